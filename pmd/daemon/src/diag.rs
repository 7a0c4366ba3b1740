//! Asks the kernel which socket a connection belongs to (`NETLINK_SOCK_DIAG`), in the network
//! namespace that the netlink socket was made in.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, TCP_ESTABLISHED};
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags,
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// A socket that the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Inode of the socket; 0 when no process holds it any more.
    pub inode: u64,
    /// The connection is established, in both directions.
    pub established: bool,
}

/// A socket that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// On which address.
    pub address: IpAddr,
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Inode of the socket.
    pub inode: u64,
}

/// A netlink socket for questions about the sockets of one network namespace.
#[derive(Debug)]
pub struct Diag {
    socket: OwnedFd,
}

impl Diag {
    /// For the network namespace of the calling thread.
    pub fn new() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        Ok(Diag { socket })
    }

    /// `SO_NETNS_COOKIE` of the namespace; 0 on kernels without it (before 5.14).
    pub fn netns_cookie(&self) -> u64 {
        let mut cookie = 0u64;
        let mut len = size_of::<u64>() as libc::socklen_t;
        // SAFETY: the option writes at most `len` bytes to `cookie`; both outlive the call.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &mut len,
            )
        };
        if result == 0 { cookie } else { 0 }
    }

    /// The TCP socket with exactly this pair of addresses and this `SO_COOKIE`.
    pub fn find(
        &self,
        local: SocketAddr,
        peer: SocketAddr,
        cookie: u64,
    ) -> io::Result<Option<Found>> {
        // A v4-mapped IPv6 socket is found by its IPv4 addresses.
        let (local_ip, peer_ip) = (local.ip().to_canonical(), peer.ip().to_canonical());
        let family = match (local_ip, peer_ip) {
            (IpAddr::V4(_), IpAddr::V4(_)) => AF_INET,
            (IpAddr::V6(_), IpAddr::V6(_)) => AF_INET6,
            _ => return Ok(None),
        };
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST;
        let request = InetRequest {
            family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::all(),
            socket_id: SocketId {
                source_port: local.port(),
                destination_port: peer.port(),
                source_address: local_ip,
                destination_address: peer_ip,
                interface_id: 0,
                cookie: split_cookie(cookie),
            },
        };
        let mut packet = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.ask(&bytes)
    }

    /// The TCP sockets that listen on a port.
    pub fn listeners(&self, port: u16) -> io::Result<Vec<Listener>> {
        let mut found = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let mut header = NetlinkHeader::default();
            header.flags = NLM_F_REQUEST | NLM_F_DUMP;
            let request = InetRequest {
                family,
                protocol: IPPROTO_TCP,
                extensions: ExtensionFlags::empty(),
                states: StateFlags::LISTEN,
                socket_id: match family {
                    AF_INET => SocketId::new_v4(),
                    _ => SocketId::new_v6(),
                },
            };
            let mut packet =
                NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
            packet.finalize();
            let mut bytes = vec![0; packet.buffer_len()];
            packet.serialize(&mut bytes);
            self.dump(&bytes, |socket| {
                if socket.header.socket_id.source_port == port {
                    found.push(Listener {
                        address: socket.header.socket_id.source_address,
                        cookie: join_cookie(socket.header.socket_id.cookie),
                        inode: socket.header.inode.into(),
                    });
                }
            })?;
        }
        Ok(found)
    }

    fn dump(&self, question: &[u8], mut each: impl FnMut(&InetResponse)) -> io::Result<()> {
        let fd = self.socket.as_fd().as_raw_fd();
        let broken = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
        send(fd, question, MsgFlags::empty())?;
        let mut bytes = vec![0; 32 << 10];
        loop {
            let len = recv(fd, &mut bytes, MsgFlags::MSG_DONTWAIT)?;
            let mut rest = bytes.get(..len).unwrap_or(&[]);
            while !rest.is_empty() {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
                    .map_err(|error| broken(error.to_string()))?;
                let used = (message.header.length as usize).next_multiple_of(4);
                match message.payload {
                    NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(socket)) => {
                        each(&socket);
                    }
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => return Err(broken("an answer of another kind".into())),
                }
                rest = rest.get(used.max(1)..).unwrap_or(&[]);
            }
        }
    }

    fn ask(&self, question: &[u8]) -> io::Result<Option<Found>> {
        let fd = self.socket.as_fd().as_raw_fd();
        send(fd, question, MsgFlags::empty())?;
        // The kernel answers within the send.
        let mut bytes = [0; 4096];
        let len = recv(fd, &mut bytes, MsgFlags::MSG_DONTWAIT)?;
        let answer = bytes.get(..len).unwrap_or(&[]);
        let answer = NetlinkMessage::<SockDiagMessage>::deserialize(answer)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
        match answer.payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(found)) => Ok(Some(Found {
                inode: u64::from(found.header.inode),
                established: found.header.state == TCP_ESTABLISHED,
            })),
            NetlinkPayload::Error(error) => match -error.raw_code() {
                // Gone, or the addresses belong to a socket with another cookie by now.
                libc::ENOENT | libc::ESTALE => Ok(None),
                code => Err(io::Error::from_raw_os_error(code)),
            },
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// The kernel keeps a cookie as two 32-bit words, low word first, each in host order.
fn split_cookie(cookie: u64) -> [u8; 8] {
    let mut bytes = [0; 8];
    let (low, high) = bytes.split_at_mut(4);
    low.copy_from_slice(&(cookie as u32).to_ne_bytes());
    high.copy_from_slice(&((cookie >> 32) as u32).to_ne_bytes());
    bytes
}

fn join_cookie(bytes: [u8; 8]) -> u64 {
    let (low, high) = bytes.split_at(4);
    let word = |half: &[u8]| half.try_into().map_or(0, u32::from_ne_bytes);
    u64::from(word(low)) | u64::from(word(high)) << 32
}

/// `SO_COOKIE` of a socket.
pub fn cookie_of(socket: BorrowedFd<'_>) -> Option<u64> {
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option writes at most `len` bytes to `cookie`; both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &mut len,
        )
    };
    (result == 0).then_some(cookie)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::MetadataExt;

    fn check(listen: &str, connect: &str) {
        let listener = TcpListener::bind(listen).unwrap();
        let port = listener.local_addr().unwrap().port();
        let stream = TcpStream::connect((connect, port)).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let diag = Diag::new().unwrap();
        for socket in [&stream, &accepted] {
            let (local, peer) = (socket.local_addr().unwrap(), socket.peer_addr().unwrap());
            let cookie = cookie_of(socket.as_fd()).unwrap();
            let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
            let inode = std::fs::metadata(path).unwrap().ino();
            let found = Found {
                inode,
                established: true,
            };
            assert_eq!(diag.find(local, peer, cookie).unwrap(), Some(found));
            assert_eq!(diag.find(local, peer, cookie + 1).unwrap(), None);
            assert_eq!(diag.find(peer, peer, cookie).unwrap(), None);
        }
    }

    #[test]
    fn finds_both_ends_of_a_connection() {
        check("127.0.0.1:0", "127.0.0.1");
    }

    #[test]
    fn finds_ipv6_and_v4_mapped_sockets() {
        check("[::1]:0", "::1");
        check("[::]:0", "127.0.0.1");
    }
}
