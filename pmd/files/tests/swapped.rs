//! A directory that is swapped for another one while a socket is made in it, by whoever owns the one above.

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use rdsock_files::SocketFile;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn a_socket_is_made_in_the_directory_that_was_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("one")).unwrap();
    fs::create_dir(at("other")).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let swap = RenameFlags::RENAME_EXCHANGE;
                renameat2(AT_FDCWD, &at("one"), AT_FDCWD, &at("other"), swap).unwrap();
            }
        });
        let made: Vec<_> = (0..3000)
            .map(|_| {
                let flags = SockFlag::SOCK_CLOEXEC;
                let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None);
                let path = at("one/socket");
                // Dropped, it is removed from where it was made.
                SocketFile::bind(&socket.unwrap(), &path, Some(0o600)).map(drop)
            })
            .collect();
        over.store(true, Ordering::Relaxed);
        let wrong = made.into_iter().find_map(Result::err);
        assert!(wrong.is_none(), "{}", wrong.unwrap());
    });
    for name in ["one", "other"] {
        let left = fs::read_dir(at(name)).unwrap().count();
        assert_eq!(left, 0, "something is left in {name}");
    }
}
