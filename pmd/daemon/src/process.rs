//! What the kernel says of processes: who they are, whether they live, which socket they hold.
//!
//! What is called *quick* here waits for nobody, whatever the process does, and may be asked on the control thread. All
//! else may wait for the process (one in the middle of `exec` holds a lock that `pidfd_getfd` wants) or do its work
//! (the last to look at a process that ends takes its memory apart; the last to read the link to an executable closes that, which
//! waits for a file system in user space), and is asked in a look. So is whatever has a name in `/proc`: anybody can have the kernel keep
//! the lock of a folder there, for whose names it has to look, for as long as he likes.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, OnceLock};

use crate::sentry::Awaited;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, readlinkat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::{Mode, fstat, fstatat};

/// A process on the other side of a control connection, as the kernel names it. Stays with this very process: when it
/// has ended, nothing here names another one that got its id.
#[derive(Debug)]
pub struct Peer {
    /// Its id in the daemon's pid namespace; 0 when it can't be seen from there.
    pub pid: i32,
    /// Its effective user when it connected.
    pub uid: u32,
    /// Its effective group when it connected.
    pub gid: u32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// Its folder in `/proc`, once a look has opened it.
    folder: OnceLock<OwnedFd>,
}

/// Whose a process is, as its files in `/proc` tell. What gives a process more than it had (a set-id program, file
/// capabilities) shows in one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Owner and group of its files in `/proc`: its effective user and group while it is dumpable, else root. The kernel
    /// takes "dumpable" from a process that gains ids or capabilities by `exec`, or asks for that.
    pub owner: (u32, u32),
    /// Inode of its user namespace.
    pub user_namespace: u64,
}

/// Whose a process is, as the kernel tells without a look at its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// As in [`Identity`].
    pub users: [u32; 4],
    /// As in [`Identity`].
    pub groups: [u32; 4],
    /// As in [`Identity`].
    pub capabilities: [u64; 3],
}

/// Who a process is, at a glance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glance {
    /// Whose it is.
    pub standing: Standing,
    /// Path of its executable, with " (deleted)" behind one that is no more.
    pub executable: OsString,
}

/// Who a process is, in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// What can be seen at a glance.
    pub glance: Glance,
    /// Real, effective, saved and file system user.
    pub users: [u32; 4],
    /// Likewise its groups.
    pub groups: [u32; 4],
    /// The further groups, each once, in order: there may be 65,536.
    pub further_groups: Vec<u32>,
    /// Inheritable, permitted and effective capabilities. (Ambient ones are among these.)
    pub capabilities: [u64; 3],
}

impl Identity {
    /// May the process give itself further groups?
    fn may_join_groups(&self) -> bool {
        const CAP_SETGID: u64 = 1 << 6;
        self.capabilities.iter().any(|set| set & CAP_SETGID != 0)
    }
}

/// Bytes of `/proc/PID/status` that are read at once: a page, which the kernel fills in one go if the text fits.
const STATUS: usize = 4096;

