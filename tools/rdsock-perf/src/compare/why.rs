//! Asks `rdsock why` whether a run is really accelerated. Without its yes there is no figure.

use super::child::Child;
use super::ground::SOCKET;
use crate::error::{Error, Result};
use serde::Deserialize;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Longest time for one call of `rdsock why`.
const LIMIT: Duration = Duration::from_secs(10);
/// How long a connection may take to be promoted while messages go to and fro.
const PROMOTION: Duration = Duration::from_secs(5);
/// Time between two questions.
const PAUSE: Duration = Duration::from_millis(50);

/// The answer of `rdsock why PID --json`, as far as it is used here.
#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(default)]
    processes: Vec<Process>,
    #[serde(default)]
    connections: Vec<Connection>,
}

#[derive(Debug, Deserialize)]
struct Process {
    pid: u32,
    attached: bool,
    #[serde(default)]
    reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Connection {
    pid: u32,
    local: String,
    peer: String,
    accelerated: bool,
    /// The other end's node, where that is another one.
    #[serde(default)]
    node: Option<u16>,
    #[serde(default)]
    reason: Option<String>,
    #[serde(default)]
    tx_bytes: u64,
    #[serde(default)]
    rx_bytes: u64,
}

/// One end of the connection that is measured.
#[derive(Debug, Clone)]
pub struct End {
    /// "server" or "client".
    pub name: &'static str,
    /// The socket of its node's daemon, where the two ends are on two nodes.
    pub daemon: Option<PathBuf>,
    /// The process that holds it.
    pub pid: u32,
    /// Its own address.
    pub local: String,
    /// The other end's address.
    pub peer: String,
}

/// What must be true of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// The connection is on rings at both ends.
    OnRings,
    /// Both processes are attached to the daemon: short connections are never promoted, by design.
    Attached,
}

/// Waits until the demand is met at both ends: the bytes that each has moved over rings so far.
pub fn wait_until(rdsock: &Path, ends: &[End; 2], demand: Demand) -> Result<[u64; 2]> {
    let deadline = Instant::now() + PROMOTION;
    loop {
        match check(rdsock, ends, demand) {
            Err(Error::NotAccelerated(_)) if Instant::now() < deadline => std::thread::sleep(PAUSE),
            verdict => return verdict,
        }
    }
}

/// Checks once more after a run: the demand is still met, and each end moved at least `payload` bytes over rings
/// since `before`.
pub fn check_after(
    rdsock: &Path,
    ends: &[End; 2],
    demand: Demand,
    before: [u64; 2],
    payload: u64,
) -> Result<()> {
    let after = check(rdsock, ends, demand)?;
    for ((end, before), after) in ends.iter().zip(before).zip(after) {
        let moved = after.saturating_sub(before);
        if demand == Demand::OnRings && moved < payload.max(1) {
            return Err(Error::NotAccelerated(format!(
                "the {} (pid {}) has a connection on rings, but only {moved} of {payload} bytes went over them \
                 during the run",
                end.name, end.pid
            )));
        }
    }
    Ok(())
}

/// Asks about both ends.
fn check(rdsock: &Path, ends: &[End; 2], demand: Demand) -> Result<[u64; 2]> {
    let mut moved = [0; 2];
    for (end, moved) in ends.iter().zip(&mut moved) {
        let verdict = ask(rdsock, end)?.and_then(|answer| match demand {
            Demand::OnRings => on_rings(&answer, end),
            Demand::Attached => attached(&answer, end),
        });
        *moved = verdict.map_err(|reason| {
            Error::NotAccelerated(format!("the {} (pid {}): {reason}", end.name, end.pid))
        })?;
    }
    Ok(moved)
}

/// The answer of `rdsock why`, or in what way it did not answer.
fn ask(rdsock: &Path, end: &End) -> Result<std::result::Result<Answer, String>> {
    let mut command = Command::new(rdsock);
    command.args(["why", &end.pid.to_string(), "--json"]);
    if let Some(socket) = &end.daemon {
        command.env(SOCKET, socket);
    }
    let (good, text) = Child::start("rdsock why", command)?.output(LIMIT)?;
    Ok(if good {
        serde_json::from_str(&text)
            .map_err(|error| format!("rdsock why gave no usable answer ({error}): {text}"))
    } else {
        Err(format!("rdsock why failed: {}", text.trim()))
    })
}

