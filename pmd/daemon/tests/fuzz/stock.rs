//! Descriptors of all sorts that travel beside messages. Made once, used again and again: what is sent
//! is a copy, so the stock does not grow.

use std::fs::File;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

use nix::fcntl::SealFlag;
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use rdsock_shm::layout::{BellBoard, TenantMemory};

use crate::dice::Dice;
use crate::tenant::{Memory, memfd};

/// Bytes that a socket is filled with, so that it lingers.
const UNSENT: usize = 4 << 20;

/// See the module's text.
pub struct Stock(Vec<OwnedFd>);

impl Stock {
    pub fn new() -> Self {
        let mut stock = memories();
        stock.extend(sockets());
        stock.extend(others());
        Stock(stock)
    }

    pub fn any(&self, dice: &mut Dice) -> RawFd {
        dice.one_of(&self.0).unwrap().as_raw_fd()
    }
}

/// Memfds of right and wrong sizes, sealed in every way, blank or with a right start.
fn memories() -> Vec<OwnedFd> {
    let sizes = [
        0,
        16,
        4096,
        size_of::<BellBoard>() as u64,
        size_of::<TenantMemory>() as u64,
        size_of::<TenantMemory>() as u64 + 1,
        1 << 40,
    ];
    let mut made = Vec::new();
    for size in sizes {
        for seals in 0..4 {
            let mut flags = SealFlag::empty();
            flags.set(SealFlag::F_SEAL_SHRINK, seals & 1 != 0);
            flags.set(SealFlag::F_SEAL_WRITE, seals & 2 != 0);
            made.push(memfd(size, flags).into());
        }
    }
    for seals in [
        SealFlag::all(),
        SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL,
        SealFlag::F_SEAL_SHRINK | SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE),
    ] {
        made.push(memfd(size_of::<TenantMemory>() as u64, seals).into());
    }
    // Right, but for its name, its mode, or its size afterwards.
    let right = Memory::new();
    let path = format!("/proc/self/fd/{}", right.tenant.as_raw_fd());
    let read_only = File::open(path).unwrap();
    let unsealed = memfd(size_of::<TenantMemory>() as u64, SealFlag::empty());
    made.extend([right.bells.into(), read_only.into(), unsealed.into()]);
    made
}

fn sockets() -> Vec<OwnedFd> {
    let pair = |kind| {
        let (a, b) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        [a, b]
    };
    let mut made = Vec::new();
    for kind in [SockType::SeqPacket, SockType::Stream, SockType::Datagram] {
        made.extend(pair(kind));
    }
    // One end of these is gone.
    made.push(UnixStream::pair().unwrap().0.into());
    made.push(UnixDatagram::unbound().unwrap().into());
    made.push(UdpSocket::bind("127.0.0.1:0").unwrap().into());
    made.push(TcpListener::bind("127.0.0.1:0").unwrap().into());
    made
}

fn others() -> Vec<OwnedFd> {
    let (read, write) = nix::unistd::pipe().unwrap();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let mut made = vec![read, write, epoll.0, EventFd::from_value(1).unwrap().into()];
    let paths = [
        "/",
        "/proc/self",
        "/dev/null",
        "/dev/zero",
        "/proc/self/exe",
    ];
    made.extend(paths.map(|path| File::open(path).unwrap().into()));
    made
}

/// A TCP socket with bytes that its peer does not take, and that lingers: whoever closes it last waits
/// for two seconds, unless that one has made sure that it does not. And its peer.
pub fn lingering() -> (TcpStream, TcpStream) {
    use std::io::Write;
    let (mut connector, accepted) = crate::tenant::tcp_pair();
    connector.set_nonblocking(true).unwrap();
    let _ = connector.write(&vec![0; UNSENT]);
    linger(&connector, 2);
    (connector, accepted)
}

/// How long the last close of a socket may wait; 0 resets the connection.
pub fn linger(stream: &TcpStream, seconds: i32) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: seconds,
    };
    let _ = setsockopt(stream, sockopt::Linger, &linger);
}
