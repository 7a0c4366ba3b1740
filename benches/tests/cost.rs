//! Counted costs: instructions, which do not depend on the machine's load. Skipped where valgrind
//! is missing; loudly, since nothing is checked then.

use std::path::PathBuf;
use std::process::Command;

/// Instructions for sending 64 bytes through a bare ring and receiving them.
const BARE: u64 = 230;
/// Instructions for the same through both ends as they ship, under their locks, as in a program with threads. What the shim
/// adds to that is counted by `tests/tests/cost.rs`.
const ENDS: u64 = 485;

fn has_valgrind() -> bool {
    Command::new("valgrind")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
}

/// Builds the example with optimisation, whatever this test is built with.
fn build() -> PathBuf {
    let target = std::env::current_exe()
        .expect("this test's path")
        .ancestors()
        .nth(3)
        .expect("target/profile/deps/test")
        .to_owned();
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| env!("CARGO").into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--example", "ring_cost"])
        .args(["--package", "rdsock-benches", "--target-dir"])
        .arg(&target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("cargo runs");
    assert!(status.success(), "the example does not build");
    target.join("release/examples/ring_cost")
}

/// Instructions of one round: the difference between many rounds and a few.
fn instructions(program: &PathBuf, how: &str) -> u64 {
    let collected = |rounds: u64| -> u64 {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(program)
            .args([how, &rounds.to_string()])
            .output()
            .expect("valgrind runs");
        let report = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{report}");
        report
            .lines()
            .find_map(|line| line.split("Collected :").nth(1)?.trim().parse().ok())
            .unwrap_or_else(|| panic!("callgrind counts nothing: {report}"))
    };
    (collected(11_000) - collected(1_000)) / 10_000
}

#[test]
fn a_small_message_costs_few_instructions() {
    if !has_valgrind() {
        println!("SKIPPED, NOTHING WAS CHECKED: valgrind is not installed");
        eprintln!("SKIPPED, NOTHING WAS CHECKED: valgrind is not installed");
        return;
    }
    let program = build();
    for (how, most) in [("bare", BARE), ("ends", ENDS)] {
        let cost = instructions(&program, how);
        println!("{how}: {cost} instructions for 64 bytes sent and received, at most {most}");
        assert!(cost <= most, "{how}: {cost} instructions, more than {most}");
    }
}
