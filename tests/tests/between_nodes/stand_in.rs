//! A stand-in for the daemon: it speaks the control protocol as far as connections between nodes need
//! it, carries no stream, and never promotes. Behind its anchors is an echo.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag,
    SockType, UnixAddr, accept, bind, getsockopt, listen, recvmsg, sendmsg, setsockopt, shutdown,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::{Pid, ftruncate};
use rdsock_shm::control::{
    Between, Caller, Lookup, Message, NotFound, Pod, Reached, Refused, Request, Welcome,
    from_bytes, kind, parse, refusal,
};
use rdsock_shm::layout::TenantMemory;
use rdsock_shm::queue::Taker;
use rdsock_shm::reason::Reason;
use rdsock_shm::routes::Network;
use rdsock_shm::sync::{Ordering, fence};
use rdsock_tests::Folder;

/// What it does with a question of whether a connect may go to another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It carries the connection: the anchor is at hand.
    Carry,
    /// The connection is the kernel's, and this is why.
    Decline(Reason),
    /// It carries it, but nobody is at the anchor.
    Nobody,
    /// It says nothing.
    Silent,
    /// It carries it, and ends before the program goes there. Somebody else has its port by then.
    CarryAndEnd,
}

/// How it behaves.
#[derive(Clone, Debug)]
pub struct Manners {
    /// Networks of other nodes.
    pub routes: Vec<Network>,
    /// Answer to REACH.
    pub reach: Reach,
    /// How long it takes over an answer.
    pub delay: Duration,
    /// What a program is told of its own address, IPv4 and IPv6.
    pub local: [IpAddr; 2],
    /// Answer to WHOIS: for whom it has opened a connection; none when it has not.
    pub caller: Option<SocketAddr>,
    /// Whether it answers WHOIS at all.
    pub knows_callers: bool,
    /// How many programs it has room for: each further one is refused.
    pub room: usize,
    /// When it answers a LOOKUP: `None`, at once; else the first one when the second one comes, and that after this time.
    pub late: Option<Duration>,
}

impl Default for Manners {
    fn default() -> Self {
        Manners {
            routes: vec![network("10.99.0.0", 96 + 16), network("fd00:99::", 64)],
            reach: Reach::Carry,
            delay: Duration::ZERO,
            local: ["10.98.0.1".parse().unwrap(), "fd00:98::1".parse().unwrap()],
            caller: None,
            knows_callers: true,
            room: usize::MAX,
            late: None,
        }
    }
}

/// A network of node 2.
pub fn network(address: &str, prefix: u32) -> Network {
    Network {
        address: bytes(address.parse().unwrap()),
        prefix,
        node: 2,
    }
}

/// An address as the control protocol has it.
pub fn bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// What it was told or asked.
#[derive(Clone, Copy, Debug)]
pub enum Heard {
    Hello,
    Reach(Between),
    WhoIs(Between),
    LookUp,
    /// The second LOOKUP was answered.
    Answered,
    Request(Request),
    /// A program has hung up, or has ended.
    HungUp,
}

#[derive(Debug)]
struct Shared {
    manners: Mutex<Manners>,
    heard: Mutex<Vec<Heard>>,
    /// Ports of the echo, at 127.0.0.1 and at ::1.
    anchors: [u16; 2],
}

/// The stand-in. Its threads end with the test's process.
#[derive(Debug)]
pub struct StandIn {
    shared: Arc<Shared>,
    folder: Folder,
}

/// Tickets that it gives out start here.
pub const TICKETS: u64 = 1000;

