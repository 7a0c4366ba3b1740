//! Asks the kernel which socket a connection belongs to (`NETLINK_SOCK_DIAG`), in the network
//! namespace that the netlink socket was made in.
//!
//! An answer takes some microseconds, where there is such a connection. Where there is none, the kernel walks a chain of sockets that
//! listen, as long as whoever has these likes it: many milliseconds. So only who carries a load can ask: a [`Carrier`]. Several questions go in one
//! message: the kernel answers them one after the other, with nothing between.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{
    AF_INET, AF_INET6, IPPROTO_TCP, TCP_ESTABLISHED, TCP_LISTEN, TCP_SYN_RECV, TCP_SYN_SENT,
    TCP_TIME_WAIT,
};
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags,
};
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    socket,
};
use nix::sys::stat::Mode;

use crate::porters::Carrier;

/// A socket that the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Inode of the socket; 0 when no process holds it any more.
    pub inode: u64,
    /// The connection is established, in both directions.
    pub established: bool,
    /// It is, or was once: in its handshake a socket has no other end.
    pub was_made: bool,
}

/// The device of a network namespace that leads to itself: all connections of this host go over it.
pub const LOOPBACK: u32 = 1;

/// A TCP socket that is looked for.
#[derive(Clone, Copy, Debug)]
pub struct Sought {
    /// Its own address.
    pub local: SocketAddr,
    /// Its peer's.
    pub peer: SocketAddr,
    /// `SO_COOKIE`; `None` for any.
    pub cookie: Option<u64>,
    /// The device that it may be bound to, beside none; 0 for none.
    pub device: u32,
}

/// A socket that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Inode of the socket.
    pub inode: u64,
}

/// Netlink sockets for questions about the sockets of one network namespace. Several threads may ask at a time.
#[derive(Debug)]
pub struct Diag {
    /// Those that nobody uses now.
    spare: Mutex<Vec<OwnedFd>>,
    /// So many of them stay.
    most: usize,
    /// Where the namespace is; `None` for the daemon's, in which all threads are. By a descriptor for its place alone (`O_PATH`): anybody may
    /// wait for a namespace to be opened or closed (`inotify`), and whoever does that wakes all who wait.
    elsewhere: Option<OwnedFd>,
    netns_cookie: u64,
}

/// Sockets that are there for the next questions, from the start on: what the daemon holds says what is left of others.
const SPARE: usize = 4;
/// Those of another namespace. Who needs one more has it made, and does not wait for who asks: who listens there much has a question take long.
const SPARE_ELSEWHERE: usize = 1;
/// Descriptors for another namespace: those, and what leads there.
pub const ELSEWHERE_DESCRIPTORS: u64 = SPARE_ELSEWHERE as u64 + 1;

impl Diag {
    /// For the network namespace of the daemon.
    pub fn of_home() -> io::Result<Self> {
        Self::with(None, SPARE)
    }

    /// For another one, by its place. May wait: for a porter.
    pub fn of(namespace: OwnedFd) -> io::Result<Self> {
        Self::with(Some(namespace), SPARE_ELSEWHERE)
    }

    fn with(elsewhere: Option<OwnedFd>, most: usize) -> io::Result<Self> {
        let mut diag = Diag {
            spare: Mutex::default(),
            most,
            elsewhere,
            netns_cookie: 0,
        };
        let sockets = (0..most).map(|_| diag.new_socket());
        let sockets: Vec<OwnedFd> = sockets.collect::<io::Result<_>>()?;
        let cookie = sockets
            .first()
            .map(|socket| netns_cookie_of(socket.as_fd()));
        diag.netns_cookie = cookie.flatten().unwrap_or(0);
        diag.spare = Mutex::new(sockets);
        Ok(diag)
    }

    /// Made in the namespace, by a thread that moves there where this one is elsewhere.
    fn new_socket(&self) -> io::Result<OwnedFd> {
        let Some(namespace) = &self.elsewhere else {
            return new_socket();
        };
        let made = thread::scope(|scope| {
            let there = thread::Builder::new().name("netns".into());
            let there = there.spawn_scoped(scope, || {
                let place = format!("/proc/self/fd/{}", namespace.as_raw_fd());
                setns(File::open(place)?, CloneFlags::CLONE_NEWNET)?;
                new_socket()
            })?;
            io::Result::Ok(there.join())
        })?;
        made.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    }

