//! Programs that a test starts: plain or preloaded, with a time limit, ended by pid.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::place;

/// A program to be started.
#[derive(Debug)]
pub struct Program {
    name: PathBuf,
    args: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    preload: Option<PathBuf>,
    namespace: Option<String>,
    limits: Vec<(Resource, u64)>,
    input: Option<PathBuf>,
    folder: PathBuf,
}

impl Program {
    /// A command, found on the path or by its own; what it prints is kept in `folder`.
    pub fn new(name: impl AsRef<OsStr>, folder: &Path) -> Self {
        Program {
            name: PathBuf::from(name.as_ref()),
            args: Vec::new(),
            environment: Vec::new(),
            preload: None,
            namespace: None,
            limits: Vec::new(),
            input: None,
            folder: folder.to_owned(),
        }
    }

    /// One more argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// More arguments, separated by blanks.
    pub fn args(mut self, args: &str) -> Self {
        self.args
            .extend(args.split_whitespace().map(OsString::from));
        self
    }

    /// A variable of the environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// Reads its standard input from a file; else from nothing.
    pub fn input(mut self, path: &Path) -> Self {
        self.input = Some(path.to_owned());
        self
    }

    /// Lowers a limit (soft and hard) for the program.
    pub fn limit(mut self, what: Resource, value: u64) -> Self {
        self.limits.push((what, value));
        self
    }

    /// Runs it under `rdsock run`, with the daemon at this socket.
    pub fn preloaded(mut self, socket: &Path) -> Self {
        self.preload = Some(socket.to_owned());
        self
    }

    /// Runs it in a network namespace, see [`crate::Namespaces`].
    pub fn inside(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }

    fn command(&self) -> Command {
        let mut words: Vec<OsString> = Vec::new();
        if let Some(namespace) = &self.namespace {
            words.push(place::command(&["ip"]).into());
            words.extend(["netns", "exec", namespace].map(OsString::from));
        }
        if self.preload.is_some() {
            words.push(place::binary("rdsock").into());
            words.extend(["run", "--no-daemon", "--"].map(OsString::from));
        }
        words.push(self.name.clone().into());
        let mut words = words.into_iter();
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words);
        if let Some(socket) = &self.preload {
            command.env("RDSOCK_SOCKET", socket);
        }
        command.args(&self.args).process_group(0);
        for (name, value) in &self.environment {
            command.env(name, value);
        }
        let limits = self.limits.clone();
        if !limits.is_empty() {
            // SAFETY: between fork and exec only setrlimit is called, which is a plain system
            // call, on values made before the fork.
            unsafe {
                command.pre_exec(move || {
                    for (what, value) in &limits {
                        setrlimit(*what, *value, *value)?;
                    }
                    Ok(())
                });
            }
        }
        command
    }

    /// Starts it. What it prints goes to a file; see [`Running::output`].
    pub fn start(self) -> Running {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let base = self.name.file_name().unwrap_or_default().to_string_lossy();
        let path = self.folder.join(format!("{base}-{number}.out"));
        let mut command = self.command();
        let file = File::create(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        let input = match &self.input {
            None => Stdio::null(),
            Some(path) => File::open(path)
                .unwrap_or_else(|error| panic!("{path:?}: {error}"))
                .into(),
        };
        let child = command
            .stdin(input)
            .stdout(file.try_clone().expect("a file can be duplicated"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("can't start {:?}: {error}", self.name));
        Running {
            name: format!("{base} {}", self.args.join(OsStr::new(" ")).display()),
            pid: Pid::from_raw(child.id() as i32),
            child,
            status: None,
            path,
        }
    }

    /// Runs it to its end; what it printed.
    ///
    /// # Panics
    /// When it takes longer than `limit`, or ends with another status than 0.
    pub fn run(self, limit: Duration) -> String {
        self.start().finish(limit)
    }
}

/// A started program. Dropping it ends it and what it started, and when the test has failed
/// prints the end of what it had to say.
#[derive(Debug)]
pub struct Running {
    name: String,
    pid: Pid,
    child: Child,
    status: Option<ExitStatus>,
    path: PathBuf,
}

impl Running {
    /// Its process. `rdsock run` becomes the program, so this is the program itself.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw() as u32
    }

    /// All that it has printed so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.path).unwrap_or_default()).into_owned()
    }

    /// Its status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            // Only looked at: until it is dropped its number, which is its group's too, must not
            // be given to somebody else.
            let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            self.status = match waitid(Id::Pid(self.pid), look) {
                Ok(WaitStatus::Exited(_, code)) => Some(ExitStatus::from_raw(code << 8)),
                Ok(WaitStatus::Signaled(_, signal, _)) => Some(ExitStatus::from_raw(signal as i32)),
                _ => None,
            };
        }
        self.status
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid, signal).unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    /// Kill -9, and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.wait(Duration::from_secs(10));
    }

    /// Waits for its end; the status.
    ///
    /// # Panics
    /// When it takes longer.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            let late = Instant::now() >= end;
            assert!(!late, "{} has not ended within {limit:?}", self.name);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end; what it printed.
    ///
    /// # Panics
    /// When it takes longer, or ends with another status than 0.
    pub fn finish(mut self, limit: Duration) -> String {
        let status = self.wait(limit);
        assert!(status.success(), "{} ended with {status}", self.name);
        self.output()
    }

    /// Waits until it has printed this; the whole output so far.
    ///
    /// # Panics
    /// When it has not within `limit`, or ends before.
    pub fn wait_for_output(&mut self, text: &str, limit: Duration) -> String {
        let end = Instant::now() + limit;
        loop {
            let ended = self.ended();
            let output = self.output();
            if output.contains(text) {
                return output;
            }
            let name = &self.name;
            assert!(
                ended.is_none(),
                "{name} ended with {ended:?} without {text:?}"
            );
            assert!(
                Instant::now() < end,
                "{name} has not said {text:?} within {limit:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until a port accepts connections, as it does when a server is up.
    ///
    /// # Panics
    /// When it does not within 20 s, or the program ends before.
    pub fn wait_for_port(mut self, port: u16) -> Self {
        let end = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            let ended = self.ended();
            assert!(ended.is_none(), "{} ended with {ended:?}", self.name);
            assert!(
                Instant::now() < end,
                "{} does not listen on {port}",
                self.name
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        self
    }

    /// Seconds of processor time that it has used so far.
    pub fn cpu_seconds(&self) -> f64 {
        cpu_seconds(self.pid())
    }
}

/// Seconds of processor time that a process has used so far.
pub fn cpu_seconds(pid: u32) -> f64 {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let (_, fields) = text.rsplit_once(')').expect("a name in parentheses");
    let mut fields = fields.split_whitespace().skip(11);
    let ticks: f64 = fields
        .by_ref()
        .take(2)
        .filter_map(|field| field.parse::<f64>().ok())
        .sum();
    // SAFETY: sysconf has no requirements.
    let hertz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    ticks / hertz as f64
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let output = self.output();
            let lines: Vec<&str> = output.lines().collect();
            let (before, tail) = lines.split_at(lines.len().saturating_sub(40));
            let of_note = |line: &&str| line.contains("refused") || line.contains(" WARN ");
            let before = before.iter().copied().filter(of_note).take(40);
            eprintln!("---- {} ({:?}) said:", self.name, self.status);
            eprintln!(
                "{}",
                before
                    .chain(tail.iter().copied())
                    .collect::<Vec<_>>()
                    .join("\n")
            );
        }
        // The group is the program's own (see `process_group`), so this reaches only what it
        // started; it may outlive the leader.
        if self.status.is_none() {
            let _ = killpg(self.pid, Signal::SIGTERM);
            let end = Instant::now() + Duration::from_secs(2);
            while self.ended().is_none() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let _ = killpg(self.pid, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// Whether a status is death by this signal.
pub fn died_by(status: ExitStatus, signal: Signal) -> bool {
    status.signal() == Some(signal as i32)
}
