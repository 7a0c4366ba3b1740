//! A place to try a server and its clients: plain, or with either or both preloaded.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use crate::daemon::Daemon;
use crate::folder::Folder;
use crate::program::{Program, Running};
use crate::why::{self, Connection};

/// Which ends are preloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Both: connections go over rings.
    Both,
    /// The server: everything works, over the kernel.
    ServerOnly,
    /// The client: likewise.
    ClientOnly,
    /// Neither: shows that the test itself is right.
    Neither,
    /// Both, on two nodes: each has a daemon of its own, with a model of the device.
    Nodes,
    /// Both, with the smallest rings and the [`LOWEST`] thresholds: what else takes many bytes or connections happens at once.
    Lowest,
}

/// Thresholds that are crossed all the time, for `RDSOCK_TEST_LIMITS`. Those of pieces do not divide one another, nor the
/// ring.
pub const LOWEST: &str = "few=0,on_stack=0,ask_kernel_us=0,look_every_us=0,peer_check_us=0,calls=1,bytes=1,piece=1000,\
    chunk=700,file_piece=900,pipe_piece=600,give_way_turns=1,give_way_ms=1,nap_us=50,slice_ms=1,step_ms=1,belled=1,probe_every=1,\
    yield_after_us=0,misses=1,hot_after=1,one_way_after=0,gather_steps=1,gather_probe=1,gathered=1";

/// A folder, a daemon where one is needed, and programs started as the mode says.
#[derive(Debug)]
pub struct Site {
    /// Which ends are preloaded.
    pub mode: Mode,
    /// Files of the test.
    pub folder: Folder,
    daemon: Option<Daemon>,
    /// The clients' daemon, where that is another one.
    clients: Option<Daemon>,
    /// Descriptors that each daemon of [`Mode::Nodes`] had at first.
    descriptors: [usize; 2],
}

/// What `rdsock why` said of a load while it ran.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The most connections on rings at any moment, counted at the server.
    pub on_rings: usize,
    /// Times that it was asked.
    pub asked: usize,
    /// The last answer that had connections.
    pub last: Vec<Connection>,
}

impl Site {
    /// With a daemon of its own, unless neither end is preloaded.
    pub fn new(mode: Mode) -> Self {
        Self::with_rings(mode, 4096)
    }

    /// The same, with rings of so many bytes in [`Mode::Lowest`], for programs that take a buffer for granted.
    pub fn with_rings(mode: Mode, bytes: u32) -> Self {
        let folder = Folder::new();
        let mut descriptors = [0; 2];
        let (daemon, clients) = match mode {
            Mode::Neither => (None, None),
            Mode::Nodes => {
                let mut daemons = nodes(&folder);
                descriptors = daemons.each_mut().map(Daemon::descriptors);
                let [servers, clients] = daemons;
                (Some(servers), Some(clients))
            }
            Mode::Lowest => {
                let config = format!("{LOG}ring_size = {bytes}\n");
                (Some(Daemon::start(&config)), None)
            }
            _ => (Some(Daemon::start(LOG)), None),
        };
        Site {
            mode,
            folder,
            daemon,
            clients,
            descriptors,
        }
    }

    fn program(&self, name: impl AsRef<OsStr>, daemon: Option<&Daemon>) -> Program {
        let program = Program::new(name, self.folder.path());
        match daemon {
            Some(daemon) if self.mode == Mode::Lowest => program
                .preloaded(&daemon.socket())
                .env("RDSOCK_TEST_LIMITS", LOWEST),
            Some(daemon) => program.preloaded(&daemon.socket()),
            None => program,
        }
    }

    /// A server, preloaded if the mode says so.
    pub fn server(&self, name: impl AsRef<OsStr>) -> Program {
        let preloaded = self.mode != Mode::ClientOnly;
        self.program(name, self.daemon.as_ref().filter(|_| preloaded))
    }

