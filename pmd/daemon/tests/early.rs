//! A program announces a connection that the daemon has made to it for another node before the daemon has heard that the kernel
//! made it.
//!
//! Such a call is over within microseconds. Here it stands still for as long as a test likes: the daemon runs behind a filter of
//! system calls that asks the test about each connect over IPv4. The test connects the daemon's socket itself, and says to the daemon
//! what came of it when it likes.

mod tenant;

use std::io::Write;
use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrIn, UnixAddr, connect, recvmsg, setsockopt, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use rdsock_shm::control::{Between, Caller, Message, Promote, Request, Verdict, from_bytes, kind};
use tenant::nodes::{Bound, Client, Nodes, Server, octets};
use tenant::{Answer, announcement};

/// Time for what comes at once, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Connects of a daemon over IPv4, which wait for this test.
struct Connects {
    notices: OwnedFd,
    daemon: OwnedFd,
}

/// One of them.
struct Waiting {
    id: u64,
    /// The daemon's socket.
    socket: OwnedFd,
}

/// Requests of `linux/seccomp.h`.
const RECEIVE: libc::Ioctl = 0xc050_2100_u32 as libc::Ioctl;
const ANSWER: libc::Ioctl = 0xc018_2101_u32 as libc::Ioctl;

impl Connects {
    /// The next one.
    fn next(&self) -> Waiting {
        wait_for(&self.notices, "the daemon calls nobody");
        // SAFETY: integers; zeroes are a value, and what the kernel wants.
        let mut notice: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the call writes the notice.
        let got = unsafe { libc::ioctl(self.notices.as_raw_fd(), RECEIVE, &raw mut notice) };
        assert_eq!(got, 0, "{}", Errno::last());
        let (daemon, number) = (self.daemon.as_raw_fd(), notice.data.args[0]);
        // SAFETY: the call takes integers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, daemon, number, 0) };
        assert!(fd >= 0, "{}", Errno::last());
        Waiting {
            id: notice.id,
            // SAFETY: just made, owned by nobody else.
            socket: unsafe { OwnedFd::from_raw_fd(fd as RawFd) },
        }
    }

    /// Says to the daemon that its connect has failed with this.
    fn answer(&self, waiting: Waiting, error: Errno) {
        let answer = libc::seccomp_notif_resp {
            id: waiting.id,
            val: 0,
            error: -(error as i32),
            flags: 0,
        };
        // SAFETY: the call reads the answer.
        let sent = unsafe { libc::ioctl(self.notices.as_raw_fd(), ANSWER, &raw const answer) };
        assert_eq!(sent, 0, "{}", Errno::last());
    }
}

fn wait_for(fd: &impl AsFd, what: &str) {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(LIMIT).unwrap();
    assert_eq!(poll(&mut fds, timeout), Ok(1), "{what}");
}

const fn step(code: u32, k: u32, on: u8, off: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: on,
        jf: off,
        k,
    }
}

/// Asks about connects with an address that has the length of IPv4's, or of one of any family (Unix sockets have shorter ones), and lets
/// everything else go on.
static FILTER: [libc::sock_filter; 7] = {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const IS: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const IS_MORE: u32 = libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    const NUMBER: u32 = 0;
    const THIRD: u32 = 32;
    [
        step(LOAD, NUMBER, 0, 0),
        step(IS, libc::SYS_connect as u32, 0, 4),
        step(LOAD, THIRD, 0, 0),
        step(IS, size_of::<libc::sockaddr_in>() as u32, 1, 0),
        step(IS_MORE, size_of::<libc::sockaddr_un>() as u32, 0, 1),
        step(RETURN, libc::SECCOMP_RET_USER_NOTIF, 0, 0),
        step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    ]
};

