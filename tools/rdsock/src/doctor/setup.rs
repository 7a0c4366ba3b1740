//! What of rdsock itself is there.

use std::path::Path;

use rdsock_shm::control::question;
use serde_json::Value;

use super::{Finding, Health};
use crate::daemon::{self, Daemon};
use crate::run::find_library;

/// All of it.
pub fn look() -> Vec<Finding> {
    vec![library(), program(), daemon()]
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

/// Where the daemon at this socket logs.
fn log_of(socket: &Path) -> String {
    let log = socket.with_file_name("rdsockd.log");
    match log.is_file() {
        true => log.display().to_string(),
        false => "journalctl -u rdsockd".into(),
    }
}