    /// `SO_NETNS_COOKIE` of the namespace; 0 on kernels without it (before 5.14).
    pub fn netns_cookie(&self) -> u64 {
        self.netns_cookie
    }

    /// The TCP socket with exactly this pair of addresses and this `SO_COOKIE`.
    pub fn find(
        &self,
        carrier: &Carrier,
        local: SocketAddr,
        peer: SocketAddr,
        cookie: u64,
    ) -> io::Result<Option<Found>> {
        let sought = Sought {
            local,
            peer,
            cookie: Some(cookie),
            device: 0,
        };
        let [found] = self.find_each(carrier, [sought])?;
        Ok(found)
    }

    /// These sockets, asked for one after the other with nothing between. One may be asked for twice.
    pub fn find_each<const N: usize>(
        &self,
        _: &Carrier,
        sought: [Sought; N],
    ) -> io::Result<[Option<Found>; N]> {
        let number = next_number();
        let mut questions = Vec::with_capacity(N * QUESTION);
        for Sought {
            local,
            peer,
            cookie,
            device,
        } in sought
        {
            let cookie = cookie.unwrap_or(NO_COOKIE);
            if !ask_for(number, (local, peer), cookie, device, &mut questions) {
                return Ok([None; N]);
            }
        }
        let mut found = [None; N];
        let answers: [_; N] = self.ask(number, &questions)?;
        for ((found, answer), sought) in found.iter_mut().zip(&answers).zip(&sought) {
            // All ones stand for any cookie (`INET_DIAG_NOCOOKIE`): what was found has to have this one.
            let answer = answer.as_ref().map(Found::of);
            *found = answer.filter(|answer| sought.cookie.is_none_or(|it| it == answer.cookie));
        }
        Ok(found)
    }

    /// The TCP socket with exactly this pair of addresses, whatever its cookie is.
    pub fn find_any(
        &self,
        _: &Carrier,
        local: SocketAddr,
        peer: SocketAddr,
    ) -> io::Result<Option<Found>> {
        Ok(self.ask_one(local, peer)?.as_ref().map(Found::of))
    }

    /// The TCP socket that would get a connection to `destination` from `source`, if one listens there. Of several that
    /// share the port (`SO_REUSEPORT`), the one that the kernel would choose for this very pair.
    pub fn listener(
        &self,
        _: &Carrier,
        destination: SocketAddr,
        source: SocketAddr,
    ) -> io::Result<Option<Listener>> {
        let is_over = |found: &InetResponse| found.header.state == TCP_TIME_WAIT;
        let mut found = self.ask_one(destination, source)?;
        if found.as_ref().is_some_and(is_over) {
            // What is left of an earlier connection between them, which keeps no new one away. No connection has port 0.
            found = self.ask_one(destination, SocketAddr::new(source.ip(), 0))?;
        }
        Ok(found
            .filter(|found| found.header.state == TCP_LISTEN)
            .map(|found| Listener {
                cookie: join_cookie(found.header.socket_id.cookie),
                inode: found.header.inode.into(),
            }))
    }

    /// Asks for any socket with these addresses.
    fn ask_one(&self, local: SocketAddr, peer: SocketAddr) -> io::Result<Option<InetResponse>> {
        let number = next_number();
        let mut question = Vec::with_capacity(QUESTION);
        if !ask_for(number, (local, peer), NO_COOKIE, 0, &mut question) {
            return Ok(None);
        }
        let [found] = self.ask(number, &question)?;
        Ok(found)
    }