/// Puts this process behind the filter, and sends what tells of its connects. In a child that was just forked: makes system calls and
/// nothing else.
fn stand_behind_filter(to: RawFd) -> std::io::Result<()> {
    /// No signal ends a connect that the test has taken up.
    const UNTIL_KILLED: libc::c_ulong = 1 << 5;
    let program = libc::sock_fprog {
        len: FILTER.len() as u16,
        filter: FILTER.as_ptr().cast_mut(),
    };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | UNTIL_KILLED;
    // SAFETY: the call reads the program; the message's parts are locals that outlive the call that reads them.
    let sent = unsafe {
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        let notices = libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program);
        if notices < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let mut byte = 0_u8;
        let mut part = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        let mut room = [0_u64; 4];
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = room.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as _;
        let item = libc::CMSG_FIRSTHDR(&raw const message);
        (*item).cmsg_level = libc::SOL_SOCKET;
        (*item).cmsg_type = libc::SCM_RIGHTS;
        (*item).cmsg_len = libc::CMSG_LEN(4) as _;
        libc::CMSG_DATA(item)
            .cast::<RawFd>()
            .write_unaligned(notices as RawFd);
        libc::sendmsg(to, &raw const message, 0)
    };
    match sent {
        1 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Two nodes, and the connects of the one whose program listens. `None` where that can't be.
fn nodes() -> Option<(Nodes, Connects)> {
    if !nix::unistd::geteuid().is_root() {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED, NOTHING WAS CHECKED: needs root"
        );
        return None;
    }
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let to = theirs.as_raw_fd();
    let nodes = Nodes::start_with(["", ""], |command: &mut Command| {
        // SAFETY: what runs in the child makes system calls and nothing else.
        unsafe { command.pre_exec(move || stand_behind_filter(to)) };
    });
    // In the order in which they were started.
    let [_client, notices] = [0, 1].map(|_| received(&ours));
    // SAFETY: the call takes integers.
    let daemon = unsafe { libc::syscall(libc::SYS_pidfd_open, nodes.server().pid(), 0) };
    assert!(daemon >= 0, "{}", Errno::last());
    // SAFETY: just made, owned by nobody else.
    let daemon = unsafe { OwnedFd::from_raw_fd(daemon as RawFd) };
    Some((nodes, Connects { notices, daemon }))
}

/// A descriptor that was sent.
fn received(socket: &UnixDatagram) -> OwnedFd {
    wait_for(socket, "nothing was sent");
    let (mut byte, mut room) = ([0], nix::cmsg_space!(RawFd));
    let mut parts = [std::io::IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message =
        recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut room), flags).unwrap();
    let fds = message.cmsgs().unwrap().find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: just received, owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(fds.expect("a descriptor comes")) }
}

/// What the daemon says of a connection.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Promoted,
    TurnedDown,
}

/// A client of node 1 asks for a stream to a server of node 2, which has the connection and announces it while the daemon's call waits.
struct Scene {
    server: Server,
    client: Client,
    _bound: Bound,
    waiting: Waiting,
    accepted: TcpStream,
    early: Option<Said>,
}

const EARLY: u32 = 1;
const BEHIND: u32 = 2;

impl Scene {
    fn new(nodes: &Nodes, connects: &Connects) -> Self {
        let server = Server::deaf(nodes.server(), 16);
        let mut client = Client::at(&nodes.client().socket());
        let bound = Bound::new(0).unwrap();
        client.ask(&bound, server.address());
        let waiting = connects.next();
        let to = SockaddrIn::from(server.address());
        let connected = connect(waiting.socket.as_raw_fd(), &to);
        assert!(matches!(connected, Ok(()) | Err(Errno::EINPROGRESS)));
        setsockopt(
            &server.listener,
            sockopt::ReceiveTimeout,
            &TimeVal::seconds(60),
        )
        .unwrap();
        let (accepted, _) = server.listener.accept().unwrap();
        let mut scene = Scene {
            server,
            client,
            _bound: bound,
            waiting,
            accepted,
            early: None,
        };
        let ticket = scene.whose();
        assert_ne!(ticket, 0, "the daemon does not know its own call");
        scene.announce(ticket);
        scene
    }