impl Peer {
    /// Who made the other end of `socket`. Fails when that process has ended. Quick.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        let pid = credentials.pid();
        let pidfd = match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(pidfd) => pidfd,
            // Before Linux 6.5. The id could have been used again before the pidfd was opened;
            // then the socket's maker is gone and the socket, unless inherited, hung up: the
            // event loop sees that before it believes any message.
            Err(Errno::ENOPROTOOPT) => pidfd_open(pid)?,
            Err(error) => return Err(error.into()),
        };
        let peer = Peer {
            pid,
            uid: credentials.uid(),
            gid: credentials.gid(),
            pidfd,
            folder: OnceLock::new(),
        };
        match peer.is_alive() {
            true => Ok(peer),
            false => Err(Errno::ESRCH.into()),
        }
    }

    /// True while the process runs. Quick.
    pub fn is_alive(&self) -> bool {
        is_alive(&self.pidfd)
    }

    /// Its folder in `/proc`. May wait.
    fn folder(&self) -> io::Result<&OwnedFd> {
        if let Some(folder) = self.folder.get() {
            return Ok(folder);
        }
        if self.pid == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let folder = open(format!("/proc/{}", self.pid).as_str(), flags, Mode::empty())?;
        // While it lives, its id has named nobody else.
        match self.is_alive() {
            true => Ok(self.folder.get_or_init(|| folder)),
            false => Err(Errno::ESRCH.into()),
        }
    }

    /// What `/proc/PID/status` says. One read gets all of it, unless the process has hundreds of groups.
    fn status(&self) -> io::Result<String> {
        use std::io::Read;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let mut file = File::from(openat(self.folder()?, "status", flags, Mode::empty())?);
        let mut text = vec![0; STATUS];
        let length = loop {
            match file.read(&mut text) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        text.truncate(length);
        if length == STATUS {
            file.read_to_end(&mut text)?;
        }
        String::from_utf8(text).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// Whose it is now, as its pidfd tells; `None` where the kernel does not (before Linux 6.13), and where this process may not know. Quick.
    pub fn credentials(&self) -> Option<Credentials> {
        let [users, groups] = ids(&self.pidfd)?;
        Some(Credentials {
            users,
            groups,
            capabilities: capabilities(self.pid)?,
        })
    }

    /// Inode of its network namespace. May wait.
    pub fn netns(&self) -> io::Result<u64> {
        let link = readlinkat(self.folder()?, "ns/net")?;
        namespace_in(&link, "net")
    }

    /// Whose it is now, as its files in `/proc` tell. May wait.
    pub fn standing(&self) -> io::Result<Standing> {
        let folder = self.folder()?;
        Ok(Standing {
            owner: owner(folder)?,
            user_namespace: user_namespace(folder)?,
        })
    }

    /// Who it is now. May wait.
    pub fn glance(&self) -> io::Result<Glance> {
        Ok(Glance {
            standing: self.standing()?,
            executable: readlinkat(self.folder()?, "exe")?,
        })
    }

    /// Who it is now, in full.
    pub fn identity(&self) -> io::Result<Identity> {
        let glance = self.glance()?;
        let rights = parse_rights(&self.status()?, glance);
        rights.ok_or(io::ErrorKind::InvalidData.into())
    }

    /// Who it is now, in full, where it was `before`: but for its program, of which the caller asks by its mappings. Nobody
    /// without the capability to join groups has joined one, and newer kernels tell the rest without a text that costs
    /// more than all else in a look.
    pub fn identity_since(&self, before: &Identity) -> io::Result<Identity> {
        if before.may_join_groups() {
            return self.identity();
        }
        let (Some([users, groups]), Some(capabilities)) =
            (ids(&self.pidfd), capabilities(self.pid))
        else {
            return self.identity();
        };
        let glance = Glance {
            standing: self.standing()?,
            executable: before.glance.executable.clone(),
        };
        Ok(Identity {
            glance,
            users,
            groups,
            further_groups: before.further_groups.clone(),
            capabilities,
        })
    }

    /// Where it has mapped a file; `None` where it has not. It is the program that it runs now which has: `exec` takes
    /// all mappings away.
    pub fn maps(&self, file: FileId) -> io::Result<Option<u64>> {
        use std::io::{BufRead, BufReader};
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let maps = openat(self.folder()?, "maps", flags, Mode::empty())?;
        for line in BufReader::new(File::from(maps)).split(b'\n') {
            if let Some((address, id)) = parse_mapping(&line?)
                && id == file
            {
                return Ok(Some(address));
            }
        }
        Ok(None)
    }

    /// Where it has mapped a file, which it says is this address; `None` where it has not.
    pub fn maps_at(&self, file: FileId, address: u64) -> io::Result<Option<u64>> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let maps = openat(self.folder()?, "maps", flags, Mode::empty())?;
        match mapping_at(&maps, address) {
            // Before Linux 6.11.
            Err(Errno::ENOTTY | Errno::ENOSYS) => self.maps(file),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error.into()),
            Ok(id) => Ok((id == file).then_some(address)),
        }
    }

    /// Whether it has mapped a file still, at an address where it had.
    pub fn still_maps(&self, file: FileId, address: u64) -> io::Result<bool> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let maps = openat(self.folder()?, "maps", flags, Mode::empty())?;
        match mapping_at(&maps, address) {
            // Before Linux 6.11.
            Err(Errno::ENOTTY | Errno::ENOSYS) => Ok(self.maps(file)? == Some(address)),
            Err(Errno::ENOENT) => Ok(false),
            Err(error) => Err(error.into()),
            Ok(id) => Ok(id == file),
        }
    }

    /// A duplicate of its descriptor `fd`. Where this process may not have one (Yama, a daemon without privilege),
    /// `EPERM`; where the kernel or a filter does not know the call, `ENOSYS`.
    pub fn duplicate(&self, fd: i32) -> io::Result<OwnedFd> {
        duplicate(&self.pidfd, fd)
    }

    /// Inode of the socket that it holds as `fd`; `None` when it holds none there, or may not be looked at. May wait.
    /// Inodes of sockets have 32 bits: another socket gets the same one after some hours of work.
    pub fn socket_inode(&self, fd: i32) -> Option<u64> {
        let link = readlinkat(self.folder().ok()?, format!("fd/{fd}").as_str()).ok()?;
        parse_socket(link.to_str()?)
    }

    /// What it is called. May wait.
    pub fn program(&self) -> Program {
        Program::of(self.pid)
    }
}

