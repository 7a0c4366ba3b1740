//! A daemon of a test's own.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
};
use rdsock_shm::control::{Message, Query, kind, parse, question};
use serde_json::Value;

use crate::folder::Folder;
use crate::place;
use crate::program::{Program, Running};

/// A running `rdsockd` with a socket and a configuration of its own. Dropping it ends it.
#[derive(Debug)]
pub struct Daemon {
    running: Option<Running>,
    folder: Folder,
    config: PathBuf,
    namespace: Option<String>,
}

impl Daemon {
    /// Starts one with this configuration (TOML), and waits until it answers.
    pub fn start(config: &str) -> Self {
        Self::start_inside(None, config)
    }

    /// The same in a network namespace.
    pub fn start_inside(namespace: Option<&str>, config: &str) -> Self {
        let folder = Folder::new();
        let config = folder.write("rdsockd.toml", config);
        let mut daemon = Daemon {
            running: None,
            folder,
            config,
            namespace: namespace.map(str::to_owned),
        };
        daemon.restart();
        daemon
    }

    /// Starts it again at the same socket, after [`Daemon::kill`].
    ///
    /// # Panics
    /// When it does not answer within 10 s.
    pub fn restart(&mut self) {
        let mut program = Program::new(place::binary("rdsockd"), self.folder.path())
            .arg("--socket")
            .arg(self.socket())
            .arg("--config")
            .arg(&self.config);
        if let Some(namespace) = &self.namespace {
            program = program.inside(namespace);
        }
        let running = program.start();
        let running = self.running.insert(running);
        let end = Instant::now() + Duration::from_secs(10);
        while connect_to(&self.folder.at("rdsockd.sock")).is_err() {
            let ended = running.ended();
            assert!(ended.is_none(), "rdsockd ended with {ended:?}");
            assert!(Instant::now() < end, "rdsockd does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Where its control socket is.
    pub fn socket(&self) -> PathBuf {
        self.folder.at("rdsockd.sock")
    }

    /// The process.
    ///
    /// # Panics
    /// After [`Daemon::kill`].
    pub fn running(&mut self) -> &mut Running {
        self.running.as_mut().expect("the daemon runs")
    }

    /// Kill -9.
    pub fn kill(&mut self) {
        self.running().kill();
        self.running = None;
    }

    /// A connection to its control socket.
    pub fn stranger(&self) -> OwnedFd {
        connect_to(&self.socket()).expect("the daemon takes connections")
    }

    /// Its counters and what it holds, as it says them on its control socket.
    pub fn stat(&self) -> Value {
        let query = Query {
            what: question::STAT,
            pid: 0,
        };
        let stranger = self.stranger();
        let message = Message::new(kind::QUERY, &query);
        send(
            stranger.as_raw_fd(),
            message.as_bytes(),
            MsgFlags::MSG_NOSIGNAL,
        )
        .expect("the daemon reads");
        let mut text = Vec::new();
        let mut piece = vec![0; 1 << 17];
        loop {
            let length = recv(stranger.as_raw_fd(), &mut piece, MsgFlags::empty())
                .expect("the daemon answers");
            let datagram = piece.get(..length).unwrap_or_default();
            let (answer, body) = parse(datagram).expect("the daemon speaks our version");
            assert_eq!(answer, kind::ANSWER, "the daemon answers a query");
            if body.is_empty() {
                return serde_json::from_slice(&text).expect("the answer is JSON");
            }
            text.extend_from_slice(body);
        }
    }

    /// A number of [`Daemon::stat`], by its path (`streams_now`, `/counters/malformed`).
    pub fn number(&self, path: &str) -> u64 {
        let stat = self.stat();
        let found = match path.starts_with('/') {
            true => stat.pointer(path),
            false => stat.get(path),
        };
        found
            .and_then(Value::as_u64)
            .unwrap_or_else(|| panic!("no number {path} in {stat}"))
    }

    /// Waits until so many other nodes are up.
    ///
    /// # Panics
    /// When they are not within 10 s.
    pub fn wait_for_nodes(&mut self, expected: usize) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let stat = self.stat();
            let nodes = stat["fabric"]["nodes"].as_array();
            let up = |node: &&Value| node["up"] == true;
            if nodes.map_or(0, |nodes| nodes.iter().filter(up).count()) >= expected {
                return;
            }
            assert!(Instant::now() < end, "the nodes are not up: {stat:#}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Descriptors that the daemon holds, but for those of streams that are yet to come.
    pub fn descriptors(&mut self) -> usize {
        let path = format!("/proc/{}/fd", self.running().pid());
        loop {
            let stock = self.number("streams_in_stock");
            let all = std::fs::read_dir(&path).map_or(0, Iterator::count);
            // One may just have been added.
            if self.number("streams_in_stock") == stock {
                return all - 3 * stock as usize;
            }
        }
    }

    /// Lets it have so many descriptors from now on; what it has it keeps. How many it could have before.
    ///
    /// # Panics
    /// When the system does not allow that.
    pub fn limit_descriptors(&mut self, count: u64) -> u64 {
        let pid = self.running().pid() as libc::pid_t;
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        let set = |new: *const libc::rlimit, old: *mut libc::rlimit| {
            // SAFETY: each is null, or a limit that is alive.
            let done = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, new, old) };
            assert_eq!(done, 0, "prlimit: {}", std::io::Error::last_os_error());
        };
        set(std::ptr::null(), &mut limit);
        let before = std::mem::replace(&mut limit.rlim_cur, count);
        set(&limit, std::ptr::null_mut());
        before
    }

    /// Names and `stat` of its threads.
    fn tasks(&mut self) -> Vec<(String, String)> {
        let path = format!("/proc/{}/task", self.running().pid());
        let tasks = std::fs::read_dir(path).into_iter().flatten().flatten();
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let task = |path: PathBuf| (read(path.join("comm")), read(path.join("stat")));
        tasks.map(|entry| task(entry.path())).collect()
    }

    /// Threads that it has.
    pub fn threads(&mut self) -> usize {
        self.tasks().len()
    }

    /// How long its threads of this name have worked.
    pub fn busy(&mut self, name: &str) -> Duration {
        let tasks = self.tasks();
        let stats = tasks.iter().filter(|(comm, _)| comm.trim() == name);
        let ticks = |stat: &str| -> u64 {
            let after_name = stat.rsplit(')').next().unwrap_or_default();
            let words = after_name.split_whitespace().skip(11).take(2);
            words.filter_map(|word| word.parse::<u64>().ok()).sum()
        };
        // The unit is a hundredth of a second on every Linux.
        Duration::from_millis(stats.map(|(_, stat)| ticks(stat) * 10).sum())
    }

    /// Waits until nothing of a test's programs is left in it: no process, no stream, and not
    /// one descriptor more than `descriptors`.
    ///
    /// # Panics
    /// When something is left after 10 s: a leak.
    pub fn wait_until_empty(&mut self, descriptors: usize) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let (tenants, streams) = (self.number("tenants_now"), self.number("streams_now"));
            let held = self.descriptors();
            if tenants == 0 && streams == 0 && held <= descriptors {
                return;
            }
            assert!(
                Instant::now() < end,
                "the daemon still has {tenants} tenants, {streams} streams, {held} descriptors \
                 (at first {descriptors})"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it has logged since it was started last.
    pub fn log(&mut self) -> String {
        self.running().output()
    }
}

fn connect_to(path: &Path) -> nix::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}