/// Whether the end's connection is on rings: the bytes moved over them, or why not.
fn on_rings(answer: &Answer, end: &End) -> std::result::Result<u64, String> {
    let connection = answer.connections.iter().find(|connection| {
        connection.pid == end.pid
            && same(&connection.local, &end.local)
            && same(&connection.peer, &end.peer)
    });
    match connection {
        None => Err(match attached(answer, end) {
            Ok(_) => format!(
                "rdsock why lists no connection from {} to {}",
                end.local, end.peer
            ),
            Err(reason) => reason,
        }),
        Some(found) if found.accelerated && found.node.is_some() != end.daemon.is_some() => {
            Err(match found.node {
                Some(node) => format!("its other end is on another node ({node})"),
                None => "its other end is on the same node".into(),
            })
        }
        Some(found) if found.accelerated => Ok(found.tx_bytes + found.rx_bytes),
        Some(found) => Err(found
            .reason
            .clone()
            .unwrap_or("not on rings, and rdsock why gives no reason".into())),
    }
}

/// Whether the end's process is attached to the daemon; 0, or why not.
fn attached(answer: &Answer, end: &End) -> std::result::Result<u64, String> {
    match answer
        .processes
        .iter()
        .find(|process| process.pid == end.pid)
    {
        Some(found) if found.attached => Ok(0),
        Some(found) => Err(found
            .reason
            .clone()
            .unwrap_or("not attached, and rdsock why gives no reason".into())),
        None => Err("rdsock why does not list the process".into()),
    }
}

/// Whether two texts name the same address; an IPv4 address may be written as IPv6.
fn same(left: &str, right: &str) -> bool {
    let plain = |text: &str| {
        let address: SocketAddr = text.parse().ok()?;
        let ip = match address.ip() {
            IpAddr::V6(v6) => v6.to_canonical(),
            v4 => v4,
        };
        Some((ip, address.port()))
    };
    left == right || plain(left).is_some_and(|left| Some(left) == plain(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end() -> End {
        End {
            name: "client",
            daemon: None,
            pid: 7,
            local: "127.0.0.1:50000".into(),
            peer: "127.0.0.1:6379".into(),
        }
    }

    fn answer(text: &str) -> Answer {
        serde_json::from_str(text).unwrap()
    }

    const ON_RINGS: &str = r#"{"daemon":{"socket":"s","pid":1},
        "processes":[{"pid":7,"program":"p","attached":true,"reason":null}],
        "connections":[{"pid":7,"program":"p","fd":3,"local":"127.0.0.1:50000","peer":"127.0.0.1:6379",
        "accelerated":true,"state":"rings","reason":null,"tx_bytes":10,"rx_bytes":5}]}"#;

    #[test]
    fn a_connection_on_rings_is_found() {
        assert_eq!(on_rings(&answer(ON_RINGS), &end()), Ok(15));
        let mapped = ON_RINGS.replace("127.0.0.1:50000", "[::ffff:127.0.0.1]:50000");
        assert_eq!(on_rings(&answer(&mapped), &end()), Ok(15));
    }

    #[test]
    fn the_reason_is_handed_on() {
        let text = ON_RINGS.replace("\"accelerated\":true", "\"accelerated\":false");
        let text = text.replace(
            "\"reason\":null,\"tx",
            "\"reason\":\"peer not preloaded\",\"tx",
        );
        assert_eq!(
            on_rings(&answer(&text), &end()),
            Err("peer not preloaded".into())
        );
    }

    #[test]
    fn another_node_is_told_from_this_one() {
        let between = ON_RINGS.replace("\"accelerated\":true", "\"accelerated\":true,\"node\":2");
        let far = End {
            daemon: Some("/somewhere".into()),
            ..end()
        };
        assert_eq!(on_rings(&answer(&between), &far), Ok(15));
        assert!(on_rings(&answer(&between), &end()).is_err());
        assert!(on_rings(&answer(ON_RINGS), &far).is_err());
    }

    #[test]
    fn another_connection_or_process_does_not_count() {
        assert!(on_rings(&answer(ON_RINGS), &End { pid: 8, ..end() }).is_err());
        assert!(
            on_rings(
                &answer(ON_RINGS),
                &End {
                    local: "127.0.0.1:50001".into(),
                    ..end()
                }
            )
            .is_err()
        );
        assert!(
            on_rings(
                &answer(ON_RINGS),
                &End {
                    peer: "127.0.0.1:6380".into(),
                    ..end()
                }
            )
            .is_err()
        );
        assert!(on_rings(&answer(r#"{"daemon":null}"#), &end()).is_err());
    }

    #[test]
    fn attached_is_told_from_not_attached() {
        assert_eq!(attached(&answer(ON_RINGS), &end()), Ok(0));
        let not = r#"{"daemon":null,"processes":[{"pid":7,"attached":false,"reason":"no daemon"}],"connections":[]}"#;
        assert_eq!(attached(&answer(not), &end()), Err("no daemon".into()));
        assert!(
            on_rings(&answer(not), &end())
                .unwrap_err()
                .contains("no daemon")
        );
    }
}
