//! Programs that end, fork, run another program, or hold something else by now, in the middle of
//! being promoted; and processes that come by their ids. Thousands of rounds: in each, one end of a
//! connection is an honest partner's, the other one a racer's. The partner gets a stream for no other
//! connection, and none at all once the racer can't have one. Nothing is left behind.
//!
//! RDSOCK_RACES_SEED=N  makes the same choices again (what happens first is the machine's choice)

mod honest;
mod tenant;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, geteuid, getpid};
use rdsock_shm::control::{
    Between, Caller, Message, Promote, Request, from_bytes, kind, request as what,
};

use honest::{Honest, Level};
use tenant::{Answer, Daemon, Tenant, announcement, cookie, request};

const USER: u32 = 64_001;
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
/// Rounds of each of the two kinds.
const ROUNDS: u32 = 1_500;
/// Longest time, in turns of a loop, that passes before something happens.
const MOMENT: u32 = 20_000;

/// What becomes of the racer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// It ends by itself.
    Ends,
    /// It is killed.
    Killed,
    /// A child of it lives on, with all that it had, and speaks in its place.
    Forks,
    /// Its descriptor is another connection by now.
    Replaces,
    /// It closed its descriptor.
    Closes,
    /// It runs another program now, which has the connection but no control socket.
    Runs,
    /// It runs another program now, which has all that it had.
    RunsWithAll,
    /// It dies when it has got its stream.
    DiesPromoted,
    /// It dies when it has said that it mapped its stream.
    DiesMapped,
    /// Nothing.
    Lives,
}

use Fate::*;

#[test]
fn no_stream_for_another_connection() {
    in_own_namespace("racing_stage");
}

/// Not a test by itself: the test above runs it, where it can in a pid namespace of its own.
#[test]
fn racing_stage() {
    if std::env::var_os("RDSOCK_RACES").is_none() {
        return;
    }
    let mut stage = Stage::new();
    let before = stage.level();
    let fates = [
        Ends,
        Killed,
        Forks,
        Replaces,
        Closes,
        Runs,
        DiesPromoted,
        DiesMapped,
        Lives,
    ];
    for round in 0..ROUNDS {
        let fate = fates[fastrand::usize(..fates.len())];
        stage.race(round, fate);
    }
    let late = [Ends, Killed, Forks, Replaces, Closes, Runs];
    for round in ROUNDS..2 * ROUNDS {
        let fate = late[fastrand::usize(..late.len())];
        stage.come_late(round, fate, Reuse::None);
    }
    if can_choose_pids() {
        for round in 2 * ROUNDS..2 * ROUNDS + ROUNDS / 3 {
            let reuse = [Reuse::SameSocket, Reuse::OtherSocket][round as usize % 2];
            stage.come_late(round, Killed, reuse);
        }
        assert!(stage.reused > ROUNDS / 4, "{} ids came again", stage.reused);
    } else {
        println!(
            "SKIPPED, NOTHING WAS CHECKED: ids of processes that come again (needs root, unshare)"
        );
    }
    stage.finish(&before);
}

/// A program that another one has replaced is not the one that announced, whatever it inherits.
#[test]
fn no_stream_for_the_program_that_another_one_became() {
    let mut stage = Stage::new();
    let before = stage.level();
    for round in 0..20 {
        stage.come_late(round, RunsWithAll, Reuse::None);
    }
    stage.finish(&before);
}

/// Runs a test of this file again, as the first process of a pid namespace.
fn in_own_namespace(test: &str) {
    let program = std::env::current_exe().unwrap();
    let arguments = ["--exact", test, "--nocapture"];
    let unshare = Command::new("unshare").arg("--version").output();
    let mut command = if geteuid().is_root() && unshare.is_ok_and(|output| output.status.success())
    {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child"]);
        command.arg(program);
        command
    } else {
        Command::new(program)
    };
    let status = command.args(arguments).env("RDSOCK_RACES", "1").status();
    assert!(status.unwrap().success());
}

fn can_choose_pids() -> bool {
    getpid() == Pid::from_raw(1) && File::options().write(true).open(LAST_PID).is_ok()
}

