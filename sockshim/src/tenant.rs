//! This process as a tenant of the daemon: its control connection, its memory, what it announces
//! and what it is offered. Nothing here waits for the daemon (but [`look_up`], for a connection
//! inherited over exec).

use crate::conn::{self, Conn, born, phase};
use crate::io::TcpInfo;
use crate::stream::{self, Stream};
use crate::{clock, sys};
use libc::c_int;
use rdsock_shm::control::{self, Hello, Lookup, Message, Promote, Request, Verdict, kind, request};
use rdsock_shm::layout::{
    self, BELL_MAGIC, BELLS, Bell, BellBoard, ConnRecord, Counter, TENANT_MAGIC, TenantMemory,
    VERSION,
};
use rdsock_shm::lock::{self, Owner, Taken};
use rdsock_shm::queue::Putter;
use rdsock_shm::reason::{Reason, State};
use std::cell::UnsafeCell;
use std::mem::size_of;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering::*, fence};

/// Calls on a connection before it is announced.
const CALLS_TO_ANNOUNCE: u32 = 4;
/// Bytes in one call that show as well that a connection is worth it.
const BYTES_TO_ANNOUNCE: usize = 32 * 1024;
/// Milliseconds between two attempts to reach a daemon.
const RETRY_MS: u64 = 500;
/// Milliseconds that a program waits for the answer about an inherited connection.
const LOOKUP_MS: i64 = 1000;

static MEMORY: AtomicPtr<TenantMemory> = AtomicPtr::new(std::ptr::null_mut());
static BOARD: AtomicPtr<BellBoard> = AtomicPtr::new(std::ptr::null_mut());
static CONTROL: AtomicI32 = AtomicI32::new(-1);
/// A control connection of the process that forked this one: only good for ADOPT.
static INHERITED: AtomicI32 = AtomicI32::new(-1);
static MEMFDS: [AtomicI32; 2] = [AtomicI32::new(-1), AtomicI32::new(-1)];
static SEEN: AtomicU64 = AtomicU64::new(0);
static TRIED_AT: AtomicU64 = AtomicU64::new(0);
static LOCK: AtomicU64 = AtomicU64::new(0);
/// Counts attachments: a stream of an earlier one is unknown to the present daemon.
static EPOCH: AtomicU32 = AtomicU32::new(0);
static DISABLED: AtomicU32 = AtomicU32::new(0);
static BELLS_IN_USE: AtomicU64 = AtomicU64::new(0);

struct Shared<T>(UnsafeCell<T>);
// SAFETY: used under LOCK only (the path: written by the constructor only).
unsafe impl<T> Sync for Shared<T> {}
static PUTTER: Shared<Putter> = Shared(UnsafeCell::new(Putter::new()));
static PATH: Shared<[u8; 108]> = Shared(UnsafeCell::new([0; 108]));

/// What the daemon offers for a connection: the fds of a stream's memory.
#[derive(Debug)]
pub struct Offer {
    promote: Promote,
    fds: [c_int; 3],
}

impl Offer {
    fn close(self) {
        for fd in self.fds {
            close_hidden(fd);
        }
    }
}

/// Notes the daemon's address, from the environment.
pub fn start(path: Option<&std::ffi::CStr>, disabled: bool) {
    DISABLED.store(u32::from(disabled), Relaxed);
    if let Some(path) = path
        && path.to_bytes().len() < 108
    {
        // SAFETY: the constructor runs before anybody reads it.
        let place = unsafe { &mut *PATH.0.get() };
        for (to, from) in place.iter_mut().zip(path.to_bytes()) {
            *to = *from;
        }
    }
}

/// True when no connection of this process may be promoted.
pub fn is_disabled() -> bool {
    DISABLED.load(Relaxed) != 0
}

/// No connection may be promoted from now on.
pub fn disable() {
    DISABLED.store(1, Relaxed);
}

/// The tenant's lock. `None` when this thread holds it already, further up its stack: the caller
/// gives up, which is always possible.
struct Guard;

impl Guard {
    fn take() -> Option<Guard> {
        Self::take_within(u32::MAX)
    }

    /// For one who may hold the lock of an epoll instance or of a half, for which the holder of
    /// this one may wait: gives up after a while.
    fn take_soon() -> Option<Guard> {
        Self::take_within(1 << 17)
    }

