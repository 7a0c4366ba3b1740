//! Other processes: whether they run, and what they have open. A stream's end is held by several, which may end without a word.

use super::{
    call, close, decimal, each_number, is_missing, list, open_folder, open_read, poll_one, pread,
    stat_of,
};
use libc::c_int;
use std::ffi::CStr;

/// A path below `/proc/PID`.
struct Path([u8; 40]);

impl Path {
    fn of(pid: u32, name: &str) -> Self {
        let (mut path, mut digits) = ([0_u8; 40], [0; 10]);
        let parts = ["/proc/", decimal(pid, &mut digits), name];
        let bytes = parts.iter().flat_map(|part| part.bytes());
        // The last byte stays 0.
        for (to, from) in path.iter_mut().take(39).zip(bytes) {
            *to = from;
        }
        Path(path)
    }

    fn name(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

/// True while a process runs; one that has ended but was not waited for does not.
pub fn is_alive(pid: u32) -> bool {
    let fd = syscall!(SYS_pidfd_open, pid, 0);
    if fd < 0 && is_missing(fd as c_int) {
        return is_listed_alive(pid);
    }
    if fd < 0 {
        return fd != -(libc::ESRCH as isize);
    }
    let ended = poll_one(fd as c_int, libc::POLLIN, 0) > 0;
    close(fd as c_int);
    !ended
}

/// As [`is_alive`], by what /proc says: for kernels before 5.3, and filters that know no pidfd. In doubt it runs.
fn is_listed_alive(pid: u32) -> bool {
    if syscall!(SYS_kill, pid, 0) == -(libc::ESRCH as isize) {
        return false;
    }
    let fd = open_read(Path::of(pid, "/stat").name().as_ptr()) as c_int;
    if fd < 0 {
        return true;
    }
    let mut text = [0_u8; 128];
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { pread(fd, text.as_mut_ptr(), text.len(), None) };
    close(fd);
    // "PID (NAME) STATE …", where the name may hold anything.
    let text = text.get(..got.max(0) as usize).unwrap_or_default();
    let end = text
        .iter()
        .rposition(|byte| *byte == b')')
        .unwrap_or(text.len());
    !matches!(text.get(end + 2), Some(b'Z' | b'X'))
}

/// False where a process is known not to have open what `fd` is a descriptor of. In doubt it has.
pub fn may_have_open(pid: u32, fd: c_int) -> bool {
    let Some(wanted) = stat_of(fd) else {
        return true;
    };
    let folder = open_folder(Path::of(pid, "/fd").name()) as c_int;
    if folder < 0 {
        return true;
    }
    let mut is_known = false;
    let mut found = false;
    let mut part = [0_u64; 256];
    loop {
        let got = list(folder, &mut part);
        if got <= 0 {
            is_known |= got == 0;
            break;
        }
        each_number(&part, got as usize, |number| {
            let mut digits = [0; 10];
            let name = decimal(number as u32, &mut digits);
            match stat_below(folder, name) {
                Ok(stat) => found |= is_same(&stat, &wanted),
                // It was closed since the list was made; or nobody may look.
                Err(error) => found |= error != libc::ENOENT,
            }
        });
    }
    close(folder);
    found || !is_known
}

fn is_same(one: &libc::stat, other: &libc::stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

/// What the kernel says of the file that an entry of a folder leads to, or an error number.
fn stat_below(folder: c_int, name: &str) -> Result<libc::stat, c_int> {
    let mut text = [0_u8; 16];
    for (to, from) in text.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    match syscall!(SYS_newfstatat, folder, text.as_ptr(), stat.as_mut_ptr(), 0) {
        // SAFETY: zeroed, and made of integers.
        0 => Ok(unsafe { stat.assume_init() }),
        error => Err(-error as c_int),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_is_asked_what_it_has_open() {
        let (given, kept) = UnixStream::pair().unwrap();
        let mut child = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(
                given.try_clone().unwrap(),
            )))
            .spawn()
            .unwrap();
        let pid = child.id();
        // `spawn` has come back behind the exec.
        assert!(may_have_open(pid, given.as_raw_fd()));
        assert!(!may_have_open(pid, kept.as_raw_fd()));
        assert!(is_alive(pid));
        assert!(may_have_open(pid, -1), "in doubt");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_alive(pid));
        assert!(may_have_open(pid, given.as_raw_fd()), "in doubt");
    }
}
