//! A daemon of the test's own, and tenants without a shim that may be honest or not.

#![allow(dead_code)]

/// A test that only root can run, and that runs itself again, by [`actor`], for each part that another user plays.
#[allow(unused_macros)]
macro_rules! scene {
    ($(#[$attribute:meta])* $name:ident, $body:expr) => {
        #[test]
        $(#[$attribute])*
        fn $name() {
            if let Some(part) = Part::of_this() {
                return play(&part);
            }
            if is_root() {
                $body(stringify!($name));
            }
        }
    };
}

pub mod actor;
pub mod linger;
pub mod measure;
pub mod nodes;
pub mod owner;
pub mod silent;
pub mod victim;

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::offset_of;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    connect, getsockopt, recvmsg, sendmsg, setsockopt, socket, socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::geteuid;
use rdsock_shm::control::{
    Attached, Hello, Message, NotFound, OF_USERS, Pod, Promote, Query, Refused, Request, Verdict,
    from_bytes, kind, parse, question, request,
};
use rdsock_shm::layout::{
    BELL_MAGIC, BellBoard, CONN_RECORDS, QUEUE_SLOTS, TenantHeader, TenantMemory, VERSION,
};
use rdsock_shm::queue::Putter;
use rdsock_shm::sync::{AtomicU32, AtomicU64, Ordering};
use serde_json::Value;

/// How long it is waited for that the daemon takes a call.
const TAKEN: Duration = Duration::from_secs(2);

/// The socket of a user, beside the one for everybody.
pub fn own_socket(path: &std::path::Path, user: u32) -> PathBuf {
    PathBuf::from(format!("{}{OF_USERS}/{user}", path.display()))
}

/// A running daemon. Killed when dropped.
pub struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    /// With a configuration file of this text.
    pub fn start(config: &str) -> Self {
        Self::start_with(config, |_| {})
    }

    /// With a configuration file of this text, and something done to the command.
    pub fn start_with(config: &str, change: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Tenants of other users look for the socket there.
        std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).unwrap();
        let file = dir.path().join("rdsockd.toml");
        std::fs::write(&file, config).unwrap();
        let mut command = Self::command(&dir);
        command.arg("--config").arg(file);
        change(&mut command);
        let mut daemon = Daemon {
            child: command.spawn().unwrap(),
            dir,
        };
        daemon.wait_for_socket();
        daemon
    }

    fn command(dir: &tempfile::TempDir) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rdsockd"));
        command
            .arg("--socket")
            .arg(dir.path().join("s"))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if std::env::var_os("RDSOCKD_TEST_LOG").is_none() {
            command.stderr(Stdio::null());
        } else {
            command.args(["--log-level", "debug"]);
        }
        command
    }

    fn wait_for_socket(&mut self) {
        let end = Instant::now() + Duration::from_secs(10);
        // The one for everybody, which comes last.
        while Tenant::at_this(&self.socket()).is_none() {
            assert!(Instant::now() < end, "the daemon makes no socket");
            assert!(self.child.try_wait().unwrap().is_none(), "the daemon ended");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Kills it, and starts another one in its place.
    pub fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = Self::command(&self.dir).spawn().unwrap();
        self.wait_for_socket();
    }

    /// Starts another one in its place, which has been killed and may not have ended. Returns what is left of that.
    pub fn succeed(&mut self) -> Child {
        let before = std::mem::replace(&mut self.child, Self::command(&self.dir).spawn().unwrap());
        let end = Instant::now() + Duration::from_secs(60);
        let is_there = || {
            let caller = Tenant::at_this(&self.socket())?;
            Some(
                getsockopt(&caller.socket, sockopt::PeerCredentials)
                    .unwrap()
                    .pid()
                    == self.pid(),
            )
        };
        while is_there() != Some(true) {
            assert!(Instant::now() < end, "the daemon does not take the place");
            std::thread::sleep(Duration::from_millis(5));
        }
        before
    }

    /// Its exit status, when it ends within ten seconds.
    pub fn wait(&mut self) -> Option<i32> {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }

    /// Its processor time so far, in clock ticks.
    pub fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// Descriptors of the daemon, but for those of streams that are yet to come.
    pub fn descriptors(&self) -> usize {
        let stock = || self.stat()["streams_in_stock"].as_u64().unwrap_or(0) as usize;
        loop {
            let before = stock();
            let all = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
            let all = all.count();
            // One may just have been added.
            if stock() == before {
                return all - 3 * before;
            }
        }
    }

    pub fn stat(&self) -> Value {
        Tenant::stranger(self).unwrap().ask(question::STAT)
    }

    pub fn counter(&self, name: &str) -> u64 {
        self.stat()["counters"][name].as_u64().unwrap()
    }

    /// Waits until `done` says so of the statistics.
    pub fn wait_until(&self, what: &str, done: impl Fn(&Value) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let stat = self.stat();
            if done(&stat) {
                return;
            }
            assert!(Instant::now() < end, "{what}: {stat:#}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What came from the daemon.
#[derive(Debug)]
pub enum Answer {
    Message(u16, Vec<u8>, Vec<OwnedFd>),
    Closed,
}

/// The memory of a tenant, and its side of the queue. Until the daemon has sent it, nobody else sees what lies there.
pub struct Memory {
    pub tenant: File,
    pub bells: File,
    pub map: MmapRaw,
    pub putter: Putter,
}

/// Two ends of a control connection. What is sent to the second one says who sent it.
pub fn control_pair() -> (OwnedFd, OwnedFd) {
    let kind = SockType::SeqPacket;
    let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
    let (ours, theirs) = pair.unwrap();
    setsockopt(&theirs, sockopt::PassCred, &true).unwrap();
    (ours, theirs)
}

pub fn memfd(bytes: u64, seals: SealFlag) -> File {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"test", flags).unwrap());
    file.set_len(bytes).unwrap();
    if !seals.is_empty() {
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    }
    file
}

/// HELLO of an honest tenant.
pub fn hello_message() -> Message {
    let hello = Hello {
        memory_size: size_of::<TenantMemory>() as u64,
        bell_size: size_of::<BellBoard>() as u64,
    };
    Message::new(kind::HELLO, &hello)
}

fn identify(file: &File, magic: u64, size: usize) {
    file.write_all_at(&magic.to_ne_bytes(), 0).unwrap();
    file.write_all_at(&VERSION.to_ne_bytes(), 8).unwrap();
    file.write_all_at(&(size as u32).to_ne_bytes(), 12).unwrap();
}

impl Memory {
    pub fn new() -> Self {
        let fixed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        let tenant = memfd(size_of::<TenantMemory>() as u64, fixed);
        let bells = memfd(size_of::<BellBoard>() as u64, fixed);
        identify(&bells, BELL_MAGIC, size_of::<BellBoard>());
        let map = MmapOptions::new().map_raw(&tenant).unwrap();
        Memory {
            tenant,
            bells,
            map,
            putter: Putter::new(),
        }
    }

    /// Maps what a daemon has sent with WELCOME. What to say of it.
    pub fn take(&mut self, file: OwnedFd) -> Message {
        self.tenant = file.into();
        self.map = MmapOptions::new().map_raw(&self.tenant).unwrap();
        self.putter = Putter::new();
        let address = self.map.as_ptr() as u64;
        Message::new(kind::ATTACHED, &Attached { address })
    }

    fn memory(&self) -> &TenantMemory {
        // SAFETY: the mapping has this size, and the test reads nothing but its atomics.
        unsafe { &*self.map.as_ptr().cast() }
    }

    pub fn header(&self) -> &TenantHeader {
        &self.memory().header
    }

    pub fn put(&mut self, request: &Request) -> bool {
        // SAFETY: as in `memory`; the putter is another field.
        let memory = unsafe { &*self.map.as_ptr().cast::<TenantMemory>() };
        self.putter.put(&memory.queue, request)
    }

    pub fn set_conn(&self, number: usize, fd: i32, generation: u32, stream: u64) {
        let conn = &self.memory().conns[number];
        conn.fd.store(fd, Ordering::Relaxed);
        conn.stream_id.store(stream, Ordering::Relaxed);
        conn.generation.store(generation, Ordering::Relaxed);
    }

    /// Any word of the memory.
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset < size_of::<TenantMemory>());
        // SAFETY: within the mapping and aligned.
        unsafe { &*self.map.as_ptr().add(offset).cast() }
    }

    pub fn sleeps(&self) -> &AtomicU32 {
        &self.header().daemon_sleeps
    }
}

