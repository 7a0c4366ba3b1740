//! What `/proc` says of this machine: TCP sockets, and who holds them. Each part is read once,
//! when it is first needed.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use procfs::net::TcpState;
use procfs::process::{FDTarget, LimitValue, MMapPath, Process, all_processes};
use rdsock_shm::control::MACHINE_SOCKET;

use super::patience::Patience;
use crate::run::{Loads, OTHER_LIBC, has_loaded_libraries};

/// Bytes of an environment that are read: more than the kernel gives a program that is started as usual.
const ENVIRONMENT: u64 = 2 << 20;

/// A network namespace, by the inode that stands for it.
pub type Netns = u64;

/// A TCP connection as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// Its inode.
    pub inode: u64,
}

/// The connections of a namespace.
#[derive(Debug, Default)]
struct Table {
    by_inode: HashMap<u64, Socket>,
    by_addresses: HashMap<(SocketAddr, SocketAddr), u64>,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Machine {
    tables: HashMap<Netns, Table>,
    holders: Option<HashMap<u64, Vec<i32>>>,
    namespaces: Option<HashMap<Netns, i32>>,
    addresses: Option<Vec<IpAddr>>,
    absences: HashMap<i32, Absence>,
    patience: Patience,
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

impl Table {
    fn read(process: &Process) -> Self {
        let mut table = Table::default();
        let v4 = process.tcp().unwrap_or_default();
        let v6 = process.tcp6().unwrap_or_default();
        for entry in v4.into_iter().chain(v6) {
            // Without an inode no process holds it any more.
            if matches!(entry.state, TcpState::Listen | TcpState::SynSent) || entry.inode == 0 {
                continue;
            }
            let socket = Socket {
                local: canonical(entry.local_address),
                peer: canonical(entry.remote_address),
                inode: entry.inode,
            };
            table
                .by_addresses
                .insert((socket.local, socket.peer), socket.inode);
            table.by_inode.insert(socket.inode, socket);
        }
        table
    }
}

impl Machine {
    /// Nothing is read yet.
    pub fn new() -> Self {
        Machine::default()
    }

    /// Does this process exist?
    pub fn exists(&self, pid: i32) -> bool {
        Process::new(pid).is_ok()
    }

    /// Name of the program that a process runs, as `ps` shows it.
    pub fn program(&self, pid: i32) -> String {
        let Ok(process) = Process::new(pid) else {
            return String::new();
        };
        let name = process.stat().map(|stat| stat.comm).unwrap_or_default();
        // The kernel keeps fifteen bytes of it.
        let path = process.exe().ok().filter(|_| name.len() == 15);
        let whole = path.and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
        whole
            .filter(|whole| whole.starts_with(&name))
            .unwrap_or(name)
    }

    /// The network namespace of a process; `None` when it may not be looked at.
    pub fn netns(&self, pid: i32) -> Option<Netns> {
        Some(std::fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.ino())
    }

    fn table(&mut self, netns: Netns, pid: i32) -> &Table {
        self.tables.entry(netns).or_insert_with(|| {
            Process::new(pid)
                .map(|process| Table::read(&process))
                .unwrap_or_default()
        })
    }

    /// The TCP connections of a process, as (fd, connection); each once, by its lowest fd, or by
    /// one of `preferred`. `None` when the process may not be looked at.
    pub fn connections(&mut self, pid: i32, preferred: &[i32]) -> Option<Vec<(i32, Socket)>> {
        let netns = self.netns(pid)?;
        let mut fds: Vec<(i32, u64)> = sockets(pid)?;
        fds.sort_by_key(|(fd, _)| (!preferred.contains(fd), *fd));
        let table = self.table(netns, pid);
        let mut seen = std::collections::HashSet::new();
        let mut found: Vec<(i32, Socket)> = fds
            .into_iter()
            .filter(|(_, inode)| seen.insert(*inode))
            .filter_map(|(fd, inode)| Some((fd, *table.by_inode.get(&inode)?)))
            .collect();
        found.sort_by_key(|(fd, _)| *fd);
        Some(found)
    }

    /// Inode of the other end of a connection, if it is in the same namespace.
    pub fn other_end(&mut self, netns: Netns, pid: i32, socket: &Socket) -> Option<u64> {
        self.table(netns, pid)
            .by_addresses
            .get(&(socket.peer, socket.local))
            .copied()
    }

    /// The other end of a connection, if it is in another namespace that can be looked into.
    pub fn other_end_elsewhere(&mut self, netns: Netns, socket: &Socket) -> Option<u64> {
        let others: Vec<(Netns, i32)> = self
            .namespaces()
            .iter()
            .filter(|(other, _)| **other != netns)
            .map(|(other, pid)| (*other, *pid))
            .collect();
        others
            .into_iter()
            .find_map(|(other, pid)| self.other_end(other, pid, socket))
    }

    fn namespaces(&mut self) -> &HashMap<Netns, i32> {
        if self.namespaces.is_none() {
            let pids: Vec<i32> = processes().collect();
            let found = pids
                .into_iter()
                .filter_map(|pid| Some((self.netns(pid)?, pid)))
                .collect();
            self.namespaces = Some(found);
        }
        self.namespaces.get_or_insert_default()
    }

    /// Processes that hold a socket, as far as they may be looked at.
    pub fn holders(&mut self, inode: u64) -> &[i32] {
        let holders = self.holders.get_or_insert_with(|| {
            let mut holders: HashMap<u64, Vec<i32>> = HashMap::new();
            for pid in processes() {
                for (_, inode) in sockets(pid).unwrap_or_default() {
                    let pids = holders.entry(inode).or_default();
                    if pids.last() != Some(&pid) {
                        pids.push(pid);
                    }
                }
            }
            holders
        });
        holders.get(&inode).map_or(&[], Vec::as_slice)
    }

    /// Is this one of the machine's own addresses (in this process's namespace)?
    pub fn is_own_address(&mut self, ip: IpAddr) -> bool {
        let own = self.addresses.get_or_insert_with(|| {
            let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
            let addresses = interfaces.filter_map(|interface| {
                let address = interface.address?;
                let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
            });
            addresses.collect()
        });
        ip.is_loopback() || own.contains(&ip)
    }

    /// The processes that have the shim in them and use the daemon at `socket`, attached or not; of
    /// those that may be looked at.
    pub fn preloaded(&mut self, socket: &Path) -> Preloaded {
        let socket = socket.to_owned();
        let belongs = move |pid: i32| {
            Process::new(pid).is_ok_and(|process| {
                has_shim(&process) == Some(true)
                    && daemon_of(&process).is_some_and(|path| is_same(&path, &socket))
            })
        };
        let all: Vec<i32> = processes().collect();
        let (seen, stuck) = self.patience.look_at_each(&all, belongs);
        let unseen = |pid: &i32| (*pid, Absence::Unseen(STUCK));
        self.absences.extend(stuck.iter().map(unseen));
        let mut found: Vec<i32> = seen
            .into_iter()
            .filter_map(|(pid, belongs)| belongs.then_some(pid))
            .collect();
        found.sort_unstable();
        Preloaded { found, stuck }
    }

    /// Why a process that is not attached is not.
    pub fn absence(&mut self, pid: i32) -> Absence {
        let patience = &mut self.patience;
        let known = self.absences.entry(pid).or_insert_with(|| {
            let (seen, _) = patience.look_at_each(&[pid], absence);
            let seen = seen.into_iter().next();
            seen.map_or(Absence::Unseen(STUCK), |(_, absence)| absence)
        });
        known.clone()
    }
}

/// What a process does that keeps whoever looks at it waiting.
const STUCK: &str = "it keeps whoever looks at it waiting (it is starting another program, say, or waits for a file \
                     that does not answer)";

/// The processes that have the shim in them.
#[derive(Debug)]
pub struct Preloaded {
    /// Those.
    pub found: Vec<i32>,
    /// Of these that can't be told, since they keep whoever looks at them waiting.
    pub stuck: Vec<i32>,
}

/// May wait for the process.
fn absence(pid: i32) -> Absence {
    let Ok(process) = Process::new(pid) else {
        return Absence::Unseen("it has ended");
    };
    let program = has_loaded_libraries(pid);
    match has_shim(&process) {
        None => return Absence::Unseen("it is another user's, or has changed its user"),
        // The loader of another libc has loaded it, but it does nothing there.
        Some(true) if program == Loads::No(OTHER_LIBC) => {}
        Some(true) if has_tenant_memory(&process) => return Absence::LeftBehind,
        Some(true) => {
            return match narrow_limits(&process) {
                Some(limits) => Absence::Limited(limits),
                None => Absence::NotAttached,
            };
        }
        Some(false) => {}
    }
    match program {
        Loads::No(why) => Absence::NotPreloaded(format!("it {why}")),
        Loads::Yes | Loads::Unknown => {
            Absence::NotPreloaded("it was not started by rdsock run".into())
        }
    }
}

/// What the shim's memory takes of a file and of the address space, of which it leaves the program most.
const ROOM: [u64; 2] = [4 << 20, 64 << 20];

/// Descriptors that a program may have at least where the shim takes some for itself.
const DESCRIPTORS: u64 = 128;

/// Limits of a process that may keep the shim from having its memory.
fn narrow_limits(process: &Process) -> Option<String> {
    let limits = process.limits().ok()?;
    let narrow = |limit: LimitValue, below: u64, name: &str| match limit {
        LimitValue::Value(value) if value < below => Some(format!("{name}: {value} bytes")),
        _ => None,
    };
    let files = narrow(limits.max_file_size.soft_limit, ROOM[0], "file size");
    let space = limits.max_address_space.soft_limit;
    let space = narrow(space, ROOM[1], "address space");
    let open = match limits.max_open_files.soft_limit {
        LimitValue::Value(value) if value < DESCRIPTORS => Some(format!("descriptors: {value}")),
        _ => None,
    };
    let found: Vec<String> = files.into_iter().chain(space).chain(open).collect();
    (!found.is_empty()).then(|| found.join(", "))
}

/// Why a process is not a tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Absence {
    /// The shim is not in it, for this reason.
    NotPreloaded(String),
    /// The shim is in it, but the daemon does not know it.
    NotAttached,
    /// The shim is in it and has what an attached program has, but the daemon does not know it.
    LeftBehind,
    /// Likewise, and these limits may be why.
    Limited(String),
    /// It can't be looked at, for this reason.
    Unseen(&'static str),
}

impl std::fmt::Display for Absence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Absence::NotPreloaded(why) => write!(f, "is not preloaded: {why}"),
            Absence::NotAttached => f.write_str(
                "is preloaded, but not attached: it has used no TCP connection yet, or found no \
                 daemon, or was refused (see the log of rdsockd)",
            ),
            Absence::LeftBehind => f.write_str(
                "is preloaded, but not attached: it was attached to an earlier daemon (it attaches \
                 again with its next call), or the daemon refuses it for now (see the log of rdsockd)",
            ),
            Absence::Limited(limits) => write!(
                f,
                "is preloaded, but not attached: its limits may leave no room for what the shim needs ({limits}), or it \
                 has used no TCP connection yet, or found no daemon, or was refused (see the log of rdsockd)"
            ),
            Absence::Unseen(why) => write!(f, "is not attached, and can't be looked at: {why}"),
        }
    }
}