    fn take_within(most: u32) -> Option<Guard> {
        let me = Owner::new(stream::pid(), sys::thread_pointer());
        let mut turns = 0_u32;
        loop {
            match lock::try_take(&LOCK, me) {
                Ok(Taken::Outer) => return Some(Guard),
                Ok(Taken::Nested) => return None,
                Err(_) => {
                    turns = turns.wrapping_add(1);
                    if turns == most && most != u32::MAX {
                        return None;
                    }
                    if turns.is_multiple_of(64) {
                        sys::sched_yield();
                    }
                    std::hint::spin_loop();
                }
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        lock::release(&LOCK, Taken::Outer);
    }
}

fn memory() -> Option<&'static TenantMemory> {
    let at = MEMORY.load(Acquire);
    // SAFETY: mapped once and never unmapped; all that changes in it is atomic.
    (!at.is_null()).then(|| unsafe { &*at })
}

/// The record of a connection, where this tenant has memory.
pub fn record(index: usize) -> Option<&'static ConnRecord> {
    memory()?.conns.get(index)
}

/// Counts an event.
#[inline]
pub fn count(counter: Counter) {
    if let Some(memory) = memory()
        && let Some(word) = memory.header.counters.get(counter as usize)
    {
        word.fetch_add(1, Relaxed);
    }
}

/// Gives out one of the tenant's bells.
pub fn take_bell() -> Option<(usize, &'static Bell)> {
    let board = BOARD.load(Acquire);
    if board.is_null() {
        return None;
    }
    loop {
        let used = BELLS_IN_USE.load(Relaxed);
        let number = used.trailing_ones() as usize;
        if number >= BELLS {
            return None;
        }
        if BELLS_IN_USE
            .compare_exchange(used, used | 1 << number, AcqRel, Relaxed)
            .is_ok()
        {
            // SAFETY: mapped once and never unmapped; a bell is made of atomics; below BELLS.
            return Some((number, unsafe {
                &*(&raw const (*board).bells).cast::<Bell>().add(number)
            }));
        }
    }
}

/// Takes a bell back.
pub fn return_bell(number: usize) {
    BELLS_IN_USE.fetch_and(!(1 << number), AcqRel);
}

/// Makes the tenant's memory and tries to reach the daemon, once, when the first TCP socket of
/// the process is used.
pub fn ensure() {
    if MEMORY.load(Relaxed).is_null()
        && !is_disabled()
        && let Some(guard) = Guard::take()
    {
        make_memory();
        attach(&guard);
    }
}

fn make_memory() {
    if !MEMORY.load(Relaxed).is_null() {
        return;
    }
    let Some((board, board_fd)) = make_one(c"rdsock-bells", size_of::<BellBoard>()) else {
        return;
    };
    let Some((memory, memory_fd)) = make_one(c"rdsock-tenant", size_of::<TenantMemory>()) else {
        sys::close(board_fd);
        return;
    };
    let (board, memory) = (board.cast::<BellBoard>(), memory.cast::<TenantMemory>());
    // SAFETY: fresh mappings of these sizes, that nobody else knows yet.
    unsafe {
        (*board).magic = BELL_MAGIC;
        (*board).version = VERSION;
        (*board).size = size_of::<BellBoard>() as u32;
        (*memory).header.magic = TENANT_MAGIC;
        (*memory).header.version = VERSION;
        (*memory).header.size = size_of::<TenantMemory>() as u32;
    }
    for (place, fd) in MEMFDS.iter().zip([memory_fd, board_fd]) {
        place.store(fd, Relaxed);
    }
    BOARD.store(board, Release);
    MEMORY.store(memory, Release);
}

fn make_one(name: &std::ffi::CStr, size: usize) -> Option<(*mut u8, c_int)> {
    // To grow a file beyond this limit would raise SIGXFSZ.
    if sys::limit_of(libc::RLIMIT_FSIZE) < size as u64 {
        return None;
    }
    let fd = sys::memfd(name, libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) as c_int;
    if fd < 0 {
        return None;
    }
    let fd = hide(fd);
    sys::ftruncate(fd, size);
    sys::fcntl(
        fd,
        libc::F_ADD_SEALS,
        (libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL) as usize,
    );
    match sys::map(fd, size) {
        Some(at) => Some((at, fd)),
        None => {
            conn::set_kind(fd, conn::Kind::Other);
            sys::close(fd);
            None
        }
    }
}

/// Moves a descriptor of the shim's own out of the way of the program's numbers.
pub fn hide(fd: c_int) -> c_int {
    let base = (sys::limit_of(libc::RLIMIT_NOFILE).min(1024) as usize).saturating_sub(64);
    let high = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, base) as c_int;
    let hidden = if high >= 0 {
        sys::close(fd);
        high
    } else {
        fd
    };
    conn::set_kind(hidden, conn::Kind::Internal);
    hidden
}

