//! What the kernel says of processes: who holds which socket, who lives, in which namespace.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{getsockopt, sockopt};
use nix::time::{ClockId, clock_gettime};

/// A process on the other side of a control connection, as the kernel names it.
#[derive(Debug)]
pub struct Peer {
    /// Its id in the daemon's pid namespace; 0 when it can't be seen from there.
    pub pid: i32,
    /// Its effective user when it connected.
    pub uid: u32,
    /// Stays with this very process, even when its id is used again.
    pub pidfd: OwnedFd,
}

impl Peer {
    /// Who made the other end of `socket`. Fails when that process has ended.
    pub fn of(socket: &OwnedFd) -> io::Result<Self> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        let pid = credentials.pid();
        let pidfd = match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(pidfd) => pidfd,
            // Before Linux 6.5. The id could have been used again before the pidfd was opened;
            // then the socket's maker is gone and the socket, unless inherited, hung up: the
            // event loop sees that before it believes any message.
            Err(nix::errno::Errno::ENOPROTOOPT) => pidfd_open(pid)?,
            Err(error) => return Err(error.into()),
        };
        if !is_alive(&pidfd) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(Peer {
            pid,
            uid: credentials.uid(),
            pidfd,
        })
    }

    /// True while the process runs.
    pub fn is_alive(&self) -> bool {
        is_alive(&self.pidfd)
    }
}

fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers, returns a new fd or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above returned this fd, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn is_alive(pidfd: &OwnedFd) -> bool {
    use std::os::fd::AsFd;
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    // A pidfd is readable once the process has ended.
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
}

/// Inode of the socket that a process holds as `fd`; `None` when it holds none there, or may
/// not be looked at.
pub fn socket_inode(pid: i32, fd: i32) -> Option<u64> {
    parse_socket(
        fs::read_link(format!("/proc/{pid}/fd/{fd}"))
            .ok()?
            .to_str()?,
    )
}

fn parse_socket(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

/// Inode of a process's network namespace.
pub fn netns_inode(pid: i32) -> io::Result<u64> {
    Ok(fs::metadata(format!("/proc/{pid}/ns/net"))?.ino())
}

/// What a process is called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// As `ps` shows it: the name that it was started by (redis-server, though the file is
    /// another).
    pub name: String,
    /// Basename of the executable.
    pub executable: String,
}

impl Program {
    /// Of a process; empty where that can't be seen.
    pub fn of(pid: i32) -> Self {
        let path = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let executable = file.strip_suffix(" (deleted)").unwrap_or(&file).to_owned();
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let name = name.trim_end();
        // The kernel keeps fifteen bytes of it.
        let cut_off = name.len() == 15 && executable.starts_with(name);
        Program {
            name: if cut_off {
                executable.clone()
            } else {
                name.to_owned()
            },
            executable,
        }
    }
}

/// Who else holds a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherHolder {
    /// Nobody.
    Nobody,
    /// This process, or it may: it is a relative of the tenant whose fds can't be looked at.
    Process(i32),
    /// Not found out within the time allowed.
    TooSlow,
}

/// Looks for a process other than `pid` that holds the socket with this inode, for at most
/// `allowed` of processor time. Relatives of `pid` come first: they are who inherits. This process, whose many
/// descriptors are none of a tenant's sockets, is left out.
pub fn other_holder(pid: i32, inode: u64, allowed: Duration) -> OtherHolder {
    let end = processor_time() + allowed;
    let own = std::process::id() as i32;
    let parent = parent_of(pid);
    let mut others: Vec<(bool, i32)> = processes()
        .filter(|other| *other != pid && *other != own)
        .map(|other| {
            let its_parent = parent_of(other);
            let related = Some(other) == parent
                || its_parent == Some(pid)
                || (its_parent.is_some() && its_parent == parent && parent != Some(1));
            (related, other)
        })
        .collect();
    others.sort_by_key(|(related, _)| !related);
    for (related, other) in others {
        match holds(other, inode) {
            Ok(true) => return OtherHolder::Process(other),
            Ok(false) => {}
            Err(error) if related && error.kind() == io::ErrorKind::PermissionDenied => {
                return OtherHolder::Process(other);
            }
            Err(_) => {}
        }
        if processor_time() > end {
            return OtherHolder::TooSlow;
        }
    }
    OtherHolder::Nobody
}

/// What this thread has used of its processor. Unlike the time that passes, it does not grow while
/// busy programs have the processors.
pub fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

fn processes() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Parent of a process: the field behind the name and the state in `/proc/PID/stat`.
fn parent_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1)?.parse().ok()
}

fn holds(pid: i32, inode: u64) -> io::Result<bool> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let link = fs::read_link(entry?.path()).unwrap_or_default();
        if link.to_str().and_then(parse_socket) == Some(inode) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Raises the limits that the daemon may have inherited from whoever started it to what they may
/// be; returns the number of descriptors.
pub fn raise_limits() -> u64 {
    raise(Resource::RLIMIT_FSIZE);
    // SAFETY: a signal is ignored; no handler is installed. A file (a stream's memory is one) that
    // may not grow is then an error, not the end of the daemon.
    let _ = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
    raise(Resource::RLIMIT_NOFILE)
}

fn raise(resource: Resource) -> u64 {
    let Ok((soft, hard)) = getrlimit(resource) else {
        return 1024;
    };
    match setrlimit(resource, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;

    #[test]
    fn sockets_are_found_by_their_inode() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let me = std::process::id() as i32;
        let inode = socket_inode(me, listener.as_raw_fd()).unwrap();
        assert!(holds(me, inode).unwrap());
        assert_eq!(socket_inode(me, 0x7fff_0000), None);
        let second = Duration::from_secs(1);
        assert_eq!(other_holder(me, inode, second), OtherHolder::Nobody);
        let child = std::process::Command::new("sleep").arg("5").spawn();
        let mut child = child.unwrap();
        assert_eq!(parent_of(child.id() as i32), Some(me));
        // Held by this process alone, which does not count.
        let nobody = other_holder(child.id() as i32, inode, second);
        assert_eq!(nobody, OtherHolder::Nobody);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn only_sockets_have_socket_inodes() {
        assert_eq!(parse_socket("socket:[123]"), Some(123));
        assert_eq!(parse_socket("pipe:[123]"), None);
        assert_eq!(parse_socket("/tmp/socket:[123]"), None);
        assert_eq!(parse_socket("socket:[-1]"), None);
    }
}
