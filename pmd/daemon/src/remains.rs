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
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{Shutdown, SockFlag, accept4, getsockopt, shutdown, sockopt};
use nix::sys::stat::fstat;
use nix::unistd::geteuid;

use crate::diag::{is_seqpacket, is_tcp};
use crate::process;

/// A process that has said that it serves by a lock ([`Holder::say`]).
#[derive(Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: i32,
    /// The byte of the file by which it says so.
    at: i64,
}

impl Holder {
    /// Who has locked a file by `flock`, as it has said; `None` where that can't be seen (another process id namespace), or nobody has.
    ///
    /// (The kernel lists the locks of all, too, in `/proc/locks`: anybody can have so many that to read them takes minutes.)
    pub fn of(file: &File) -> io::Result<Option<Self>> {
        Ok(Self::last(file)?.filter(|holder| holder.pid > 0))
    }

    /// Who has locked the latest byte, if that is another process. The kernel keeps that for as long as it has any thread.
    fn last(file: &File) -> io::Result<Option<Self>> {
        let (mut last, mut from) = (None, 0);
        loop {
            let mut lock = bytes(from, 0);
            fcntl(file, FcntlArg::F_GETLK(&mut lock))?;
            if i32::from(lock.l_type) == libc::F_UNLCK {
                return Ok(last);
            }
            let (pid, at) = (lock.l_pid, lock.l_start);
            last = Some(Holder { pid, at });
            from = at + 1;
        }
    }

    /// Says that this process has locked the file, by the byte behind those of the ones before. It does so until it closes any descriptor
    /// of that file. Fails where the file system knows no such locks.
    pub fn say(file: &File) -> io::Result<()> {
        let at = Self::last(file)?.map_or(0, |before| before.at + 1);
        fcntl(file, FcntlArg::F_SETLK(&bytes(at, 1)))?;
        Ok(())
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
                    // Another process may have got the number: not one that has said so.
                    if Holder::of(file)?.as_ref() != Some(self) {
                        return Ok(());
                    }
                    return thread.take_away(&lock);
                }
                Err(error) => taken = taken.and(Err(error)),
            }
        }
        taken
    }
}

/// So many bytes from this one on, or all for 0, to be locked for oneself.
fn bytes(from: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: from,
        l_len: len,
        l_pid: 0,
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

    /// Is it by this descriptor that the process has [said](Holder::say) that it holds the lock? Its own record locks are shown with those of its
    /// files that it has locked, and nobody can send it one.
    fn says_by(&self, fd: RawFd) -> bool {
        let shown = fs::read_to_string(self.folder.with_file_name("fdinfo").join(fd.to_string()));
        let is_record = |line: &str| line.starts_with("lock:") && line.contains(" POSIX ");
        shown.is_ok_and(|shown| shown.lines().any(is_record))
    }

    fn take_away(&self, lock: &Path) -> io::Result<()> {
        let (mut strangers, mut doors) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            // Closed meanwhile, or no number.
            let Ok(link) = fs::read_link(entry.path()) else {
                continue;
            };
            let Ok(fd) = entry.file_name().to_string_lossy().parse::<RawFd>() else {
                continue;
            };
            // Nothing else is taken: a file that does not answer would hold this process up as well.
            // The text may lie: others can show any file by the lock's name.
            let is_socket = process::parse_socket(&link.to_string_lossy()).is_some();
            if !is_socket && (link != lock || !self.says_by(fd)) {
                continue;
            }
            match process::duplicate(&self.pidfd, fd) {
                Ok(lock) if !is_socket => unlock(&lock)?,
                // Programs are told first that the daemon has gone: where they were to go, somebody else may be then.
                Ok(socket) if is_door(&socket) => doors.push(socket),
                Ok(socket) => {
                    if is_seqpacket(socket.as_fd()) {
                        strangers.extend(end(&socket, self.pid));
                    }
                    strangers.push(socket);
                }
                Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
                Err(error) => return Err(error),
            }
        }
        for door in doors {
            strangers.extend(end(&door, self.pid));
            strangers.push(door);
        }
        // Who closes a stranger's socket last may have to wait, and so may who closes one in which a stranger has left something.
        std::thread::spawn(move || drop(strangers));
        Ok(())
    }
}

/// Whether it is a daemon's own socket, to which programs come that go to other nodes. (Its callers and programs are at the other end of
/// local sockets.) A stranger may have sent it any other one, whose lock he holds for as long as he likes, or at which a shutdown ends nothing.
fn is_door(socket: &OwnedFd) -> bool {
    let is_own = || fstat(socket).is_ok_and(|found| found.st_uid == geteuid().as_raw());
    is_tcp(socket.as_fd()) && listens(socket) && is_own()
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

    /// A process that has locked this byte of a file.
    fn locker(path: &Path, at: i64) -> std::process::Child {
        use std::io::BufRead;
        let script = "import fcntl,sys\nf=open(sys.argv[1],'w')\nfcntl.lockf(f,fcntl.LOCK_EX,1,int(sys.argv[2]))\nprint(flush=True)\nsys.stdin.read()";
        let mut command = std::process::Command::new("python3");
        let command = command.args(["-c", script]).arg(path).arg(at.to_string());
        let piped = || std::process::Stdio::piped();
        let mut child = command.stdin(piped()).stdout(piped()).spawn().unwrap();
        let said = io::BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut String::new());
        assert_eq!(said.unwrap(), 1);
        child
    }

    #[test]
    fn who_has_said_last_that_it_holds_a_lock_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let file = File::create(&path).unwrap();
        assert_eq!(Holder::of(&file).unwrap(), None);
        // What this process says is for others.
        Holder::say(&file).unwrap();
        assert_eq!(Holder::of(&file).unwrap(), None);
        let mut lockers = [1, 2].map(|at| (at, locker(&path, at)));
        for (at, locker) in lockers.iter_mut().rev() {
            let holder = Holder::of(&file).unwrap().unwrap();
            assert_eq!((holder.pid, holder.at), (locker.id() as i32, *at));
            assert!(!holder.is_dying());
            locker.kill().unwrap();
            locker.wait().unwrap();
        }
        assert_eq!(Holder::of(&file).unwrap(), None);
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
