//! The control connection: where the daemon is, how it is reached, and what becomes of the
//! connections when it is gone.

use super::link::{PATH_ROOM, link};
use super::listeners::{is_any_told, tell_all};
use super::lock::Guard;
use super::memory::{self, make_memory, may_write};
use super::messages::{await_message, read_messages, send_with};
use super::requests::{empty_queue, tell_untold};
use super::routes::may_lead_away;
use crate::conn::{self, Conn, Kind, phase};
use crate::hidden::{close_hidden, hide};
use crate::{clock, identity, sys};
use libc::c_int;
use rdsock_shm::control::{
    Attached, Hello, MACHINE_SOCKET, Message, OF_USERS, believer, kind, may_serve,
};
use rdsock_shm::layout::{BellBoard, TenantMemory};
use rdsock_shm::reason::{Reason, State};
use std::mem::size_of;
use std::sync::atomic::Ordering::*;

/// Milliseconds between two looks whether the daemon is still there,
const LOOK_MS: u64 = 1000;
/// and microseconds while its greeting is awaited.
const GREETING_US: u64 = 20;
/// Milliseconds for the daemon to take a call.
const TAKEN_MS: u32 = 10;

/// Notes the daemon's address, from the environment.
pub fn start(path: Option<&std::ffi::CStr>, disabled: bool) {
    if disabled {
        disable(Reason::Disabled);
    }
    if let Some(path) = path {
        // SAFETY: the constructor runs before anybody reads it.
        unsafe { link().note_path(path) };
    }
}

/// True when no connection of this process may be promoted.
pub(super) fn is_disabled() -> bool {
    link().is_disabled()
}

/// No connection may be promoted from now on. The daemon makes none to what listens here any more: what is done there may not be
/// seen, and a program on another node would be taken for one of this host.
pub fn disable(reason: Reason) {
    link().disable(reason);
    if is_any_told() {
        hang_up();
    }
}

/// The daemon, if it makes connections for other nodes, forgets what it knows of this process, which attaches anew.
pub(super) fn hang_up() {
    if may_lead_away()
        && link().control.load(Relaxed) >= 0
        && let Some(_guard) = Guard::take()
    {
        detach();
    }
}

/// Makes room for the tenant's memory and tries to reach the daemon when the first TCP socket of the process
/// is used; later, [`stay_attached`].
pub fn ensure() {
    if memory::is_there() {
        stay_attached();
    } else if !link().stays_unknown()
        && let Some(guard) = Guard::take()
    {
        make_memory();
        attach(&guard);
    }
}

/// Looks, at most once a second, whether the daemon is still there, and attaches to the next one if it
/// is not, so that it knows this program again and what it listens on. Sooner where others crowded its socket. The shim has no thread: called
/// where the program makes a system call that is rare or may sleep, never where bytes move over rings.
#[inline]
pub fn stay_attached() {
    if conn::has_untold() {
        tell_untold();
    }
    let now = clock::ticks();
    let since = now.wrapping_sub(link().looked_at.load(Relaxed));
    let pause = match link().greeting.load(Relaxed) {
        0 => link().attempts.crowded().unwrap_or(LOOK_MS) * 1000,
        _ => GREETING_US,
    };
    if since >= clock::ticks_of(pause) && memory::is_there() && !link().stays_unknown() {
        look_for_daemon(now);
    }
}

#[cold]
fn look_for_daemon(now: u64) {
    link().looked_at.store(now, Relaxed);
    if let Some(guard) = Guard::take_soon() {
        note_hang_up(&guard);
        attach(&guard);
    }
}

/// The control connection, while a daemon's greeting is awaited there. Who sleeps on what need not be a connection sleeps on this, too: a
/// program that sleeps can't answer, and the daemon is to know that it is there.
#[inline]
pub fn greeting() -> Option<c_int> {
    if link().greeting.load(Relaxed) == 0 || identity::is_foreign() {
        return None;
    }
    let control = link().control.load(Relaxed);
    (control >= 0).then_some(control)
}

/// Something has come while the greeting is awaited: reads it.
#[cold]
pub fn take_greeting() {
    match Guard::take() {
        Some(guard) => note_hang_up(&guard),
        // This is a handler that has interrupted whoever reads: it does so afterwards.
        None => {
            sys::poll_one(-1, 0, 1);
        }
    }
}