/// True when the shim is in a process; `None` when that may not be looked at.
fn has_shim(process: &Process) -> Option<bool> {
    let maps = process.maps().ok()?;
    let is_shim = |path: &MMapPath| match path {
        MMapPath::Path(path) => path.ends_with("librdsock.so"),
        _ => false,
    };
    Some(maps.iter().any(|map| is_shim(&map.pathname)))
}

/// True when a process has a tenant's memory mapped, as it does once it has found a daemon. A forked child has done away
/// with its parent's.
fn has_tenant_memory(process: &Process) -> bool {
    let is_memory = |path: &MMapPath| match path {
        MMapPath::Path(path) => path.to_string_lossy().starts_with("/memfd:rdsock-tenant"),
        _ => false,
    };
    let maps = process.maps();
    maps.is_ok_and(|maps| maps.iter().any(|map| is_memory(&map.pathname)))
}

/// Where the shim in a process looks for its daemon.
fn daemon_of(process: &Process) -> Option<PathBuf> {
    let file = process.open_relative("environ").ok()?;
    let mut environment = Vec::new();
    // A process may say that its environment is all of its memory.
    file.take(ENVIRONMENT).read_to_end(&mut environment).ok()?;
    Some(daemon_in(&environment))
}

/// Where an environment says that the daemon is.
fn daemon_in(environment: &[u8]) -> PathBuf {
    let mut variables = environment.split(|byte| *byte == 0);
    let told = variables.find_map(|variable| variable.strip_prefix(b"RDSOCK_SOCKET="));
    told.map_or(MACHINE_SOCKET.into(), |told| OsStr::from_bytes(told).into())
}

