//! The conformance cases (`tests/conformance`, in C), on plain Linux and under the shim.
//!
//! Plain Linux comes first: it is the oracle, and a case that fails there is itself wrong.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use rdsock_tests::{Mode, Program, Site, place};

const LIMIT: Duration = Duration::from_secs(900);

/// The built program.
fn sockconf() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance");
        let output = Command::new("make")
            .arg("-C")
            .arg(place::tests_folder().join("conformance"))
            .arg(format!("OUT={}", out.display()))
            .output()
            .expect("make is installed: see tests/setup.sh");
        assert!(
            output.status.success(),
            "sockconf does not build (see tests/setup.sh for what it needs):\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        out.join("sockconf")
    })
}

/// Runs all cases; every one must be `ok` or skipped for want of root.
fn check(program: Program) {
    let mut running = program.start();
    let status = running.wait(LIMIT);
    let output = running.output();
    let failures: Vec<&str> = output
        .lines()
        .filter(|line| line.starts_with("FAIL "))
        .collect();
    let closing = output.lines().last().unwrap_or("nothing");
    assert!(
        failures.is_empty(),
        "{} cases failed:\n{}\n{closing}",
        failures.len(),
        failures.join("\n")
    );
    assert!(status.success(), "sockconf ended with {status}: {closing}");
    assert!(closing.contains(" 0 failed"), "no closing line: {closing}");
    println!("{closing}");
}

fn plain(args: &str) {
    let site = Site::new(Mode::Neither);
    check(site.plain(sockconf()).args(args));
}

fn preloaded(args: &str, spin_us: Option<&str>) {
    let site = Site::new(Mode::Both);
    let mut program = site.client(sockconf()).args(args);
    if let Some(spin_us) = spin_us {
        program = program.env("RDSOCK_SPIN_US", spin_us);
    }
    check(program);
}

#[test]
fn a_plain_linux() {
    plain("--warm 2");
}

#[test]
fn a_plain_linux_with_threads_and_roles_exchanged() {
    plain("--warm 0 --swap --peer thread");
}

#[test]
fn b_rings_from_the_start() {
    preloaded("--need-rings", None);
}

#[test]
fn b_rings_with_roles_exchanged() {
    preloaded("--need-rings --swap", None);
}

#[test]
fn b_promoted_in_the_middle() {
    preloaded("--warm 0", None);
}

#[test]
fn b_promoted_in_the_middle_with_roles_exchanged() {
    preloaded("--warm 0 --swap", None);
}

#[test]
fn b_both_ends_in_one_process() {
    preloaded("--need-rings --peer thread", None);
}

#[test]
fn b_never_spinning() {
    preloaded("--need-rings", Some("0"));
}

#[test]
fn b_spinning_for_long() {
    preloaded("--need-rings --swap", Some("2000"));
}
