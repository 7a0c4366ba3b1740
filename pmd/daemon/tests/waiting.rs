//! Nobody makes the daemon wait: not by what is closed, read or mapped last by it, nor by what it has to
//! say, nor by not being there when it is looked for.

mod tenant;

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use rdsock_shm::control::{Message, Query, kind, question, refusal};
use tenant::actor::{Part, is_root};
use tenant::linger::Lingering;
use tenant::measure::{Bystander, Honest};
use tenant::silent::{SilentFile, be_file_system};
use tenant::{Answer, Daemon, Tenant, announcement, control_pair, hello_message};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

/// How long others are watched after an attack. An attack that works is felt at once.
const WATCH: Duration = Duration::from_secs(2);
/// A little more than a caller has to say who it is.
const HANDSHAKE: Duration = Duration::from_secs(6);

/// What a descriptor comes beside.
#[derive(Clone, Copy, Debug)]
enum Beside {
    Kick,
    Garbage,
    /// In place of the tenant's bell board.
    Hello,
    /// As one too many.
    HelloMore,
    Adopt,
    Query,
}

impl Beside {
    /// Sends a descriptor; returns who sent it, since what it holds open counts.
    fn send(self, daemon: &Daemon, send: impl FnOnce(&Tenant, &[u8], &[i32])) -> Tenant {
        let attached = matches!(self, Beside::Kick | Beside::Adopt);
        let tenant = match attached {
            true => Tenant::attach(daemon),
            false => Tenant::stranger(daemon).unwrap(),
        };
        let bells = tenant.memory.bells.as_raw_fd();
        let (what, pid) = (question::STAT, 0);
        let message = match self {
            Beside::Kick => Message::empty(kind::KICK),
            Beside::Garbage => Message::empty(77),
            Beside::Hello | Beside::HelloMore => hello_message(),
            Beside::Adopt => Message::empty(kind::ADOPT),
            Beside::Query => Message::new(kind::QUERY, &Query { what, pid }),
        };
        let others: &[i32] = match self {
            Beside::HelloMore => &[bells],
            _ => &[],
        };
        send(&tenant, message.as_bytes(), others);
        tenant
    }
}

/// A socket whose last close sleeps, beside this message.
fn a_lingering_socket(beside: Beside) {
    let daemon = Daemon::start(SMALL);
    let bystander = Bystander::new(&daemon);
    let mut honest = Honest::new(&daemon);
    let mut sockets: Vec<_> = (0..4).map(|_| Lingering::new()).collect();
    let mut senders = Vec::new();
    for socket in &mut sockets {
        let sent = |tenant: &Tenant, message: &[u8], others: &[i32]| {
            socket.give(tenant, message, others);
        };
        senders.push(beside.send(&daemon, sent));
        bystander.asks(&daemon, &format!("a lingering socket beside {beside:?}"));
    }
    let what = format!("lingering sockets beside {beside:?}");
    let longest = bystander.goes_on(&daemon, &what, WATCH);
    println!("{what}: {longest:?} at most");
    honest.promotion();
}

#[test]
fn a_lingering_socket_beside_a_kick() {
    a_lingering_socket(Beside::Kick);
}

#[test]
fn a_lingering_socket_beside_garbage() {
    a_lingering_socket(Beside::Garbage);
}

#[test]
fn a_lingering_socket_as_bell_board() {
    a_lingering_socket(Beside::Hello);
}

#[test]
fn a_lingering_socket_too_many() {
    a_lingering_socket(Beside::HelloMore);
}

#[test]
fn a_lingering_socket_to_be_adopted() {
    a_lingering_socket(Beside::Adopt);
}

#[test]
fn a_lingering_socket_beside_a_question() {
    a_lingering_socket(Beside::Query);
}

/// The daemon closes the control socket, with messages in it that it has not read.
#[test]
fn lingering_sockets_that_nobody_has_read() {
    let daemon = Daemon::start(SMALL);
    let bystander = Bystander::new(&daemon);
    let mut honest = Honest::new(&daemon);
    let mut sockets: Vec<_> = (0..4).map(|_| Lingering::new()).collect();
    let stranger = Tenant::stranger(&daemon).unwrap();
    daemon.stat();
    daemon.signal(Signal::SIGSTOP);
    // The first one is refused.
    stranger.send(b"rubbish", &[]);
    for socket in &mut sockets {
        socket.give(&stranger, Message::empty(kind::KICK).as_bytes(), &[]);
    }
    daemon.signal(Signal::SIGCONT);
    bystander.goes_on(&daemon, "lingering sockets that nobody has read", WATCH);
    honest.promotion();
}

