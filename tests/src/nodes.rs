//! Nodes of a test's own on this machine: a daemon for each, on models of the device that are linked. Node *n*
//! has the address 127.0.0.*n*; connects from the programs of one node to the address of another go over the
//! fabric.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::daemon::Daemon;
use crate::folder::Folder;
use crate::program::{Program, Running};
use crate::why::{self, Connection};

/// The daemons, and a folder for what programs print.
#[derive(Debug)]
pub struct Nodes {
    /// Of node 1, 2, ….
    pub daemons: Vec<Daemon>,
    /// Files of the test.
    pub folder: Folder,
    /// Descriptors of each daemon when nobody was attached.
    descriptors: Vec<usize>,
}

impl Nodes {
    /// Starts the daemons of nodes 1 to `daemons` in a fabric of `nodes` nodes, and waits until they have met.
    pub fn start(daemons: u16, nodes: u16) -> Self {
        let folder = Folder::new();
        let fabric = folder.at("fabric");
        std::fs::create_dir(&fabric).expect("a new folder");
        std::fs::set_permissions(&fabric, PermissionsExt::from_mode(0o700)).expect("it is ours");
        let table: String = (1..=nodes)
            .map(|id| format!("[[fabric.nodes]]\nid = {id}\naddresses = [\"127.0.0.{id}\"]\n"))
            .collect();
        let config = |node| {
            format!(
                "log_level = \"debug\"\n[fabric]\nnode = {node}\ndevice = \"model:{}\"\n\
                 connect_timeout_us = 10000000\n{table}",
                fabric.display()
            )
        };
        let daemons = (1..=daemons).map(|node| Daemon::start(&config(node)));
        let mut nodes = Nodes {
            daemons: daemons.collect(),
            folder,
            descriptors: Vec::new(),
        };
        nodes.wait_until_met();
        nodes.descriptors = nodes.daemons.iter_mut().map(Daemon::descriptors).collect();
        nodes
    }

    /// Where the nodes' models meet.
    pub fn fabric(&self) -> PathBuf {
        self.folder.at("fabric")
    }

    /// Waits until each node that has a daemon reaches each other.
    pub fn wait_until_met(&mut self) {
        let others = self.daemons.len() - 1;
        for daemon in &mut self.daemons {
            daemon.wait_for_nodes(others);
        }
    }

    /// The daemon of a node.
    pub fn daemon(&mut self, node: usize) -> &mut Daemon {
        &mut self.daemons[node - 1]
    }

    /// A program of a node, under its shim.
    pub fn program(&self, node: usize, name: &str, args: &str) -> Program {
        Program::new(name, self.folder.path())
            .args(args)
            .preloaded(&self.daemons[node - 1].socket())
    }

    /// The connections of a program of a node that are on rings.
    pub fn on_rings(&self, node: usize, program: &Running) -> Vec<Connection> {
        let why = why::ask(&self.daemons[node - 1].socket(), Some(program.pid()));
        let mut connections = why.connections;
        connections.retain(|connection| connection.accelerated);
        connections
    }

    /// Waits until so many connections of a program of a node are on rings.
    ///
    /// # Panics
    /// When they are not within 20 s.
    pub fn wait_for_rings(&self, node: usize, program: &Running, count: usize) {
        let end = Instant::now() + Duration::from_secs(20);
        let mut most = 0;
        loop {
            let found = self.on_rings(node, program).len();
            if found >= count {
                return;
            }
            most = most.max(found);
            if Instant::now() > end {
                let why = why::ask(&self.daemons[node - 1].socket(), Some(program.pid()));
                let mut off = why.connections;
                off.retain(|connection| !connection.accelerated);
                off.truncate(5);
                panic!("at most {most} of {count} on rings; not now: {off:#?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A transfer by `pump` from node 2 to a port of node 1, with arguments as the pump has them, well on its way on
    /// rings. The kernel has it where a busy node did not answer in time, and where the server has not come back
    /// to a daemon that was started again (it looks twice a second): then it is begun again.
    ///
    /// # Panics
    /// When that goes on for a minute.
    pub fn begin(&self, pump: &str, args: &str) -> Running {
        let end = Instant::now() + Duration::from_secs(60);
        while Instant::now() < end {
            let mut client = self.program(2, pump, args).start();
            client.wait_for_output("begun", Duration::from_secs(60));
            let why = why::ask(&self.daemons[1].socket(), Some(client.pid()));
            if why.connections.iter().all(|c| c.state != "kernel") {
                self.wait_for_rings(2, &client, 1);
                return client;
            }
            client.kill();
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("for a minute, each connection stayed on the kernel");
    }

    /// What the daemon of a node says of its fabric.
    pub fn fabric_stat(&self, node: usize) -> Value {
        self.daemons[node - 1].stat()["fabric"].clone()
    }

    /// How often the daemon of `node` has counted a violation of `other`.
    pub fn violations(&self, node: usize, other: u64, name: &str) -> u64 {
        let stat = self.fabric_stat(node);
        let nodes = stat["nodes"].as_array().expect("a list of nodes");
        let found = nodes.iter().find(|entry| entry["id"] == other);
        let count = found.and_then(|entry| entry["violations"][name].as_u64());
        count.unwrap_or_else(|| panic!("no count {name} of node {other} in {stat:#}"))
    }

    /// Waits until nothing of a test's programs is left in any daemon: processes, streams, descriptors, memory.
    ///
    /// # Panics
    /// When something is left after 10 s: a leak.
    pub fn wait_until_empty(&mut self) {
        for (daemon, descriptors) in self.daemons.iter_mut().zip(&self.descriptors) {
            daemon.wait_until_empty(*descriptors);
            let end = Instant::now() + Duration::from_secs(10);
            loop {
                let carried = daemon.number("/fabric/streams");
                let mapped = daemon.mappings("rdsock-stream").len();
                if carried == 0 && mapped == 0 {
                    break;
                }
                assert!(
                    Instant::now() < end,
                    "the daemon still carries {carried} streams and maps the memory of {mapped}"
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Daemon {
    /// Where files of this name are mapped in it, from their starts on: inodes and addresses.
    pub fn mappings(&mut self, name: &str) -> Vec<(u64, u64)> {
        let path = format!("/proc/{}/maps", self.running().pid());
        let maps = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        maps.lines()
            .filter(|line| line.contains(name))
            .filter_map(|line| {
                let (start, rest) = line.split_once('-')?;
                let inode = rest.split_whitespace().nth(4)?.parse().ok()?;
                let start = u64::from_str_radix(start, 16).ok()?;
                rest.contains(" 00000000 ").then_some((inode, start))
            })
            .collect()
    }

    /// The inodes of files of this name that it has open.
    pub fn open_files(&mut self, name: &str) -> Vec<u64> {
        let path = format!("/proc/{}/fd", self.running().pid());
        let fds = std::fs::read_dir(path).into_iter().flatten().flatten();
        fds.filter(|fd| {
            let target = std::fs::read_link(fd.path()).unwrap_or_default();
            target.to_string_lossy().contains(name)
        })
        .filter_map(|fd| Some(std::fs::metadata(fd.path()).ok()?.ino()))
        .collect()
    }

    /// Stores a word into its memory.
    pub fn poke(&mut self, address: u64, word: u32) {
        let path = format!("/proc/{}/mem", self.running().pid());
        let file = OpenOptions::new().write(true).open(path);
        let file = file.expect("a child's memory can be written");
        file.write_all_at(&word.to_le_bytes(), address)
            .expect("the memory is mapped");
    }
}