/// A tenant, or a stranger that has not said HELLO.
pub struct Tenant {
    pub socket: OwnedFd,
    pub memory: Memory,
    pub received: u64,
}

pub fn request(what: u32, conn: u32, generation: u32) -> Request {
    Request {
        what,
        conn,
        generation,
        ..from_bytes(&[0; size_of::<Request>()]).unwrap()
    }
}

impl Tenant {
    /// Connects, and says nothing.
    pub fn stranger(daemon: &Daemon) -> Option<Self> {
        Self::at(&daemon.socket())
    }

    /// Connects to the socket of this user as shims do, or to the one for everybody, and says nothing.
    pub fn at(path: &std::path::Path) -> Option<Self> {
        let own = own_socket(path, geteuid().as_raw());
        Self::at_this(&own).or_else(|| Self::at_this(path))
    }

    /// Connects to this very socket, and says nothing.
    pub fn at_this(path: &std::path::Path) -> Option<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        connect(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).ok()?;
        Some(Self::over(socket))
    }

    pub fn over(socket: OwnedFd) -> Self {
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(60)).unwrap();
        Tenant {
            socket,
            memory: Memory::new(),
            received: 0,
        }
    }

    /// A control connection of its own, asked for over that of `parent`, and the end that the daemon has.
    pub fn adopted(parent: &Tenant) -> (Self, OwnedFd) {
        let (ours, theirs) = control_pair();
        let adopt = Message::empty(kind::ADOPT);
        parent.send(adopt.as_bytes(), &[theirs.as_raw_fd()]);
        (Self::over(ours), theirs)
    }

    /// Attached.
    pub fn attach(daemon: &Daemon) -> Self {
        Self::attach_at(&daemon.socket())
    }

    /// Attached to the daemon with this socket.
    pub fn attach_at(path: &std::path::Path) -> Self {
        let mut tenant = Self::at(path).unwrap();
        tenant.hello();
        match tenant.receive() {
            Answer::Message(kind::WELCOME, ..) => tenant,
            other => panic!("not welcome: {other:?}"),
        }
    }

    /// Says HELLO, with a bell board of its own. When it then receives WELCOME, it maps its memory and says so.
    pub fn hello(&mut self) {
        let fds = [self.memory.bells.as_raw_fd()];
        self.send(hello_message().as_bytes(), &fds);
    }

    pub fn send(&self, bytes: &[u8], fds: &[RawFd]) {
        let _ = self.try_send(bytes, fds);
    }

    /// Where nothing that brings descriptors can be sent before the daemon has taken the call, waits for that, for a little while.
    pub fn try_send(&self, bytes: &[u8], fds: &[RawFd]) -> nix::Result<usize> {
        let end = Instant::now() + TAKEN;
        loop {
            match self.try_send_now(bytes, fds) {
                Err(Errno::EPERM) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_micros(100));
                }
                sent => return sent,
            }
        }
    }

    /// The same, at once.
    pub fn try_send_now(&self, bytes: &[u8], fds: &[RawFd]) -> nix::Result<usize> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        let parts = [IoSlice::new(bytes)];
        sendmsg::<UnixAddr>(self.socket.as_raw_fd(), &parts, control, flags, None)
    }

    /// The daemon's next message; panics when none comes. After a WELCOME it is attached, or the daemon will say why it is not.
    pub fn receive(&mut self) -> Answer {
        let mut answer = self.receive_only();
        if let Answer::Message(kind::WELCOME, _, fds) = &mut answer {
            let attached = self.memory.take(fds.remove(0));
            // It is counted there from now on.
            self.received = 0;
            self.send(attached.as_bytes(), &[]);
            let end = Instant::now() + Duration::from_secs(10);
            while self.memory.sleeps().load(Ordering::Relaxed) == 0 && Instant::now() < end {
                let mut events = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
                if poll(&mut events, PollTimeout::from(1_u8)) != Ok(0) {
                    break;
                }
            }
        }
        answer
    }

    /// The daemon's next message, of which nothing more is made.
    pub fn receive_only(&mut self) -> Answer {
        let mut bytes = vec![0; 70_000];
        let mut control = nix::cmsg_space!([RawFd; 8]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let fd = self.socket.as_raw_fd();
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<UnixAddr>(fd, &mut parts, Some(&mut control), flags) {
            Ok(message) => message,
            Err(nix::errno::Errno::ECONNRESET) => return Answer::Closed,
            Err(error) => panic!("no message: {error}"),
        };
        let mut fds = Vec::new();
        for part in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                // SAFETY: just received, owned by nobody else.
                fds.extend(
                    numbers
                        .into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let len = message.bytes;
        if len == 0 {
            return Answer::Closed;
        }
        self.received += 1;
        let (kind, body) = parse(&bytes[..len]).unwrap();
        Answer::Message(kind, body.to_vec(), fds)
    }

    /// The daemon's next message, when it comes in this time.
    pub fn receive_within(&mut self, patience: Duration) -> Option<Answer> {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let millis = patience.as_millis() as u16;
        let ready = poll(&mut fds, PollTimeout::from(millis)).unwrap();
        (ready > 0).then(|| self.receive())
    }

    fn expect<T: Pod>(&mut self, expected: u16) -> (T, Vec<OwnedFd>) {
        match self.receive() {
            Answer::Message(kind, body, fds) if kind == expected => {
                (from_bytes(&body).unwrap(), fds)
            }
            other => panic!("expected message {expected}: {other:?}"),
        }
    }

    pub fn promote(&mut self) -> (Promote, Vec<OwnedFd>) {
        self.expect(kind::PROMOTE)
    }

    /// The daemon has no stream for the socket that was asked for.
    pub fn not_found(&mut self) -> NotFound {
        self.expect(kind::NOT_FOUND).0
    }

    pub fn verdict(&mut self) -> Verdict {
        self.expect(kind::VERDICT).0
    }

    /// The daemon refuses, says why, and hangs up.
    pub fn refused(&mut self) -> Refused {
        let refused = self.expect(kind::REFUSED).0;
        assert!(matches!(self.receive(), Answer::Closed));
        refused
    }

    pub fn kick(&self) {
        self.send(Message::empty(kind::KICK).as_bytes(), &[]);
    }

    /// Puts a request into the queue, and wakes the daemon if it sleeps.
    pub fn ask_for(&mut self, request: &Request) {
        let end = Instant::now() + Duration::from_secs(10);
        while !self.memory.put(request) {
            assert!(Instant::now() < end, "the queue stays full");
            self.kick();
            std::thread::yield_now();
        }
        rdsock_shm::sync::fence(Ordering::SeqCst);
        if self.memory.sleeps().load(Ordering::Relaxed) == 1 {
            self.kick();
        }
    }

    /// A question of the tool, and its answer.
    pub fn ask(&mut self, what: u32) -> Value {
        let query = Query { what, pid: 0 };
        self.send(Message::new(kind::QUERY, &query).as_bytes(), &[]);
        let mut text = Vec::new();
        loop {
            match self.receive() {
                Answer::Message(kind::ANSWER, piece, _) if piece.is_empty() => break,
                Answer::Message(kind::ANSWER, piece, _) => text.extend(piece),
                other => panic!("no answer: {other:?}"),
            }
        }
        serde_json::from_slice(&text).unwrap()
    }

    pub fn announce(&mut self, number: u32, generation: u32, stream: &TcpStream, active: u32) {
        self.ask_for(&announcement(number, generation, stream, active));
    }
}

fn option(stream: &impl AsRawFd, option: i32) -> u64 {
    let (mut value, mut len) = (0u64, 8);
    let fd = stream.as_raw_fd();
    // SAFETY: the option writes 8 bytes to `value`.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &mut len,
        )
    };
    assert_eq!(result, 0);
    value
}