    fn ask<const N: usize>(
        &self,
        number: u32,
        questions: &[u8],
    ) -> io::Result<[Option<InetResponse>; N]> {
        let socket = self.lock().pop();
        let socket = socket.map_or_else(|| self.new_socket(), Ok)?;
        let found = ask_by(&socket, number, questions)?;
        let mut spare = self.lock();
        if spare.len() < self.most {
            spare.push(socket);
        }
        Ok(found)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Found {
    fn of(found: &InetResponse) -> Self {
        Found {
            cookie: join_cookie(found.header.socket_id.cookie),
            inode: found.header.inode.into(),
            established: found.header.state == TCP_ESTABLISHED,
            was_made: ![TCP_SYN_SENT, TCP_SYN_RECV, TCP_NEW_SYN_RECV].contains(&found.header.state),
        }
    }
}

/// A connection that is being made, and has no socket yet.
const TCP_NEW_SYN_RECV: u8 = 12;

/// Where a file is, which is not opened.
pub fn place_of(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

/// Messages with questions so far, of all threads.
static ASKED: AtomicU64 = AtomicU64::new(0);

/// How many messages with questions there were so far.
pub fn asked() -> u64 {
    ASKED.load(Ordering::Relaxed)
}

/// The number of the next message, which its answers have. It wraps.
fn next_number() -> u32 {
    ASKED.fetch_add(1, Ordering::Relaxed) as u32
}

fn new_socket() -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    // To the kernel, which has number 0: nobody else may answer then. Whoever administers the namespace could otherwise.
    connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(socket)
}

/// Asks so many questions. Each answer is taken, also behind one that says that something is wrong: none is left for the next questions.
fn ask_by<const N: usize>(
    socket: &OwnedFd,
    number: u32,
    questions: &[u8],
) -> io::Result<[Option<InetResponse>; N]> {
    let fd = socket.as_raw_fd();
    send(fd, questions, MsgFlags::empty())?;
    // The kernel answers within the send.
    let answers: [_; N] = std::array::from_fn(|_| take_answer(fd, number));
    let mut found = [const { None }; N];
    for (found, answer) in found.iter_mut().zip(answers) {
        *found = answer?;
    }
    Ok(found)
}

/// What is left of questions that failed comes before: each time it is taken away.
fn take_answer(fd: RawFd, number: u32) -> io::Result<Option<InetResponse>> {
    let mut bytes = [0; 4096];
    let answer = loop {
        let len = recv(fd, &mut bytes, MsgFlags::MSG_DONTWAIT)?;
        let answer = bytes.get(..len).unwrap_or(&[]);
        let answer = NetlinkMessage::<SockDiagMessage>::deserialize(answer)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
        if answer.header.sequence_number == number {
            break answer;
        }
    };
    match answer.payload {
        NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(found)) => Ok(Some(*found)),
        NetlinkPayload::Error(error) => match -error.raw_code() {
            // Gone, or the addresses belong to a socket with another cookie by now.
            libc::ENOENT | libc::ESTALE => Ok(None),
            code => Err(io::Error::from_raw_os_error(code)),
        },
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// In place of a cookie: any socket's.
const NO_COOKIE: u64 = u64::MAX;

/// Bytes of a question.
const QUESTION: usize = 72;

/// Puts the question for the socket with these addresses behind others; false where there can be none.
fn ask_for(
    number: u32,
    (local, peer): (SocketAddr, SocketAddr),
    cookie: u64,
    device: u32,
    questions: &mut Vec<u8>,
) -> bool {
    // A v4-mapped IPv6 socket is found by its IPv4 addresses.
    let (local_ip, peer_ip) = (local.ip().to_canonical(), peer.ip().to_canonical());
    let family = match (local_ip, peer_ip) {
        (IpAddr::V4(_), IpAddr::V4(_)) => AF_INET,
        (IpAddr::V6(_), IpAddr::V6(_)) => AF_INET6,
        _ => return false,
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    header.sequence_number = number;
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
            interface_id: device,
            cookie: split_cookie(cookie),
        },
    };
    let mut packet = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    packet.finalize();
    let start = questions.len();
    questions.resize(start + packet.buffer_len(), 0);
    packet.serialize(&mut questions[start..]);
    true
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

/// An option of a socket, of the level `SOL_SOCKET`. Those that are asked for here take no lock of the socket, so nobody
/// has to be waited for.
fn option<T: Default>(socket: BorrowedFd<'_>, name: i32) -> Option<T> {
    option_of(socket, libc::SOL_SOCKET, name)
}

fn option_of<T: Default>(socket: BorrowedFd<'_>, level: i32, name: i32) -> Option<T> {
    let mut value = T::default();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the option writes at most `len` bytes to `value`, integers of that size; both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &mut len,
        )
    };
    (result == 0).then_some(value)
}

/// `SO_COOKIE` of a socket.
pub fn cookie_of(socket: BorrowedFd<'_>) -> Option<u64> {
    option(socket, libc::SO_COOKIE)
}

/// `SO_NETNS_COOKIE` of a socket; `None` before Linux 5.14.
pub fn netns_cookie_of(socket: BorrowedFd<'_>) -> Option<u64> {
    option(socket, libc::SO_NETNS_COOKIE)
}

/// Number of the device that a socket is bound to, 0 for none; `None` before Linux 5.1.
pub fn device_of(socket: BorrowedFd<'_>) -> Option<i32> {
    option(socket, libc::SO_BINDTOIFINDEX)
}

/// When data was last sent and received by a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// When it was last sent; not before this.
    pub said: Instant,
    /// When it was last received; not behind this.
    pub heard: Instant,
}

