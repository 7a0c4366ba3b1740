//! Where things are: the binaries under test, this crate, free ports.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};

/// The workspace's folder `tests/`.
pub fn tests_folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// One of the built binaries: from `$RDSOCK_BIN_DIR`, else `target/release` of the workspace.
///
/// # Panics
/// When it is absent: a test that runs without the thing under test would say nothing.
pub fn binary(name: &str) -> PathBuf {
    let folder = match std::env::var_os("RDSOCK_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => tests_folder().join("../target/release"),
    };
    let path = folder.join(name);
    assert!(
        path.is_file() && folder.join("librdsock.so").is_file(),
        "{} or librdsock.so beside it is missing: run `make` in the workspace's root first \
         (or set RDSOCK_BIN_DIR to the folder that has the binaries)",
        path.display()
    );
    path
}

/// The first of these commands that is installed.
///
/// # Panics
/// When none is.
pub fn command(names: &[&str]) -> PathBuf {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    path.split(':')
        .flat_map(|folder| names.iter().map(move |name| Path::new(folder).join(name)))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| panic!("{names:?} is not installed: run tests/setup.sh first"))
}

/// A TCP port that nobody listens on, outside the range that the kernel gives to clients.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let base = 12_000 + (std::process::id() % 180) as u16 * 100;
    for _ in 0..2_000 {
        let port = base + NEXT.fetch_add(1, Ordering::Relaxed) % 2_000;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    panic!("no free port above {base}");
}

/// Whether the tests run as root: some checks need it and are left out, saying so, without.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
