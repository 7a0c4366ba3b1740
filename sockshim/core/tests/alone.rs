//! The core needs no libc: what it leaves undefined are the functions that a compiler takes for granted.

use std::path::PathBuf;
use std::process::{Command, Output};

/// Of copies and comparisons, and of wide numbers.
const GIVEN: [&str; 6] = ["memcpy", "memmove", "memset", "memcmp", "bcmp", "__udivti3"];

fn run(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let said = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?}: {said}");
    String::from_utf8(stdout).unwrap()
}

#[test]
fn it_needs_no_libc() {
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("alone");
    let mut cargo = Command::new(env!("CARGO"));
    // A build of its own: with the settings of a release there is no code before the last link.
    run(cargo
        .args(["build", "--locked", "--lib", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .env_remove("RUSTFLAGS"));
    let library = |name: &str| -> Option<PathBuf> {
        let path = target.join("debug").join(name);
        path.exists().then_some(path)
    };
    let core = library("librdsock_core.rlib").expect("cargo has made the library");
    let symbols = run(Command::new("nm").arg("--undefined-only").arg(core));
    let names: Vec<&str> = symbols
        .lines()
        .filter_map(|line| line.trim().strip_prefix("U "))
        .collect();
    assert!(names.len() > 100, "nm shows few symbols: {names:?}");
    // Those of Rust are mangled.
    let is_rusts = |name: &str| name.starts_with("_R") || name.starts_with("_ZN");
    let needed: Vec<&str> = (names.into_iter())
        .filter(|name| !is_rusts(name) && !GIVEN.contains(name))
        .collect();
    assert!(needed.is_empty(), "the core needs {needed:?}");
}
