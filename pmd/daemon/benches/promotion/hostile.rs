//! A hostile tenant: everything that tenants are known to do to a daemon, in turns, for ever. Nothing here waits for the
//! daemon for long, so that one attack does not hold up the next one.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use rdsock_shm::control::{
    Between, Lookup, Message, Query, Request, bytes_of, head, kind, question, request as what,
};
use rdsock_shm::layout::CONN_RECORDS;

use crate::honest::end_with_us;
use crate::tenant::actor::{ATTACKER, Actor, OTHER, Part, VICTIM, say};
use crate::tenant::linger::Lingering;
use crate::tenant::silent::SilentFile;
use crate::tenant::{Answer, Tenant, announcement, request, tcp_pair};

/// Processes, and the users that they belong to.
const COUNT: u32 = 10;
const USERS: [u32; 3] = [ATTACKER, VICTIM, OTHER];
/// Time for all attacks to be under way.
const UNDER_WAY: Duration = Duration::from_secs(3);
/// Time for the daemon to let somebody in.
const PATIENCE: Duration = Duration::from_millis(100);

/// Running attackers. Ended when dropped.
pub struct Attack {
    /// Before those who have it: they can't end while they close it.
    _silent: Option<SilentFile>,
    _actors: Vec<Actor>,
}

/// Starts the attackers. `part` is what they do: "hostile", or "busy" for no more than to keep the processors busy.
pub fn start(part: &str, socket: &Path) -> Attack {
    let users = (0..COUNT).map(|number| (number, USERS[number as usize % USERS.len()]));
    // Who has the silent file does not come to an end while it is open, nor does `exec` that closes it. So it is one
    // user's, and opened when all others have been started.
    let (with, without): (Vec<_>, Vec<_>) = users.partition(|(_, user)| *user == OTHER);
    let mut actors: Vec<_> = without
        .into_iter()
        .map(|(number, user)| start_one(part, socket, number, user, None))
        .collect();
    let silent = match part {
        "hostile" => SilentFile::open("promotion"),
        _ => None,
    };
    let fd = silent.as_ref().map(SilentFile::fd);
    let more = with
        .into_iter()
        .map(|(number, user)| start_one(part, socket, number, user, fd));
    actors.extend(more);
    std::thread::sleep(UNDER_WAY);
    Attack {
        _silent: silent,
        _actors: actors,
    }
}

fn start_one(part: &str, socket: &Path, number: u32, user: u32, silent: Option<RawFd>) -> Actor {
    let actor = Actor::start_with("promotion", part, socket, |command| {
        command.uid(user).gid(user);
        command.env("TENANT_NUMBER", number.to_string());
        if let Some(fd) = silent {
            command.env("TENANT_SILENT", fd.to_string());
            // SAFETY: one system call between fork and exec.
            unsafe { command.pre_exec(move || let_inherit(fd)) };
        }
        end_with_us(command);
    });
    actor.hear("ready");
    actor
}

fn let_inherit(fd: RawFd) -> std::io::Result<()> {
    // SAFETY: the caller has it open.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

/// The part that keeps a processor busy.
pub fn be_busy() {
    say("ready");
    loop {
        std::hint::spin_loop();
    }
}

/// The part of a tenant that attaches, announces, and runs another program which has the control connection still.
pub fn be_replaced(part: &Part) {
    let Some(mut tenant) = attach(&part.socket) else {
        return;
    };
    let (connector, accepted) = tcp_pair();
    tenant.announce(1, 1, &connector, 1);
    tenant.announce(2, 1, &accepted, 0);
    for fd in [tenant.socket.as_raw_fd(), connector.as_raw_fd()] {
        let _ = let_inherit(fd);
    }
    let error = Command::new("sleep").arg("0.1").exec();
    panic!("sleep: {error}");
}

/// The part that does everything.
pub fn be_hostile(part: &Part) {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    // SAFETY: children are waited for by nobody.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.unwrap();
    let number = |name| std::env::var(name).ok()?.parse().ok();
    fastrand::seed(number("TENANT_NUMBER").unwrap_or_default());
    let mut hostile = Hostile {
        path: part.socket.clone(),
        silent: number("TENANT_SILENT").map(|fd| fd as RawFd),
        listener: TcpListener::bind("127.0.0.1:0").unwrap(),
        null: std::fs::File::open("/dev/null").unwrap().into(),
        lingering: Vec::new(),
        callers: Vec::new(),
        deaf: Vec::new(),
        full: None,
        announcer: None,
        pairs: Vec::new(),
        round: 0,
    };
    say("ready");
    loop {
        hostile.round += 1;
        hostile.linger();
        hostile.talk_garbage();
        hostile.call_silently();
        hostile.ask_and_not_read();
        hostile.ask_about_full_records();
        for _ in 0..10 {
            hostile.announce();
        }
        hostile.come_and_go();
        hostile.be_replaced();
        hostile.hoard();
        hostile.pass_silent_file();
    }
}

/// See [`be_hostile`].
struct Hostile {
    path: PathBuf,
    /// A file on which every operation waits for ever.
    silent: Option<RawFd>,
    listener: TcpListener,
    null: OwnedFd,
    lingering: Vec<Lingering>,
    callers: Vec<OwnedFd>,
    deaf: Vec<Tenant>,
    full: Option<Tenant>,
    announcer: Option<Tenant>,
    pairs: Vec<(TcpStream, TcpStream)>,
    round: u32,
}

/// Keeps the newest ones.
fn keep<T>(all: &mut Vec<T>, count: usize) {
    let old = all.len().saturating_sub(count);
    all.drain(..old);
}

/// Connects and says nothing; `None` where that would have to wait.
fn call(path: &Path) -> Option<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).ok()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path).ok()?).ok()?;
    Some(socket)
}