    /// A client, preloaded if the mode says so. Between nodes, the server is waited for until its
    /// daemon knows that it listens.
    ///
    /// # Panics
    /// When the daemon does not know that within 10 s.
    pub fn client(&self, name: impl AsRef<OsStr>) -> Program {
        let preloaded = self.mode != Mode::ServerOnly;
        if let (Mode::Nodes, Some(daemon)) = (self.mode, &self.daemon) {
            let end = Instant::now() + Duration::from_secs(10);
            while daemon.number("/fabric/listeners") == 0 {
                assert!(Instant::now() < end, "no server listens, its daemon says");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let daemon = self.clients.as_ref().or(self.daemon.as_ref());
        self.program(name, daemon.filter(|_| preloaded))
    }

    /// A program that is no end of the connections looked at.
    pub fn plain(&self, name: impl AsRef<OsStr>) -> Program {
        self.program(name, None)
    }

    /// Waits for a client's end and looks on meanwhile, through `rdsock why`, at the connections
    /// to `port`; what it printed.
    ///
    /// # Panics
    /// When the client fails or is late; when both ends are preloaded and fewer than `expected`
    /// connections were ever on rings at once; when one end is plain and one was; when a
    /// connection on the kernel has no reason.
    pub fn finish(
        &self,
        client: Running,
        port: u16,
        expected: usize,
        limit: Duration,
    ) -> (String, Seen) {
        let mut client = client;
        let mut seen = Seen::default();
        let end = Instant::now() + limit;
        while client.ended().is_none() {
            assert!(
                Instant::now() < end,
                "the client has not ended within {limit:?}"
            );
            if self.daemon.is_some() {
                self.look(port, &mut seen);
            }
            // Often while nothing was seen yet: some loads are over in half a second.
            let pause = if seen.on_rings < expected { 10 } else { 250 };
            std::thread::sleep(Duration::from_millis(pause));
        }
        let output = client.finish(Duration::from_secs(1));
        match self.mode {
            Mode::Both | Mode::Nodes | Mode::Lowest => assert!(
                seen.on_rings >= expected,
                "expected {expected} connections to port {port} on rings, saw at most {} in {} \
                 looks; last: {:#?}",
                seen.on_rings,
                seen.asked,
                seen.last
            ),
            _ => assert_eq!(seen.on_rings, 0, "one end is plain: {:#?}", seen.last),
        }
        (output, seen)
    }

    /// Where both ends are preloaded, waits until this many connections to `port` are on rings.
    ///
    /// # Panics
    /// When they are not within 10 s.
    pub fn wait_for_rings(&self, port: u16, expected: usize) {
        let mut seen = Seen::default();
        let end = Instant::now() + Duration::from_secs(10);
        let is_on_both = matches!(self.mode, Mode::Both | Mode::Nodes | Mode::Lowest);
        while is_on_both && seen.on_rings < expected {
            assert!(Instant::now() < end, "never on rings: {:#?}", seen.last);
            std::thread::sleep(Duration::from_millis(10));
            self.look(port, &mut seen);
        }
    }

    fn look(&self, port: u16, seen: &mut Seen) {
        let Some(daemon) = &self.daemon else { return };
        let why = why::ask(&daemon.socket(), None);
        seen.asked += 1;
        let connections: Vec<Connection> = why
            .connections
            .into_iter()
            .filter(|connection| connection.touches(port))
            .collect();
        for connection in &connections {
            assert!(
                connection.accelerated || connection.reason.is_some(),
                "a connection on the kernel without a reason: {connection:#?}"
            );
        }
        let ending = format!(":{port}");
        let on_rings = connections
            .iter()
            .filter(|connection| connection.accelerated && connection.local.ends_with(&ending))
            .count();
        seen.on_rings = seen.on_rings.max(on_rings);
        if !connections.is_empty() {
            seen.last = connections;
        }
    }

    /// The daemon, unless neither end is preloaded.
    pub fn daemon(&mut self) -> Option<&mut Daemon> {
        self.daemon.as_mut()
    }
}

impl Drop for Site {
    /// Between nodes, at the end of a test that has not failed: nothing is left of it, and its connects
    /// went over the fabric.
    fn drop(&mut self) {
        if self.mode != Mode::Nodes || std::thread::panicking() {
            return;
        }
        let daemons = [&mut self.daemon, &mut self.clients];
        for (daemon, descriptors) in daemons.into_iter().flatten().zip(self.descriptors) {
            daemon.wait_until_empty(descriptors);
            assert_eq!(daemon.number("/fabric/streams"), 0);
            let counted = |name: &str| daemon.number(&format!("/counters/{name}"));
            let (reached, not) = (counted("reached"), counted("not_reached"));
            // Some may go past it, while a server starts or the machine is too busy to answer.
            assert!(
                not == 0 || reached > not,
                "{reached} connects went over the fabric, {not} not"
            );
        }
    }
}

const LOG: &str = "log_level = \"debug\"\n";

/// The daemons of two nodes: that of the servers, to which 127.0.0.1 and ::1 belong, and that of the
/// clients. The fabric is waited for, so that a connect never goes past it.
fn nodes(folder: &Folder) -> [Daemon; 2] {
    let fabric = folder.at("fabric");
    std::fs::create_dir(&fabric).unwrap();
    std::fs::set_permissions(&fabric, PermissionsExt::from_mode(0o700)).unwrap();
    let config = |node: u16| {
        format!(
            "{LOG}
[fabric]
node = {node}
device = \"model:{}\"
connect_timeout_us = 2000000
[[fabric.nodes]]
id = 1
name = \"servers\"
addresses = [\"127.0.0.1\", \"::1\"]
[[fabric.nodes]]
id = 2
name = \"clients\"
addresses = [\"127.0.0.2\", \"fd00::2\"]
",
            fabric.display()
        )
    };
    let mut daemons = [1, 2].map(|node| Daemon::start(&config(node)));
    for daemon in &mut daemons {
        daemon.wait_for_nodes(1);
    }
    daemons
}

/// Makes a test of each function that takes a [`Site`]: the server on one node, the client on another.
#[macro_export]
macro_rules! between_nodes {
    ($($name:ident),* $(,)?) => {
        mod between_nodes {
            $(
                #[test]
                fn $name() {
                    super::$name($crate::Site::new($crate::Mode::Nodes));
                }
            )*
        }
    };
}

/// Makes a test of each function that takes a [`Site`]: both ends on rings, with the lowest thresholds.
#[macro_export]
macro_rules! with_the_lowest_limits {
    ($($name:ident),* $(,)?) => {
        mod with_the_lowest_limits {
            $(
                #[test]
                fn $name() {
                    super::$name($crate::Site::new($crate::Mode::Lowest));
                }
            )*
        }
    };
}

/// Makes four tests of a function that takes a [`Site`]: one for each [`Mode`].
#[macro_export]
macro_rules! in_each_mode {
    ($($name:ident),* $(,)?) => { $(
        mod $name {
            #[test]
            fn both() {
                super::$name($crate::Site::new($crate::Mode::Both));
            }
            #[test]
            fn server_only() {
                super::$name($crate::Site::new($crate::Mode::ServerOnly));
            }
            #[test]
            fn client_only() {
                super::$name($crate::Site::new($crate::Mode::ClientOnly));
            }
            #[test]
            fn neither() {
                super::$name($crate::Site::new($crate::Mode::Neither));
            }
        }
    )* };
}
