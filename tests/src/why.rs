//! The answers of `rdsock why --json`.

use std::path::Path;
use std::process::Command;

use serde::Deserialize;

use crate::place;

/// All of it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Why {
    /// The daemon that was asked; none when none runs.
    pub daemon: Option<DaemonAnswer>,
    /// Programs.
    pub processes: Vec<Process>,
    /// Connections of those programs.
    pub connections: Vec<Connection>,
}

/// Which daemon answered.
#[derive(Clone, Debug, Deserialize)]
pub struct DaemonAnswer {
    /// Its control socket.
    pub socket: String,
    /// Its process.
    pub pid: u32,
}

/// A program.
#[derive(Clone, Debug, Deserialize)]
pub struct Process {
    /// Its process.
    pub pid: u32,
    /// Its name.
    pub program: String,
    /// Whether it is known to the daemon.
    pub attached: bool,
    /// If not, why not.
    pub reason: Option<String>,
}

/// One end of a TCP connection.
#[derive(Clone, Debug, Deserialize)]
pub struct Connection {
    /// The process that holds it.
    pub pid: u32,
    /// The name of that program.
    pub program: String,
    /// The descriptor.
    pub fd: i32,
    /// Its own address and port.
    pub local: String,
    /// The other end's.
    pub peer: String,
    /// The node of the other end, if that is another one.
    #[serde(default)]
    pub node: Option<u16>,
    /// Whether its bytes travel through rings.
    pub accelerated: bool,
    /// A word for where they travel.
    pub state: String,
    /// If not on rings, why not.
    pub reason: Option<String>,
    /// Bytes that it sent over rings.
    pub tx_bytes: u64,
    /// Bytes that it received over rings.
    pub rx_bytes: u64,
}

impl Connection {
    /// Whether either end is at this port.
    pub fn touches(&self, port: u16) -> bool {
        let ending = format!(":{port}");
        self.local.ends_with(&ending) || self.peer.ends_with(&ending)
    }
}

/// Asks about one process, or about all that the daemon knows.
///
/// # Panics
/// When `rdsock why` fails or its answer is not as documented.
pub fn ask(socket: &Path, pid: Option<u32>) -> Why {
    let whom = pid.map_or("--all".to_owned(), |pid| pid.to_string());
    let output = Command::new(place::binary("rdsock"))
        .args(["why", &whom, "--json"])
        .env("RDSOCK_SOCKET", socket)
        .output()
        .expect("rdsock can be run");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "rdsock why {whom} --json: {}\n{text}{errors}",
        output.status
    );
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("rdsock why: {error} in {text}"))
}
