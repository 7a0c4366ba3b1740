//! Connections between nodes, as they come to be. The local daemon stands in for the other end: the
//! program's socket is connected to it over loopback, and from then on it is a peer like any other
//! with a shim. Only the addresses differ, and the program is told the true ones.

use crate::address::Address;
use crate::conn::{Use, born, phase};
use crate::tcp_info::TcpInfo;
use crate::tenant::Answerer;
use crate::{clock, identity, real, sys, tenant};
use libc::{c_int, sockaddr, sockaddr_storage, socklen_t};
use rdsock_shm::control::{Between, FABRIC_CLASS_V6, Reached};
use rdsock_shm::reason::{Reason, State};
use std::sync::atomic::Ordering::*;

/// `connect` of a socket to an address of another node. `None` when it is the kernel's, and nothing
/// was done. Else its result, with errno.
///
/// # Safety
/// As `connect(2)`.
pub unsafe fn connect(
    held: &Use,
    fd: c_int,
    address: *const sockaddr,
    len: socklen_t,
) -> Option<c_int> {
    if !tenant::may_lead_away() {
        return None;
    }
    // SAFETY: as the caller says.
    let (family, peer) = unsafe { Address::given(address, len)? };
    if peer.is_any() || !tenant::lead_to(&peer.ip) || identity::is_foreign() {
        return None;
    }
    let end = tenant::end_of_wait();
    let conn = held.conn;
    if TcpInfo::of(fd)?.state != TcpInfo::CLOSE {
        return None;
    }
    if conn.phase.load(Acquire) != phase::KERNEL || !conn.names.claim() {
        return None;
    }
    let reached = match ask(fd, family, peer, end) {
        Ok((local, reached, answerer)) => {
            let way = (&reached, answerer);
            match through_daemon(held, fd, family, local, peer, way) {
                Some(result) => return Some(result),
                None => Reason::None,
            }
        }
        Err(reason) => reason,
    };
    conn.names.forget();
    // SAFETY: as the caller says.
    let result = unsafe { real::connect(fd, address, len) };
    if is_under_way(result) {
        keep_on_kernel(held, reached);
    }
    Some(result)
}

/// A connection to another node that the kernel makes stays the kernel's.
fn keep_on_kernel(held: &Use, reason: Reason) {
    let error = real::errno();
    match reason {
        Reason::None => {}
        Reason::NoDaemon => held.conn.tell(held.index, State::Kernel, reason),
        _ => tenant::keep_on_kernel(held.index, held.conn, reason),
    }
    real::set_errno(error);
}

/// True when a `connect` has succeeded, or goes on.
fn is_under_way(result: c_int) -> bool {
    result == 0 || matches!(real::errno(), libc::EINPROGRESS | libc::EINTR)
}

/// Asks the daemon, for a socket that is bound by then: its own address, the way, and who has told it. `Err` says why
/// the connection is the kernel's.
fn ask(
    fd: c_int,
    family: c_int,
    peer: Address,
    end: u64,
) -> Result<(Address, Reached, Answerer), Reason> {
    let local = bound(fd, family).ok_or(Reason::None)?;
    let question = Between {
        question: 0,
        netns: sys::network_namespace(fd),
        local: if local.is_any() { [0; 16] } else { local.ip },
        peer: peer.ip,
        local_port: local.port.into(),
        peer_port: peer.port.into(),
        fd,
        reserved: 0,
    };
    let (reached, answerer) = tenant::reach(question, end).ok_or(Reason::NoDaemon)?;
    if reached.ticket == 0 {
        return Err(Reason::from_code(reached.reason).unwrap_or(Reason::None));
    }
    let local = Address {
        ip: reached.local,
        port: local.port,
    };
    Ok((local, reached, answerer))
}

/// The address and port of a socket of this family, which is bound to any if it is to none: the other
/// end is told its port. `None` where the kernel refuses or gives no port.
fn bound(fd: c_int, family: c_int) -> Option<Address> {
    let own = || -> Option<Address> {
        let name = sys::name_of(fd, false)?;
        (name.ss_family as c_int == family).then(|| Address::of(&name))?
    };
    let local = own()?;
    if local.port != 0 {
        return Some(local);
    }
    if !local.is_any() {
        return None;
    }
    let (name, len) = local.name(family)?;
    if sys::bind(fd, &name, len) < 0 {
        return None;
    }
    own().filter(|local| local.port != 0)
}

/// Milliseconds that a `connect` waits for its anchor, at most, where it would not wait itself.
const ESTABLISHED_WITHIN: i64 = 20;