/// The same, where whoever sent them is gone.
#[test]
fn lingering_sockets_of_somebody_who_is_gone() {
    let daemon = Daemon::start(SMALL);
    let bystander = Bystander::new(&daemon);
    let mut honest = Honest::new(&daemon);
    let mut sockets: Vec<_> = (0..4).map(|_| Lingering::new()).collect();
    for attached in [true, false] {
        let sender = match attached {
            true => Tenant::attach(&daemon),
            false => Tenant::stranger(&daemon).unwrap(),
        };
        daemon.stat();
        daemon.signal(Signal::SIGSTOP);
        for socket in sockets.iter_mut().filter(|s| s.socket.is_some()).take(2) {
            socket.give(&sender, b"rubbish", &[]);
        }
        drop(sender);
        daemon.signal(Signal::SIGCONT);
        bystander.goes_on(&daemon, "lingering sockets of somebody gone", WATCH);
    }
    honest.promotion();
}

/// They lie unread in a socket that is itself a descriptor of a message.
#[test]
fn lingering_sockets_in_a_socket_to_be_adopted() {
    let daemon = Daemon::start(SMALL);
    let bystander = Bystander::new(&daemon);
    let mut honest = Honest::new(&daemon);
    let mut sockets: Vec<_> = (0..4).map(|_| Lingering::new()).collect();
    let tenant = Tenant::attach(&daemon);
    let pair = |kind| -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
    };
    for (number, socket) in sockets.iter_mut().enumerate() {
        // Adopted and then refused, or not even adopted.
        let kind = match number % 2 {
            0 => SockType::SeqPacket,
            _ => SockType::Stream,
        };
        let (ours, theirs) = pair(kind);
        let ours = Tenant::over(ours);
        ours.send(b"rubbish", &[]);
        socket.give(&ours, b"more rubbish", &[]);
        let adopt = Message::empty(kind::ADOPT);
        tenant.send(adopt.as_bytes(), &[theirs.as_raw_fd()]);
        drop((ours, theirs));
        bystander.asks(&daemon, "a lingering socket in a socket");
    }
    bystander.goes_on(&daemon, "lingering sockets in sockets", WATCH);
    honest.promotion();
}

/// A control connection that was handed over, of which its maker has kept the daemon's end: a look at what has come does not
/// tell what is received, and what is received has a lingering socket that nobody takes.
#[test]
fn lingering_sockets_that_a_look_does_not_show() {
    let daemon = Daemon::start(SMALL);
    let bystander = Bystander::new(&daemon);
    let mut honest = Honest::new(&daemon);
    let tenant = Tenant::attach(&daemon);
    let mut adopted = Vec::new();
    for _ in 0..4 {
        let mut socket = Lingering::new();
        let (ours, theirs) = control_pair();
        let ours = Tenant::over(ours);
        let plain = Message::empty(kind::KICK);
        // A look begins behind the first message.
        let (offset, level) = (plain.as_bytes().len() as i32, libc::SOL_SOCKET);
        // SAFETY: the option reads one integer.
        let set = unsafe {
            let value = (&raw const offset).cast();
            libc::setsockopt(theirs.as_raw_fd(), level, libc::SO_PEEK_OFF, value, 4)
        };
        assert_eq!(set, 0);
        socket.give(&ours, plain.as_bytes(), &[]);
        ours.send(plain.as_bytes(), &[]);
        let adopt = Message::empty(kind::ADOPT);
        tenant.send(adopt.as_bytes(), &[theirs.as_raw_fd()]);
        bystander.asks(&daemon, "a lingering socket that a look does not show");
        adopted.push((ours, theirs, socket));
    }
    bystander.goes_on(&daemon, "lingering sockets that no look shows", WATCH);
    honest.promotion();
}

/// Who has kept the daemon's end receives there into a page that does not answer, and the kernel lets nobody else receive
/// until that ends.
#[test]
fn an_adopted_socket_whose_maker_receives_for_ever() {
    if let Some(part) = Part::of_this() {
        return be_file_system(&part);
    }
    if !is_root() {
        return;
    }
    let daemon = Daemon::start(SMALL);
    let bystander = Bystander::new(&daemon);
    let mut honest = Honest::new(&daemon);
    let tenant = Tenant::attach(&daemon);
    let test = "an_adopted_socket_whose_maker_receives_for_ever";
    let Some((file, page)) = SilentFile::with_page(test) else {
        return;
    };
    let (ours, theirs) = control_pair();
    let ours = Tenant::over(ours);
    for _ in 0..2 {
        ours.kick();
    }
    let fd = theirs.as_raw_fd();
    let (page, length) = (page.as_mut_ptr() as usize, page.len());
    // SAFETY: the mapping lives until this has ended, and nobody refers to it.
    let receiver = std::thread::spawn(move || unsafe { libc::recv(fd, page as _, length, 0) });
    std::thread::sleep(Duration::from_millis(300));
    assert!(!receiver.is_finished());
    let adopt = Message::empty(kind::ADOPT);
    tenant.send(adopt.as_bytes(), &[fd]);
    bystander.goes_on(&daemon, "a socket whose maker receives", WATCH);
    honest.promotion();
    // More than a caller's time to say who it is.
    bystander.goes_on(&daemon, "a socket whose maker receives", HANDSHAKE);
    // The file goes first: this ends then.
    drop(file);
    receiver.join().unwrap();
    honest.promotion();
}