/// Waits until this process has mapped the memory that a daemon sends which was told HELLO. False where that is late, or
/// there is no daemon.
#[cold]
pub(super) fn await_greeting(end: u64) -> bool {
    if link().greeting.load(Relaxed) != 0
        && link().late.load(Relaxed) == 0
        && !identity::is_foreign()
    {
        let has_come = |_: &Guard| (link().greeting.load(Relaxed) == 0).then_some(());
        if await_message(end, has_come).is_none() {
            link().late.store(1, Relaxed);
        }
    }
    link().greeting.load(Relaxed) == 0 && link().control.load(Relaxed) >= 0
}

/// True when it is time to look whether the greeting has come.
#[inline]
pub(super) fn is_greeting_due() -> bool {
    link().greeting.load(Relaxed) != 0 && {
        let now = clock::ticks();
        let since = now.wrapping_sub(link().looked_at.load(Relaxed));
        let is_due = since >= clock::ticks_of(GREETING_US);
        if is_due {
            link().looked_at.store(now, Relaxed);
        }
        is_due
    }
}

/// Takes what the daemon said last, and notes it when it is gone.
pub(super) fn note_hang_up(guard: &Guard) {
    let control = link().control.load(Relaxed);
    if control < 0 {
        return;
    }
    if conn::kind(control) != Kind::Internal {
        return detach();
    }
    let seen = sys::poll_one(control, libc::POLLIN, 0);
    if seen > 0 {
        read_messages(guard);
    }
    // Unread messages are all there can be in front of the end, and they were read.
    if seen > 0 && seen as i16 & libc::POLLHUP != 0 && link().control.load(Relaxed) == control {
        detach();
    }
}

/// The daemon has no place for this process now: it is asked again after a while, each time a longer
/// one.
pub(super) fn refused_for_now() {
    link().attempts.refused(clock::nanoseconds());
    detach();
}

/// The daemon has greeted this process, whose memory is mapped at this address.
pub(super) fn welcomed(control: c_int, address: u64) {
    link().attempts.welcomed();
    link().await_nothing();
    let attached = Attached { address };
    if send_with(control, &Message::new(kind::ATTACHED, &attached), &[]) < 0 {
        detach();
    }
}

/// True while the process has the user that it attached as: as another one the daemon would turn it away, and it asks for
/// nothing.
pub(super) fn is_as_attached() -> bool {
    link().attached_as.load(Relaxed) == ids()
}

/// A program that has changed its user since it attached is not who the daemon knows: it attaches anew, through the
/// connection that it has, since it may no longer reach the socket's path. One that changes it again and again (a file
/// server that works as the user of each request) stays who it was meanwhile, and is that again when it has changed
/// back: it attaches anew ever more seldom.
fn follow_user() {
    if link().control.load(Relaxed) < 0
        || is_as_attached()
        || !link().changes.may_follow(clock::nanoseconds())
    {
        return;
    }
    let control = link().control.swap(-1, AcqRel);
    let spare = link().inherited.swap(control, AcqRel);
    if spare >= 0 {
        close_hidden(spare);
    }
    detach();
    link().attempts.forget();
}

fn ids() -> u64 {
    let [user, group] = sys::effective_ids();
    u64::from(user) << 32 | u64::from(group)
}

pub(super) fn attach(guard: &Guard) {
    follow_user();
    let now = clock::nanoseconds();
    if link().control.load(Relaxed) >= 0 || !link().attempts.are_due(now) {
        return;
    }
    link().attempts.begin(now);
    if !memory::is_there() || !may_write() {
        return;
    }
    let found = match adopted() {
        Some(fd) => Ok(fd),
        None => connected(),
    };
    link()
        .attempts
        .end(found.is_err_and(|error| error == libc::EAGAIN));
    let Ok(fd) = found else {
        return;
    };
    let fd = hide(fd);
    // A fresh start for the queue: requests that an earlier daemon did not take are void.
    empty_queue(guard);
    let board = memory::board_fd();
    let hello = Hello {
        memory_size: size_of::<TenantMemory>() as u64,
        bell_size: size_of::<BellBoard>() as u64,
    };
    link().awaited.store(1, Relaxed);
    link().greeting.store(1, Relaxed);
    link().late.store(0, Relaxed);
    link().attached_as.store(ids(), Relaxed);
    let sent = say_hello(fd, &Message::new(kind::HELLO, &hello), board.as_slice());
    link().control.store(fd, Release);
    if sent < 0 {
        // A daemon that takes nobody says so before it hangs up.
        read_messages(guard);
        if link().control.load(Relaxed) == fd {
            detach();
        }
        return;
    }
    link().epoch.fetch_add(1, AcqRel);
    link().looked_at.store(clock::ticks(), Relaxed);
    clock::calibrate();
    tell_all(guard);
}