/// Closes a descriptor of the shim's own.
pub fn close_hidden(fd: c_int) {
    conn::set_kind(fd, conn::Kind::Other);
    sys::close(fd);
}

/// The program wants a number that the shim uses: moves out of its way.
pub fn move_hidden(fd: c_int) {
    let new = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, fd as usize + 1) as c_int;
    if new < 0 {
        return;
    }
    conn::set_kind(new, conn::Kind::Internal);
    for place in MEMFDS.iter().chain([&CONTROL, &INHERITED]) {
        let _ = place.compare_exchange(fd, new, AcqRel, Relaxed);
    }
    crate::epoll::moved_inner(fd, new);
    close_hidden(fd);
}

fn attach(_guard: &Guard) {
    let now = clock::nanoseconds();
    let tried = TRIED_AT.load(Relaxed);
    if CONTROL.load(Relaxed) >= 0 || (tried != 0 && now.wrapping_sub(tried) < RETRY_MS * 1_000_000)
    {
        return;
    }
    TRIED_AT.store(now, Relaxed);
    let Some(memory) = memory() else { return };
    let Some(fd) = adopted().or_else(connected) else {
        return;
    };
    let fd = hide(fd);
    let fds = [MEMFDS[0].load(Relaxed), MEMFDS[1].load(Relaxed)];
    let hello = Hello {
        memory_size: size_of::<TenantMemory>() as u64,
        bell_size: size_of::<BellBoard>() as u64,
    };
    // A fresh start for the queue: requests that an earlier daemon did not take are void.
    // SAFETY: the lock is held.
    unsafe { *PUTTER.0.get() = Putter::new() };
    for slot in &memory.queue {
        slot.sequence.store(0, Relaxed);
    }
    SEEN.store(memory.header.messages.load(Relaxed), Relaxed);
    if send_with(fd, &Message::new(kind::HELLO, &hello), &fds) < 0 {
        close_hidden(fd);
        return;
    }
    EPOCH.fetch_add(1, AcqRel);
    CONTROL.store(fd, Release);
    clock::calibrate();
}

/// A control connection through the one of the process that forked this one: works after chroot
/// and after a change of user, too.
fn adopted() -> Option<c_int> {
    let inherited = INHERITED.swap(-1, AcqRel);
    if inherited < 0 {
        return None;
    }
    let pair = sys::socketpair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
    let sent = pair.is_some_and(|[_, theirs]| {
        send_with(inherited, &Message::empty(kind::ADOPT), &[theirs]) >= 0
    });
    close_hidden(inherited);
    let [ours, theirs] = pair?;
    sys::close(theirs);
    if !sent {
        sys::close(ours);
        return None;
    }
    Some(ours)
}

fn connected() -> Option<c_int> {
    // SAFETY: written by the constructor only.
    let configured = unsafe { &*PATH.0.get() };
    let fd = sys::socket(
        libc::AF_UNIX,
        libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        0,
    ) as c_int;
    if fd < 0 {
        return None;
    }
    let mut address = libc::sockaddr_un {
        sun_family: libc::AF_UNIX as u16,
        sun_path: [0; 108],
    };
    let mut reach = |path: &[u8]| {
        address.sun_path = [0; 108];
        for (to, from) in address.sun_path.iter_mut().zip(path) {
            *to = *from as libc::c_char;
        }
        sys::connect_unix(fd, &address, size_of::<libc::sockaddr_un>()) == 0
    };
    let reached = if configured[0] != 0 {
        reach(configured)
    } else {
        reach(b"/run/rdsock/rdsockd.sock\0")
    };
    if !reached {
        sys::close(fd);
        return None;
    }
    Some(fd)
}