pub fn cookie(stream: &TcpStream) -> u64 {
    cookie_of(stream)
}

/// Of any socket.
pub fn cookie_of(socket: &impl AsRawFd) -> u64 {
    option(socket, libc::SO_COOKIE)
}

/// The cookie of a socket's network namespace.
pub fn netns_of(socket: &impl AsRawFd) -> u64 {
    option(socket, libc::SO_NETNS_COOKIE)
}

pub fn announcement(number: u32, generation: u32, stream: &TcpStream, active: u32) -> Request {
    let mapped = |address: SocketAddr| match address {
        SocketAddr::V4(address) => address.ip().to_ipv6_mapped().octets(),
        SocketAddr::V6(address) => address.ip().octets(),
    };
    let (local, peer) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
    Request {
        fd: stream.as_raw_fd(),
        cookie: cookie(stream),
        netns: option(stream, libc::SO_NETNS_COOKIE),
        local: mapped(local),
        peer: mapped(peer),
        local_port: local.port().into(),
        peer_port: peer.port().into(),
        active,
        ..request(request::ANNOUNCE, number, generation)
    }
}

/// A connection over loopback: the end that connected, and the other.
pub fn tcp_pair() -> (TcpStream, TcpStream) {
    tcp_pair_at("127.0.0.1:0")
}

pub fn tcp_pair_at(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let connector = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    (connector, accepted)
}

const _: () = assert!(offset_of!(TenantMemory, queue) == 512 && QUEUE_SLOTS < CONN_RECORDS);
