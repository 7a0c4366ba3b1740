//! What the kernel counts of a TCP socket, and the positions that follow from it.

use crate::sys;
use libc::c_int;

/// What the kernel counts of a TCP socket: `struct tcp_info` of linux/tcp.h.
#[derive(Clone, Copy, Debug)]
pub struct TcpInfo {
    /// `tcpi_state`.
    pub state: u8,
    /// `tcpi_bytes_acked`, at offset 120.
    pub acked: u64,
    /// `tcpi_bytes_received`, at offset 128.
    pub received: u64,
}

impl TcpInfo {
    /// `TCP_ESTABLISHED`.
    pub const ESTABLISHED: u8 = 1;
    /// `TCP_CLOSE`: not connected, not yet or no more.
    pub const CLOSE: u8 = 7;
    /// `TCP_CLOSE_WAIT`: the peer has sent its FIN.
    pub const CLOSE_WAIT: u8 = 8;
    /// `TCP_LISTEN`.
    pub const LISTEN: u8 = 10;
    /// `TCP_SYN_SENT`.
    pub const SYN_SENT: u8 = 2;

    /// Of a socket.
    pub fn of(fd: c_int) -> Option<Self> {
        let words: [u64; 18] = sys::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO)?;
        Some(TcpInfo {
            state: words[0] as u8,
            acked: words[15],
            received: words[16],
        })
    }

    /// True for a connection, also for one of which a direction has ended, or both, if it has carried anything.
    pub fn was_connected(&self) -> bool {
        match self.state {
            TcpInfo::CLOSE => self.acked != 0 || self.received != 0,
            state => !matches!(state, TcpInfo::LISTEN | TcpInfo::SYN_SENT),
        }
    }

    /// The position of the next byte that a socket will send, counted from the connection's birth:
    /// `tcpi_bytes_acked` (which counts the SYN of an active opener) and what is queued behind it (`SIOCOUTQ`).
    pub fn sent(fd: c_int, is_opener: bool) -> Option<u64> {
        for _ in 0..100 {
            let before = TcpInfo::of(fd)?;
            let queued = sys::ioctl_int(fd, libc::TIOCOUTQ)?;
            if TcpInfo::of(fd)?.acked == before.acked {
                return (before.acked + queued as u64).checked_sub(u64::from(is_opener));
            }
        }
        None
    }

    /// The position of the next byte that a socket will receive, read until it stands still for the length of two calls.
    pub fn received(fd: c_int) -> Option<u64> {
        for _ in 0..1000 {
            let before = TcpInfo::of(fd)?.received;
            let unread = sys::ioctl_int(fd, libc::FIONREAD)? as u64;
            if TcpInfo::of(fd)?.received == before {
                return before.checked_sub(unread);
            }
        }
        None
    }
}
