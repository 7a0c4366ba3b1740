//! An honest program that brings one connection after the other on rings, and says how long that took: a process of
//! its own, which waits for the daemon as a program does that receives. It compiles against older daemons' tests, too.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use rdsock_shm::control::{kind, request as what};

use crate::tenant::{Answer, Tenant, request, tcp_pair};

/// A user that nobody has.
const USER: u32 = 64_010;
/// A daemon that says nothing for so long is stopped.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two promotions, so that each finds the daemon asleep.
const PAUSE: Duration = Duration::from_millis(1);
/// Promotions before those that are measured.
const WARM_UP: usize = 20;

/// Has a command end when this process does, however that ends.
pub fn end_with_us(command: &mut Command) {
    // SAFETY: one system call between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
    }
}

/// What promotions took, and for how much of that the program was ready to run and had no core. In nanoseconds.
pub struct Times {
    pub took: Histogram<u64>,
    pub waited: Histogram<u64>,
}

/// A running honest program. Ended when dropped.
pub struct Honest {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Honest {
    /// Attached to the daemon with this socket.
    pub fn start(socket: &Path) -> Self {
        let mut command = Command::new("/proc/self/exe");
        command
            .env("PROMOTION_SOCKET", socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if geteuid().is_root() {
            let folder = socket.parent().unwrap();
            std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755)).unwrap();
            command.uid(USER).gid(USER);
        }
        end_with_us(&mut command);
        let mut child = command.spawn().unwrap();
        let mut honest = Honest {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        };
        honest.measure(WARM_UP);
        honest
    }

    /// Measures so many promotions.
    pub fn measure(&mut self, count: usize) -> Times {
        writeln!(self.input, "{count}").unwrap();
        let empty = || Histogram::new_with_bounds(1, 60_000_000_000, 3).unwrap();
        let mut times = Times {
            took: empty(),
            waited: empty(),
        };
        for _ in 0..count {
            let mut line = String::new();
            self.output.read_line(&mut line).unwrap();
            let mut words = line.split_whitespace().map(|word| word.parse().unwrap());
            let took = words.next().expect("the honest program is served");
            times.took.record(took).unwrap();
            times.waited.record(words.next().unwrap()).unwrap();
        }
        times
    }
}

impl Drop for Honest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a process that [`Honest`] has started: makes as many promotions as it is told, and prints the time of each. False
/// in another one.
pub fn be_honest() -> bool {
    let Some(socket) = std::env::var_os("PROMOTION_SOCKET") else {
        return false;
    };
    let socket = PathBuf::from(socket);
    let mut pair = [attach(&socket), attach(&socket)];
    let mut generation = 0;
    for line in std::io::stdin().lines() {
        let count: u32 = line.unwrap().parse().unwrap();
        for _ in 0..count {
            generation += 1;
            let waited = waited_for_core();
            let took = promotion(&mut pair, generation).as_nanos();
            println!("{took} {}", waited_for_core() - waited);
            std::thread::sleep(PAUSE);
        }
    }
    true
}

fn attach(socket: &Path) -> Tenant {
    let mut tenant = Tenant::at(socket).unwrap();
    tenant.hello();
    match receive(&mut tenant) {
        Answer::Message(kind::WELCOME, ..) => tenant,
        other => panic!("not welcome: {other:?}"),
    }
}

/// One connection comes on rings, and is closed. Returns the time from its second announcement until both ends are told.
fn promotion([client, server]: &mut [Tenant; 2], generation: u32) -> Duration {
    let (connector, accepted) = tcp_pair();
    client.announce(1, generation, &connector, 1);
    let start = Instant::now();
    server.announce(1, generation, &accepted, 0);
    for tenant in [&mut *client, &mut *server] {
        match receive(tenant) {
            Answer::Message(kind::PROMOTE, ..) => {}
            other => panic!("not promoted: {other:?}"),
        }
    }
    let took = start.elapsed();
    for tenant in [client, server] {
        tenant.ask_for(&request(what::CLOSED, 1, generation));
    }
    took
}

fn receive(tenant: &mut Tenant) -> Answer {
    let mut fds = [PollFd::new(tenant.socket.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut fds, timeout), Ok(1), "the daemon says nothing");
    tenant.receive()
}

/// Nanoseconds that this process was ready to run and had no core.
fn waited_for_core() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/schedstat").unwrap();
    stat.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Prints lines about what was measured.
pub fn print(name: &str, times: &Times) {
    print_line(name, &times.took);
    print_line("  of that without a core", &times.waited);
}

fn print_line(name: &str, times: &Histogram<u64>) {
    let micros = |quantile| times.value_at_quantile(quantile) as f64 / 1e3;
    println!(
        "{name:<9} {:>5} promotions: median {:7.1} µs, p90 {:7.1}, p99 {:7.1}, longest {:7.1}",
        times.len(),
        micros(0.5),
        micros(0.9),
        micros(0.99),
        times.max() as f64 / 1e3,
    );
}