/// True when two paths are one, or lead to one file.
fn is_same(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.dev(), found.ino()))
    };
    one == other || file(one).is_some_and(|one| file(other) == Some(one))
}

fn processes() -> impl Iterator<Item = i32> {
    all_processes()
        .into_iter()
        .flatten()
        .flatten()
        .map(|process| process.pid())
}

/// The sockets of a process, as (fd, inode).
fn sockets(pid: i32) -> Option<Vec<(i32, u64)>> {
    let fds = Process::new(pid).ok()?.fd().ok()?;
    let socket = |fd: procfs::process::FDInfo| match fd.target {
        FDTarget::Socket(inode) => Some((fd.fd, inode)),
        _ => None,
    };
    Some(fds.flatten().filter_map(socket).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_where_the_daemon_is() {
        let of = |text: &str| daemon_in(text.as_bytes());
        assert_eq!(
            of("A=1\0RDSOCK_SOCKET=/s\0RDSOCK_SOCKET=/t\0"),
            Path::new("/s")
        );
        assert_eq!(
            of("XRDSOCK_SOCKET=/s\0RDSOCK_SOCKETS=/s\0"),
            Path::new(MACHINE_SOCKET)
        );
        // As much of it as is read.
        assert_eq!(of("RDSOCK_SOCKET=/s"), Path::new("/s"));
    }
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn both_ends_of_a_connection_are_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let again = stream.try_clone().unwrap();
        let me = std::process::id() as i32;
        let mut machine = Machine::new();
        let found = machine.connections(me, &[again.as_raw_fd()]).unwrap();
        let by_fd = |fd: i32| {
            found
                .iter()
                .find(|(found, _)| *found == fd)
                .map(|(_, socket)| *socket)
        };
        assert_eq!(by_fd(stream.as_raw_fd()), None);
        let connector = by_fd(again.as_raw_fd()).unwrap();
        assert_eq!(connector.peer, listener.local_addr().unwrap());
        let netns = machine.netns(me).unwrap();
        let other = machine.other_end(netns, me, &connector).unwrap();
        assert_eq!(other, by_fd(accepted.as_raw_fd()).unwrap().inode);
        assert!(machine.holders(other).contains(&me));
        assert_eq!(machine.other_end_elsewhere(netns, &connector), None);
    }

    #[test]
    fn loopback_is_our_own_and_a_documentation_address_is_not() {
        let mut machine = Machine::new();
        assert!(machine.is_own_address("127.8.9.1".parse().unwrap()));
        assert!(!machine.is_own_address("192.0.2.1".parse().unwrap()));
    }
}
