//! What a daemon that was killed has left of itself, and how its successor takes that away.
//!
//! A killed process keeps all its descriptors until its last thread has ended. A porter may be where not even that signal
//! ends it: it closes a file of a file system that does not answer, say, and whoever has sent that file decides for how long. Until then
//! the lock stays locked, callers come to a socket that nobody serves, and programs that were attached don't hear that it has gone.
//!
//! So [`Endpoint`](crate::endpoint::Endpoint) asks here who holds the lock. From one that is dying, and takes its time, the successor
//! takes duplicates of its sockets and of its lock (`pidfd_getfd` on a thread that is still there), shuts the sockets down, and unlocks the
//! lock. Devices can't be taken away like that: the fabric has to wait for them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, SockFlag, accept4, getsockopt, shutdown, sockopt};
use nix::sys::stat::{fstat, major, minor};
use nix::unistd::geteuid;

use crate::diag::{is_seqpacket, is_tcp};
use crate::process;

/// A process that holds a lock.
#[derive(Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: i32,
}

impl Holder {
    /// Who has locked a file by `flock`; `None` where that can't be seen (another process id namespace, a file system with
    /// numbers of its own), or nobody has.
    pub fn of(file: &File) -> io::Result<Option<Self>> {
        let found = file.metadata()?;
        let locks = fs::read_to_string("/proc/locks")?;
        let id = (
            major(found.dev()) as u32,
            minor(found.dev()) as u32,
            found.ino(),
        );
        let mut holders = locks.lines().filter_map(parse_lock);
        let holder = holders.find(|(_, file)| *file == id);
        Ok(holder.map(|(pid, _)| Holder { pid }))
    }

    /// Whether it has been killed: then its first thread has ended, or is about to.
    pub fn is_dying(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{0}/task/{0}/status", self.pid));
        status.is_ok_and(|status| is_dying(&status))
    }

    /// Takes away what it holds of the daemon that it was: the lock on `file`, and all sockets that programs and callers
    /// come to. It must be [dying](Self::is_dying).
    pub fn take_away(&self, file: &File) -> io::Result<()> {
        let lock = fs::read_link(own(file))?;
        let mut taken = Err(io::Error::other("no thread of it is left to be looked at"));
        for thread in fs::read_dir(format!("/proc/{}/task", self.pid))? {
            let tid = thread?.file_name().to_string_lossy().parse();
            let Ok(tid) = tid else { continue };
            // All of its threads have the same descriptors: one that still has them is enough.
            match Thread::open(self.pid, tid) {
                Ok(thread) => {
                    // Another process may have got the number: not one that holds this lock.
                    if Holder::of(file)?.as_ref() != Some(self) {
                        return Ok(());
                    }
                    thread.take_away(&lock)?;
                    taken = Ok(());
                }
                Err(error) if taken.is_err() => taken = Err(error),
                Err(_) => {}
            }
        }
        taken
    }
}

/// The link to an open file of this process.
fn own(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// A thread whose descriptors can be taken.
struct Thread {
    /// Its process.
    pid: i32,
    pidfd: OwnedFd,
    folder: PathBuf,
}

impl Thread {
    /// Fails for one that has no descriptors any more.
    fn open(pid: i32, tid: i32) -> io::Result<Self> {
        let folder = PathBuf::from(format!("/proc/{pid}/task/{tid}/fd"));
        let pidfd = process::pidfd_of_thread(tid)?;
        match fs::read_dir(&folder)?.next() {
            Some(_) => Ok(Thread { pid, pidfd, folder }),
            None => Err(Errno::ESRCH.into()),
        }
    }

    fn take_away(&self, lock: &Path) -> io::Result<()> {
        let mut strangers = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            // Closed meanwhile, or no number.
            let Ok(link) = fs::read_link(entry.path()) else {
                continue;
            };
            let Ok(fd) = entry.file_name().to_string_lossy().parse() else {
                continue;
            };
            // Nothing else is taken: a file that does not answer would hold this process up as well.
            let is_socket = process::parse_socket(&link.to_string_lossy()).is_some();
            if !is_socket && link != lock {
                continue;
            }
            match process::duplicate(&self.pidfd, fd) {
                Ok(lock) if !is_socket => unlock(&lock)?,
                Ok(socket) => {
                    if is_daemons(&socket) {
                        strangers.extend(end(&socket, self.pid));
                    }
                    strangers.push(socket);
                }
                Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
                Err(error) => return Err(error),
            }
        }
        // Who closes a stranger's socket last may have to wait, and so may who closes one in which a stranger has left something.
        std::thread::spawn(move || drop(strangers));
        Ok(())
    }
}

