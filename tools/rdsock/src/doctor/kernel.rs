//! Features of the kernel that rdsock uses, each tried out.

use std::fs::File;
use std::io;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, getsockopt, recv, send, socket,
    socketpair, sockopt,
};

use super::{Finding, Health};

/// All of them.
pub fn look() -> Vec<Finding> {
    vec![
        release(),
        seals(),
        pidfd(),
        peer_pidfd(),
        cookie(),
        netns_cookie(),
        sock_diag(),
        membarrier(),
    ]
}

fn release() -> Finding {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Finding::good("kernel", release.trim())
}

fn needed(what: &'static str, result: io::Result<()>, advice: &str) -> Finding {
    match result {
        Ok(()) => Finding::good(what, "works"),
        Err(error) => Finding::new(what, Health::Bad, error.to_string(), advice),
    }
}

fn seals() -> Finding {
    let try_it = || -> io::Result<()> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"rdsock-doctor", flags)?);
        file.set_len(4096)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(())
    };
    needed(
        "sealed memfd",
        try_it(),
        "needs Linux 3.17, and a sandbox that lets memfd_create pass",
    )
}

fn pidfd() -> Finding {
    // SAFETY: takes two integers, returns a new fd or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
    let result = if fd < 0 {
        Err(io::Error::last_os_error())
    } else {
        // SAFETY: the call above returned this fd, and nothing else owns it.
        drop(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
        Ok(())
    };
    needed(
        "pidfd_open",
        result,
        "needs Linux 5.3, and a sandbox that lets pidfd_open pass",
    )
}

fn peer_pidfd() -> Finding {
    let what = "SO_PEERPIDFD";
    let flags = SockFlag::SOCK_CLOEXEC;
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    match pair.and_then(|(one, _other)| getsockopt(&one, sockopt::PeerPidfd)) {
        Ok(_) => Finding::good(what, "works"),
        Err(_) => Finding::good(what, "not there (Linux 6.5): pidfd_open is used instead"),
    }
}

fn option(socket: &TcpStream, option: i32) -> io::Result<u64> {
    let (mut value, mut len) = (0u64, 8);
    let fd = socket.as_raw_fd();
    // SAFETY: the option writes at most 8 bytes to `value`; both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &mut len,
        )
    };
    match result {
        0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A connection over loopback: the end that connected, and the other, which keeps it open.
fn connection() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    Ok((stream, listener.accept()?.0))
}

fn cookie() -> Finding {
    let result = connection().and_then(|(stream, _other)| option(&stream, libc::SO_COOKIE));
    needed("SO_COOKIE", result.map(drop), "needs Linux 4.12")
}

fn netns_cookie() -> Finding {
    let what = "SO_NETNS_COOKIE";
    match connection().and_then(|(stream, _other)| option(&stream, libc::SO_NETNS_COOKIE)) {
        Ok(_) => Finding::good(what, "works"),
        Err(_) => Finding::new(
            what,
            Health::Weak,
            "not there",
            "with Linux 5.14, programs that change their network namespace are accelerated, too",
        ),
    }
}

fn sock_diag() -> Finding {
    let advice = "load the modules tcp_diag and inet_diag (CONFIG_INET_DIAG), or let the sandbox \
                  open netlink sockets: the daemon believes no connection that it can't look up";
    needed("sock_diag for TCP", look_up_connection(), advice)
}

fn look_up_connection() -> io::Result<()> {
    let (stream, _other) = connection()?;
    let inode = std::fs::metadata(format!("/proc/self/fd/{}", stream.as_raw_fd()))?.ino();
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let request = InetRequest {
        family: AF_INET,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: SocketId {
            source_port: local.port(),
            destination_port: peer.port(),
            source_address: local.ip(),
            destination_address: peer.ip(),
            interface_id: 0,
            // Any cookie.
            cookie: [0xff; 8],
        },
    };
    let mut packet = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    let (kind, flags) = (SockType::Datagram, SockFlag::SOCK_CLOEXEC);
    let netlink = socket(
        AddressFamily::Netlink,
        kind,
        flags,
        SockProtocol::NetlinkSockDiag,
    )?;
    send(netlink.as_raw_fd(), &bytes, MsgFlags::empty())?;
    let mut bytes = [0; 4096];
    let len = recv(netlink.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT)?;
    let answer = NetlinkMessage::<SockDiagMessage>::deserialize(bytes.get(..len).unwrap_or(&[]))
        .map_err(|error| io::Error::other(error.to_string()))?;
    match answer.payload {
        NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(found))
            if u64::from(found.header.inode) == inode
                && found.header.socket_id.source_address.is_ipv4() =>
        {
            debug_assert!(matches!(local.ip(), IpAddr::V4(_)));
            Ok(())
        }
        NetlinkPayload::Error(error) => Err(io::Error::from_raw_os_error(-error.raw_code())),
        _ => Err(io::Error::other("an unexpected answer")),
    }
}

fn membarrier() -> Finding {
    let what = "membarrier";
    // SAFETY: a query; takes integers only.
    let commands = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_QUERY, 0, 0) };
    let wanted = i64::from(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
    match commands > 0 && commands & wanted == wanted {
        true => Finding::good(what, "works"),
        false => Finding::new(
            what,
            Health::Weak,
            "not there",
            "with Linux 4.14 and CONFIG_MEMBARRIER, waking a sleeping program costs less",
        ),
    }
}