impl StandIn {
    pub fn start(manners: Manners) -> Self {
        let folder = Folder::new();
        let anchors = [
            echo(Ipv4Addr::LOCALHOST.into()),
            echo(Ipv6Addr::LOCALHOST.into()),
        ];
        let shared = Arc::new(Shared {
            manners: Mutex::new(manners),
            heard: Mutex::default(),
            anchors,
        });
        let stand_in = StandIn { shared, folder };
        let path = stand_in.socket();
        let listener = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        );
        let listener = listener.unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(64).unwrap()).unwrap();
        let shared = stand_in.shared.clone();
        std::thread::spawn(move || {
            while let Ok(fd) = accept(listener.as_raw_fd()) {
                // SAFETY: just accepted, owned by nobody else.
                attend(&shared, unsafe { OwnedFd::from_raw_fd(fd) });
            }
        });
        stand_in
    }

    /// Its control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.at("stand-in.sock")
    }

    pub fn manners(&self) -> MutexGuard<'_, Manners> {
        self.shared.manners.lock().unwrap()
    }

    pub fn anchor(&self) -> u16 {
        self.shared.anchors[0]
    }

    pub fn heard(&self) -> Vec<Heard> {
        self.shared.heard.lock().unwrap().clone()
    }

    pub fn reaches(&self) -> Vec<Between> {
        let heard = self.heard();
        let reaches = heard.iter().filter_map(|heard| match heard {
            Heard::Reach(between) => Some(*between),
            _ => None,
        });
        reaches.collect()
    }

    pub fn questions_who(&self) -> Vec<Between> {
        let heard = self.heard();
        let questions = heard.iter().filter_map(|heard| match heard {
            Heard::WhoIs(between) => Some(*between),
            _ => None,
        });
        questions.collect()
    }

    /// Requests of this kind, when there are this many: a tenant does not wait until they are read.
    pub fn requests(&self, what: u32, count: usize) -> Vec<Request> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let heard = self.heard();
            let requests: Vec<Request> = heard
                .iter()
                .filter_map(|heard| match heard {
                    Heard::Request(request) if request.what == what => Some(*request),
                    _ => None,
                })
                .collect();
            if requests.len() >= count {
                return requests;
            }
            assert!(
                Instant::now() < end,
                "{count} requests {what} have not come: {heard:#?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Echoes at a port of this address.
fn echo(address: IpAddr) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            std::thread::spawn(move || {
                let mut block = [0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut block) {
                    if stream.write_all(&block[..length]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

/// A port of 127.0.0.1 that nobody listens on.
fn nobody() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// A tenant's memory.
struct Memory(NonNull<TenantMemory>);

// SAFETY: used by one thread; everything in it that changes is atomic.
unsafe impl Send for Memory {}

impl Memory {
    /// Its memory, and the file that it is.
    fn make() -> (Self, OwnedFd) {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(c"rdsock-tenant", flags).unwrap();
        ftruncate(&file, size_of::<TenantMemory>() as i64).unwrap();
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        let size = size_of::<TenantMemory>().try_into().unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping of a file that is sealed against shrinking.
        let at = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &file, 0) };
        (Memory(at.unwrap().cast()), file)
    }

    fn get(&self) -> &TenantMemory {
        // SAFETY: mapped until it is dropped; only its atomics are used.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more.
        unsafe { munmap(self.0.cast(), size_of::<TenantMemory>()) }.unwrap();
    }
}

/// A tenant's control connection.
struct Attended {
    shared: Arc<Shared>,
    socket: OwnedFd,
    memory: Option<Memory>,
    taker: Taker,
    unanswered: Option<NotFound>,
}

fn attend(shared: &Arc<Shared>, socket: OwnedFd) {
    // Sometimes it looks at the queue unasked, as the daemon does while it is awake.
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20)).unwrap();
    let mut attended = Attended {
        shared: shared.clone(),
        socket,
        memory: None,
        taker: Taker::new(),
        unanswered: None,
    };
    std::thread::spawn(move || while attended.step() {});
}

impl Attended {
    /// Waits for a message, and reads the queue. False at the end.
    fn step(&mut self) -> bool {
        self.take_requests();
        let mut bytes = [0; 256];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let raw = self.socket.as_raw_fd();
        let (length, fds) = match recvmsg::<UnixAddr>(raw, &mut parts, Some(&mut control), flags) {
            Ok(message) => {
                let fds = message.cmsgs().unwrap().flat_map(|part| match part {
                    ControlMessageOwned::ScmRights(fds) => fds,
                    _ => Vec::new(),
                });
                // SAFETY: just received, owned by nobody else.
                let fds = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                (message.bytes, fds.collect::<Vec<OwnedFd>>())
            }
            Err(nix::errno::Errno::EAGAIN) => return true,
            Err(_) => return false,
        };
        if length == 0 {
            self.take_requests();
            self.hear(Heard::HungUp);
            return false;
        }
        let (kind, body) = parse(&bytes[..length]).unwrap();
        self.handle(kind, body, fds);
        true
    }

    fn handle(&mut self, kind: u16, body: &[u8], mut fds: Vec<OwnedFd>) {
        let manners = self.shared.manners.lock().unwrap().clone();
        match kind {
            kind::HELLO if self.greeted() >= manners.room => {
                let (code, expected) = (refusal::LIMIT, manners.room as u32);
                self.send(kind::REFUSED, &Refused { code, expected });
                let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
            }
            kind::HELLO => {
                let (memory, file) = Memory::make();
                memory.get().routes.set(&manners.routes);
                self.memory = Some(memory);
                self.hear(Heard::Hello);
                std::thread::sleep(manners.delay);
                let welcome = Welcome {
                    tenant: 1,
                    answer_us: 0,
                    judges: 0,
                };
                self.send_with(kind::WELCOME, &welcome, &[file.as_raw_fd()]);
            }
            kind::ADOPT => attend(&self.shared, fds.remove(0)),
            kind::REACH => {
                let question = from_bytes(body).unwrap();
                self.hear(Heard::Reach(question));
                std::thread::sleep(manners.delay);
                self.answer_reach(&manners, &question);
            }
            kind::WHOIS => {
                let question: Between = from_bytes(body).unwrap();
                self.hear(Heard::WhoIs(question));
                std::thread::sleep(manners.delay);
                if manners.knows_callers {
                    let caller = Caller {
                        question: question.question,
                        ticket: manners.caller.map_or(0, |_| TICKETS + question.question),
                        local: question.local,
                        peer: manners.caller.map_or([0; 16], |caller| bytes(caller.ip())),
                        local_port: question.local_port,
                        peer_port: manners.caller.map_or(0, |caller| caller.port().into()),
                    };
                    self.send(kind::CALLER, &caller);
                }
            }
            kind::LOOKUP => {
                let lookup: Lookup = from_bytes(body).unwrap();
                self.hear(Heard::LookUp);
                self.answer_lookup(&manners, &lookup);
            }
            _ => {}
        }
    }

    fn answer_lookup(&mut self, manners: &Manners, lookup: &Lookup) {
        let answer = NotFound {
            conn: lookup.conn,
            generation: lookup.generation,
        };
        let Some(late) = manners.late else {
            return self.send(kind::NOT_FOUND, &answer);
        };
        match self.unanswered.replace(answer) {
            None => {}
            Some(earlier) => {
                self.send(kind::NOT_FOUND, &earlier);
                std::thread::sleep(late);
                self.hear(Heard::Answered);
                self.send(kind::NOT_FOUND, &answer);
            }
        }
    }

    fn answer_reach(&self, manners: &Manners, question: &Between) {
        let is_v4 = question
            .peer
            .starts_with(&bytes(Ipv4Addr::UNSPECIFIED.into())[..12]);
        let (anchor, local, port) = match is_v4 {
            true => (
                Ipv4Addr::LOCALHOST.into(),
                manners.local[0],
                self.shared.anchors[0],
            ),
            false => (
                Ipv6Addr::LOCALHOST.into(),
                manners.local[1],
                self.shared.anchors[1],
            ),
        };
        let carried = Reached {
            question: question.question,
            ticket: TICKETS + question.question,
            anchor: bytes(anchor),
            local: bytes(local),
            anchor_port: port.into(),
            reason: 0,
        };
        let answer = match manners.reach {
            Reach::Silent => return,
            Reach::Carry | Reach::CarryAndEnd => carried,
            Reach::Nobody => Reached {
                anchor_port: nobody().into(),
                ..carried
            },
            Reach::Decline(reason) => Reached {
                ticket: 0,
                reason: reason as u32,
                ..carried
            },
        };
        if manners.reach != Reach::CarryAndEnd {
            return self.send(kind::REACHED, &answer);
        }
        let program = getsockopt(&self.socket, sockopt::PeerCredentials).unwrap();
        let program = Pid::from_raw(program.pid());
        kill(program, Signal::SIGSTOP).unwrap();
        self.send(kind::REACHED, &answer);
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        kill(program, Signal::SIGCONT).unwrap();
    }

    fn take_requests(&mut self) {
        let Some(memory) = &self.memory else { return };
        memory
            .get()
            .header
            .daemon_sleeps
            .store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let mut taken = Vec::new();
        while let Some(request) = self.taker.take(&memory.get().queue) {
            taken.push(Heard::Request(request));
        }
        self.shared.heard.lock().unwrap().extend(taken);
    }

    /// How many programs it has greeted.
    fn greeted(&self) -> usize {
        let heard = self.shared.heard.lock().unwrap();
        let hellos = heard.iter().filter(|heard| matches!(heard, Heard::Hello));
        hellos.count()
    }

    fn hear(&self, heard: Heard) {
        self.shared.heard.lock().unwrap().push(heard);
    }

    fn send<T: Pod>(&self, kind: u16, body: &T) {
        self.send_with(kind, body, &[]);
    }

    fn send_with<T: Pod>(&self, kind: u16, body: &T, fds: &[RawFd]) {
        let message = Message::new(kind, body);
        let parts = [IoSlice::new(message.as_bytes())];
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let raw = self.socket.as_raw_fd();
        // A tenant may be gone.
        let _ = sendmsg::<UnixAddr>(raw, &parts, control, MsgFlags::MSG_NOSIGNAL, None);
        if let Some(memory) = &self.memory {
            memory.get().header.messages.fetch_add(1, Ordering::Release);
        }
    }
}
