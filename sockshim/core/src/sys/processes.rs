//! Other processes: whether they run, and what they have open. A stream's end is held by several, which may end without a word.

use super::{
    call, close, decimal, each_number, effective_ids, is_missing, list, open_folder, open_read,
    poll_one, pread, stat_at, stat_of,
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

/// False where a process is known not to have the socket open that `fd` is a descriptor of. In doubt it has. Only what waits for nobody is asked:
/// whose process it is may be a lie, and what others have open may be files that do not answer. Another user can have the folders of
/// his process locked.
pub fn may_have_open(pid: u32, fd: c_int) -> bool {
    let Some(wanted) = stat_of(fd).and_then(|stat| Link::of(&stat)) else {
        return true;
    };
    // SAFETY: a C string.
    let process = unsafe { stat_at(Path::of(pid, "").name().as_ptr()) };
    if process.is_none_or(|process| process.st_uid != effective_ids()[0]) {
        return true;
    }
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
            match Link::below(folder, name) {
                Ok(link) => found |= link == wanted,
                // It was closed since the list was made; or nobody may look.
                Err(error) => found |= error != libc::ENOENT,
            }
        });
    }
    close(folder);
    found || !is_known
}

/// The text of a link to what is open, as far as it tells one socket from another.
#[derive(PartialEq, Eq)]
struct Link([u8; 24]);

impl Link {
    /// To this socket; `None` where it is none.
    fn of(stat: &libc::stat) -> Option<Self> {
        let inode = u32::try_from(stat.st_ino).ok()?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFSOCK {
            return None;
        }
        let (mut text, mut digits) = ([0; 24], [0; 10]);
        let parts = ["socket:[", decimal(inode, &mut digits), "]"];
        let bytes = parts.iter().flat_map(|part| part.bytes());
        for (to, from) in text.iter_mut().zip(bytes) {
            *to = from;
        }
        Some(Link(text))
    }

    /// Of an entry of a folder, or an error number. That the file is asked for nothing is why it is the text that is looked at.
    fn below(folder: c_int, name: &str) -> Result<Self, c_int> {
        let mut path = [0_u8; 16];
        for (to, from) in path.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        let mut text = [0; 24];
        let room = text.len();
        match syscall!(
            SYS_readlinkat,
            folder,
            path.as_ptr(),
            text.as_mut_ptr(),
            room
        ) {
            error @ ..0 => Err(-error as c_int),
            _ => Ok(Link(text)),
        }
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
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(may_have_open(pid, file.as_raw_fd()), "in doubt");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_alive(pid));
        assert!(may_have_open(pid, given.as_raw_fd()), "in doubt");
    }

    /// Its folders may be locked, for as long as it likes.
    #[test]
    fn a_process_of_another_user_is_asked_nothing() {
        use std::os::unix::process::CommandExt;
        let (kept, _other) = UnixStream::pair().unwrap();
        let mut sleeper = Command::new("sleep");
        let Ok(mut child) = sleeper.arg("60").uid(64_001).spawn() else {
            return eprintln!("SKIPPED, NOTHING WAS CHECKED: needs root");
        };
        assert!(may_have_open(child.id(), kept.as_raw_fd()), "in doubt");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
