//! What a number of the program's becomes: a connection, an instance, another number for one of them, or nothing of ours. Whoever
//! changes what stands in the table of fds does so here, and what stood there is let go: of a connection by the table of
//! connections, which says when it has no number any more, and then by the instances that it is registered in.

use crate::conn;
use crate::epoll;
use crate::fds::{self, Kind};
use libc::c_int;

/// Puts a kind in the table and lets go of what stood there: an entry that is still set for a
/// number that the kernel has just given out was closed behind the shim's back.
pub fn replace(fd: c_int, kind: Kind) {
    match fds::set_kind(fd, kind) {
        Kind::Conn(index) => {
            if let Some(last) = conn::let_go(fd, index) {
                epoll::forget(last.conn);
            }
        }
        Kind::Epoll(index) => epoll::closed(fd, index),
        Kind::Other | Kind::Internal => {}
    }
}

/// Tracks a new TCP socket. Nothing is done where there is no room: it stays the kernel's.
pub fn track(fd: c_int, born: u32) -> Option<usize> {
    let index = conn::make(fd, born)?;
    replace(fd, Kind::Conn(index));
    Some(index)
}

/// The program has made an epoll instance.
pub fn track_instance(fd: c_int) {
    replace(fd, epoll::make(fd));
}

/// The program has another number for what `kind` says.
pub fn add(fd: c_int, kind: Kind) {
    let is_there = match kind {
        Kind::Conn(index) => conn::add_ref(index),
        Kind::Epoll(index) => epoll::add_ref(index),
        Kind::Other | Kind::Internal => false,
    };
    if is_there {
        replace(fd, kind);
    }
}

/// Forgets which fds are connections: the kernel has them all, for as long as the process runs.
pub fn forget_connections() {
    conn::make_no_more();
    epoll::close_copies();
    for fd in 0..fds::high_fd() {
        if matches!(fds::kind(fd), Kind::Conn(_)) {
            fds::set_kind(fd, Kind::Other);
        }
    }
}