fn send_with(socket: c_int, message: &Message, fds: &[c_int]) -> isize {
    let bytes = message.as_bytes();
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr() as *mut _,
        iov_len: bytes.len(),
    };
    let mut room = [0_u64; 8];
    // SAFETY: a header made of integers and pointers; zeroes are a value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    if !fds.is_empty() && fds.len() <= 3 {
        header.msg_control = room.as_mut_ptr().cast();
        // SAFETY: the room is aligned and large enough for three fds; the CMSG macros stay in it.
        unsafe {
            header.msg_controllen = libc::CMSG_SPACE(size_of_val(fds) as u32) as _;
            let item = libc::CMSG_FIRSTHDR(&header);
            (*item).cmsg_level = libc::SOL_SOCKET;
            (*item).cmsg_type = libc::SCM_RIGHTS;
            (*item).cmsg_len = libc::CMSG_LEN(size_of_val(fds) as u32) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr(), libc::CMSG_DATA(item).cast(), fds.len());
        }
    }
    // SAFETY: the header points to the locals above.
    unsafe { sys::sendmsg(socket, &header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
}

/// The daemon is gone: what was announced is announced anew once there is another.
fn detach() {
    let control = CONTROL.swap(-1, AcqRel);
    if control >= 0 {
        close_hidden(control);
    }
    conn::each(|index, conn| {
        if conn
            .phase
            .compare_exchange(phase::ANNOUNCED, phase::KERNEL, AcqRel, Relaxed)
            .is_ok()
        {
            conn.calls.store(0, Relaxed);
            conn.tell(index, State::Kernel, Reason::NoDaemon);
        }
    });
}

fn has_hung_up(control: c_int) -> bool {
    sys::poll_one(control, libc::POLLIN, 0) as i16 & libc::POLLHUP != 0
}

/// Puts a request; the daemon is kicked when it sleeps. The lock is held.
fn put(_guard: &Guard, request: &Request) -> bool {
    let Some(memory) = memory() else { return false };
    let control = CONTROL.load(Relaxed);
    if control < 0 {
        return false;
    }
    // SAFETY: the lock is held.
    if !unsafe { &mut *PUTTER.0.get() }.put(&memory.queue, request) {
        count(Counter::QueueFull);
        if has_hung_up(control) {
            detach();
        }
        return false;
    }
    fence(SeqCst);
    if memory.header.daemon_sleeps.load(Relaxed) != 0 {
        memory.header.daemon_sleeps.store(0, Relaxed);
        let sent = send_with(control, &Message::empty(kind::KICK), &[]);
        if sent < 0 && sent != -(libc::EAGAIN as isize) {
            detach();
            return false;
        }
    }
    true
}

fn blank(what: u32, index: usize, conn: &Conn) -> Request {
    Request {
        what,
        conn: index as u32,
        generation: conn.generation.load(Relaxed),
        fd: conn.fd.load(Relaxed),
        cookie: 0,
        netns: 0,
        stream_id: 0,
        local: [0; 16],
        peer: [0; 16],
        local_port: 0,
        peer_port: 0,
        active: 0,
        extra: 0,
        reserved: [0; 4],
    }
}

/// After a kernel call on a connection: announces it when it has shown that it lasts, and follows
/// an offer that waits.
#[inline]
pub fn after_call(index: usize, conn: &'static Conn, fd: c_int, bytes: isize) {
    if bytes <= 0 {
        return;
    }
    let step = if bytes >= BYTES_TO_ANNOUNCE as isize {
        CALLS_TO_ANNOUNCE
    } else {
        1
    };
    let calls = conn.calls.load(Relaxed) + step;
    conn.calls.store(calls, Relaxed);
    match conn.phase.load(Relaxed) {
        phase::KERNEL if calls >= CALLS_TO_ANNOUNCE => announce(index, conn, fd),
        phase::ANNOUNCED => {
            look();
            if conn.offered.load(Relaxed) != 0
                && let Some(guard) = Guard::take()
            {
                // SAFETY: the lock is held.
                if let Some(offer) = unsafe { conn.take_offer() } {
                    follow(&guard, offer);
                }
            }
        }
        _ => {}
    }
}

#[cold]
fn announce(index: usize, conn: &'static Conn, fd: c_int) {
    if is_disabled() {
        conn.keep_on_kernel(index, Reason::Disabled);
        return;
    }
    // Tried again with growing distance.
    if !conn.calls.load(Relaxed).is_power_of_two()
        && !conn.calls.load(Relaxed).is_multiple_of(1024)
        && conn.reason.load(Relaxed) != Reason::Young as u32
    {
        return;
    }
    let (Some(local), Some(peer)) = (sys::name_of(fd, false), sys::name_of(fd, true)) else {
        return;
    };
    let (Some((local, local_port)), Some((peer, peer_port))) = (ip_of(&local), ip_of(&peer)) else {
        conn.keep_on_kernel(index, Reason::Call);
        return;
    };
    const SO_NETNS_COOKIE: c_int = 71;
    let Some(cookie) = sys::getsockopt(fd, libc::SOL_SOCKET, libc::SO_COOKIE) else {
        return;
    };
    let netns = sys::getsockopt(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE).unwrap_or(0);
    let Some(guard) = Guard::take() else { return };
    make_memory();
    attach(&guard);
    if conn
        .phase
        .compare_exchange(phase::KERNEL, phase::ANNOUNCED, AcqRel, Relaxed)
        .is_err()
    {
        return;
    }
    conn.generation.fetch_add(1, Relaxed);
    conn.cookie.store(cookie, Relaxed);
    let request = Request {
        fd,
        cookie,
        netns,
        local,
        peer,
        local_port,
        peer_port,
        active: conn.born.load(Relaxed).min(born::UNKNOWN),
        extra: conn.shared.load(Relaxed),
        ..blank(request::ANNOUNCE, index, conn)
    };
    if put(&guard, &request) {
        conn.tell(index, State::Announced, Reason::PeerUnknown);
    } else {
        conn.phase.store(phase::KERNEL, Release);
        conn.tell(index, State::Kernel, Reason::NoDaemon);
    }
}

/// Address (IPv4 as v4-mapped) and port of a name; `None` for another family.
fn ip_of(name: &libc::sockaddr_storage) -> Option<([u8; 16], u32)> {
    let at = name as *const libc::sockaddr_storage;
    match name.ss_family as c_int {
        libc::AF_INET => {
            // SAFETY: the storage holds an address of this family.
            let v4 = unsafe { &*at.cast::<libc::sockaddr_in>() };
            let [a, b, c, d] = v4.sin_addr.s_addr.to_ne_bytes();
            Some((
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d],
                u16::from_be(v4.sin_port).into(),
            ))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { &*at.cast::<libc::sockaddr_in6>() };
            Some((v6.sin6_addr.s6_addr, u16::from_be(v6.sin6_port).into()))
        }
        _ => None,
    }
}

