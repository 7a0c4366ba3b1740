//! The kernel module's policy, tried in user space, and its size. What needs a kernel is in `tests/vm`.

use std::path::Path;
use std::process::Command;

use rdsock_tests::place;

/// Its sources, without the test.
const SOURCES: [&str; 4] = ["main.c", "policy.h", "compat.h", "rde.h"];

/// Lines that it may have, with comments and blank ones: a person must be able to read it in one sitting.
const LIMIT: usize = 500;

fn folder() -> std::path::PathBuf {
    place::tests_folder().join("../kmod-minimal")
}

#[test]
fn its_policy_refuses_what_it_should() {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("policy_test");
    let output = Command::new("make")
        .args(["-s", "-C"])
        .arg(folder())
        .arg("test")
        .arg(format!("OUT={}", out.display()))
        .output()
        .expect("make is installed: see tests/setup.sh");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("policy: ok"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn it_stays_small() {
    let lines: usize = SOURCES
        .map(|source| std::fs::read_to_string(folder().join(source)).unwrap())
        .map(|text| text.lines().count())
        .iter()
        .sum();
    assert!((300..LIMIT).contains(&lines), "{lines} lines");
}