/// What the process has that comes by the racer's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reuse {
    None,
    /// The same socket under the same number.
    SameSocket,
    /// Another connection under the same number.
    OtherSocket,
}

/// A racer, as the stage sees it.
struct Racer {
    pid: Pid,
    cue: UnixStream,
    /// The partner's end of its connection.
    accepted: TcpStream,
    /// Its descriptor, and the cookie of its socket.
    fd: i32,
    cookie: u64,
}

struct Stage {
    daemon: Daemon,
    honest: Honest,
    partner: Tenant,
    listener: TcpListener,
    promoted: BTreeMap<Fate, u32>,
    rounds: BTreeMap<Fate, u32>,
    reused: u32,
    marks: Cell<u64>,
}

impl Stage {
    fn new() -> Self {
        let seed = honest::number("RDSOCK_RACES_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
        fastrand::seed(seed);
        println!("RDSOCK_RACES_SEED={seed}");
        let daemon = Daemon::start("ring_size = 65536\nhuge_pages = \"never\"\n");
        honest::let_others_in(&daemon);
        let mut honest = Honest::new(&daemon);
        honest.turn(&daemon);
        Stage {
            partner: Tenant::attach(&daemon),
            daemon,
            honest,
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            promoted: BTreeMap::new(),
            rounds: BTreeMap::new(),
            reused: 0,
            marks: Cell::new(0),
        }
    }

    fn level(&self) -> Level {
        Level::settled(&self.daemon)
    }

    /// All at once: the partner is promoted or not, but for this connection only.
    fn race(&mut self, round: u32, fate: Fate) {
        let racer = self.start(fate, Some(round));
        let early = fastrand::bool();
        if early {
            self.announce(round, &racer);
        }
        go(&racer);
        if !early {
            wait_for(fastrand::u32(..MOMENT));
            self.announce(round, &racer);
        }
        if fate == Runs {
            // Its cue is closed when it runs the other program.
            while (&racer.cue).read(&mut [0]).is_ok_and(|count| count > 0) {}
        }
        if matches!(fate, Killed | Runs) {
            wait_for(fastrand::u32(..MOMENT));
            kill(racer.pid, Signal::SIGKILL).unwrap();
        }
        self.end(&racer, fate);
        for (promote, memory) in self.heard() {
            check(round, &racer, &promote, &memory);
            *self.promoted.entry(fate).or_default() += 1;
        }
        self.close(round, racer);
        *self.rounds.entry(fate).or_default() += 1;
    }

    /// The partner announces when the racer can't have the stream any more.
    fn come_late(&mut self, round: u32, fate: Fate, reuse: Reuse) {
        let mut racer = self.start(fate, None);
        let kept = (reuse != Reuse::None).then(|| receive_socket(&racer));
        go(&racer);
        let mut said = [0];
        if fate == Killed {
            // It says so when it has announced.
            racer.cue.read_exact(&mut said).unwrap();
            self.mark();
            kill(racer.pid, Signal::SIGKILL).unwrap();
        } else if matches!(fate, Replaces | Closes) {
            racer.cue.read_exact(&mut said).unwrap();
        } else if matches!(fate, Runs | RunsWithAll) {
            // The socket was closed by the exec, if it was.
            assert_eq!(racer.cue.read(&mut said).unwrap(), 0, "{fate:?}");
        }
        if matches!(fate, Ends | Killed | Forks) {
            self.end(&racer, fate);
        }
        let heir = kept.and_then(|socket| self.reuse_pid(&racer, socket, reuse));
        self.announce(round, &racer);
        let heard: Vec<Promote> = self
            .heard()
            .into_iter()
            .map(|(promote, _)| promote)
            .collect();
        assert!(
            heard.is_empty(),
            "{fate:?}, {reuse:?}, id came again: {}: {heard:?}",
            heir.is_some()
        );
        if let Some((pid, socket)) = heir {
            self.reused += 1;
            kill(pid, Signal::SIGKILL).unwrap();
            waitpid(pid, None).unwrap();
            drop(socket);
        }
        if !matches!(fate, Ends | Killed | Forks) {
            let _ = kill(racer.pid, Signal::SIGKILL);
            self.end(&racer, fate);
        }
        self.close(round, racer);
        *self.rounds.entry(fate).or_default() += 1;
    }

    /// Starts a racer and takes its connection; it goes on when told. With a `round`, at a random moment.
    fn start(&self, fate: Fate, round: Option<u32>) -> Racer {
        let (mut cue, theirs) = UnixStream::pair().unwrap();
        let address = self.listener.local_addr().unwrap();
        let daemon = self.daemon.socket();
        let moment = round.map_or(0, |_| fastrand::u32(..MOMENT));
        let user = if fastrand::bool() { USER } else { 0 };
        // SAFETY: the child uses nothing that another thread could hold but the allocator, which the C
        // library hands over, and ends without returning.
        let pid = match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                let done = std::panic::catch_unwind(|| {
                    honest::become_user(user);
                    let connection = TcpStream::connect(address).unwrap();
                    run(fate, &daemon, connection, theirs, moment, round.is_none());
                });
                // SAFETY: ends the process.
                unsafe { libc::_exit(if done.is_ok() { 0 } else { 101 }) }
            }
        };
        drop(theirs);
        let (accepted, _) = self.listener.accept().unwrap();
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&accepted, sockopt::Linger, &linger).unwrap();
        let mut said = [0; 16];
        cue.read_exact(&mut said).unwrap();
        let word = |at: usize| u64::from_ne_bytes(said[at..at + 8].try_into().unwrap());
        Racer {
            pid,
            cue,
            accepted,
            fd: word(0) as i32,
            cookie: word(8),
        }
    }

    fn announce(&mut self, round: u32, racer: &Racer) {
        self.partner
            .announce(record(round), round + 1, &racer.accepted, 0);
    }

    /// Waits for the racer's end. One that was killed or died is dead, all others came to their end.
    fn end(&self, racer: &Racer, fate: Fate) {
        if matches!(fate, Replaces | Closes | Lives | Runs | RunsWithAll) {
            let _ = racer.cue.shutdown(std::net::Shutdown::Both);
        }
        match waitpid(racer.pid, None).unwrap() {
            WaitStatus::Exited(_, 0) | WaitStatus::Signaled(_, Signal::SIGKILL, _) => {}
            other => panic!("{fate:?}: {other:?}"),
        }
        // Orphans of ours, where this is the first process of a namespace.
        let daemon = Pid::from_raw(self.daemon.pid());
        while let Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) =
            waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG))
        {
            assert_ne!(pid, daemon, "the daemon has ended");
        }
    }

    /// All answers so far have come when this one has.
    fn mark(&self) -> u64 {
        let mark = self.marks.get() + 1;
        self.marks.set(mark);
        let question = Between {
            question: mark,
            ..from_bytes(&[0; size_of::<Between>()]).unwrap()
        };
        self.partner
            .send(Message::new(kind::WHOIS, &question).as_bytes(), &[]);
        mark
    }

    /// What the partner was promoted for.
    fn heard(&mut self) -> Vec<(Promote, File)> {
        // What a look brings, which may take long, is answered later than a question.
        let is_done = |stat: &serde_json::Value| stat["looks_now"] == 0;
        self.daemon.wait_until("looks do not end", is_done);
        let mark = self.mark();
        let mut promotes = Vec::new();
        loop {
            match self.partner.receive() {
                Answer::Message(kind::PROMOTE, body, mut fds) => {
                    let memory = File::from(fds.remove(0));
                    promotes.push((from_bytes(&body).unwrap(), memory));
                }
                Answer::Message(kind::CALLER, body, _) => {
                    let answered: Caller = from_bytes(&body).unwrap();
                    if answered.question == mark {
                        return promotes;
                    }
                }
                Answer::Message(kind::VERDICT, ..) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn close(&mut self, round: u32, racer: Racer) {
        drop(racer);
        self.partner
            .ask_for(&request(what::CLOSED, record(round), round + 1));
        if round.is_multiple_of(64) {
            self.honest.turn(&self.daemon);
        }
    }

    /// A process that comes by the racer's id, and has a socket under the same number.
    fn reuse_pid(
        &self,
        racer: &Racer,
        socket: TcpStream,
        reuse: Reuse,
    ) -> Option<(Pid, TcpStream)> {
        let address = self.listener.local_addr().unwrap();
        let other = TcpStream::connect(address).unwrap();
        let _accepted = self.listener.accept().unwrap();
        for _ in 0..20 {
            let wanted = racer.pid.as_raw();
            std::fs::write(LAST_PID, (wanted - 1).to_string()).unwrap();
            // SAFETY: the child makes two system calls.
            match unsafe { fork() }.unwrap() {
                ForkResult::Parent { child } if child == racer.pid => {
                    // It takes its place before anybody asks.
                    let place = format!("/proc/{child}/fd/{}", racer.fd);
                    let own = match reuse {
                        Reuse::SameSocket => socket.as_raw_fd(),
                        _ => other.as_raw_fd(),
                    };
                    let link = std::fs::read_link(format!("/proc/self/fd/{own}")).unwrap();
                    while std::fs::read_link(&place).ok().as_ref() != Some(&link) {
                        std::thread::yield_now();
                    }
                    return Some((child, socket));
                }
                ForkResult::Parent { child } => {
                    kill(child, Signal::SIGKILL).unwrap();
                    waitpid(child, None).unwrap();
                }
                ForkResult::Child => {
                    let own = match reuse {
                        Reuse::SameSocket => socket.as_raw_fd(),
                        _ => other.as_raw_fd(),
                    };
                    // SAFETY: system calls on integers; nothing of this process is used any more.
                    unsafe {
                        libc::dup2(own, racer.fd);
                        loop {
                            libc::pause();
                        }
                    }
                }
            }
        }
        None
    }

    fn finish(mut self, before: &Level) {
        self.honest.turn(&self.daemon);
        self.honest.check_victims();
        let (rounds, promoted, reused) = (&self.rounds, &self.promoted, self.reused);
        println!("rounds {rounds:?}, promoted {promoted:?}, ids came again {reused}");
        drop(self.partner);
        let after = before.is_reached_again_but(&self.daemon, 1);
        println!("before {before}, after {after}; {}", self.honest);
    }
}

fn record(round: u32) -> u32 {
    round % 1000
}

fn wait_for(moment: u32) {
    for _ in 0..moment {
        std::hint::spin_loop();
    }
}

fn go(racer: &Racer) {
    (&racer.cue).write_all(&[1]).unwrap();
}

/// The partner was promoted for its own announcement, and whoever has the other end wrote down the same
/// connection.
fn check(round: u32, racer: &Racer, promote: &Promote, memory: &File) {
    let announced = (record(round), round + 1, 1);
    let got = (promote.conn, promote.generation, promote.end);
    assert_eq!(got, announced, "{promote:?}");
    let mut written = [0; 8];
    let at = promote.data_offset;
    memory.read_exact_at(&mut written, at).unwrap();
    let written = u64::from_ne_bytes(written);
    assert!(
        written == 0 || written == racer.cookie,
        "the other end is of {written}, and not of {}",
        racer.cookie
    );
}

/// The racer: announces its connection, and meets its fate. `late` racers say when they have.
fn run(
    fate: Fate,
    daemon: &Path,
    connection: TcpStream,
    mut cue: UnixStream,
    moment: u32,
    late: bool,
) {
    let mut tenant = Tenant::at(daemon).unwrap();
    tenant.hello();
    let answer = tenant.receive();
    assert!(matches!(answer, Answer::Message(kind::WELCOME, ..)));
    let own = cookie(&connection);
    let said = [connection.as_raw_fd() as u64, own].map(u64::to_ne_bytes);
    cue.write_all(&said.concat()).unwrap();
    if late && fate == Killed {
        let fd = [connection.as_raw_fd()];
        let rights = [nix::sys::socket::ControlMessage::ScmRights(&fd)];
        let text = [std::io::IoSlice::new(b"s")];
        let flags = nix::sys::socket::MsgFlags::empty();
        nix::sys::socket::sendmsg::<()>(cue.as_raw_fd(), &text, &rights, flags, None).unwrap();
    }
    cue.read_exact(&mut [0]).unwrap();
    let announced = announcement(1, 1, &connection, 1);
    tenant.ask_for(&announced);
    wait_for(moment);
    meet(fate, tenant, &announced, connection, &mut cue, late);
}

fn meet(
    fate: Fate,
    mut tenant: Tenant,
    announced: &Request,
    connection: TcpStream,
    cue: &mut UnixStream,
    late: bool,
) {
    let answered = |cue: &mut UnixStream| {
        if late {
            cue.write_all(&[1]).unwrap();
        }
    };
    // Until the stage has seen enough.
    let stay = |cue: &mut UnixStream| while cue.read(&mut [0]).is_ok_and(|count| count > 0) {};
    match fate {
        Ends => {}
        Killed => {
            answered(cue);
            stay(cue);
            wait_for_ever();
        }
        Forks => speak_as_child(tenant, announced),
        Replaces => {
            let (other, _accepted) = tenant::tcp_pair();
            // SAFETY: the number is the connection's, which owns whatever it is.
            unsafe { libc::dup2(other.as_raw_fd(), connection.as_raw_fd()) };
            answered(cue);
            stay(cue);
        }
        Closes => {
            drop(connection);
            answered(cue);
            stay(cue);
        }
        Runs | RunsWithAll => become_another(fate, &tenant, &connection),
        DiesPromoted | DiesMapped => {
            let promote = write_down(&mut tenant, cookie(&connection));
            if fate == DiesMapped {
                let mapped = request(what::MAPPED, promote.conn, promote.generation);
                tenant.ask_for(&mapped);
            }
            kill(getpid(), Signal::SIGKILL).unwrap();
        }
        Lives => {
            let promote = write_down(&mut tenant, cookie(&connection));
            let mapped = request(what::MAPPED, promote.conn, promote.generation);
            tenant.ask_for(&mapped);
            stay(cue);
        }
    }
}

fn wait_for_ever() -> ! {
    loop {
        std::thread::park();
    }
}

/// Gets its stream, and writes down of which connection it is.
fn write_down(tenant: &mut Tenant, cookie: u64) -> Promote {
    let (promote, mut fds) = tenant.promote();
    assert_eq!((promote.conn, promote.generation, promote.end), (1, 1, 0));
    let memory = File::from(fds.remove(0));
    memory
        .write_all_at(&cookie.to_ne_bytes(), promote.data_offset)
        .unwrap();
    promote
}

/// A child announces in place of its parent, which is gone.
fn speak_as_child(mut tenant: Tenant, announced: &Request) {
    // SAFETY: this process has one thread.
    if let ForkResult::Child = unsafe { fork() }.unwrap() {
        for generation in 2..20 {
            let again = Request {
                generation,
                ..*announced
            };
            tenant.memory.put(&again);
            tenant.kick();
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) };
    }
}

/// Runs another program, which keeps the connection and maybe the control socket. The cue is closed then.
fn become_another(fate: Fate, tenant: &Tenant, connection: &TcpStream) {
    let keep = |fd: i32| {
        // SAFETY: sets a flag of a descriptor.
        unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    };
    keep(connection.as_raw_fd());
    if fate == RunsWithAll {
        keep(tenant.socket.as_raw_fd());
    }
    use std::os::unix::process::CommandExt;
    panic!("{}", Command::new("sleep").arg("10").exec());
}

/// A copy of the racer's socket, which keeps its connection open.
fn receive_socket(racer: &Racer) -> TcpStream {
    let mut text = [0];
    let mut parts = [std::io::IoSliceMut::new(&mut text)];
    let mut control = nix::cmsg_space!([i32; 1]);
    let flags = nix::sys::socket::MsgFlags::MSG_CMSG_CLOEXEC;
    let message = nix::sys::socket::recvmsg::<()>(
        racer.cue.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        flags,
    );
    for part in message.unwrap().cmsgs().unwrap() {
        if let nix::sys::socket::ControlMessageOwned::ScmRights(fds) = part {
            // SAFETY: just received, owned by nobody else.
            return unsafe { TcpStream::from_raw_fd(fds[0]) };
        }
    }
    panic!("no socket came")
}
