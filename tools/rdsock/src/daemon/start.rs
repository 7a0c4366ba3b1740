//! Starts a daemon for this user, once, however many programs are started at the same time.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IoSliceMut, PipeReader, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixAddr, UnixCredentials, bind, recvmsg, setsockopt, sockopt,
};
use nix::unistd::geteuid;
use rdsock_files::{ONLY_BY_NAME, Obstacle};

use super::find::{Silent, connect_to, user_sockets};

/// A daemon that was started for a program ends when it was unused for so long.
const IDLE_EXIT: &str = "60";
/// Time for a daemon to come up.
const PATIENCE: Duration = Duration::from_secs(5);
/// A log that has grown beyond this starts anew.
const LONG_LOG: u64 = 1 << 20;

/// Why there is no daemon.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Neither beside this program nor in the path.
    #[error("rdsockd is neither beside rdsock nor in $PATH")]
    NotFound,
    /// Something else is where a file is to be made or opened, or on the way there.
    #[error(transparent)]
    Obstacle(#[from] Obstacle),
    /// It does not take a caller, or somebody does not come to an end with starting it.
    #[error("{0}")]
    Silent(String),
    /// It ended, or does not come up.
    #[error("rdsockd does not come up: see {log}{last}")]
    Failed {
        /// Its log.
        log: PathBuf,
        /// The last line there.
        last: String,
    },
    /// The system said no.
    #[error("{0} {1}: {2}")]
    Io(&'static str, PathBuf, io::Error),
}

/// Starts a daemon, or finds the one that somebody else has just started. Returns its socket.
pub fn start() -> Result<PathBuf, StartError> {
    let program = find_program().ok_or(StartError::NotFound)?;
    let mut result = Err(StartError::NotFound);
    for socket in user_sockets() {
        result = start_at(&program, &socket);
        if result.is_ok() {
            return Ok(socket);
        }
    }
    result.map(|()| PathBuf::new())
}

/// `rdsockd` beside this program, else in the path.
pub fn find_program() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok()?.with_file_name("rdsockd");
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(beside)
        .chain(std::env::split_paths(&paths).map(|dir| dir.join("rdsockd")))
        .find(|path| path.is_file())
}

