//! A connection that another node asks for, while the kernel is asked who would get it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, getsockname, setsockopt, socket,
    sockopt,
};
use rdsock_node::Asked;
use rdsock_proto::Addresses;
use rdsock_shm::control::{FABRIC_CLASS_V6, FABRIC_SOURCE_V4};

use super::Listening;
use crate::accounts::Charge;
use crate::diag::{Listener, cookie_of};
use crate::porters::Carrier;
use crate::rights::{Ask, socket_address};

/// See the module's text.
#[derive(Debug)]
pub struct Incoming {
    /// The stream that it will be.
    pub ticket: u64,
    /// What the other node asked for.
    pub id: Asked,
    /// That node.
    pub node: u16,
    /// From where to where.
    pub between: Addresses,
    /// The address that somebody has to listen at.
    pub destination: SocketAddr,
    /// Who does, as far as is known: on that one's behalf the kernel is asked.
    pub claims: Listening,
    /// The user of that tenant.
    pub uid: u32,
    /// On that user's account.
    pub connect: Charge,
}

/// The daemon's end of a call.
#[derive(Debug)]
pub struct OwnEnd {
    /// It is bound, and not connected.
    pub socket: OwnedFd,
    /// To this address.
    pub local: SocketAddr,
    /// `SO_COOKIE`.
    pub cookie: u64,
}

/// The daemon's end for a call, and who would get that.
pub type Answer = (OwnEnd, io::Result<Option<Listener>>);

/// Finds a port to call a program from, and asks the kernel who would get that call, with what knows the sockets there. Others may have taken
/// all ports but a few, and listen as many as they like: for who carries a load.
pub fn ask(carrier: &Carrier, destination: SocketAddr, ask: Ask) -> Result<Answer, Errno> {
    let own = own_end(destination)?;
    let listener = ask.coming_from(own.local).listener(carrier);
    Ok((own, listener))
}

/// Who asks about the connection is told the true peer.
fn own_end(destination: SocketAddr) -> Result<OwnEnd, Errno> {
    let (family, from) = match destination.ip() {
        IpAddr::V4(_) => (
            AddressFamily::Inet,
            SocketAddr::new(Ipv4Addr::from(FABRIC_SOURCE_V4).into(), 0),
        ),
        IpAddr::V6(_) => (
            AddressFamily::Inet6,
            SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0),
        ),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None)?;
    if destination.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6TClass, &FABRIC_CLASS_V6.into())?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
    let local = socket_address(&getsockname(socket.as_raw_fd())?).ok_or(Errno::EINVAL)?;
    let cookie = cookie_of(socket.as_fd()).ok_or(Errno::EINVAL)?;
    Ok(OwnEnd {
        socket,
        local,
        cookie,
    })
}