/// Whoever has kept the daemon's end can take the sender away from what comes: nothing is done for nobody.
#[test]
fn an_adopted_socket_that_does_not_say_who_speaks() {
    let daemon = Daemon::start(SMALL);
    let tenant = Tenant::attach(&daemon);
    let (mut adopted, theirs) = Tenant::adopted(&tenant);
    adopted.hello();
    assert!(matches!(
        adopted.receive(),
        Answer::Message(kind::WELCOME, ..)
    ));
    adopted.ask(question::STAT);
    setsockopt(&theirs, sockopt::PassCred, &false).unwrap();
    let (what, pid) = (question::STAT, 0);
    let query = Message::new(kind::QUERY, &Query { what, pid });
    adopted.send(query.as_bytes(), &[]);
    daemon.wait_until("it is nobody's", |stat| stat["counters"]["stray"] == 1);
    assert!(adopted.receive_within(Duration::ZERO).is_none());
}

/// Who has been adopted and says nothing is sent away as others are.
#[test]
fn an_adopted_socket_on_which_nobody_speaks() {
    let daemon = Daemon::start(SMALL);
    let tenant = Tenant::attach(&daemon);
    let (mut adopted, _theirs) = Tenant::adopted(&tenant);
    assert_eq!(adopted.refused().code, refusal::MALFORMED);
}

/// The daemon must not be the last to hold a socket because it looked at it when it was announced.
#[test]
fn lingering_sockets_that_are_announced_and_closed() {
    let daemon = Daemon::start(SMALL);
    let bystander = Bystander::new(&daemon);
    let mut honest = Honest::new(&daemon);
    let mut tenant = Tenant::attach(&daemon);
    for number in 0..200 {
        let mut lingering = Lingering::new();
        let socket = lingering.socket.take().unwrap();
        let claim = announcement(1, number, &socket, 1);
        // Closing it may sleep here, too, until its peer is dropped.
        let closer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(u64::from(number % 50) * 10));
            drop(socket);
        });
        tenant.ask_for(&claim);
        bystander.asks(&daemon, "a lingering socket that is announced and closed");
        drop(lingering);
        closer.join().unwrap();
        while tenant.receive_within(Duration::ZERO).is_some() {}
    }
    honest.promotion();
}

macro_rules! silent_file {
    ($name:ident, $body:expr) => {
        #[test]
        fn $name() {
            if let Some(part) = Part::of_this() {
                return be_file_system(&part);
            }
            if !is_root() {
                return;
            }
            let daemon = Daemon::start(SMALL);
            let bystander = Bystander::new(&daemon);
            let honest = Honest::new(&daemon);
            // Dropped first: the daemon does not die while it waits for this.
            if let Some(file) = SilentFile::open(stringify!($name)) {
                $body(&daemon, bystander, honest, file);
            }
        }
    };
}

/// A file of a file system that does not answer, beside this message.
fn beside(daemon: &Daemon, bystander: &Bystander, file: &SilentFile, beside: Beside) {
    let what = format!("a file that does not answer beside {beside:?}");
    let send = |tenant: &Tenant, message: &[u8], others: &[i32]| {
        tenant.send(message, &[others, &[file.fd()]].concat());
    };
    let _sender = beside.send(daemon, send);
    let longest = bystander.goes_on(daemon, &what, WATCH);
    println!("{what}: {longest:?} at most");
}

fn silent_beside(which: Beside) -> impl Fn(&Daemon, Bystander, Honest, SilentFile) {
    move |daemon, bystander, mut honest, file| {
        beside(daemon, &bystander, &file, which);
        honest.promotion();
    }
}