/// That it ends.
impl Awaited for Arc<Peer> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Which file something is: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: (u64, u64),
    inode: u64,
}

impl FileId {
    /// Of an open file.
    pub fn of(file: &impl AsFd) -> io::Result<Self> {
        let stat = fstat(file)?;
        let (major, minor) = (libc::major(stat.st_dev), libc::minor(stat.st_dev));
        Ok(FileId {
            device: (major.into(), minor.into()),
            inode: stat.st_ino,
        })
    }
}

/// A line of `/proc/PID/maps`: start-end, permissions, offset, device, inode, path.
fn parse_mapping(line: &[u8]) -> Option<(u64, FileId)> {
    let line = std::str::from_utf8(line.get(..line.len().min(100))?).ok()?;
    let mut words = line.split_ascii_whitespace();
    let hex = |word: &str| u64::from_str_radix(word, 16).ok();
    let address = hex(words.next()?.split('-').next()?)?;
    let (major, minor) = words.nth(2)?.split_once(':')?;
    let id = FileId {
        device: (hex(major)?, hex(minor)?),
        inode: words.next()?.parse().ok()?,
    };
    Some((address, id))
}

/// Asks which file is mapped at an address (`include/uapi/linux/fs.h`).
pub const PROCMAP_QUERY: u64 = nix::request_code_readwrite!(b'f', 17, size_of::<ProcmapQuery>());

#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    major: u32,
    minor: u32,
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

const _: () = assert!(size_of::<ProcmapQuery>() == 104);

/// The file that is mapped at an address.
fn mapping_at(maps: &OwnedFd, address: u64) -> nix::Result<FileId> {
    let mut asked = ProcmapQuery {
        size: size_of::<ProcmapQuery>() as u64,
        address,
        ..ProcmapQuery::default()
    };
    // SAFETY: the argument is the structure that the call reads and writes, with its size in front.
    let result = unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY as _, &raw mut asked) };
    Errno::result(result)?;
    Ok(FileId {
        device: (asked.major.into(), asked.minor.into()),
        inode: asked.inode,
    })
}

/// Asks who a process is (`include/uapi/linux/pidfd.h`).
pub const PIDFD_GET_INFO: u64 = nix::request_code_readwrite!(0xff, 11, size_of::<PidfdInfo>());

/// A pidfd of a thread (`include/uapi/linux/pidfd.h`).
const PIDFD_THREAD: i32 = libc::O_EXCL;

/// As in Linux 6.13. Later kernels take it, too.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    /// The process, its thread group, its parent.
    ids: [u32; 3],
    /// User and group in turn: real, effective, saved, file system.
    owners: [u32; 8],
    exit_code: i32,
}

const _: () = assert!(size_of::<PidfdInfo>() == 64);

/// Real, effective, saved and file system user of a process, and likewise its groups; `None` before Linux 6.13, and where
/// the process has ended.
fn ids(pidfd: &OwnedFd) -> Option<[[u32; 4]; 2]> {
    /// `PIDFD_INFO_CREDS`.
    const OWNERS: u64 = 1 << 1;
    let mut asked = PidfdInfo {
        mask: OWNERS,
        ..PidfdInfo::default()
    };
    // SAFETY: the argument is the structure that the call reads and writes; its size is in the request.
    let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO as _, &raw mut asked) };
    if result != 0 || asked.mask & OWNERS == 0 {
        return None;
    }
    let [ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid] = asked.owners;
    Some([[ruid, euid, suid, fsuid], [rgid, egid, sgid, fsgid]])
}

