use super::*;
use nix::sys::signal::{SigHandler, Signal};
use std::net::TcpListener;
use std::os::fd::AsRawFd;

/// This process.
fn own() -> Peer {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    let kind = SockType::SeqPacket;
    let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
    Peer::of(&pair.unwrap().0).unwrap()
}

#[test]
fn a_process_is_who_it_was() {
    let own = own();
    let before = own.identity().unwrap();
    assert_eq!(own.identity().unwrap(), before);
    assert_eq!(before.users[1], nix::unistd::geteuid().as_raw());
    assert_eq!(before.groups[1], nix::unistd::getegid().as_raw());
    assert_eq!(own.glance().unwrap(), before.glance);
    assert_eq!(own.identity_since(&before).unwrap(), before);
    // What newer kernels tell is the same.
    if let Some(ids) = ids(&own.pidfd) {
        assert_eq!(ids, [before.users, before.groups]);
    } else {
        println!("SKIPPED, NOTHING WAS CHECKED: this kernel does not tell a pidfd's ids");
    }
    assert_eq!(capabilities(own.pid), Some(before.capabilities));
    if let Some(credentials) = own.credentials() {
        let expected = Credentials {
            users: before.users,
            groups: before.groups,
            capabilities: before.capabilities,
        };
        assert_eq!(credentials, expected);
    }
    assert_eq!(own.netns().unwrap(), netns_inode(own.pid).unwrap());
    let executable = std::env::current_exe().unwrap();
    assert_eq!(before.glance.executable, executable.as_os_str());
    let file = FileId::of(&File::open(executable).unwrap()).unwrap();
    let address = own.maps(file).unwrap().unwrap();
    assert!(own.still_maps(file, address).unwrap());
    assert_eq!(own.maps_at(file, address).unwrap(), Some(address));
    assert!(!own.still_maps(file, 4096).unwrap());
    let other = FileId {
        inode: file.inode + 1,
        ..file
    };
    assert!(!own.still_maps(other, address).unwrap());
    assert_eq!(own.maps(other).unwrap(), None);
    assert_eq!(own.maps_at(other, address).unwrap(), None);
}

#[test]
fn a_process_does_not_end_because_a_signal_comes() {
    extern "C" fn nothing(_: i32) {}
    let action = nix::sys::signal::SigAction::new(
        SigHandler::Handler(nothing),
        nix::sys::signal::SaFlags::empty(),
        nix::sys::signal::SigSet::empty(),
    );
    // SAFETY: the handler does nothing.
    unsafe { nix::sys::signal::sigaction(Signal::SIGURG, &action) }.unwrap();
    let (own, thread) = (own(), nix::unistd::gettid().as_raw());
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let signals = scope.spawn({
            let done = &done;
            move || {
                let mut sent = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    // SAFETY: a signal to a thread of this process that outlives this one.
                    unsafe {
                        libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGURG)
                    };
                    sent += 1;
                }
                sent
            }
        });
        let alive = (0..200_000).all(|_| own.is_alive());
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(signals.join().unwrap() > 0);
        assert!(alive);
    });
}

#[test]
fn a_line_of_the_maps_is_understood() {
    let line = b"7f0000001000-7f0000201000 rw-s 00000000 00:01 4711    /memfd:a b (deleted)";
    let id = FileId {
        device: (0, 1),
        inode: 4711,
    };
    assert_eq!(parse_mapping(line), Some((0x7f00_0000_1000, id)));
    assert_eq!(parse_mapping(b""), None);
    assert_eq!(parse_mapping(b"7f-8f rw-s 0 nonsense"), None);
}

#[test]
fn a_process_that_executes_is_another_one() {
    let _alone = crate::own::alone();
    // The child waits for a byte before it runs another program, and for another before it ends.
    let mut child = std::process::Command::new("sh")
        .args(["-c", "read a; exec cat"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id() as i32;
    let peer = Peer {
        pid,
        uid: 0,
        gid: 0,
        pidfd: pidfd_open(pid).unwrap(),
        folder: OnceLock::new(),
    };
    while peer.glance().unwrap().executable == own().glance().unwrap().executable {
        std::thread::yield_now();
    }
    let glance = peer.glance().unwrap();
    let shell = FileId::of(&File::open(&glance.executable).unwrap()).unwrap();
    // The name of the program changes a little before its mappings are there.
    let address = loop {
        if let Some(address) = peer.maps(shell).unwrap() {
            break address;
        }
    };
    use std::io::Write;
    child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    while peer.still_maps(shell, address).unwrap() {
        std::thread::yield_now();
    }
    assert_ne!(peer.glance().unwrap().executable, glance.executable);
    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(!peer.is_alive() && peer.glance().is_err());
}

#[test]
fn sockets_are_found_by_their_inode() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = own();
    let inode = own.socket_inode(listener.as_raw_fd()).unwrap();
    assert_eq!(inode, nix::sys::stat::fstat(&listener).unwrap().st_ino);
    assert_eq!(own.socket_inode(0x7fff_0000), None);
    let duplicate = own.duplicate(listener.as_raw_fd()).unwrap();
    let duplicate = TcpListener::from(duplicate);
    assert_eq!(
        duplicate.local_addr().unwrap(),
        listener.local_addr().unwrap()
    );
    assert!(own.duplicate(0x7fff_0000).is_err());
}

#[test]
fn only_sockets_have_socket_inodes() {
    assert_eq!(parse_socket("socket:[123]"), Some(123));
    assert_eq!(parse_socket("pipe:[123]"), None);
    assert_eq!(parse_socket("/tmp/socket:[123]"), None);
    assert_eq!(parse_socket("socket:[-1]"), None);
}