/// Reads what the daemon has sent, if it has sent something.
#[inline]
pub fn look() {
    if let Some(memory) = memory()
        && memory.header.messages.load(Relaxed) != SEEN.load(Relaxed)
        && let Some(guard) = Guard::take()
    {
        read_messages(&guard);
    }
}

#[cold]
fn read_messages(guard: &Guard) {
    let Some(memory) = memory() else { return };
    let control = CONTROL.load(Relaxed);
    if control < 0 {
        return;
    }
    SEEN.store(memory.header.messages.load(Acquire), Relaxed);
    let mask = sys::block_signals();
    loop {
        let mut bytes = [0_u8; 256];
        let (got, fds) = receive_with(control, &mut bytes, 0);
        if got <= 0 {
            if got == 0 || got == -(libc::ECONNRESET as isize) {
                detach();
            }
            break;
        }
        let fds_of = |fds: [c_int; 3]| {
            fds.into_iter().filter(|fd| *fd >= 0).for_each(|fd| {
                sys::close(fd);
            })
        };
        let Some((message, body)) = bytes
            .get(..got as usize)
            .and_then(|bytes| control::parse(bytes).ok())
        else {
            fds_of(fds);
            continue;
        };
        match (
            message,
            control::from_bytes::<Promote>(body),
            control::from_bytes::<Verdict>(body),
        ) {
            (kind::PROMOTE, Some(promote), _) if fds.iter().all(|fd| *fd >= 0) => {
                follow(guard, Offer { promote, fds });
                continue;
            }
            (kind::VERDICT, _, Some(verdict)) => take_verdict(&verdict),
            (kind::REFUSED, ..) => {
                disable();
                sys::warn(
                    "the daemon refused this program (see its log); connections stay on kernel TCP",
                );
            }
            _ => {}
        }
        fds_of(fds);
    }
    sys::restore_signals(mask);
}

fn receive_with(socket: c_int, bytes: &mut [u8], flags: c_int) -> (isize, [c_int; 3]) {
    let mut fds = [-1; 3];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut room = [0_u64; 8];
    // SAFETY: a header made of integers and pointers; zeroes are a value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    header.msg_control = room.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&room) as _;
    // SAFETY: the header points to the locals above.
    let got = unsafe {
        sys::recvmsg(
            socket,
            &mut header,
            libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT | flags,
        )
    };
    if got <= 0 {
        return (got, fds);
    }
    // SAFETY: the kernel filled the room; the macros stay inside it.
    unsafe {
        let item = libc::CMSG_FIRSTHDR(&header);
        if !item.is_null()
            && (*item).cmsg_level == libc::SOL_SOCKET
            && (*item).cmsg_type == libc::SCM_RIGHTS
        {
            let count = ((*item).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize) / 4;
            for i in 0..count {
                let fd = libc::CMSG_DATA(item)
                    .cast::<c_int>()
                    .add(i)
                    .read_unaligned();
                match fds.get_mut(i) {
                    Some(place) => *place = fd,
                    None => {
                        sys::close(fd);
                    }
                }
            }
        }
    }
    (got, fds)
}

