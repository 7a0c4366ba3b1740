//! How long a promotion takes: alone, beside programs that only keep the processors busy, and while ten hostile tenants
//! of three other users do all that they can to the daemon at once.
//!
//!     cargo bench -p rdsockd --bench promotion [-- alone busy attacked]
//!
//! `RDSOCKD=path` measures another daemon. `RDSOCKD_TEST_LOG=1` shows the daemon's log. It needs root for other users.

mod honest;
mod hostile;
#[path = "../../tests/tenant/mod.rs"]
mod tenant;

use std::process::{Command, Stdio};

use honest::{Honest, Times};
use serde_json::Value;
use tenant::Daemon;
use tenant::actor::{Part, is_root};
use tenant::silent::be_file_system;

/// Promotions that are measured without and beside others.
const ALONE: usize = 1000;
const BESIDE: usize = 200;

fn main() {
    if honest::be_honest() {
        return;
    }
    if let Some(part) = Part::of_this() {
        return play(&part);
    }
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let wanted = |mode: &str| words.is_empty() || words.iter().any(|word| word == mode);
    let alone = wanted("alone").then(alone);
    for mode in ["busy", "attacked"] {
        if wanted(mode) && is_root() {
            beside(mode, alone.as_ref());
        }
    }
}

fn play(part: &Part) {
    match part.name.as_str() {
        "hostile" => hostile::be_hostile(part),
        "busy" => hostile::be_busy(),
        "replaced" => hostile::be_replaced(part),
        "file system" => be_file_system(part),
        other => panic!("no such part: {other}"),
    }
}

/// A daemon as it is by default.
fn daemon() -> Daemon {
    Daemon::start_with("", |command| {
        if let Some(path) = std::env::var_os("RDSOCKD") {
            let mut other = Command::new(path);
            other.args(command.get_args());
            other.stdin(Stdio::null()).stdout(Stdio::null());
            if std::env::var_os("RDSOCKD_TEST_LOG").is_none() {
                other.stderr(Stdio::null());
            }
            *command = other;
        }
        honest::end_with_us(command);
    })
}

fn alone() -> Times {
    let daemon = daemon();
    let times = Honest::start(&daemon.socket()).measure(ALONE);
    honest::print("alone", &times);
    print_turns(&daemon.stat());
    times
}

fn beside(mode: &str, alone: Option<&Times>) {
    let daemon = daemon();
    // Before there is a file that no program can close which inherits it.
    let mut program = Honest::start(&daemon.socket());
    let (memory, before) = (daemon.peak_megabytes(), daemon.stat());
    let part = if mode == "busy" { "busy" } else { "hostile" };
    let attack = hostile::start(part, &daemon.socket());
    let times = program.measure(BESIDE);
    drop(attack);
    honest::print(mode, &times);
    if let Some(alone) = alone {
        let median = |times: &Times| times.took.value_at_quantile(0.5) as f64;
        println!("  {:.2} × alone", median(&times) / median(alone));
    }
    let after = daemon.stat();
    print_turns(&after);
    let peak = daemon.peak_megabytes();
    println!("  memory of the daemon: {peak} MB at most, {memory} MB before");
    print_done(&before, &after);
}

fn print_turns(stat: &Value) {
    let counters = &stat["counters"];
    println!(
        "  longest turn of the control thread: {} µs, {} µs of processor time; over 50 ms: {}",
        counters["longest_turn_us"], counters["longest_turn_cpu_us"], counters["long_turns"]
    );
}

/// What the daemon was asked for meanwhile, so that it shows whether anything was done to it.
fn print_done(before: &Value, after: &Value) {
    let counters = after["counters"].as_object().unwrap();
    let grown = counters.iter().filter_map(|(name, value)| {
        let grown = value.as_u64()? - before["counters"][name].as_u64()?;
        (grown != 0 && !name.starts_with("longest")).then(|| format!("{name} {grown}"))
    });
    println!(
        "  counted meanwhile: {}",
        grown.collect::<Vec<_>>().join(", ")
    );
}
