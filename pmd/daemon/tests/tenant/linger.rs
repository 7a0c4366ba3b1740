//! A socket whose last close sleeps in the kernel.

use std::io::Write;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use super::{Tenant, tcp_pair};

/// How long the last close may sleep.
pub const LINGER: Duration = Duration::from_secs(15);

/// A TCP socket with SO_LINGER and bytes that its peer does not read. Whoever closes it last sleeps.
/// Dropping this ends that sleep: the peer goes first.
pub struct Lingering {
    peer: TcpStream,
    /// Until it is given away.
    pub socket: Option<TcpStream>,
}

impl Lingering {
    pub fn new() -> Self {
        let (mut socket, peer) = tcp_pair();
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: LINGER.as_secs() as i32,
        };
        // Little is enough to fill it.
        setsockopt(&socket, sockopt::SndBuf, &4096).unwrap();
        setsockopt(&peer, sockopt::RcvBuf, &4096).unwrap();
        setsockopt(&socket, sockopt::Linger, &linger).unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[7; 4096]).is_ok() {}
        Lingering {
            peer,
            socket: Some(socket),
        }
    }

    pub fn fd(&self) -> RawFd {
        self.socket.as_ref().unwrap().as_raw_fd()
    }

    /// Sends it beside a message, and closes it here: whoever has the message is the last to hold it.
    pub fn give(&mut self, to: &Tenant, message: &[u8], others: &[RawFd]) {
        let fds = [others, &[self.fd()]].concat();
        if to.try_send(message, &fds).is_ok() {
            self.socket = None;
        }
    }
}