fn take_verdict(verdict: &Verdict) {
    let (Some(held), Some(reason)) = (
        conn::by_index(verdict.conn as usize),
        Reason::from_code(verdict.reason),
    ) else {
        return;
    };
    let conn = held.conn;
    if conn.generation.load(Relaxed) != verdict.generation {
        return;
    }
    if reason == Reason::Shared {
        // Asked again later: the other holder may be about to close.
        if conn
            .phase
            .compare_exchange(phase::ANNOUNCED, phase::KERNEL, AcqRel, Relaxed)
            .is_ok()
        {
            conn.tell(held.index, State::Kernel, reason);
        }
    } else if conn.phase.load(Relaxed) == phase::ANNOUNCED {
        conn.tell(held.index, State::Announced, reason);
    }
}

/// Maps an offered stream, or keeps the offer until the kernel calls under way have ended.
fn follow(guard: &Guard, offer: Offer) {
    let Some(held) = conn::by_index(offer.promote.conn as usize) else {
        offer.close();
        return;
    };
    let mask = sys::block_signals();
    follow_with_signals_blocked(guard, offer, &held);
    sys::restore_signals(mask);
}

fn follow_with_signals_blocked(guard: &Guard, offer: Offer, held: &conn::Use) {
    let Promote {
        generation,
        stream_id,
        ..
    } = offer.promote;
    let (index, conn) = (held.index, held.conn);
    let declined = Request {
        stream_id,
        generation,
        ..blank(request::DECLINED, index, conn)
    };
    if crate::epoll::declines(conn)
        || conn.generation.load(Relaxed) != generation
        || conn
            .phase
            .compare_exchange(phase::ANNOUNCED, phase::INSTALLING, SeqCst, Relaxed)
            .is_err()
    {
        offer.close();
        put(guard, &declined);
        return;
    }
    if conn.in_rx.load(SeqCst) != 0 || conn.in_tx.load(SeqCst) != 0 {
        conn.phase.store(phase::ANNOUNCED, SeqCst);
        // SAFETY: the lock is held.
        unsafe {
            conn.set_offer(Offer {
                fds: offer.fds.map(hide),
                ..offer
            })
        };
        return;
    }
    match install(conn, &offer.promote, offer.fds) {
        Ok(stream) => {
            // SAFETY: the phase is INSTALLING, set above.
            unsafe { conn.set_stream(stream) };
            conn.epoch.store(EPOCH.load(Relaxed), Relaxed);
            conn.phase.store(phase::MAPPED, SeqCst);
            conn.tell(index, State::Rings, Reason::None);
            if let Some(record) = record(index) {
                record.stream_id.store(stream_id, Relaxed);
            }
            count(Counter::Promoted);
            put(
                guard,
                &Request {
                    stream_id,
                    generation,
                    ..blank(request::MAPPED, index, conn)
                },
            );
            crate::epoll::promoted(held);
        }
        Err(reason) => {
            conn.phase.store(phase::NEVER, SeqCst);
            conn.tell(index, State::Kernel, reason);
            put(guard, &declined);
        }
    }
    offer.close();
}

/// Maps a stream, and makes the receiving half ready: the other end may switch from then on.
fn install(conn: &Conn, promote: &Promote, fds: [c_int; 3]) -> Result<Stream, Reason> {
    let fd = conn.fd.load(Relaxed);
    let stream = Stream::map(
        fds,
        promote.ring_size,
        promote.data_offset,
        promote.end,
        promote.stream_id,
    )
    .ok_or(Reason::NoMemory)?;
    if stream.end().installed.load(Acquire) != 0 {
        // Inherited over exec: everything stands in the end page.
        stream.free_own_locks();
        stream
            .out()
            .producer
            .barriers
            .store(stream::has_barriers(), Relaxed);
        own_options(conn, fd);
        return Ok(stream);
    }
    match make_ready(conn, &stream, fd) {
        Some(()) => Ok(stream),
        None => {
            stream.unmap();
            Err(Reason::NotQuiet)
        }
    }
}

