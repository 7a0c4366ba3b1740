//! Sockets for users: whose they are, and what becomes of what lies there.

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::geteuid;
use rdsock_files::{Obstacle, UserSockets};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

fn new_socket() -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<String> = entries
        .map(|entry| name(entry).into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn each_user_is_given_a_socket_and_what_is_left_is_replaced() {
    if !geteuid().is_root() {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root gives sockets to users");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("users");
    let sockets = UserSockets::make(&path).unwrap();
    for user in [0, 64001] {
        sockets.bind(&new_socket(), user).unwrap();
        let made = fs::symlink_metadata(path.join(user.to_string())).unwrap();
        assert!(made.file_type().is_socket());
        assert_eq!((made.uid(), made.mode() & 0o777), (user, 0o600));
    }
    assert!(matches!(
        sockets.bind(&new_socket(), 64001),
        Err(Obstacle::Io { .. })
    ));
    // As after a process that was killed, beside something that is not ours to remove.
    std::mem::forget(sockets);
    fs::write(path.join("64002"), "precious").unwrap();
    chown(path.join("64002"), Some(64002), None).unwrap();
    let sockets = UserSockets::make(&path).unwrap();
    assert_eq!(names(&path), ["64002"]);
    assert!(sockets.bind(&new_socket(), 64002).is_err());
    sockets.bind(&new_socket(), 64001).unwrap();
    drop(sockets);
    assert_eq!(names(&path), ["64002"]);
    assert_eq!(fs::read(path.join("64002")).unwrap(), b"precious");
    fs::remove_file(path.join("64002")).unwrap();
    drop(UserSockets::make(&path).unwrap());
    assert!(!path.exists());
}

#[test]
fn a_directory_that_others_can_write_to_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("users");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(
        UserSockets::make(&path),
        Err(Obstacle::Directory(_))
    ));
}
