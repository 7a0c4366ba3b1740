//! The conformance cases (`tests/conformance`, in C), on plain Linux and under the shim.
//!
//! Plain Linux comes first: it is the oracle, and a case that fails there is itself wrong.

use std::io::Write;
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

/// Cases in which rings differ from Linux, each with its reason: see `docs/socket-semantics.md`.
const KNOWN_DIFFERENCES: &str = include_str!("../conformance/known-differences.txt");

/// Runs cases: the names of those that failed, each with what it said.
fn failures(program: Program) -> Vec<(String, String)> {
    let mut running = program.start();
    running.wait(LIMIT);
    let output = running.output();
    let closing = output.lines().last().unwrap_or("nothing");
    assert!(
        closing.contains(" ok, "),
        "no closing line, but: {closing}\n{output}"
    );
    println!("{closing}");
    output
        .lines()
        .filter_map(|line| line.strip_prefix("FAIL "))
        .filter_map(|line| line.split_once(": "))
        .map(|(name, said)| (name.to_owned(), said.to_owned()))
        .collect()
}

/// True when a busy machine explains a failure: a case says so of each expectation of time
/// (`TIMELY`). Everything else, a reset, wrong bytes or a hang before all, may be a rare race, and
/// another try would hide it.
fn is_late(said: &str) -> bool {
    said.starts_with("timing: ")
}

/// Says what must be seen of a test that passes, too: the harness keeps what `println!` prints.
fn say(line: &str) {
    // Nobody may listen.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Every case must be `ok`, skipped for want of root, or (under the shim) a known difference. One
/// that was late on a busy machine is tried again, alone, and must be right then, twice.
fn check(run: impl Fn(&str) -> Program, differences: &str) {
    let known = |name: &str| {
        differences
            .lines()
            .any(|line| line.split_whitespace().next() == Some(name))
    };
    let mut wrong = Vec::new();
    for (name, said) in failures(run("")) {
        if known(&name) {
            println!("known difference: {name}: {said}");
            continue;
        }
        if !is_late(&said) {
            wrong.push(format!("{name}: {said}"));
            continue;
        }
        say(&format!("AGAIN, twice and alone: {name}: {said}"));
        let again: Vec<_> = (0..2)
            .flat_map(|_| failures(run(&format!(" --only {name}"))))
            .map(|(_, said)| said)
            .collect();
        if again.is_empty() {
            say(&format!("AGAIN: {name}: ok both times"));
        } else {
            wrong.push(format!("{name}: {said}\n    again: {again:?}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} cases failed:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

fn plain(args: &str) {
    let site = Site::new(Mode::Neither);
    check(
        |more| site.plain(sockconf()).args(&format!("{args}{more}")),
        "",
    );
}

fn preloaded(args: &str, spin_us: Option<&str>) {
    let site = Site::new(Mode::Both);
    let run = |more: &str| {
        let program = site.client(sockconf()).args(&format!("{args}{more}"));
        match spin_us {
            Some(spin_us) => program.env("RDSOCK_SPIN_US", spin_us),
            None => program,
        }
    };
    check(run, KNOWN_DIFFERENCES);
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

/// Each receive that sleeps naps first, for as long as a case takes: whatever may end one does.
#[test]
fn b_napping_for_long() {
    let site = Site::new(Mode::Both);
    let run = |more: &str| {
        site.client(sockconf())
            .args(&format!("--need-rings{more}"))
            .env("RDSOCK_SPIN_US", "0")
            .env("RDSOCK_TEST_LIMITS", "nap_us=200000")
    };
    check(run, KNOWN_DIFFERENCES);
}

/// With rings as small as the cases allow, which take a socket buffer for granted.
#[test]
fn b_rings_with_the_lowest_limits() {
    let site = Site::with_rings(Mode::Lowest, 64 << 10);
    check(
        |more| site.client(sockconf()).args(&format!("--need-rings{more}")),
        KNOWN_DIFFERENCES,
    );
}

/// What waits and closes, with errors in place of calls that a kernel or a container's profile does not know
/// (`close_range`, `epoll_pwait2` and those between, by number).
const REFUSED: &str = "436,437,438,439,440,441,442";
const WAITING: &str = "--only epoll_level --only epoll_e* --only epoll_one* --only epoll_m* --only epoll_n* \
                       --only epoll_pwait_mask --only poll_* --only select_* --only bulk_closing_without_the_kernels_call";

fn refused(program: impl Fn(&Path) -> Program, more: &str) {
    let deny = sockconf().with_file_name("deny");
    for error in [libc::EPERM, libc::EACCES, libc::ENOSYS] {
        check(
            |_| {
                program(&deny)
                    .args(&format!("{error} {REFUSED}"))
                    .arg(sockconf())
                    .args(&format!("{more} {WAITING}"))
            },
            "",
        );
    }
}

#[test]
fn a_plain_linux_with_calls_refused() {
    let site = Site::new(Mode::Neither);
    refused(|deny| site.plain(deny), "--warm 2");
}

#[test]
fn b_rings_with_calls_refused() {
    let site = Site::new(Mode::Both);
    refused(|deny| site.client(deny), "--need-rings");
}