/// Finds the position of the receiving half, and publishes that it is ready.
fn make_ready(conn: &Conn, stream: &Stream, fd: c_int) -> Option<()> {
    if TcpInfo::of(fd)?.state != TcpInfo::ESTABLISHED {
        return None;
    }
    let position = settle(fd)?;
    own_options(conn, fd);
    let flags = sys::fcntl(fd, libc::F_GETFL, 0);
    let nonblocking = flags & libc::O_NONBLOCK as isize != 0;
    let end = stream.end();
    end.installed.store(1, Release);
    end.nonblock.store(u32::from(nonblocking), Relaxed);
    stream.rx().tail.store(position, Relaxed);
    stream.rx().phase.store(layout::phase::SWITCHING, Release);
    // Whoever sleeps on the anchor already must be woken by the first byte on the ring.
    let incoming = stream.incoming();
    incoming.bytes.want.fetch_or(layout::want::WAKE, SeqCst);
    stream
        .out()
        .producer
        .barriers
        .store(stream::has_barriers(), Relaxed);
    incoming.consumer.ready.store(1, Release);
    Some(())
}

/// The receive position, read until it stands still for the length of two calls.
fn settle(fd: c_int) -> Option<u64> {
    for _ in 0..1000 {
        let before = TcpInfo::of(fd)?.received;
        let unread = sys::ioctl_int(fd, libc::FIONREAD)? as u64;
        if TcpInfo::of(fd)?.received == before {
            return before.checked_sub(unread);
        }
    }
    None
}

/// The anchor sends single bytes from now on, which must leave at once.
fn own_options(conn: &Conn, fd: c_int) {
    let on = |name| {
        sys::getsockopt::<c_int>(fd, libc::IPPROTO_TCP, name).is_some_and(|value| value != 0)
    };
    let options = u32::from(on(libc::TCP_NODELAY)) | u32::from(on(libc::TCP_CORK)) << 1;
    conn.options.store(options, Relaxed);
    if options & 2 != 0 {
        sys::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_CORK, &0_i32);
    }
    sys::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, &1_i32);
}

/// The connection is closed, or may no longer be promoted.
pub fn withdraw(index: usize, conn: &Conn) {
    if let Some(guard) = Guard::take() {
        // SAFETY: the lock is held.
        if let Some(offer) = unsafe { conn.take_offer() } {
            offer.close();
        }
        put(&guard, &blank(request::CLOSED, index, conn));
    }
}

/// This process no longer holds a stream.
pub fn stream_closed(index: usize, conn: &Conn, stream: &Stream) {
    stream.end().holders.fetch_sub(1, AcqRel);
    if let Some(guard) = Guard::take() {
        put(
            &guard,
            &Request {
                stream_id: stream.id,
                active: stream.end_number(),
                ..blank(request::CLOSED, index, conn)
            },
        );
    }
}

/// A stream was demoted or reset.
pub fn stream_left(fd: c_int, stream: &Stream, state: State, reason: Reason) {
    let Some(held) = conn::of(fd) else { return };
    held.conn.tell(held.index, state, reason);
    if let Some(guard) = Guard::take_soon() {
        put(
            &guard,
            &Request {
                stream_id: stream.id,
                extra: reason as u32,
                ..blank(request::LEFT, held.index, held.conn)
            },
        );
    }
}

/// Before fork: nothing of the tenant's may be half done. True when the lock was taken.
pub fn before_fork() -> bool {
    let Some(guard) = Guard::take() else {
        return false;
    };
    note_shared(&guard);
    conn::each(|_, conn| {
        if let Some(stream) = conn.stream() {
            stream.end().holders.fetch_add(1, AcqRel);
        }
    });
    std::mem::forget(guard);
    true
}

/// Before a program is spawned or executed: it may get any connection, so what is not promoted yet
/// must be looked at again.
pub fn before_exec() {
    if let Some(guard) = Guard::take() {
        note_shared(&guard);
    }
}

fn note_shared(guard: &Guard) {
    conn::each(|index, conn| {
        conn.shared.store(1, Relaxed);
        if conn.phase.load(Relaxed) != phase::ANNOUNCED {
            return;
        }
        // An answer to an announcement of before the fork must not be followed: the child would
        // not know.
        // SAFETY: the lock is held.
        if let Some(offer) = unsafe { conn.take_offer() } {
            offer.close();
        }
        conn.generation.fetch_add(1, Relaxed);
        conn.phase.store(phase::KERNEL, Relaxed);
        conn.calls.store(1, Relaxed);
        conn.tell(index, State::Kernel, Reason::Shared);
        put(guard, &blank(request::CLOSED, index, conn));
    });
}