fn start_at(program: &Path, socket: &Path) -> Result<(), StartError> {
    let dir = socket.parent().unwrap_or(Path::new("/"));
    let mode = if geteuid().is_root() {
        ONLY_BY_NAME
    } else {
        0o700
    };
    rdsock_files::make_directory(dir, mode)?;
    let lock_path = with_suffix(socket, ".start");
    // Before files are made beside what may be anything.
    match rdsock_files::check(socket) {
        // Somebody may be starting it, or has just done so.
        Ok(()) | Err(Obstacle::Served(_)) => {}
        Err(obstacle) => return Err(obstacle.into()),
    }
    let lock = rdsock_files::open_lock(&lock_path)?;
    // Released at the end of this function, or with this process.
    let _lock = take_turn(lock, &lock_path)?;
    match connect_to(socket) {
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let (path, pid) = (socket.to_owned(), None);
            return Err(StartError::Silent(Silent { path, pid }.to_string()));
        }
        Err(_) => {}
    }
    let log_path = dir.join("rdsockd.log");
    let mut log = rdsock_files::open_log(&log_path)?;
    if log.metadata().is_ok_and(|meta| meta.len() > LONG_LOG) {
        log.set_len(0)
            .map_err(|error| StartError::Io("can't cut", log_path.clone(), error))?;
    }
    let (ready, alive) = log
        .try_clone()
        .and_then(|log| spawn(program, socket, log))
        .map_err(|error| StartError::Io("can't start", program.to_owned(), error))?;
    if is_up(&ready, &alive) {
        return Ok(());
    }
    let mut text = String::new();
    let _ = log.rewind().and_then(|()| log.read_to_string(&mut text));
    Err(StartError::Failed {
        last: text
            .lines()
            .last()
            .map(|line| format!(": {line}"))
            .unwrap_or_default(),
        log: log_path,
    })
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// Waits, not for ever, until nobody else is starting a daemon.
fn take_turn(mut lock: File, path: &Path) -> Result<Flock<File>, StartError> {
    let end = Instant::now() + 2 * PATIENCE;
    loop {
        match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() > end => {
                return Err(StartError::Silent(format!(
                    "another rdsock has been starting one for seconds: is it stopped? (fuser {} tells which it is)",
                    path.display()
                )));
            }
            Err((same, Errno::EWOULDBLOCK | Errno::EINTR)) => lock = same,
            Err((_, error)) => {
                return Err(StartError::Io("can't lock", path.to_owned(), error.into()));
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where the daemon says that it is ready, and the name of that: one that the kernel finds free, which nobody has taken in advance.
fn ready_socket() -> io::Result<(UnixDatagram, OsString)> {
    let ready = UnixDatagram::unbound()?;
    // Whoever knows the name can send there: it is asked who has sent.
    setsockopt(&ready, sockopt::PassCred, &true)?;
    bind(ready.as_raw_fd(), &UnixAddr::new_unnamed())?;
    let address = ready.local_addr()?;
    let mut name = OsString::from("@");
    name.push(OsStr::from_bytes(
        address.as_abstract_name().unwrap_or_default(),
    ));
    Ok((ready, name))
}

/// Starts the daemon as nobody's child in a session of its own, so that the program that this
/// process becomes finds no child that it did not make. Returns where it says that it is ready,
/// and a pipe that ends with it.
fn spawn(program: &Path, socket: &Path, log: File) -> io::Result<(UnixDatagram, PipeReader)> {
    let (ready, name) = ready_socket()?;
    let (alive, held) = io::pipe()?;
    let mut command = Command::new(program);
    command
        .arg("--socket")
        .arg(socket)
        .args(["--idle-exit", IDLE_EXIT])
        .env_remove("LD_PRELOAD")
        .env_remove("RDSOCK_SOCKET")
        .env("NOTIFY_SOCKET", name)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(OwnedFd::from(held))
        .stderr(log);
    // SAFETY: between fork and exec only system calls that are safe after fork.
    unsafe { command.pre_exec(detach) };
    command.spawn()?.wait()?;
    Ok((ready, alive))
}

fn detach() -> io::Result<()> {
    nix::unistd::setsid()?;
    // SAFETY: this process has one thread (it is between fork and exec); the parent ends at once
    // without running anything.
    unsafe {
        match libc::fork() {
            -1 => return Err(io::Error::last_os_error()),
            0 => {}
            _ => libc::_exit(0),
        }
        // The caller's other descriptors (a terminal, a pipe that somebody reads) stay with it.
        libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
    }
    Ok(())
}

fn is_up(ready: &UnixDatagram, alive: &PipeReader) -> bool {
    let end = Instant::now() + PATIENCE;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut fds = [
            PollFd::new(ready.as_fd(), PollFlags::POLLIN),
            PollFd::new(alive.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, timeout) {
            Ok(0) => return false,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(_) => return false,
            Ok(_) => {}
        }
        if fds[0].any().unwrap_or(false) {
            if says_ready(ready) {
                return true;
            }
        } else {
            return false;
        }
        if Instant::now() >= end {
            return false;
        }
    }
}

/// Takes what has come: a process of this user says that it is ready.
fn says_ready(ready: &UnixDatagram) -> bool {
    let mut text = [0; 256];
    let mut room = nix::cmsg_space!(UnixCredentials);
    let mut parts = [IoSliceMut::new(&mut text)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let Ok(message) = recvmsg::<UnixAddr>(ready.as_raw_fd(), &mut parts, Some(&mut room), flags)
    else {
        return false;
    };
    let own = geteuid().as_raw();
    let is_own =
        |part| matches!(part, ControlMessageOwned::ScmCredentials(who) if who.uid() == own);
    let by_us = message.cmsgs().is_ok_and(|mut parts| parts.any(is_own));
    let len = message.bytes;
    by_us && text.get(..len).unwrap_or(&[]).starts_with(b"READY=1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::SocketAddr;

    /// Sends these words there as a user.
    fn send_as(user: libc::uid_t, to: &OsStr, words: &'static str) {
        let name = to.as_bytes().strip_prefix(b"@").unwrap();
        let to = SocketAddr::from_abstract_name(name).unwrap();
        let sent = std::thread::spawn(move || {
            // SAFETY: takes three integers. The call itself, without libc, is this thread's alone.
            let result = unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
            assert_eq!(result, 0);
            let socket = UnixDatagram::unbound().unwrap();
            socket.send_to_addr(words.as_bytes(), &to).unwrap();
        });
        sent.join().unwrap();
    }

    #[test]
    fn nobody_else_says_that_a_daemon_is_up() {
        if !geteuid().is_root() {
            let why = b"SKIPPED, NOTHING WAS CHECKED: only root can be another user\n";
            return io::stderr().write_all(why).unwrap();
        }
        let (ready, name) = ready_socket().unwrap();
        let (alive, held) = io::pipe().unwrap();
        send_as(64021, &name, "READY=1");
        send_as(0, &name, "STATUS=starting");
        drop(held);
        assert!(!is_up(&ready, &alive));
        send_as(64021, &name, "READY=1");
        send_as(0, &name, "READY=1");
        assert!(is_up(&ready, &alive));
    }
}
