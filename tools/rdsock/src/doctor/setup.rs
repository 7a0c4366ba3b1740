//! What of rdsock itself is there.

use std::path::Path;

use rdsock_shm::control::question;
use serde_json::Value;

use super::{Finding, Health};
use crate::daemon::{self, Daemon};
use crate::run::find_library;

/// All of it.
pub fn look() -> Vec<Finding> {
    let mut findings = vec![library(), program(), daemon()];
    findings.extend(confinement());
    findings
}

fn library() -> Finding {
    let what = "shim";
    match find_library() {
        Some(path) => Finding::good(what, path.display().to_string()),
        None => Finding::new(
            what,
            Health::Bad,
            "librdsock.so was not found",
            "run make, or make install, or set RDSOCK_LIB to its path",
        ),
    }
}

fn program() -> Finding {
    let what = "daemon program";
    match daemon::find_program() {
        Some(path) => Finding::good(what, path.display().to_string()),
        None => Finding::new(
            what,
            Health::Weak,
            "rdsockd is neither beside rdsock nor in $PATH",
            "rdsock run can't start a daemon by itself: run make, or make install",
        ),
    }
}

fn daemon() -> Finding {
    let what = "daemon";
    let found = match Daemon::find() {
        Ok(found) => found,
        Err(error) => {
            let advice = "programs stay on the kernel until it answers";
            return Finding::new(what, Health::Bad, error.to_string(), advice);
        }
    };
    let Some(daemon) = found else {
        let advice =
            "rdsock run starts one for you; for the whole machine: systemctl enable --now rdsockd";
        let health = if daemon::find_program().is_some() {
            Health::Weak
        } else {
            Health::Bad
        };
        return Finding::new(what, health, "none runs", advice);
    };
    match daemon.ask::<Value>(question::STAT) {
        Ok(stat) => {
            let text = |key: &str| stat.pointer(key).map(Value::to_string).unwrap_or_default();
            let version = text("/daemon/version");
            let found = format!(
                "version {} pid {} at {}, {} programs, {} streams",
                version.trim_matches('"'),
                text("/daemon/pid"),
                daemon.path.display(),
                text("/tenants_now"),
                text("/streams_now"),
            );
            if version.trim_matches('"') == env!("CARGO_PKG_VERSION") {
                return Finding::good(what, found);
            }
            let advice = "it is of another version than this tool: restart it";
            Finding::new(what, Health::Weak, found, advice)
        }
        Err(error) => Finding::new(
            what,
            Health::Bad,
            error.to_string(),
            &format!("see its log, and restart it ({})", log_of(&daemon.path)),
        ),
    }
}

/// What the daemon has given up. `None` where none runs, or one that does not say it.
fn confinement() -> Option<Finding> {
    let what = "confinement";
    let daemon = Daemon::find().ok()??;
    let stat: Value = daemon.ask(question::STAT).ok()?;
    let confinement = stat.pointer("/daemon/confinement")?;
    let list = |key: &str, between: &str| {
        let texts = confinement.get(key).and_then(Value::as_array);
        let texts = texts.into_iter().flatten().filter_map(Value::as_str);
        texts.collect::<Vec<_>>().join(between)
    };
    let calls = confinement.get("other_calls").and_then(Value::as_str)?;
    let capabilities = match list("capabilities", " ") {
        none if none.is_empty() => "no capabilities".to_owned(),
        some => some,
    };
    let found = format!("{capabilities}; system calls that it does not make are {calls}");
    let missing = list("missing", "; ");
    Some(match (calls, missing.is_empty()) {
        ("refused", true) => Finding::good(what, found),
        (_, true) => {
            let advice = "set confine = \"on\" in its configuration, and restart it";
            Finding::new(what, Health::Weak, found, advice)
        }
        (_, false) => {
            let advice = "the kernel does not grant it: see docs/configuration.md";
            Finding::new(what, Health::Weak, format!("{found}; {missing}"), advice)
        }
    })
}

/// Where the daemon at this socket logs.
fn log_of(socket: &Path) -> String {
    let log = socket.with_file_name("rdsockd.log");
    match log.is_file() {
        true => log.display().to_string(),
        false => "journalctl -u rdsockd".into(),
    }
}