/// Connects the anchor to the daemon. `None` when that fails at once, or when it is not known to be the daemon that it is connected to: by its end,
/// somebody else may have got its port.
fn through_daemon(
    held: &Use,
    fd: c_int,
    family: c_int,
    local: Address,
    peer: Address,
    (reached, answerer): (&Reached, Answerer),
) -> Option<c_int> {
    let conn = held.conn;
    let anchor = Address {
        ip: reached.anchor,
        port: u16::try_from(reached.anchor_port).ok()?,
    };
    let (anchor, len) = anchor.name(family)?;
    local.name(family)?;
    let result = connect_to(fd, &anchor, len);
    let error = real::errno();
    if !is_under_way(result) {
        return None;
    }
    let state = || TcpInfo::of(fd).map(|info| info.state);
    if state() == Some(TcpInfo::SYN_SENT) {
        // Over loopback it is there at once, where cores have time.
        sys::poll_one(fd, libc::POLLOUT, ESTABLISHED_WITHIN);
    }
    if result != 0 && state() == Some(TcpInfo::CLOSE) {
        // Over loopback the refusal is there already, and this call fetches it.
        if connect_to(fd, &anchor, len) != 0 {
            return None;
        }
    }
    // In this order. Where the daemon has no room for it yet: by when it has, the port may be another's.
    if state() == Some(TcpInfo::SYN_SENT) || !answerer.is_there() {
        disconnect(fd);
        return None;
    }
    conn.names.tell(local, peer, reached.ticket);
    conn.born.store(born::ACTIVE, Release);
    tenant::announce_now(held.index, conn, fd);
    real::set_errno(error);
    Some(result)
}

/// As a socket that was never connected, to be connected anew.
fn disconnect(fd: c_int) {
    // SAFETY: zeroes are a value of it: an address of the family AF_UNSPEC.
    let nowhere: sockaddr_storage = unsafe { std::mem::zeroed() };
    connect_to(fd, &nowhere, size_of::<sockaddr>() as socklen_t);
}

fn connect_to(fd: c_int, name: &sockaddr_storage, len: socklen_t) -> c_int {
    // SAFETY: the name is valid for reads of its length.
    unsafe { real::connect(fd, (name as *const sockaddr_storage).cast(), len) }
}

/// Who is at the other end of a connection that the program has not made itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Whom the kernel says.
    Kernel,
    /// A program on another node, at this address.
    Far(Address),
    /// A program on another node, and the daemon does not say which: the kernel's address would be
    /// taken for one of this host.
    Unknown,
}

/// Nanoseconds to wait for the daemon, which has made the connection.
const PATIENCE: u64 = 1_000_000_000;

/// Has the daemon made this connection, from `peer`, on behalf of a program on another node?
fn is_daemons(fd: c_int, peer: &Address) -> bool {
    /// Bits that TCP itself uses.
    const CONGESTION: u8 = 0b11;
    let is_marked =
        || sys::traffic_class(fd).map(|class| class & !CONGESTION) == Some(FABRIC_CLASS_V6);
    peer.may_be_daemons() && (!peer.is_v6_loopback() || tenant::may_be_reached() && is_marked())
}

/// A connection was accepted, which comes from `peer` as far as the kernel has said: where the daemon made it on behalf of a program on another
/// node, the program is told that one's address from now on. `held` is `None` where this process does not follow it.
pub fn accepted(held: Option<&Use>, fd: c_int, peer: Option<Address>) -> Origin {
    let peer = peer.or_else(|| Address::of(&sys::name_of(fd, true)?));
    if !peer.is_some_and(|peer| is_daemons(fd, &peer)) {
        return Origin::Kernel;
    }
    match held.and_then(|held| learn_names(held, fd)) {
        Some(peer) => Origin::Far(peer),
        None => Origin::Unknown,
    }
}

/// Does a connection that the program has not made itself, and whose `peer` the kernel says, come from another node, of which nobody has said
/// which? The program would take that for a connection of this host.
pub fn is_nameless(held: &Use, fd: c_int, peer: Option<Address>) -> bool {
    held.conn.born.load(Relaxed) != born::ACTIVE
        && !held.conn.names.are_told()
        && peer.is_some_and(|peer| is_daemons(fd, &peer))
}

/// A connection was got from another program, by exec, and has no stream (yet).
pub fn inherited(held: &Use, fd: c_int) {
    let peer = sys::name_of(fd, true).and_then(|name| Address::of(&name));
    if tenant::may_lead_away() && peer.is_some_and(|peer| peer.is_loopback()) {
        learn_names(held, fd);
    }
}

/// Asks the daemon whose connection this is, and keeps the answer; the peer. `None` when it is not
/// the daemon's, or that does not answer.
fn learn_names(held: &Use, fd: c_int) -> Option<Address> {
    let name = sys::name_of(fd, true)?;
    let peer = Address::of(&name)?;
    let local = Address::of(&sys::name_of(fd, false)?)?;
    let question = Between {
        question: 0,
        netns: sys::network_namespace(fd),
        local: local.ip,
        peer: peer.ip,
        local_port: local.port.into(),
        peer_port: peer.port.into(),
        fd,
        reserved: 0,
    };
    let caller = tenant::who_is(question, clock::nanoseconds() + PATIENCE)?;
    let address = |ip, port: u32| {
        let port = u16::try_from(port).ok()?;
        Some(Address { ip, port })
    };
    let far = address(caller.peer, caller.peer_port)?;
    let own = address(caller.local, caller.local_port)?;
    let family = name.ss_family.into();
    if caller.ticket == 0
        || far.name(family).is_none()
        || own.name(family).is_none()
        || !held.conn.names.claim()
    {
        return None;
    }
    held.conn.names.tell(own, far, caller.ticket);
    tenant::announce_now(held.index, held.conn, fd);
    Some(far)
}