/// A tenant that has not said HELLO, and whose sends do not wait.
fn stranger(path: &Path) -> Option<Tenant> {
    Some(Tenant::over(call(path)?))
}

fn attach(path: &Path) -> Option<Tenant> {
    let mut tenant = stranger(path)?;
    tenant.hello();
    match tenant.receive_within(PATIENCE)? {
        Answer::Message(kind::WELCOME, ..) => Some(tenant),
        _ => None,
    }
}

/// Sends until the socket is full.
fn send_many(tenant: &Tenant, message: &Message, count: usize) {
    for _ in 0..count {
        if tenant.try_send(message.as_bytes(), &[]).is_err() {
            return;
        }
    }
}

fn query(what: u32) -> Message {
    Message::new(kind::QUERY, &Query { what, pid: 0 })
}

impl Hostile {
    /// Somebody to send something, attached or not.
    fn somebody(&self) -> Option<Tenant> {
        match fastrand::bool() {
            true => attach(&self.path),
            false => stranger(&self.path),
        }
    }

    /// Any message of no body.
    fn any(&self) -> Message {
        let kinds = [kind::KICK, kind::HELLO, kind::ADOPT, kind::QUERY, 77];
        Message::empty(fastrand::choice(kinds).unwrap())
    }

    /// Sockets whose last close sleeps, in control messages.
    fn linger(&mut self) {
        for _ in 0..3 {
            if let Some(tenant) = self.somebody() {
                let mut socket = Lingering::new();
                socket.give(&tenant, self.any().as_bytes(), &[]);
                self.lingering.push(socket);
            }
        }
        keep(&mut self.lingering, 8);
    }

    fn talk_garbage(&mut self) {
        for count in [0, 1, 100, 253] {
            let Some(tenant) = self.somebody() else {
                return;
            };
            let mut bytes = bytes_of(&head(fastrand::u16(..20))).to_vec();
            bytes.extend((0..fastrand::usize(..300)).map(|_| fastrand::u8(..)));
            for _ in 0..20 {
                let fds = vec![self.null.as_raw_fd(); count];
                if tenant.try_send(&bytes, &fds).is_err() {
                    break;
                }
            }
        }
    }

    fn call_silently(&mut self) {
        let callers = (0..100).map_while(|_| call(&self.path));
        self.callers.extend(callers);
        keep(&mut self.callers, 300);
    }

    /// Questions of strangers and of tenants.
    fn ask_and_not_read(&mut self) {
        for what in [question::WHY, question::STAT] {
            if let Some(tenant) = self.somebody() {
                send_many(&tenant, &query(what), 300);
                self.deaf.push(tenant);
            }
        }
        if let Some(tenant) = attach(&self.path) {
            let address = Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets();
            let question = Between {
                question: 1,
                netns: 0,
                local: address,
                peer: address,
                local_port: 1,
                peer_port: 1,
                fd: -1,
                reserved: 0,
            };
            send_many(&tenant, &Message::new(kind::WHOIS, &question), 300);
            let lookup = Lookup {
                conn: 8,
                generation: 1,
                cookie: 1,
                fd: 1,
                reserved: 0,
            };
            send_many(&tenant, &Message::new(kind::LOOKUP, &lookup), 300);
            self.deaf.push(tenant);
        }
        keep(&mut self.deaf, 20);
    }

