//! Processes that a test starts to play a part as another user: the test's own binary, run again.
//!
//! A test that has such parts begins with `if let Some(part) = Part::of_this() { return … }`. Both sides
//! speak in lines, over standard input and output. Nothing here knows what the lines mean.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Users that nobody has. No test needs them in `/etc/passwd`.
pub const ATTACKER: u32 = 64_001;
pub const VICTIM: u32 = 64_002;
pub const OTHER: u32 = 64_003;

/// What a line begins with, so that it is not taken for what the test harness prints.
const MARK: &str = "@";
/// Time for an actor to say something.
const PATIENCE: Duration = Duration::from_secs(20);

/// True for root. Where it is not, the test says that it has checked nothing.
pub fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skipped("needs root");
    }
    root
}

/// Says that a test has checked nothing, also where the harness keeps what tests print to itself.
pub fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED, NOTHING WAS CHECKED: {why}");
}

/// The part that this process plays, where it is an actor.
pub struct Part {
    pub name: String,
    pub socket: PathBuf,
}

impl Part {
    pub fn of_this() -> Option<Self> {
        let name = std::env::var("TENANT_PART").ok()?;
        let socket = std::env::var_os("TENANT_SOCKET")?.into();
        Some(Part { name, socket })
    }
}

/// Says a line to the test.
pub fn say(line: &str) {
    // The harness may have left its own line open.
    let text = format!("\n{MARK}{line}\n");
    let mut output = std::io::stdout();
    let _ = output.write_all(text.as_bytes());
    let _ = output.flush();
}

/// The next line of the test; `None` when it is over.
///
/// Read byte by byte, so that nothing is lost to a child that reads on.
pub fn listen() -> Option<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        match nix::unistd::read(std::io::stdin(), &mut byte) {
            Ok(1) if byte[0] == b'\n' => return String::from_utf8(line).ok(),
            Ok(1) => line.push(byte[0]),
            Ok(_) => return None,
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return None,
        }
    }
}

/// A running actor. Ended when dropped.
pub struct Actor {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Actor {
    /// Runs this test's binary again, for the test of this name and the part of this name, as `user`.
    pub fn start(test: &str, part: &str, socket: &Path, user: u32) -> Self {
        Self::start_with(test, part, socket, |command| {
            command.uid(user).gid(user);
        })
    }

    /// The same with something done to the command.
    pub fn start_with(
        test: &str,
        part: &str,
        socket: &Path,
        change: impl FnOnce(&mut Command),
    ) -> Self {
        // The link needs no way to the file that others may walk.
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env("TENANT_PART", part)
            .env("TENANT_SOCKET", socket);
        change(&mut command);
        Self::run(command)
    }

    /// Runs a command as an actor.
    pub fn run(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(line) = line.strip_prefix(MARK) {
                    let _ = sender.send(line.to_owned());
                }
            }
        });
        Actor {
            input: child.stdin.take(),
            child,
            lines,
        }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Tells it something.
    pub fn say(&mut self, line: &str) {
        let input = self.input.as_mut().unwrap();
        writeln!(input, "{line}").unwrap();
        input.flush().unwrap();
    }

    /// The rest of its next line, which begins with this word.
    pub fn hear(&self, word: &str) -> String {
        let line = self.lines.recv_timeout(PATIENCE);
        let line = line.unwrap_or_else(|error| panic!("the actor does not say {word:?}: {error}"));
        let rest = line.strip_prefix(word);
        let rest = rest.unwrap_or_else(|| panic!("expected {word:?}: {line:?}"));
        rest.trim().to_owned()
    }

    /// The numbers of its next line, which begins with this word.
    pub fn hear_numbers(&self, word: &str) -> Vec<u64> {
        let rest = self.hear(word);
        let numbers = rest.split_whitespace().map(str::parse);
        numbers
            .collect::<Result<_, _>>()
            .unwrap_or_else(|_| panic!("numbers behind {word:?}: {rest:?}"))
    }

    /// Its next line, when it comes in this time.
    pub fn next_line(&self, patience: Duration) -> Option<String> {
        self.lines.recv_timeout(patience).ok()
    }

    /// Kills it and none of its children, and waits until it is gone.
    pub fn kill_alone(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Kills it, and waits until it is gone.
    pub fn kill(&mut self) {
        self.input = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        // Its children see the end of their input.
        self.kill();
    }
}