/// When data was last sent and received by a TCP socket, or else when it was connected. To the tick, which is 10 ms at most. The socket's
/// lock is waited for.
pub fn times_of(socket: BorrowedFd<'_>) -> Option<Times> {
    /// The kernel says by then, so that it is known when: a thread may have to wait for its turn.
    const SOON: Duration = Duration::from_millis(10);
    /// Of `struct tcp_info` (`include/uapi/linux/tcp.h`), behind eight bytes.
    const LAST_DATA_SENT: usize = 11;
    const LAST_DATA_RECEIVED: usize = 13;
    for _ in 0..4 {
        let before = Instant::now();
        let info: [u32; 14] = option_of(socket, libc::IPPROTO_TCP, libc::TCP_INFO)?;
        let after = Instant::now();
        if after - before < SOON {
            let ago = |word: usize| Duration::from_millis(info[word].into());
            return Some(Times {
                said: after.checked_sub(ago(LAST_DATA_SENT))?,
                heard: before.checked_sub(ago(LAST_DATA_RECEIVED))?,
            });
        }
    }
    None
}

/// True for a TCP socket; false for any other descriptor.
pub fn is_tcp(socket: BorrowedFd<'_>) -> bool {
    option::<i32>(socket, libc::SO_PROTOCOL) == Some(libc::IPPROTO_TCP)
        && matches!(
            option::<i32>(socket, libc::SO_DOMAIN),
            Some(libc::AF_INET | libc::AF_INET6)
        )
}

