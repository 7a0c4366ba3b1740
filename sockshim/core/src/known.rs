//! What is known to leave the way of a connection's bytes alone: controls (`ioctl`) and socket options. Whatever is not
//! here, or not yet invented, makes the connection the kernel's before the kernel is told. No state, no call.

use libc::{c_int, c_ulong};

/// Linux's `SIOCOUTQNSD`: bytes not even sent.
pub const SIOCOUTQNSD: c_ulong = 0x894B;
/// Whether the mark of urgent data is next.
pub const SIOCATMARK: c_ulong = 0x8905;
/// `TCP_INQ`: each `recvmsg` tells how many bytes are left.
pub const TCP_INQ: c_int = 36;

/// A control of a socket that changes nothing of how its bytes travel, or that the shim follows.
pub fn is_harmless_control(request: c_ulong) -> bool {
    const FOLLOWED: [c_ulong; 4] = [
        libc::FIONREAD,
        libc::TIOCOUTQ,
        libc::FIONBIO,
        libc::FIOASYNC,
    ];
    const OF_DESCRIPTORS: [c_ulong; 2] = [libc::FIOCLEX, libc::FIONCLEX];
    // Those that ask whether this is a terminal. The kernel says no.
    const OF_TERMINALS: [c_ulong; 4] =
        [libc::TCGETS, libc::TIOCGWINSZ, libc::TIOCGPGRP, 0x802C_542A];
    FOLLOWED.contains(&request)
        || OF_DESCRIPTORS.contains(&request)
        || OF_TERMINALS.contains(&request)
        // Owner, mark, time stamp; routes; interfaces (and SIOCOUTQNSD among them).
        || matches!(request, 0x8901..=0x8907 | 0x890B..=0x890D | 0x8910..=0x899F)
}

/// A control of another file whose argument is a plain number (it describes no structure), which may be that of a socket
/// that the kernel is to take (`NBD_SET_SOCK`). Not those of terminals, consoles, virtual machines and counters.
pub fn may_name_socket(request: c_ulong) -> bool {
    const SIZE: c_ulong = 0x3FFF;
    let kind = request >> 8 & 0xFF;
    let others = [b'T', b'K', b'V', 0xAE, b'$', 0x89].map(c_ulong::from);
    request >> 16 & SIZE == 0 && !others.contains(&kind)
}

/// A control of another socket whose argument points to the number of one that it takes (`SIOCKCMATTACH`).
pub fn points_to_socket(request: c_ulong) -> bool {
    request == 0x89E0
}

/// What an option asks of a connection's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing.
    Nothing,
    /// That they pass the kernel from now on.
    Kernel,
    /// That not one comes otherwise, also of those that are on their way: the kernel reads them itself, or nobody knows
    /// what it does.
    KernelAlone,
}

/// What an option needs when it is set to `value`.
pub fn need_of(level: c_int, name: c_int, value: c_int) -> Need {
    let when = |needed: bool| if needed { Need::Kernel } else { Need::Nothing };
    match level {
        libc::SOL_SOCKET => match name {
            libc::SO_RCVLOWAT => when(value > 1),
            libc::SO_OOBINLINE | libc::SO_ZEROCOPY => when(value != 0),
            // Time stamps, old and new.
            29 | 35 | 37 | 63..=65 => when(value != 0),
            // Buffers, time limits, names, priorities and the like.
            1..=9 | 11..=17 | 19..=25 | 27 | 28 | 30..=34 | 36 | 38..=49 => Need::Nothing,
            51..=53 | 55..=57 | 59 | 61 | 62 | 66..=77 | 81..=83 => Need::Nothing,
            _ => Need::KernelAlone,
        },
        libc::IPPROTO_TCP => match name {
            // Segments, timers, windows, congestion; and what is told of them.
            1..=13 | 15..=18 | 23..=28 | 30 | 33 | 34 | TCP_INQ | 37 | 44 => Need::Nothing,
            _ => Need::KernelAlone,
        },
        // What the kernel encrypts (IP_IPSEC_POLICY, IP_XFRM_POLICY, and those of IPv6).
        libc::IPPROTO_IP if matches!(name, 16 | 17) => Need::KernelAlone,
        libc::IPPROTO_IPV6 if matches!(name, 34 | 35) => Need::KernelAlone,
        // Headers and routes.
        libc::IPPROTO_IP | libc::IPPROTO_IPV6 => Need::Nothing,
        _ => Need::KernelAlone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_is_the_kernels() {
        assert_eq!(need_of(libc::SOL_SOCKET, 9999, 0), Need::KernelAlone);
        assert_eq!(
            need_of(libc::IPPROTO_TCP, libc::TCP_ULP, 0),
            Need::KernelAlone
        );
        assert_eq!(need_of(libc::SOL_TLS, 1, 0), Need::KernelAlone);
        assert!(!is_harmless_control(0xAB00));
    }
}