    /// Asks for whom the daemon has called, as a shim does.
    fn whose(&mut self) -> u64 {
        let name = |name: std::net::SocketAddr| match name {
            std::net::SocketAddr::V4(name) => name,
            std::net::SocketAddr::V6(_) => unreachable!(),
        };
        let ends = [self.accepted.local_addr(), self.accepted.peer_addr()];
        let [local, peer]: [SocketAddrV4; 2] = ends.map(|end| name(end.unwrap()));
        let question = Between {
            question: 1,
            netns: tenant::netns_of(&self.accepted),
            local: octets(*local.ip()),
            peer: octets(*peer.ip()),
            local_port: local.port().into(),
            peer_port: peer.port().into(),
            fd: self.accepted.as_raw_fd(),
            reserved: 0,
        };
        let message = Message::new(kind::WHOIS, &question);
        self.server.tenant.send(message.as_bytes(), &[]);
        match self.server.tenant.receive() {
            Answer::Message(kind::CALLER, body, _) => from_bytes::<Caller>(&body).unwrap().ticket,
            other => panic!("{other:?}"),
        }
    }

    /// Announces the connection, and behind that one that is not there: when the daemon has answered that, it has heard of both.
    fn announce(&mut self, ticket: u64) {
        for (number, wrong) in [(EARLY, 0), (BEHIND, 1)] {
            let true_one = announcement(number, 1, &self.accepted, 0);
            let cookie = true_one.cookie + wrong;
            self.server.tenant.ask_for(&Request {
                stream_id: ticket,
                cookie,
                ..true_one
            });
        }
        match self.next() {
            (BEHIND, Said::TurnedDown) => {}
            (EARLY, said) => {
                self.early = Some(said);
                assert_eq!(self.next(), (BEHIND, Said::TurnedDown));
            }
            other => panic!("{other:?}"),
        }
    }

    /// What the server's program is told next, and of which connection.
    fn next(&mut self) -> (u32, Said) {
        match self.server.tenant.receive() {
            Answer::Message(kind::PROMOTE, body, _) => {
                let promote: Promote = from_bytes(&body).unwrap();
                (promote.conn, Said::Promoted)
            }
            Answer::Message(kind::VERDICT, body, _) => {
                let verdict: Verdict = from_bytes(&body).unwrap();
                (verdict.conn, Said::TurnedDown)
            }
            other => panic!("{other:?}"),
        }
    }

    /// What becomes of the early one, now that the daemon's connect has ended with this, and whether the client got its stream.
    fn end(mut self, connects: &Connects, error: Errno) -> (Said, bool) {
        connects.answer(self.waiting, error);
        let reached = self.client.answer().ticket != 0;
        let said = self.early.take();
        let mut server = self.server;
        let said = said.unwrap_or_else(|| match server.tenant.receive() {
            Answer::Message(kind::PROMOTE, ..) => Said::Promoted,
            Answer::Message(kind::VERDICT, ..) => Said::TurnedDown,
            other => panic!("{other:?}"),
        });
        (said, reached)
    }
}

#[test]
fn who_announces_a_connection_before_the_daemon_has_heard_of_it_is_promoted() {
    let Some((nodes, connects)) = nodes() else {
        return;
    };
    let end = Instant::now() + LIMIT;
    loop {
        let scene = Scene::new(&nodes, &connects);
        match scene.end(&connects, Errno::EINPROGRESS) {
            (said, true) => return assert_eq!(said, Said::Promoted),
            // The daemon gives a call up that takes too long: this machine was too busy for all of that.
            (_, false) => assert!(Instant::now() < end, "the machine is too busy"),
        }
    }
}

#[test]
fn who_announces_a_connection_that_the_daemon_has_not_made_is_told_so() {
    let Some((nodes, connects)) = nodes() else {
        return;
    };
    let scene = Scene::new(&nodes, &connects);
    let ended = scene.end(&connects, Errno::ECONNREFUSED);
    assert_eq!(ended, (Said::TurnedDown, false));
}

#[test]
fn who_announces_a_connection_that_the_daemon_gives_up_is_told_so() {
    let Some((nodes, connects)) = nodes() else {
        return;
    };
    let mut scene = Scene::new(&nodes, &connects);
    if scene.early.is_none() {
        assert_eq!(scene.next(), (EARLY, Said::TurnedDown));
    }
    scene.early = Some(Said::TurnedDown);
    assert!(!scene.end(&connects, Errno::EINPROGRESS).1);
}