/// True for a `SOCK_SEQPACKET` socket of the family `AF_UNIX`.
pub fn is_seqpacket(socket: BorrowedFd<'_>) -> bool {
    option::<i32>(socket, libc::SO_DOMAIN) == Some(libc::AF_UNIX)
        && option::<i32>(socket, libc::SO_TYPE) == Some(libc::SOCK_SEQPACKET)
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
        let (diag, carrier) = (Diag::of_home().unwrap(), Carrier::of_test());
        for socket in [&stream, &accepted] {
            let (local, peer) = (socket.local_addr().unwrap(), socket.peer_addr().unwrap());
            let cookie = cookie_of(socket.as_fd()).unwrap();
            let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
            let inode = std::fs::metadata(path).unwrap().ino();
            let found = Found {
                cookie,
                inode,
                established: true,
                was_made: true,
            };
            assert_eq!(
                diag.find(&carrier, local, peer, cookie).unwrap(),
                Some(found)
            );
            assert_eq!(diag.find(&carrier, local, peer, cookie + 1).unwrap(), None);
            assert_eq!(diag.find(&carrier, local, peer, NO_COOKIE).unwrap(), None);
            assert_eq!(diag.find(&carrier, peer, peer, cookie).unwrap(), None);
            let sought = |local, peer, cookie| Sought {
                local,
                peer,
                cookie,
                device: 0,
            };
            // What is behind an answer that there is none is there as well, and nothing is left for the next question.
            let each = [
                sought(local, peer, Some(cookie)),
                sought(peer, peer, Some(cookie)),
                sought(local, peer, Some(cookie + 1)),
                sought(local, peer, None),
            ];
            let expected = [Some(found), None, None, Some(found)];
            assert_eq!(diag.find_each(&carrier, each).unwrap(), expected);
            assert_eq!(diag.find(&carrier, local, peer, cookie + 1).unwrap(), None);
        }
        // Who would get the next connection is asked without a connection.
        let here = stream.local_addr().unwrap();
        let source = SocketAddr::new(here.ip(), 0);
        let destination = stream.peer_addr().unwrap();
        let would_get = diag
            .listener(&carrier, destination, source)
            .unwrap()
            .unwrap();
        assert_eq!(Some(would_get.cookie), cookie_of(listener.as_fd()));
        // The connection itself is no listener.
        assert_eq!(diag.listener(&carrier, destination, here).unwrap(), None);
        // What is left of it hides none: the end that closes first keeps its addresses for a minute.
        drop(accepted);
        drop(stream);
        let would_get = diag.listener(&carrier, destination, here).unwrap().unwrap();
        assert_eq!(Some(would_get.cookie), cookie_of(listener.as_fd()));
    }

    /// Whoever administers a network namespace may send to any netlink socket there: in one of one's own anybody may.
    #[test]
    fn nobody_but_the_kernel_answers() {
        use nix::errno::Errno;
        use nix::sys::socket::{getsockname, sendto};
        let (diag, carrier) = (Diag::of_home().unwrap(), Carrier::of_test());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (to, from) = (
            listener.local_addr().unwrap(),
            "127.0.0.1:0".parse().unwrap(),
        );
        assert!(diag.listener(&carrier, to, from).unwrap().is_some());
        let fd = diag.lock()[SPARE - 1].as_raw_fd();
        let name = getsockname::<NetlinkAddr>(fd).unwrap();
        let forger = new_socket().unwrap();
        let mut forgery = Vec::new();
        assert!(ask_for(0, (to, from), NO_COOKIE, 0, &mut forgery));
        let sent = sendto(forger.as_raw_fd(), &forgery, &name, MsgFlags::empty());
        assert!(
            matches!(sent, Err(Errno::ECONNREFUSED | Errno::EPERM)),
            "{sent:?}"
        );
        assert!(diag.listener(&carrier, to, from).unwrap().is_some());
    }

    #[test]
    fn the_answer_to_an_earlier_question_is_not_taken_for_this_ones() {
        let (diag, carrier) = (Diag::of_home().unwrap(), Carrier::of_test());
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let from = "127.0.0.1:0".parse().unwrap();
        let [earlier, to] = listeners
            .each_ref()
            .map(|listener| listener.local_addr().unwrap());
        let mut question = Vec::new();
        assert!(ask_for(
            u32::MAX,
            (earlier, from),
            NO_COOKIE,
            0,
            &mut question
        ));
        // The next question goes by this one.
        let socket = diag.lock().last().unwrap().as_raw_fd();
        send(socket, &question, MsgFlags::empty()).unwrap();
        for _ in 0..2 {
            let found = diag.listener(&carrier, to, from).unwrap().unwrap();
            assert_eq!(Some(found.cookie), cookie_of(listeners[1].as_fd()));
        }
    }

    /// Who asks there while another one is being answered has a socket made.
    #[test]
    fn nobody_waits_for_another_question_in_another_namespace() {
        let there = thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).ok()?;
            // A socket of there, which any thread has.
            let listener = TcpListener::bind("0.0.0.0:0").unwrap();
            Some((
                listener,
                place_of(Path::new("/proc/thread-self/ns/net")).unwrap(),
            ))
        });
        let Some((listener, namespace)) = there.join().unwrap() else {
            use std::io::Write;
            let why = "SKIPPED, NOTHING WAS CHECKED: needs CAP_SYS_ADMIN";
            return writeln!(std::io::stderr(), "{why}").unwrap();
        };
        let (diag, carrier) = (Diag::of(namespace).unwrap(), Carrier::of_test());
        assert_ne!(diag.netns_cookie(), Diag::of_home().unwrap().netns_cookie());
        let to = SocketAddr::from(([127, 0, 0, 1], listener.local_addr().unwrap().port()));
        let finds = || {
            let found = diag.listener(&carrier, to, "127.0.0.1:0".parse().unwrap());
            found.unwrap().map(|found| found.cookie) == cookie_of(listener.as_fd())
        };
        assert!(finds());
        let used = diag.lock().pop().unwrap();
        assert!(diag.lock().is_empty());
        assert!(finds() && finds());
        assert_eq!(diag.lock().len(), SPARE_ELSEWHERE);
        drop(used);
        assert!(finds());
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
