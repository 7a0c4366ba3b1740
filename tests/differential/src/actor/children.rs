//! Steps of the main thread that make and end processes: `fork NAME`, `clone NAME`, `bare NAME` (`_Fork`), `vfork NAME` and
//! `spawn NAME` (which start a program), `exec`, `exit`, `reap`; and `wipe`, which leaves nothing of a program.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use libc::{c_char, c_int, pid_t};
use nix::errno::Errno;

use super::transfer::result;
use super::{Answer, Line, Scene, enter};

unsafe extern "C" {
    /// `_Fork` of libc, which runs no handlers.
    fn _Fork() -> pid_t;
    static environ: *const *const c_char;
}

/// What a program is started with: this program again, under a name, with the descriptors that stay open.
struct Start {
    path: CString,
    words: Vec<CString>,
}

impl Start {
    fn new(scene: &Scene, name: &str) -> Option<Self> {
        let path = std::env::current_exe().ok()?;
        let path = CString::new(path.as_os_str().as_bytes()).ok()?;
        let kept = scene.names().into_iter().filter(|(_, fd)| stays_open(*fd));
        let kept = kept.map(|(name, fd)| format!("{name}={fd}").into_bytes());
        let first = [
            b"actor".to_vec(),
            scene.path.as_os_str().as_bytes().to_vec(),
            name.into(),
        ];
        let words = first.into_iter().chain(kept).map(CString::new);
        Some(Start {
            path,
            words: words.collect::<Result<_, _>>().ok()?,
        })
    }

    /// Pointers to the words, and null.
    fn list(&self) -> Vec<*const c_char> {
        let words = self.words.iter().map(|word| word.as_ptr());
        words.chain([std::ptr::null()]).collect()
    }
}

fn stays_open(fd: RawFd) -> bool {
    // SAFETY: flags alone.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    flags >= 0 && flags & libc::FD_CLOEXEC == 0
}

/// A child that goes on as a process of the program, by the call that the step names.
fn fork(scene: &Arc<Scene>, line: &Line) -> Answer {
    // SAFETY: the child goes on in this thread alone, with what it has copied: the other threads of this process wait for
    // steps, and hold no lock.
    let child = unsafe {
        match line.word(0) {
            "clone" => libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as pid_t,
            "bare" => _Fork(),
            _ => libc::fork(),
        }
    };
    if child != 0 {
        return result(child as isize).map(|child| child.to_string());
    }
    let mut fds: BTreeMap<String, RawFd> = scene.names().into_iter().collect();
    // SAFETY: the parent's conversation and its listener are no business of the child's, which knows no other names for them.
    unsafe {
        libc::close(scene.control.as_raw_fd());
        libc::close(fds.remove("listener").unwrap_or(-1));
    }
    enter(scene.path.clone(), line.word(1), fds);
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

extern "C" fn become_program(start: *mut c_void) -> c_int {
    // SAFETY: the pointer is to the two that `vfork` has made, which wait there; nothing but exec is called.
    unsafe {
        let (path, words) = *start.cast::<(*const c_char, *const *const c_char)>();
        libc::execve(path, words, environ);
        libc::_exit(127)
    }
}

/// A child that shares memory until it starts a program.
fn vfork(scene: &Scene, line: &Line) -> Answer {
    let start = Start::new(scene, line.word(1)).ok_or(Errno::EINVAL)?;
    let words = start.list();
    let mut given = (start.path.as_ptr(), words.as_ptr());
    if line.word(0) == "spawn" {
        let (mut child, none) = (0, std::ptr::null());
        // SAFETY: all words live until the call returns.
        let error = unsafe {
            let words = words.as_ptr().cast();
            libc::posix_spawn(
                &mut child,
                given.0,
                none,
                none.cast(),
                words,
                environ.cast(),
            )
        };
        return match error {
            0 => Ok(child.to_string()),
            error => Err(Errno::from_raw(error)),
        };
    }
    let mut stack = vec![0_u128; 4096];
    // SAFETY: the stack and the words live until the call returns, which is when the child has its program.
    let child = unsafe {
        let top = stack.as_mut_ptr().add(stack.len()).cast();
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        libc::clone(become_program, top, flags, (&raw mut given).cast())
    };
    result(child as isize).map(|child| child.to_string())
}

/// Starts the program again in this process.
fn exec(scene: &Scene, line: &Line) -> Answer {
    let start = Start::new(scene, line.word(1)).ok_or(Errno::EINVAL)?;
    let words = start.list();
    // SAFETY: all words live; the call returns only when it failed.
    unsafe { libc::execv(start.path.as_ptr(), words.as_ptr()) };
    Err(Errno::last())
}

/// Waits until all children have ended.
fn reap() -> Answer {
    let mut count = 0;
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } > 0 {
        count += 1;
    }
    Ok(count.to_string())
}

/// Closes all that the program has opened; what is open then: descriptors with low numbers, those with high ones (which the
/// shim has), streams that are mapped.
fn wipe(scene: &Scene) -> Answer {
    for (name, _) in scene.names().iter().filter(|(name, _)| name != "listener") {
        let fd = scene.forget(name);
        // SAFETY: a descriptor of the program's.
        unsafe { libc::close(fd) };
    }
    let all = std::fs::read_dir("/proc/self/fd").map_err(|_| Errno::ENOENT)?;
    let numbers = all
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let (low, high): (Vec<u32>, Vec<u32>) = numbers.partition(|number| *number < 400);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let streams = maps
        .lines()
        .filter(|line| line.contains("rdsock-stream"))
        .count();
    Ok(format!(
        "low={} high={} streams={streams}",
        low.len(),
        high.len()
    ))
}

/// The steps of this module.
pub fn act(scene: &Arc<Scene>, line: &Line) -> Option<String> {
    let answer = match line.word(0) {
        "fork" | "clone" | "bare" => fork(scene, line),
        "vfork" | "spawn" => vfork(scene, line),
        "exec" => exec(scene, line),
        "reap" => reap(),
        "wipe" => wipe(scene),
        // SAFETY: ends the process.
        "exit" => unsafe { libc::_exit(0) },
        // SAFETY: as well.
        "end" => std::process::exit(0),
        "nap" => {
            super::raw::nap(line.number(1) as u64);
            Ok("ok".to_owned())
        }
        _ => return None,
    };
    Some(answer.unwrap_or_else(|error| format!("{error:?}")))
}