/// Sends HELLO. Where the program brings its board along, the kernel says EPERM until the daemon has taken the call (`SO_PASSRIGHTS`): that
/// is waited for a little while; later, the program calls again.
fn say_hello(fd: c_int, hello: &Message, board: &[c_int]) -> isize {
    for _ in 0..TAKEN_MS {
        let sent = send_with(fd, hello, board);
        // A daemon that takes nobody says so.
        if sent != -(libc::EPERM as isize)
            || board.is_empty()
            || sys::poll_one(fd, libc::POLLIN, 1) > 0
        {
            return sent;
        }
    }
    send_with(fd, hello, board)
}

/// A control connection through the one of the process that forked this one: works after chroot
/// and after a change of user, too, where this one believes that daemon as well.
fn adopted() -> Option<c_int> {
    let inherited = link().inherited.swap(-1, AcqRel);
    if inherited < 0 {
        return None;
    }
    if !is_believed(link().server.load(Relaxed)) {
        close_hidden(inherited);
        return None;
    }
    let pair = sys::socketpair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
    let sent = pair.is_some_and(|[_, theirs]| {
        // The daemon believes nothing that does not say who sent it, also what is sent before it has the socket.
        sys::setsockopt(theirs, libc::SOL_SOCKET, libc::SO_PASSCRED, &1i32);
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

/// A connection to the daemon's socket, or an error: EAGAIN where as many as may wait there do so already.
fn connected() -> Result<c_int, c_int> {
    let path = link().path();
    let [user, _] = sys::effective_ids();
    let own = address_of_user(path, user);
    let reached = own.map_or(Err(libc::ENOENT), |own| connect(&own));
    match reached {
        Ok(_) | Err(libc::EAGAIN) => reached,
        // There is none, or it was another daemon's.
        Err(_) => connect(&address_of([path])),
    }
}

/// Does this program, as who it is now, believe a daemon of this user?
fn is_believed(server: u32) -> bool {
    let is_machines = link().path() == MACHINE_SOCKET.as_bytes();
    // Root's everybody believes: a filter of system calls may know no further question.
    server == 0 || may_serve(server, believer(sys::users()), is_machines)
}

/// Connects to a daemon that this program believes.
fn connect(address: &libc::sockaddr_un) -> Result<c_int, c_int> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let fd = sys::socket(libc::AF_UNIX, kind, 0) as c_int;
    if fd < 0 {
        return Err(-fd);
    }
    let reached = sys::connect_unix(fd, address, size_of::<libc::sockaddr_un>());
    let server = server_of(fd);
    let error = match reached {
        0.. if is_believed(server) => {
            link().server.store(server, Relaxed);
            return Ok(fd);
        }
        // Anybody can put a socket into a directory like /tmp.
        0.. => libc::EPERM,
        _ => -reached as c_int,
    };
    sys::close(fd);
    Err(error)
}

/// The user who listens where a socket is connected.
fn server_of(fd: c_int) -> u32 {
    let server = sys::getsockopt::<libc::ucred>(fd, libc::SOL_SOCKET, libc::SO_PEERCRED);
    server.map_or(u32::MAX, |server| server.uid)
}

/// The address of the socket that is this user's alone. `None` where its path is too long for one.
fn address_of_user(path: &[u8], user: u32) -> Option<libc::sockaddr_un> {
    let mut digits = [0; 10];
    let digits = decimal(user, &mut digits);
    let len = path.len() + OF_USERS.len() + 1 + digits.len();
    (len < PATH_ROOM).then(|| address_of([path, OF_USERS.as_bytes(), b"/", digits]))
}

/// The address whose path these parts make. What does not fit is cut off.
fn address_of<const PARTS: usize>(parts: [&[u8]; PARTS]) -> libc::sockaddr_un {
    let mut sun_path = [0; PATH_ROOM];
    let bytes = parts.iter().flat_map(|part| part.iter());
    // Its last byte ends the path.
    for (to, from) in sun_path.iter_mut().take(PATH_ROOM - 1).zip(bytes) {
        *to = *from as libc::c_char;
    }
    libc::sockaddr_un {
        sun_family: libc::AF_UNIX as u16,
        sun_path,
    }
}

/// A number in decimal digits.
fn decimal(mut number: u32, room: &mut [u8; 10]) -> &[u8] {
    let mut start = room.len();
    for digit in room.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        start -= 1;
        if number == 0 {
            break;
        }
    }
    room.get(start..).unwrap_or_default()
}

/// The daemon is gone: what was announced is announced anew once there is another.
pub(super) fn detach() {
    let control = link().control.swap(-1, AcqRel);
    // The program may have closed it behind the shim's back, and have the number for itself.
    if control >= 0 && conn::kind(control) == Kind::Internal {
        close_hidden(control);
    }
    link().await_nothing();
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

/// The shim's own descriptor `old` is now `new`.
pub fn moved(old: c_int, new: c_int) {
    link().moved(old, new);
    memory::moved(old, new);
}

pub(super) fn has_hung_up(control: c_int) -> bool {
    sys::poll_one(control, libc::POLLIN, 0) as i16 & libc::POLLHUP != 0
}

/// The effective user that this process has to the daemon.
pub(super) fn attached_user() -> u32 {
    (link().attached_as.load(Relaxed) >> 32) as u32
}

/// Would a program whose environment has this path ask the daemon that this one has?
pub fn leads_to_daemon(path: Option<&std::ffi::CStr>) -> bool {
    link().leads_there(path)
}

/// True when the daemon can be asked for this connection's stream by a program that this one turns
/// into. To another user it gives none: what was said before stands in the rings. Nor, where it takes some programs only, to one that it does
/// not take.
pub fn is_known(conn: &Conn) -> bool {
    let control = link().control.load(Relaxed);
    let [user, _] = sys::effective_ids();
    link().judges.load(Relaxed) == 0
        && conn.owner.load(Relaxed) == user
        && conn.epoch.load(Relaxed) == link().epoch.load(Relaxed)
        && control >= 0
        && !has_hung_up(control)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdsock_shm::control::NAMELESS;

    fn path_of(address: &libc::sockaddr_un) -> String {
        let bytes = address.sun_path.iter().take_while(|byte| **byte != 0);
        bytes.map(|byte| *byte as u8 as char).collect()
    }

    #[test]
    fn a_daemon_is_roots_or_the_own_users() {
        for at_machines in [false, true] {
            assert!(may_serve(0, 1000, at_machines) && may_serve(1000, 1000, at_machines));
            assert!(!may_serve(1001, 1000, at_machines) && !may_serve(1000, 0, at_machines));
            // Who has no number in this user namespace may be anybody, also where the program's own user has none.
            assert_eq!(may_serve(NAMELESS, 1000, at_machines), at_machines);
            assert_eq!(may_serve(NAMELESS, NAMELESS, at_machines), at_machines);
        }
        // Root's, as a user for a while.
        for acting in [
            [0, 1000, 0],
            [0, 1000, 1000],
            [1000, 1000, 0],
            [1000, 0, 1000],
        ] {
            assert_eq!(believer(acting), 0);
        }
        assert_eq!(believer([1000; 3]), 1000);
    }

    #[test]
    fn a_user_has_an_address_beside_everybodys() {
        let of = |user| path_of(&address_of_user(b"/run/s", user).unwrap());
        assert_eq!(of(0), "/run/s.users/0");
        assert_eq!(of(1000), "/run/s.users/1000");
        assert_eq!(of(u32::MAX), "/run/s.users/4294967295");
        assert_eq!(path_of(&address_of([b"/run/s"])), "/run/s");
        // One more would not be ended any more.
        let longest = vec![b'a'; PATH_ROOM - 1 - ".users/7".len()];
        assert!(address_of_user(&longest, 7).is_some());
        assert!(address_of_user(&longest, 77).is_none());
        let too_long = [b'a'; 2 * PATH_ROOM];
        assert_eq!(path_of(&address_of([&too_long])).len(), PATH_ROOM - 1);
    }
}
