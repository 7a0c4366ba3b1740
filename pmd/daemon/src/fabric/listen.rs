//! A node asks for a stream to a program that listens here.

use super::{Listening, addresses, octets};
use crate::book::TenantId;
use crate::connections::End;
use crate::daemon::Daemon;
use crate::process::socket_inode;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, getsockname, getsockopt,
    socket, sockopt,
};
use rdsock_node::{Asked, Command, Opening};
use rdsock_proto::{Addresses, Refusal};
use rdsock_shm::control::{Between, Caller, FABRIC_SOURCE_V4, Message, Request, kind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use tracing::debug;

/// Sockets that one tenant may say it listens on.
const LISTENERS: usize = 1024;
/// Milliseconds for a connection over loopback to be made: a full backlog takes longer.
const CONNECT_MS: u16 = 20;

impl Daemon {
    /// A tenant listens on a socket.
    pub(crate) fn on_listens(&mut self, tenant: TenantId, request: &Request) {
        let home = self.namespaces.is_home(request.netns);
        let Some(fabric) = self.fabric.as_mut().filter(|_| home) else {
            return;
        };
        let ip = IpAddr::V6(Ipv6Addr::from(request.local)).to_canonical();
        let Ok(port) = u16::try_from(request.local_port) else {
            self.counters.bad_requests += 1;
            return;
        };
        let of_tenant = |entry: &&Listening| entry.tenant == tenant;
        let all = fabric.listening.values().flatten();
        if all.filter(of_tenant).count() >= LISTENERS {
            return;
        }
        let holders = fabric.listening.entry(request.cookie).or_default();
        holders.retain(|holder| holder.tenant != tenant);
        holders.push(Listening {
            tenant,
            fd: request.fd,
            address: SocketAddr::new(ip, port),
        });
    }

    /// A node asks for a stream.
    pub(super) fn on_incoming(&mut self, id: Asked, node: u16, addresses: Addresses) {
        self.counters.incoming += 1;
        if let Err(why) = self.try_incoming(id, node, addresses) {
            debug!(node, ?addresses, ?why, "refused");
            self.counters.incoming_refused += 1;
            if let Some(fabric) = &mut self.fabric {
                fabric.poller.command(Command::Refuse { id, why });
            }
        }
    }

    fn try_incoming(&mut self, id: Asked, node: u16, between: Addresses) -> Result<(), Refusal> {
        let ip = |ip: Ipv6Addr| IpAddr::V6(ip).to_canonical();
        let source = SocketAddr::new(ip(between.source), between.source_port);
        let destination = SocketAddr::new(ip(between.destination), between.destination_port);
        let config = self.config.fabric.as_ref().ok_or(Refusal::Policy)?;
        // A node speaks for its own addresses, and to ours.
        let owner = |ip| config.node_of(ip).map(|node| node.id);
        if owner(source.ip()) != Some(node) || owner(destination.ip()) != Some(config.node) {
            return Err(Refusal::Policy);
        }
        let (port, from) = (destination.port(), source.port());
        if !self.config.policy.allows_ports(port, from) {
            return Err(Refusal::Policy);
        }
        let uid = self.listener_of(destination).ok_or(Refusal::NoListener)?;
        let ticket = self
            .carry(node, Opening::Accept(id), &between, uid)
            .map_err(|error| {
                debug!(node, "no stream: {error}");
                Refusal::Limit
            })?;
        match self.call(ticket, destination) {
            Ok((socket, local)) => {
                let Some(fabric) = &mut self.fabric else {
                    return Err(Refusal::Policy);
                };
                if let Some(carried) = fabric.carried.get(&ticket) {
                    let stream = carried.stream.clone();
                    fabric.poller.command(Command::Accept { id, stream });
                }
                // As the program's socket has them.
                self.attach_anchor(ticket, socket, (destination, local));
                Ok(())
            }
            Err(error) => {
                debug!(%destination, "the program that listens can't be reached: {error}");
                if let Some(fabric) = &mut self.fabric {
                    fabric.carried.remove(&ticket);
                    fabric.callers.retain(|_, other| *other != ticket);
                }
                Err(match error {
                    Errno::ECONNREFUSED => Refusal::NoListener,
                    _ => Refusal::Limit,
                })
            }
        }
    }

    /// The user of the program that would get a connection to an address, if whoever would get it
    /// is a tenant.
    fn listener_of(&mut self, destination: SocketAddr) -> Option<u32> {
        let found = self.namespaces.home_diag()?.listeners(destination.port());
        let sockets = match found {
            Ok(sockets) => sockets,
            Err(error) => {
                self.log_fault(
                    "the kernel does not tell who listens (sock_diag)",
                    0,
                    &error,
                );
                return None;
            }
        };
        let fabric = self.fabric.as_ref()?;
        let would_get = |address: IpAddr| {
            let any = address.is_unspecified();
            address == destination.ip() || any && (address.is_ipv6() || destination.is_ipv4())
        };
        let mut user = None;
        for socket in sockets.iter().filter(|socket| would_get(socket.address)) {
            // One that is not a tenant's would show the wrong peer.
            let holders = fabric.listening.get(&socket.cookie)?;
            let peers = holders.iter().filter_map(|holder| {
                let peer = &self.connections.get(&holder.tenant)?.peer;
                let holds = socket_inode(peer.pid, holder.fd) == Some(socket.inode)
                    && holder.address.port() == destination.port();
                holds.then_some(peer.uid)
            });
            user = Some(peers.into_iter().next()?);
        }
        user
    }

    /// Connects to the program that listens. Who asks about the connection is told the true peer.
    fn call(
        &mut self,
        ticket: u64,
        destination: SocketAddr,
    ) -> Result<(OwnedFd, SocketAddr), Errno> {
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
        bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
        let local = socket_address(&getsockname(socket.as_raw_fd())?).ok_or(Errno::EINVAL)?;
        if let Some(fabric) = &mut self.fabric {
            fabric.callers.insert(local, ticket);
        }
        match connect(socket.as_raw_fd(), &SockaddrStorage::from(destination)) {
            Ok(()) => return Ok((socket, local)),
            Err(Errno::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut fds, CONNECT_MS)? == 0 {
            return Err(Errno::ETIMEDOUT);
        }
        match getsockopt(&socket, sockopt::SocketError)? {
            0 => Ok((socket, local)),
            error => Err(Errno::from_raw(error)),
        }
    }

    /// A tenant asks whose connection it has: one that it has accepted, or got from another program.
    pub(crate) fn on_whois(&mut self, id: TenantId, question: Between) -> Result<(), End> {
        let found = self.fabric.as_ref().zip(addresses(&question));
        let found = found.and_then(|(fabric, anchor)| {
            let (local, peer) = anchor;
            let accepted = fabric.callers.get(&peer);
            let accepted = accepted.and_then(|ticket| Some((*ticket, fabric.carried.get(ticket)?)));
            let accepted = accepted.filter(|(_, carried)| carried.destination == local);
            accepted.or_else(|| {
                let mut all = fabric
                    .carried
                    .iter()
                    .map(|(ticket, carried)| (*ticket, carried));
                all.find(|(_, carried)| carried.anchor == Some(anchor))
            })
        });
        let mut answer = Caller {
            question: question.question,
            ticket: 0,
            local: [0; 16],
            peer: [0; 16],
            local_port: 0,
            peer_port: 0,
        };
        if let Some((ticket, carried)) = found {
            let (local, peer) = match carried.stream.end {
                0 => (carried.source, carried.destination),
                _ => (carried.destination, carried.source),
            };
            answer.ticket = ticket;
            (answer.local, answer.local_port) = (octets(local.ip()), local.port().into());
            (answer.peer, answer.peer_port) = (octets(peer.ip()), peer.port().into());
        }
        self.reply(id, Message::new(kind::CALLER, &answer));
        Ok(())
    }
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address
        .as_sockaddr_in()
        .map(|a| SocketAddrV4::from(*a).into());
    v4.or_else(|| {
        address
            .as_sockaddr_in6()
            .map(|a| SocketAddrV6::from(*a).into())
    })
}
