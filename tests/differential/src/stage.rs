//! Where programs are carried out: the processes `A`, `B` and `C`, plain or (but for `C`) under the shim with a daemon of
//! their own. They stay for many programs, since to start them takes longer than most programs do.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{Backlog, SockFlag, UnixAddr, accept4, bind, listen};
use rdsock_tests::{Daemon, Folder, LOWEST, Program, Running};
use std::os::fd::AsFd;

use crate::control::{hear, new_socket, say};
use crate::program::Surroundings;

/// A wait is cut into slices, and counted by them: on a machine that stands still for a while, only one passes.
const SLICE_MS: u16 = 50;

/// The line to one process.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    /// The process.
    pub pid: i32,
    /// Its threads by number, as the system knows them.
    pub threads: BTreeMap<u8, i32>,
    answers: BTreeMap<u64, String>,
    /// Where it listens.
    pub port: Option<String>,
    /// What it had open when no program had run.
    pub at_first: String,
}

impl Link {
    /// Asks for a step; false when the process has gone.
    pub fn ask(&mut self, number: u64, thread: u8, text: &str) -> bool {
        say(&self.socket, &format!("{number} {thread} {text}")).is_ok()
    }

    /// The answer to a step, if it comes within so many slices of time.
    pub fn answer(&mut self, number: u64, slices: u32) -> Option<String> {
        let mut left = slices;
        loop {
            if let Some(answer) = self.answers.remove(&number) {
                return Some(answer);
            }
            let limit = if slices == 0 { 0 } else { SLICE_MS };
            if readable(&self.socket, limit) {
                self.take()?;
            } else if left <= 1 {
                return None;
            } else {
                left -= 1;
            }
        }
    }

    /// Whether there is an answer by now.
    pub fn has_answered(&mut self, number: u64) -> bool {
        while readable(&self.socket, 0) && self.take().is_some() {}
        self.answers.contains_key(&number)
    }

    fn take(&mut self) -> Option<()> {
        let line = hear(&self.socket).ok()??;
        let (first, rest) = line.split_once(' ')?;
        match (first.parse(), rest.split_once(' ')) {
            (Ok(number), _) => drop(self.answers.insert(number, rest.to_owned())),
            (Err(_), Some((thread, id))) => {
                self.threads.insert(thread.parse().ok()?, id.parse().ok()?);
            }
            _ => return None,
        }
        Some(())
    }
}

fn readable(socket: &OwnedFd, limit: u16) -> bool {
    let mut entries = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut entries, limit).is_ok_and(|found| found > 0)
}

/// Processes, and what they need.
#[derive(Debug)]
pub struct Stage {
    listener: OwnedFd,
    /// The processes by name, children of programs among them.
    pub links: BTreeMap<char, Link>,
    programs: Vec<Running>,
    daemon: Option<Daemon>,
    _folder: Folder,
}

impl Stage {
    /// Starts the processes: with `surroundings` under the shim, else plain.
    ///
    /// # Panics
    /// When they do not start: then there is nothing to test.
    pub fn new(actor: &Path, surroundings: Option<Surroundings>) -> Self {
        let folder = Folder::new();
        let path = folder.at("conductor");
        let listener = new_socket().expect("a UNIX socket");
        let name = UnixAddr::new(&path).expect("the name is short");
        bind(listener.as_raw_fd(), &name).expect("a new name");
        listen(&listener, Backlog::new(16).expect("a small number")).expect("it can listen");
        let daemon = surroundings.map(|Surroundings { ring, .. }| {
            Daemon::start(&format!("ring_size = {ring}\nhuge_pages = \"never\"\n"))
        });
        let mut stage = Stage {
            listener,
            links: BTreeMap::new(),
            programs: Vec::new(),
            daemon,
            _folder: folder,
        };
        for name in ["A", "B", "C"] {
            let program = Program::new(actor, stage._folder.path())
                .arg(&path)
                .arg(name);
            let program = match (&stage.daemon, surroundings) {
                (Some(daemon), Some(Surroundings { spin, lowest, .. })) if name != "C" => program
                    .preloaded(&daemon.socket())
                    .env("RDSOCK_SPIN_US", spin.to_string())
                    .env("RDSOCK_TEST_LIMITS", if lowest { LOWEST } else { "" }),
                _ => program,
            };
            stage.programs.push(program.start());
            assert!(stage.welcome(), "{name} does not start");
        }
        stage
    }

    /// Whether programs run under the shim here.
    pub fn is_preloaded(&self) -> bool {
        self.daemon.is_some()
    }

    /// Takes the line to a process that has just come to be, within five seconds.
    pub fn welcome(&mut self) -> bool {
        let came = (0..100).any(|_| readable(&self.listener, SLICE_MS));
        let accepted = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC);
        let (true, Ok(fd)) = (came, accepted) else {
            return false;
        };
        // SAFETY: a new descriptor, nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let hello = hear(&socket).ok().flatten().unwrap_or_default();
        let mut words = hello.split(' ').skip(1);
        let name = words.next().and_then(|name| name.chars().next());
        let (Some(name), Some(Ok(pid))) = (name, words.next().map(str::parse)) else {
            return false;
        };
        let link = Link {
            socket,
            pid,
            threads: BTreeMap::new(),
            answers: BTreeMap::new(),
            port: None,
            at_first: String::new(),
        };
        self.links.insert(name, link);
        true
    }

    /// Waits until the daemon has no stream any more, and no connection that waits for its other end, for two seconds; how many
    /// of each it has.
    pub fn left_in_daemon(&self) -> [u64; 2] {
        let Some(daemon) = &self.daemon else {
            return [0; 2];
        };
        let now = || ["streams_now", "waiting_now"].map(|what| daemon.number(what));
        for _ in 0..100 {
            if now() == [0; 2] {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        now()
    }

    /// What the processes have printed, for one that died.
    pub fn output(&self) -> String {
        self.programs.iter().map(Running::output).collect()
    }
}