/// Inheritable, permitted and effective capabilities of a process (`include/uapi/linux/capability.h`).
fn capabilities(pid: i32) -> Option<[u64; 3]> {
    /// `_LINUX_CAPABILITY_VERSION_3`: two words for each set.
    const VERSION: u32 = 0x2008_0522;
    if pid == 0 {
        // It would be taken for this process.
        return None;
    }
    let mut header = [VERSION, pid as u32];
    // Effective, permitted, inheritable: the lower words, then the upper ones.
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: the call reads and writes a header of two words and, of this version, six further words.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, &raw mut sets) };
    let [lower, upper] = sets;
    let join = |lower: u32, upper: u32| u64::from(upper) << 32 | u64::from(lower);
    let [effective, permitted, inheritable] = [0, 1, 2].map(|at| join(lower[at], upper[at]));
    (result == 0).then_some([inheritable, permitted, effective])
}

/// A duplicate of what another process, or a thread of it, has open as `fd`. Errors as for [`Peer::duplicate`].
pub(crate) fn duplicate(pidfd: &OwnedFd, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes three integers, returns a new fd or -1.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
}

fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers, returns a new fd or -1.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A pidfd of one thread, also of one whose process has no first thread any more. `EINVAL` before Linux 6.9.
pub(crate) fn pidfd_of_thread(tid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers, returns a new fd or -1.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, tid, PIDFD_THREAD) })
}

/// What a system call that makes a descriptor has returned.
fn owned(fd: i64) -> io::Result<OwnedFd> {
    match fd {
        0.. => {
            // SAFETY: the system call made it just now, and nothing else owns it.
            Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_alive(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    // A pidfd is readable once the process has ended. A porter that carries a load is interrupted now and then.
    loop {
        match poll(&mut fds, PollTimeout::ZERO) {
            Err(Errno::EINTR) => {}
            result => return result == Ok(0),
        }
    }
}

pub(crate) fn parse_socket(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

/// The lines of `/proc/PID/status` about rights, in one pass: it has many others.
fn parse_rights(status: &str, glance: Glance) -> Option<Identity> {
    fn numbers(words: &str) -> Option<Vec<u32>> {
        let words = words.split_ascii_whitespace();
        words.map(|word| word.parse().ok()).collect()
    }
    let hex = |words: &str| u64::from_str_radix(words.trim(), 16).ok();
    let (mut users, mut groups, mut further_groups) = (None, None, None);
    let mut capabilities = [None; 3];
    let names = ["CapInh", "CapPrm", "CapEff"];
    for line in status.split('\n') {
        // All are among the names with one of these letters.
        if !line.starts_with(['U', 'G', 'C']) {
            continue;
        }
        let (name, words) = line.split_once(':')?;
        match name {
            "Uid" => users = numbers(words)?.try_into().ok(),
            "Gid" => groups = numbers(words)?.try_into().ok(),
            "Groups" => further_groups = numbers(words),
            _ => {
                let place = names.iter().position(|known| *known == name);
                if let Some(place) = place.and_then(|at| capabilities.get_mut(at)) {
                    *place = hex(words);
                }
            }
        }
    }
    let [inheritable, permitted, effective] = capabilities;
    let mut further_groups: Vec<u32> = further_groups?;
    further_groups.sort_unstable();
    further_groups.dedup();
    Some(Identity {
        glance,
        users: users?,
        groups: groups?,
        further_groups,
        capabilities: [inheritable?, permitted?, effective?],
    })
}

/// Owner and group of a process's files in `/proc`.
fn owner(folder: &OwnedFd) -> io::Result<(u32, u32)> {
    // Its folder itself always belongs to its effective user.
    let shown = fstatat(folder, "environ", AtFlags::empty())?;
    Ok((shown.st_uid, shown.st_gid))
}

/// Inode of a process's user namespace.
fn user_namespace(folder: &OwnedFd) -> io::Result<u64> {
    namespace_in(&readlinkat(folder, "ns/user")?, "user")
}

/// Inode of a namespace, from the link to it. To look at what it leads to takes many times longer, and an `ioctl` that asks a pidfd for
/// it may be the last to hold all the process's namespaces, and takes their mounts apart.
fn namespace_in(link: &OsStr, kind: &str) -> io::Result<u64> {
    let number = |link: &str| {
        let rest = link.strip_prefix(kind)?.strip_prefix(":[")?;
        rest.strip_suffix(']')?.parse().ok()
    };
    let inode = link.to_str().and_then(number);
    inode.ok_or(io::ErrorKind::InvalidData.into())
}

/// Inode of a process's network namespace. May wait.
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

#[cfg(test)]
mod tests;
