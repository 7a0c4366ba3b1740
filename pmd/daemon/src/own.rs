//! What the daemon asks the kernel of its own process: its processor time, its limits, and room for its descriptors.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::time::{ClockId, clock_gettime};

/// What this thread has used of its processor. Unlike the time that passes, it does not grow while
/// busy programs have the processors.
pub fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Has each user a number of its own in the user namespace of this process? Else the kernel calls all those without one by the
/// same number. No, where the kernel does not say.
pub fn all_users_have_numbers() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map");
    map.is_ok_and(|map| is_whole(&map))
}

/// Is this the map of all users to themselves (`user_namespaces(7)`)?
fn is_whole(map: &str) -> bool {
    map.split_ascii_whitespace().eq(["0", "0", "4294967295"])
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

/// Has the kernel make room for so many descriptors. It makes more room when there is none left, and who opens something then waits
/// until each core has been through the scheduler, which takes as long as others keep the cores busy; but not while this process
/// has one thread.
pub fn make_room(descriptors: u64) {
    // Some megabytes of the kernel's memory, of which a process may have very many descriptors.
    const MOST: u64 = 1 << 20;
    let last = descriptors.min(MOST).saturating_sub(1) as RawFd;
    // Where there is no memory for that now, there may be later.
    if let Ok(file) = File::open("/dev/null") {
        drop(fcntl(&file, FcntlArg::F_DUPFD_CLOEXEC(last)).map(|fd| {
            // SAFETY: just made, and owned by nobody else.
            unsafe { OwnedFd::from_raw_fd(fd) }
        }));
    }
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

/// Held by a test that forks, asks who holds a socket, or sees what comes of a close. All tests share one process, and a child that one of them
/// forks holds all descriptors of that process until it calls `exec`.
#[cfg(test)]
pub fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_numbers_where_all_are_mapped() {
        assert!(is_whole("         0          0 4294967295\n"));
        for map in ["", "0 0 65536\n", "0 1000 1\n1 100000 65536\n"] {
            assert!(!is_whole(map), "{map:?}");
        }
    }

    /// The kernel says for how many descriptors there is room.
    #[test]
    fn there_is_room_for_descriptors_before_they_are_needed() {
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        make_room(soft);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let room = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
        let room: u64 = room.unwrap().trim().parse().unwrap();
        assert!(room >= soft.min(1 << 20), "{room} of {soft}");
        // It is nobody's limit.
        make_room(0);
        make_room(u64::MAX);
    }
}