/// Whether callers or programs of a daemon's are at the other end: a local control socket, or a socket that it listens on. A stranger may have
/// sent it any other one, whose lock he holds for as long as he likes, or at which a shutdown ends nothing.
fn is_daemons(socket: &OwnedFd) -> bool {
    let is_own = || fstat(socket).is_ok_and(|found| found.st_uid == geteuid().as_raw());
    is_seqpacket(socket.as_fd()) || is_tcp(socket.as_fd()) && listens(socket) && is_own()
}

fn listens(socket: &OwnedFd) -> bool {
    getsockopt(socket, sockopt::AcceptConn) == Ok(true)
}

/// Whoever is at the other end is told as if the process had ended. Waits for nobody. Returns the sockets of callers that nobody has
/// heard yet, who have been told, too: of a local socket on which the process `pid` listens, which is the daemon's own.
fn end(socket: &OwnedFd, pid: i32) -> Vec<OwnedFd> {
    // It may have been shut down before.
    let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
    let mut callers = Vec::new();
    let listener = getsockopt(socket, sockopt::PeerCredentials).map(|peer| peer.pid());
    // Nobody else comes.
    if is_seqpacket(socket.as_fd()) && listens(socket) && listener == Ok(pid) {
        while let Ok(caller) = accept4(socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            let _ = shutdown(caller, Shutdown::Both);
            // SAFETY: it was made by the call above, and nothing else owns it.
            callers.push(unsafe { OwnedFd::from_raw_fd(caller) });
        }
    }
    callers
}

fn unlock(lock: &OwnedFd) -> io::Result<()> {
    // SAFETY: takes two integers. The lock belongs to the open file, which the other process has, too.
    match unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_UN) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A line of `/proc/locks` about a lock by `flock` that is held: by whom, on which file (major, minor, inode).
fn parse_lock(line: &str) -> Option<(i32, (u32, u32, u64))> {
    // "1: FLOCK  ADVISORY  WRITE 708 00:17:14578 0 EOF"; one who waits has "->" behind the number.
    let mut words = line.split_whitespace().skip(1);
    if words.next() != Some("FLOCK") {
        return None;
    }
    let mut words = words.skip(2);
    let pid = words.next()?.parse().ok().filter(|pid| *pid > 0)?;
    let mut file = words.next()?.split(':');
    let mut hex = || u32::from_str_radix(file.next()?, 16).ok();
    let (major, minor) = (hex()?, hex()?);
    Some((pid, (major, minor, file.next()?.parse().ok()?)))
}

/// By `status` of its first thread: it has ended (the process stays a zombie until all have), or a SIGKILL is under way to it.
fn is_dying(status: &str) -> bool {
    let line = |name| {
        let mut lines = status.lines();
        lines
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
    };
    let ended = line("State:").is_some_and(|state| state.starts_with(['Z', 'X']));
    let pending = line("SigPnd:").and_then(|set| u64::from_str_radix(set, 16).ok());
    ended || pending.is_some_and(|set| set & 1 << (libc::SIGKILL - 1) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{Flock, FlockArg};

    #[test]
    fn who_holds_a_lock_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let open = || File::create(dir.path().join("lock")).unwrap();
        assert_eq!(Holder::of(&open()).unwrap(), None);
        let _held = Flock::lock(open(), FlockArg::LockExclusive).unwrap();
        let pid = std::process::id() as i32;
        let holder = Holder::of(&open()).unwrap();
        assert_eq!(holder, Some(Holder { pid }));
        assert!(!holder.unwrap().is_dying());
    }

    #[test]
    fn lines_of_locks_are_understood() {
        let line = "12: FLOCK  ADVISORY  WRITE 708 fd:1a:14578 0 EOF";
        assert_eq!(parse_lock(line), Some((708, (0xfd, 0x1a, 14578))));
        for none in [
            "12: -> FLOCK  ADVISORY  WRITE 709 fd:1a:14578 0 EOF",
            "13: POSIX  ADVISORY  WRITE 708 fd:1a:14578 0 EOF",
            // A process that can't be seen from here.
            "14: FLOCK  ADVISORY  WRITE -1 fd:1a:14578 0 EOF",
            "15: FLOCK  ADVISORY  WRITE 0 fd:1a:14578 0 EOF",
            "16: FLOCK  ADVISORY  WRITE 708 <none>:0 0 EOF",
            "",
        ] {
            assert_eq!(parse_lock(none), None, "{none}");
        }
    }

    #[test]
    fn one_that_is_killed_is_dying() {
        assert!(is_dying(
            "Name:\trdsockd\nState:\tZ (zombie)\nSigPnd:\t0000000000000000\n"
        ));
        assert!(is_dying(
            "State:\tD (disk sleep)\nSigPnd:\t0000000000000100\n"
        ));
        // Stopped, or with another signal (SIGTERM) under way, it lives.
        assert!(!is_dying(
            "State:\tT (stopped)\nSigPnd:\t0000000000004000\n"
        ));
        assert!(!is_dying(""));
    }
}