/// After fork, in the parent. The child may not exist: then the counts of holders are one high,
/// and the ends are only seen by the kernel's own end of file.
pub fn after_fork_in_parent() {
    lock::release(&LOCK, Taken::Outer);
}

/// After fork, in the child: a tenant of its own, when it first needs to be one.
pub fn after_fork_in_child() {
    LOCK.store(0, Relaxed);
    let control = CONTROL.swap(-1, Relaxed);
    let inherited = INHERITED.swap(-1, Relaxed);
    let keep = if control >= 0 { control } else { inherited };
    if inherited >= 0 && inherited != keep {
        close_hidden(inherited);
    }
    INHERITED.store(keep, Relaxed);
    for place in &MEMFDS {
        let fd = place.swap(-1, Relaxed);
        if fd >= 0 {
            close_hidden(fd);
        }
    }
    // The mappings are the parent's; they stay, since streams of the parent's may ring its bells.
    MEMORY.store(std::ptr::null_mut(), Relaxed);
    BOARD.store(std::ptr::null_mut(), Relaxed);
    BELLS_IN_USE.store(0, Relaxed);
    TRIED_AT.store(0, Relaxed);
    let mut streams = false;
    conn::each(|_, conn| {
        conn.users.store(0, Relaxed);
        conn.in_rx.store(0, Relaxed);
        conn.in_tx.store(0, Relaxed);
        streams |= conn.stream().is_some();
    });
    if streams {
        hold_inherited();
    }
}

/// Tells the daemon which streams this process has by inheritance.
fn hold_inherited() {
    ensure();
    conn::each(|index, conn| {
        if let Some(stream) = conn.stream() {
            conn.tell(index, State::Rings, Reason::None);
            // The control connection came from the parent's, so it is the same daemon.
            conn.epoch.store(EPOCH.load(Relaxed), Relaxed);
            if let Some(record) = record(index) {
                record.stream_id.store(stream.id, Relaxed);
            }
            if let Some(guard) = Guard::take() {
                put(
                    &guard,
                    &Request {
                        stream_id: stream.id,
                        active: stream.end_number(),
                        ..blank(request::HOLDS, index, conn)
                    },
                );
            }
        }
    });
}

/// Asks whether an inherited socket is a stream, and maps it if it is. Waits for the answer.
pub fn look_up(index: usize, fd: c_int) {
    ensure();
    let Some(held) = conn::by_index(index) else {
        return;
    };
    let Some(cookie) = sys::getsockopt(fd, libc::SOL_SOCKET, libc::SO_COOKIE) else {
        return;
    };
    let control = CONTROL.load(Relaxed);
    if control < 0 {
        return;
    }
    held.conn.generation.fetch_add(1, Relaxed);
    held.conn.cookie.store(cookie, Relaxed);
    let generation = held.conn.generation.load(Relaxed);
    held.conn.phase.store(phase::ANNOUNCED, Release);
    let question = Lookup {
        conn: index as u32,
        generation,
        cookie,
        fd,
        reserved: 0,
    };
    if send_with(control, &Message::new(kind::LOOKUP, &question), &[]) > 0 {
        let end = clock::nanoseconds() + LOOKUP_MS as u64 * 1_000_000;
        while clock::nanoseconds() < end && held.conn.phase.load(Acquire) == phase::ANNOUNCED {
            if sys::poll_one(control, libc::POLLIN, LOOKUP_MS) <= 0 {
                break;
            }
            let mut bytes = [0_u8; 256];
            let (got, copies) = receive_with(control, &mut bytes, libc::MSG_PEEK);
            for fd in copies.into_iter().filter(|fd| *fd >= 0) {
                sys::close(fd);
            }
            let not_found = got > 0
                && bytes
                    .get(..got as usize)
                    .and_then(|bytes| control::parse(bytes).ok())
                    .is_some_and(|(message, _)| message == kind::NOT_FOUND);
            if let Some(guard) = Guard::take() {
                read_messages(&guard);
            }
            if not_found {
                break;
            }
        }
    }
    let _ = held
        .conn
        .phase
        .compare_exchange(phase::ANNOUNCED, phase::KERNEL, AcqRel, Relaxed);
}

/// True when the daemon can be asked for this connection's stream by a program that this one turns
/// into.
pub fn is_known(conn: &Conn) -> bool {
    let control = CONTROL.load(Relaxed);
    conn.epoch.load(Relaxed) == EPOCH.load(Relaxed) && control >= 0 && !has_hung_up(control)
}
