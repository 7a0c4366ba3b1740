//! What a program gets in the place of a connection that it can't go on with: one that was reset. Other processes that have the socket
//! keep it as it is: they may go on with it.

use crate::address::Address;
use crate::sys;
use libc::c_int;

/// Of an address over which a program reaches itself.
fn own_address(family: c_int) -> Address {
    let mut ip = [0; 16];
    let last: &[u8] = match family {
        libc::AF_INET6 => &[1],
        _ => &[0xff, 0xff, 127, 0, 0, 1],
    };
    if let Some(place) = ip.get_mut(16 - last.len()..) {
        place.copy_from_slice(last);
    }
    Address { ip, port: 0 }
}

/// Another connection, which was reset, in the place of a descriptor that is kept over exec. Where none can be made (nothing goes over
/// loopback, or a filter of system calls is in force), the connection itself is broken, for all that have it.
pub fn put_reset(fd: c_int) {
    let family = sys::getsockopt::<c_int>(fd, libc::SOL_SOCKET, libc::SO_DOMAIN);
    if let Some(reset) = family.and_then(reset_socket) {
        let flags = sys::fcntl(fd, libc::F_GETFL, 0);
        sys::fcntl(
            reset,
            libc::F_SETFL,
            flags.max(0) as usize & libc::O_NONBLOCK as usize,
        );
        let is_there = sys::copy_to(reset, fd) >= 0;
        sys::close(reset);
        if is_there {
            return;
        }
    }
    if sys::disconnect(fd) < 0 {
        sys::shutdown(fd, libc::SHUT_RDWR);
        while sys::recv_now(fd, &mut [0; 4096], 0) > 0 {}
    }
}

/// A socket whose first call is told ECONNRESET: connected to one that listens and is closed before it has accepted.
fn reset_socket(family: c_int) -> Option<c_int> {
    let listener = Owned::socket(family)?;
    let (name, len) = own_address(family).name(family)?;
    if sys::bind(listener.0, &name, len) < 0 || sys::listen(listener.0, 1) < 0 {
        return None;
    }
    let name = sys::name_of(listener.0, false)?;
    let socket = Owned::socket(family)?;
    sys::connect(socket.0, &name, len);
    drop(listener);
    // Over loopback all that has happened by now.
    let told = sys::poll_one(socket.0, 0, 0).max(0) as i16;
    let is_reset = told & libc::POLLERR != 0 && told & libc::POLLHUP != 0;
    is_reset.then(|| socket.kept())
}

/// A descriptor that is closed where it is not kept.
struct Owned(c_int);

impl Owned {
    fn socket(family: c_int) -> Option<Self> {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let fd = sys::socket(family, kind, 0) as c_int;
        (fd >= 0).then_some(Owned(fd))
    }

    fn kept(self) -> c_int {
        let fd = self.0;
        std::mem::forget(self);
        fd
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        sys::close(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn one_process_is_told_of_a_reset_and_who_else_has_it_goes_on() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // This machine may have no IPv6.
            let Ok(listener) = TcpListener::bind(address) else {
                continue;
            };
            let mut other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let mut kept = listener.accept().unwrap().0;
            let mut lost = kept.try_clone().unwrap();
            other.write_all(b"x").unwrap();
            put_reset(lost.as_raw_fd());
            let error = lost.read(&mut [0; 4]).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ECONNRESET));
            assert_eq!(lost.read(&mut [0; 4]).unwrap(), 0);
            let error = lost.write(b"y").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
            let mut bytes = [0; 4];
            assert_eq!(kept.read(&mut bytes).unwrap(), 1);
            kept.write_all(b"z").unwrap();
            assert_eq!(other.read(&mut bytes).unwrap(), 1);
        }
    }
}
