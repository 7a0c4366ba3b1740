//! The way to a directory: what is followed, what is made, and what is refused.

use rdsock_files::{Obstacle, check, make_directory, open_directory, open_lock, open_log};
use std::fs;
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// Opened, it is the directory that the kernel finds by this path.
fn leads_as_ever(path: &Path) {
    let opened = open_directory(path, 0o700).unwrap();
    let found = nix::sys::stat::fstat(&opened).unwrap();
    assert_eq!(found.st_ino, inode(path), "{}", path.display());
}

#[test]
fn own_links_lead_where_they_always_did() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("a/b/c")).unwrap();
    symlink("a/b", at("relative")).unwrap();
    symlink(at("a"), at("absolute")).unwrap();
    symlink("../relative/c/..", at("a/chain")).unwrap();
    for name in [
        "",
        "a",
        "a//b/",
        "./a/./b",
        "a/b/../b",
        "relative/c",
        "relative/..",
        "absolute/b",
        "a/chain/c",
        "absolute/chain",
        "absolute/",
    ] {
        leads_as_ever(&at(name));
    }
    leads_as_ever(Path::new("/"));
    leads_as_ever(Path::new("."));
    leads_as_ever(Path::new(".."));
    leads_as_ever(Path::new("/proc/self/../self/task"));
    // What is missing is made there.
    open_directory(&at("relative/new/deep"), 0o700).unwrap();
    assert!(at("a/b/new/deep").is_dir());
    symlink("loop", at("loop")).unwrap();
    fs::write(at("file"), "").unwrap();
    for (name, expected) in [("loop/x", libc::ELOOP), ("file/x", libc::ENOTDIR)] {
        match open_directory(&at(name), 0o700).unwrap_err() {
            Obstacle::Io { source, .. } => assert_eq!(source.raw_os_error(), Some(expected)),
            other => panic!("{name}: {other}"),
        }
    }
}

#[test]
fn nothing_is_done_behind_the_link_of_another_user() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("target/sub")).unwrap();
    symlink(at("target"), at("link")).unwrap();
    if std::os::unix::fs::lchown(at("link"), Some(64001), None).is_err() {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root can make another user's link");
    }
    // By way of a link of one's own, too.
    symlink("link/sub", at("own")).unwrap();
    let foreign = |done: Result<(), Obstacle>| match done {
        Err(Obstacle::Foreign { path, owner }) => {
            assert_eq!((path, owner), (at("link"), 64001));
        }
        other => panic!("{other:?}"),
    };
    for way in ["link/sub", "own", "link/new"] {
        foreign(open_directory(&at(way), 0o700).map(drop));
        foreign(open_lock(&at(way).join("file")).map(drop));
        foreign(open_log(&at(way).join("file")).map(drop));
        foreign(check(&at(way).join("file")));
    }
    foreign(make_directory(&at("link/sub"), 0o700).map(drop));
    assert_eq!(fs::read_dir(at("target/sub")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(at("target")).unwrap().count(), 1);
}

#[test]
fn a_log_is_appended_to_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    for line in ["one\n", "two\n"] {
        let mut log = open_log(&path).unwrap();
        log.write_all(line.as_bytes()).unwrap();
        log.rewind().unwrap();
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap();
        assert!(text.ends_with(line));
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    let missing = open_lock(&dir.path().join("no/lock")).unwrap_err();
    match missing {
        Obstacle::Io { source, .. } => assert_eq!(source.kind(), ErrorKind::NotFound),
        other => panic!("{other}"),
    }
}