silent_file!(
    a_file_that_does_not_answer_beside_a_kick,
    silent_beside(Beside::Kick)
);
silent_file!(
    a_file_that_does_not_answer_beside_garbage,
    silent_beside(Beside::Garbage)
);
silent_file!(
    a_file_that_does_not_answer_as_bell_board,
    silent_beside(Beside::Hello)
);
silent_file!(
    a_file_that_does_not_answer_to_be_adopted,
    silent_beside(Beside::Adopt)
);
silent_file!(
    a_file_that_does_not_answer_is_announced,
    |daemon: &Daemon, bystander: Bystander, mut honest: Honest, file: SilentFile| {
        let mut tenant = Tenant::attach(daemon);
        let (connector, _accepted) = tenant::tcp_pair();
        for generation in 0..20 {
            let claim = announcement(1, generation, &connector, 1);
            tenant.ask_for(&rdsock_shm::control::Request {
                fd: file.fd(),
                ..claim
            });
            bystander.asks(daemon, "a file that does not answer, announced");
        }
        bystander.goes_on(daemon, "a file that does not answer, announced", WATCH);
        honest.promotion();
    }
);

/// A process that is in the middle of `exec`, while a file that it closes there does not answer: the kernel lets nobody look
/// into it until that ends. It has announced a connection just before.
#[test]
fn a_process_that_does_not_come_out_of_exec() {
    if let Some(part) = Part::of_this() {
        return be_file_system(&part);
    }
    if !is_root() {
        return;
    }
    let daemon = Daemon::start(SMALL);
    let bystander = Bystander::new(&daemon);
    let mut honest = Honest::new(&daemon);
    let (mut told, tells) = std::io::pipe().unwrap();
    let (is_told, mut tell) = std::io::pipe().unwrap();
    let socket = daemon.socket();
    let start = |_| {
        let mut command = Command::new("true");
        // SAFETY: nothing there rests on other threads.
        unsafe { command.pre_exec(move || announce_when_told(&socket, &tells, &is_told)) };
        // Does not come back before the program runs.
        std::thread::spawn(move || command.status());
        // The process is there, and attached.
        told.read_exact(&mut [0]).unwrap();
    };
    let Some((file, ())) = SilentFile::open_for("a_process_that_does_not_come_out_of_exec", start)
    else {
        return;
    };
    daemon.signal(Signal::SIGSTOP);
    tell.write_all(b".").unwrap();
    // It closes the file in `exec`.
    file.wait_for_somebody();
    daemon.signal(Signal::SIGCONT);
    let longest = bystander.goes_on(&daemon, "a process in exec", WATCH);
    println!("a process in exec: {longest:?} at most");
    honest.promotion();
    assert_eq!(daemon.counter("held_up"), 1);
    // Who was held up comes back.
    drop(file);
    daemon.wait_until("it is not who it was", |stat| {
        stat["counters"]["changed"] == 1 || stat["counters"]["detached"] != 0
    });
    honest.promotion();
}

/// In a child of this process: attaches, says so, and announces a connection when it is told to.
fn announce_when_told(
    socket: &Path,
    mut says: &PipeWriter,
    mut told: &PipeReader,
) -> io::Result<()> {
    let mut tenant = Tenant::attach_at(socket);
    says.write_all(b".")?;
    told.read_exact(&mut [0])?;
    let (connector, accepted) = tenant::tcp_pair();
    tenant.announce(1, 1, &connector, 1);
    // They go with the program that is to come.
    std::mem::forget((tenant, connector, accepted));
    Ok(())
}

/// Whoever has said who it is in time is served, however late the daemon reads it.
#[test]
fn callers_are_not_sent_away_because_the_daemon_was_late() {
    // More than the daemon takes at once from the kernel.
    const CALLERS: usize = 100;
    const LATE: usize = 20;
    let daemon = Daemon::start(SMALL);
    let before = daemon.descriptors();
    let mut callers: Vec<_> = (0..CALLERS)
        .map(|_| Tenant::stranger(&daemon).unwrap())
        .collect();
    daemon.wait_until("all are there", |_| {
        daemon.descriptors() >= before + 2 * CALLERS
    });
    daemon.signal(Signal::SIGSTOP);
    for caller in &mut callers {
        caller.hello();
    }
    // Some come only now.
    let mut late: Vec<_> = (0..LATE)
        .map(|_| Tenant::stranger(&daemon).unwrap())
        .collect();
    for caller in &late {
        // What brings something along can't be sent before the call is taken.
        caller.send(hello_message().as_bytes(), &[]);
    }
    // Longer than a caller has to say who it is.
    std::thread::sleep(Duration::from_secs(6));
    daemon.signal(Signal::SIGCONT);
    let answers = callers.iter_mut().chain(&mut late).map(Tenant::receive);
    let turned_away = answers
        .filter(|answer| !matches!(answer, Answer::Message(kind::WELCOME, ..)))
        .count();
    assert_eq!(turned_away, 0, "of {} callers", CALLERS + LATE);
}
