//! `rdsock stat`: the live counters of daemon, tenants, streams and other nodes.

mod fabric;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use rdsock_output::{OutputError, line};
use rdsock_shm::control::question;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::cli::StatArgs;
use crate::daemon::{AskError, Daemon};
use crate::show::{bytes, table};
use fabric::Fabric;

/// Why there are no counters.
#[derive(Debug, thiserror::Error)]
pub enum StatError {
    /// The daemon does not answer.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// Nobody can be told.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// There is none.
    #[error("no daemon answers: start rdsockd, or run programs with rdsock run")]
    NoDaemon,
}

/// The daemon's answer, as far as it is shown.
#[derive(Debug, Deserialize)]
struct Stat {
    daemon: About,
    counters: Map<String, Value>,
    tenants_now: u64,
    streams_now: u64,
    waiting_now: u64,
    tenants: Vec<Tenant>,
    streams: Vec<Stream>,
    users: Vec<User>,
    fabric: Option<Fabric>,
}

#[derive(Debug, Deserialize)]
struct About {
    socket: String,
    pid: i32,
    version: String,
    uptime_seconds: u64,
    /// An older daemon does not say it.
    #[serde(default)]
    confinement: Option<Confinement>,
}

/// What the daemon has given up.
#[derive(Debug, Deserialize)]
struct Confinement {
    wanted: String,
    no_new_privs: bool,
    capabilities: Vec<String>,
    other_calls: String,
    missing: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Tenant {
    pid: i32,
    uid: u32,
    program: String,
    promoted: u64,
    demoted: u64,
    reset: u64,
    wakes: u64,
    sleeps: u64,
    bells: u64,
    #[serde(default)]
    naps: u64,
}

#[derive(Debug, Deserialize)]
struct Stream {
    stream: u64,
    local: String,
    peer: String,
    #[serde(default)]
    node: Option<u16>,
    pids: [Vec<i32>; 2],
    bytes: u64,
    huge: bool,
    directions: Option<[Direction; 2]>,
}

#[derive(Debug, Deserialize)]
struct Direction {
    switched: bool,
    head: u64,
    tail: u64,
    wakes: u32,
}

#[derive(Debug, Deserialize)]
struct User {
    uid: u32,
    streams: u64,
    bytes: u64,
}

/// Prints the counters, once or again and again.
pub fn stat(args: &StatArgs) -> Result<ExitCode, StatError> {
    loop {
        // A new connection each time: the daemon may have been started anew.
        let daemon = Daemon::find()?.ok_or(StatError::NoDaemon)?;
        if args.json {
            let answer: Value = daemon.ask(question::STAT)?;
            rdsock_output::json(answer)?;
        } else {
            let stat: Stat = daemon.ask(question::STAT)?;
            if args.watch.is_some() && std::io::stdout().is_terminal() {
                // Home, and clear what is below.
                rdsock_output::bytes(b"\x1b[H\x1b[2J")?;
            }
            print(&stat)?;
        }
        match args.watch {
            Some(seconds) => std::thread::sleep(Duration::from_secs_f64(seconds)),
            None => return Ok(ExitCode::SUCCESS),
        }
    }
}

fn print(stat: &Stat) -> Result<(), OutputError> {
    let about = &stat.daemon;
    line!(
        "daemon {} pid {} at {}, up {} s: {} programs, {} streams, {} connections waiting for their other end",
        about.version,
        about.pid,
        about.socket,
        about.uptime_seconds,
        stat.tenants_now,
        stat.streams_now,
        stat.waiting_now
    )?;
    if let Some(confinement) = &about.confinement {
        line!("{}", confined(confinement))?;
    }
    line!("{}", counts(&stat.counters))?;
    for user in &stat.users {
        line!(
            "user {}: {} streams, {} reserved",
            user.uid,
            user.streams,
            bytes(user.bytes)
        )?;
    }
    if !stat.tenants.is_empty() {
        print_tenants(&stat.tenants)?;
    }
    if !stat.streams.is_empty() {
        print_streams(&stat.streams)?;
    }
    if let Some(fabric) = &stat.fabric {
        fabric::print(fabric)?;
    }
    Ok(())
}

/// What the daemon may still do, in a line.
fn confined(confinement: &Confinement) -> String {
    let capabilities = match confinement.capabilities.as_slice() {
        [] => "no capabilities".to_owned(),
        some => some.join(" "),
    };
    let privileges = match confinement.no_new_privs {
        true => "no new privileges",
        false => "new privileges possible",
    };
    let mut line = format!(
        "confine {}: {capabilities}; {privileges}; other system calls are {}",
        confinement.wanted, confinement.other_calls
    );
    for missing in &confinement.missing {
        line += &format!("; MISSING: {missing}");
    }
    line
}

/// Counts that are not 0.
fn counts(counts: &Map<String, Value>) -> String {
    let counts: Vec<String> = counts
        .iter()
        .filter(|(_, value)| value.as_u64() != Some(0))
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    counts.join(", ")
}

fn print_tenants(tenants: &[Tenant]) -> Result<(), OutputError> {
    let mut table = table([
        "PID", "USER", "PROGRAM", "PROMOTED", "DEMOTED", "RESET", "WAKES", "SLEEPS", "BELLS",
        "NAPS",
    ]);
    for tenant in tenants {
        table.add_row([
            tenant.pid.to_string(),
            tenant.uid.to_string(),
            tenant.program.clone(),
            tenant.promoted.to_string(),
            tenant.demoted.to_string(),
            tenant.reset.to_string(),
            tenant.wakes.to_string(),
            tenant.sleeps.to_string(),
            tenant.bells.to_string(),
            tenant.naps.to_string(),
        ]);
    }
    line!("\n{table}")
}

fn print_streams(streams: &[Stream]) -> Result<(), OutputError> {
    let mut table = table([
        "STREAM", "FROM", "TO", "PIDS", "SENT", "RECEIVED", "WAKES", "MEMORY",
    ]);
    for stream in streams {
        let names = stream.pids.each_ref().map(|pids| {
            let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
            pids.join(",")
        });
        // As the end that connected sees it; not yet on its ring is shown as a dash.
        let position = |end: usize, of: fn(&Direction) -> u64| {
            let direction = stream.directions.as_ref().and_then(|both| both.get(end));
            match direction {
                Some(direction) if direction.switched => bytes(of(direction)),
                _ => "-".into(),
            }
        };
        let wakes = stream
            .directions
            .iter()
            .flatten()
            .map(|direction| u64::from(direction.wakes));
        let pages = if stream.huge { " huge" } else { "" };
        table.add_row([
            stream.stream.to_string(),
            stream.local.clone(),
            match stream.node {
                Some(node) => format!("{}, other end on node {node}", stream.peer),
                None => stream.peer.clone(),
            },
            names.join(" / "),
            position(0, |direction| direction.head),
            position(1, |direction| direction.tail),
            wakes.sum::<u64>().to_string(),
            format!("{}{pages}", bytes(stream.bytes)),
        ]);
    }
    line!("\n{table}")
}
