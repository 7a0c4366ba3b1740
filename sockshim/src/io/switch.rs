//! Moving a direction from the anchor to its ring, at the position that the kernel counts.

use crate::conn::Use;
use crate::stream::{Stream, TxGuard};
use crate::sys;
use libc::c_int;
use rdsock_shm::layout::{phase, want};
use rdsock_shm::ring::Receiver;
use std::sync::atomic::Ordering::*;

/// The position of the next byte that this socket will send on the anchor, counted from the
/// connection's birth: `tcpi_bytes_acked` (which counts the SYN of an active opener) and what is
/// queued behind it (`SIOCOUTQ`).
fn sent_on_anchor(stream: &Stream, fd: c_int) -> Option<u64> {
    for _ in 0..100 {
        let before = TcpInfo::of(fd)?;
        let queued = sys::ioctl_int(fd, libc::TIOCOUTQ)?;
        if TcpInfo::of(fd)?.acked == before.acked {
            let syn = u64::from(stream.end_number() == 0);
            return (before.acked + queued as u64).checked_sub(syn);
        }
    }
    None
}

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
    /// `TCP_CLOSE`: not connected.
    pub const CLOSE: u8 = 7;
    /// `TCP_CLOSE_WAIT`: the peer has sent its FIN.
    pub const CLOSE_WAIT: u8 = 8;
    /// `TCP_LISTEN`.
    pub const LISTEN: u8 = 10;

    /// Of a socket.
    pub fn of(fd: c_int) -> Option<Self> {
        let words: [u64; 18] = sys::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO)?;
        Some(TcpInfo {
            state: words[0] as u8,
            acked: words[15],
            received: words[16],
        })
    }
}

/// Moves the sending direction to the ring, if nobody is inside a kernel send.
pub fn try_switch(held: &Use, stream: &Stream, guard: &TxGuard<'_>, fd: c_int) -> bool {
    if stream.out().consumer.ready.load(Acquire) != 1
        || guard.is_nested()
        || held.conn.in_tx.load(SeqCst) != 0
        || stream.tx().in_kernel.load(SeqCst) != 0
        || stream.out().bytes.want.load(Acquire) & want::DEMOTED != 0
    {
        return false;
    }
    let Some(at) = sent_on_anchor(stream, fd) else {
        return false;
    };
    guard.sender.switch(at);
    stream.tx().phase.store(phase::RING, Release);
    true
}

/// True when the anchor's connection is over, whatever still lies on it.
pub fn anchor_is_dead(fd: c_int) -> bool {
    TcpInfo::of(fd).is_none_or(|info| info.state != TcpInfo::ESTABLISHED)
}

/// Moves the receiving half to the ring when it stands where the other end switched: so that a
/// program which only sends gets there as well.
pub fn settle_switch(stream: &Stream) {
    if stream.rx().phase.load(Acquire) != phase::SWITCHING {
        return;
    }
    let guard = stream.lock_rx();
    if let Some(at) = Receiver::switch_at(stream.incoming())
        && !guard.is_nested()
        && stream.rx().phase.load(Acquire) == phase::SWITCHING
        && at == stream.rx().tail.load(Relaxed)
    {
        guard.receiver.switch(at);
        stream.rx().phase.store(phase::RING, Release);
    }
}