    /// A tenant that uses all its records asks about itself, and others do.
    fn ask_about_full_records(&mut self) {
        if self.full.is_none() {
            self.full = attach(&self.path);
            if let Some(tenant) = &self.full {
                for number in 0..CONN_RECORDS {
                    tenant.memory.set_conn(number, number as i32, 1, 1);
                }
            }
        }
        let Some(mut tenant) = self.full.take() else {
            return;
        };
        send_many(&tenant, &query(question::WHY), 1);
        // What is read is asked for again.
        for _ in 0..200 {
            match tenant.receive_within(Duration::ZERO) {
                Some(Answer::Closed) => return,
                Some(_) => {}
                None => break,
            }
        }
        self.full = Some(tenant);
    }

    fn own_pair(&self) -> Option<(TcpStream, TcpStream)> {
        let connector = TcpStream::connect(self.listener.local_addr().ok()?).ok()?;
        let (accepted, _) = self.listener.accept().ok()?;
        for socket in [&connector, &accepted] {
            // No TIME_WAIT: ports are everybody's.
            let linger = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            setsockopt(socket, sockopt::Linger, &linger).ok()?;
        }
        Some((connector, accepted))
    }

    /// Any claim: of nothing, of what is no socket, of its own connections with a lie, of its own connections.
    fn claim(&self, number: u32) -> Request {
        let address = Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets();
        let any = Request {
            fd: fastrand::i32(-1..2000),
            cookie: fastrand::u64(..100_000),
            local: address,
            peer: address,
            local_port: fastrand::u16(..).into(),
            peer_port: fastrand::u16(..).into(),
            active: fastrand::u32(..2),
            ..request(what::ANNOUNCE, number, self.round)
        };
        let Some((connector, accepted)) = fastrand::choice(&self.pairs) else {
            return any;
        };
        let (active, socket) = fastrand::choice([(1, connector), (0, accepted)]).unwrap();
        let own = announcement(number, self.round, socket, active);
        match fastrand::u32(..6) {
            0 | 1 => any,
            2 => Request {
                fd: self.silent.unwrap_or(0),
                ..own
            },
            3 => Request {
                cookie: any.cookie,
                ..own
            },
            // Other holders are searched for.
            4 => Request { extra: 1, ..own },
            _ => own,
        }
    }

    /// As fast as the daemon takes them, with a kick after every few.
    fn announce(&mut self) {
        let Some(mut tenant) = self.announcer.take().or_else(|| attach(&self.path)) else {
            return;
        };
        self.pairs.extend(self.own_pair());
        keep(&mut self.pairs, 50);
        for number in 0..200 {
            if !tenant.memory.put(&self.claim(number)) {
                break;
            }
            if number % 4 == 0 {
                tenant.kick();
            }
        }
        tenant.kick();
        // A round in ten is not read.
        while !self.round.is_multiple_of(10) {
            match tenant.receive_within(Duration::ZERO) {
                Some(Answer::Closed) => return,
                Some(_) => {}
                None => break,
            }
        }
        self.announcer = Some(tenant);
    }

    /// HELLO, and away, before or after the answer.
    fn come_and_go(&mut self) {
        for number in 0..20 {
            if number % 2 == 0 {
                drop(attach(&self.path));
            } else if let Some(mut tenant) = stranger(&self.path) {
                tenant.hello();
            }
        }
    }

    fn be_replaced(&mut self) {
        if self.silent.is_some() {
            // A program that inherits that file does not end.
            return;
        }
        let mut command = Command::new("/proc/self/exe");
        command
            .env("TENANT_PART", "replaced")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        end_with_us(&mut command);
        let _ = command.spawn();
    }

    /// Descriptors of the daemon, up to the limit, now and then.
    fn hoard(&mut self) {
        if !self.round.is_multiple_of(5) {
            return;
        }
        let attached: Vec<_> = (0..200).map_while(|_| attach(&self.path)).collect();
        let callers: Vec<_> = (0..1000).map_while(|_| call(&self.path)).collect();
        std::thread::sleep(Duration::from_millis(100));
        drop((attached, callers));
    }

    fn pass_silent_file(&mut self) {
        let Some(fd) = self.silent else {
            return;
        };
        if let Some(tenant) = self.somebody() {
            let _ = tenant.try_send(self.any().as_bytes(), &[fd]);
        }
        if let Some(tenant) = stranger(&self.path) {
            let hello = rdsock_shm::control::Hello {
                memory_size: size_of::<rdsock_shm::layout::TenantMemory>() as u64,
                bell_size: size_of::<rdsock_shm::layout::BellBoard>() as u64,
            };
            let bells = tenant.memory.bells.as_raw_fd();
            let message = Message::new(kind::HELLO, &hello);
            let _ = tenant.try_send(message.as_bytes(), &[fd, bells]);
            self.callers.extend(Some(tenant.socket));
        }
    }
}
