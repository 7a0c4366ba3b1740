//! A file of a file system that has stopped answering, as FUSE and network file systems do.
//!
//! The file system is a process that speaks FUSE as far as that file needs it, in a mount namespace of its
//! own. It is killed before the file is closed here, since closing it would wait, too.

use std::fs::File;
use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use memmap2::{MmapOptions, MmapRaw};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::Tenant;
use super::actor::{Actor, Part, listen, say, skipped};

/// What FUSE calls its requests, of those that are answered.
mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
}

/// A file system with one file, until it is told to be silent: then every operation waits for ever.
pub struct FileSystem {
    server: Actor,
    folder: tempfile::TempDir,
}

impl FileSystem {
    /// Its file is a copy of this one, or empty. `None` where there is no FUSE, having said so.
    pub fn start(test: &str, content: Option<&Path>) -> Option<Self> {
        Self::start_with(test, content, false)
    }

    /// The same, and the kernel may keep what is written for a while.
    pub fn start_with(test: &str, content: Option<&Path>, caches: bool) -> Option<Self> {
        if !Path::new("/dev/fuse").exists() {
            skipped("there is no /dev/fuse here");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let server = Actor::start_with(test, "file system", folder.path(), |command| {
            command.env("TENANT_CONTENT", content.unwrap_or(Path::new("/dev/null")));
            if caches {
                command.env(CACHES, "yes");
            }
            // SAFETY: one system call between fork and exec.
            unsafe { command.pre_exec(|| Ok(unshare(CloneFlags::CLONE_NEWNS)?)) };
        });
        server.hear("mounted");
        Some(FileSystem { server, folder })
    }

    /// Where root finds the file.
    pub fn path(&self) -> PathBuf {
        let (pid, folder) = (self.server.pid(), self.folder.path().display());
        format!("/proc/{pid}/root{folder}/file").into()
    }

    /// From now on nothing is answered.
    pub fn silence(&mut self) {
        self.server.say("be silent");
        self.server.hear("silent");
    }

    /// Waits until somebody waits for an answer that does not come.
    pub fn wait_for_somebody(&self) {
        self.server.hear("unanswered");
    }
}

/// An open file on which every operation waits for ever. It has one page, which nobody has read yet.
pub struct SilentFile {
    file: ManuallyDrop<File>,
    system: FileSystem,
}

impl SilentFile {
    /// `None` where there is no FUSE, having said so.
    pub fn open(test: &str) -> Option<Self> {
        Some(Self::open_for(test, |_| ())?.0)
    }

    /// The same, with something done while the file still answers: no process that has it can be started later.
    pub fn open_for<T>(test: &str, before: impl FnOnce(i32) -> T) -> Option<(Self, T)> {
        let page = tempfile::NamedTempFile::new().unwrap();
        page.as_file().write_all(&[7; 4096]).unwrap();
        let mut system = FileSystem::start(test, Some(page.path()))?;
        let file = File::options().read(true).write(true).open(system.path());
        let file = ManuallyDrop::new(file.unwrap());
        let result = before(file.as_raw_fd());
        system.silence();
        Some((SilentFile { file, system }, result))
    }

    /// With its page in a mapping of this process.
    pub fn with_page(test: &str) -> Option<(Self, MmapRaw)> {
        Self::open_for(test, page_of)
    }

    pub fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// Waits until somebody waits for the file.
    pub fn wait_for_somebody(&self) {
        self.system.wait_for_somebody();
    }
}

/// The page of an open [`SilentFile`]: who touches it in this mapping waits.
pub fn page_of(fd: i32) -> MmapRaw {
    MmapOptions::new().len(4096).map_raw(fd).unwrap()
}

impl Drop for SilentFile {
    fn drop(&mut self) {
        self.system.server.kill();
        // SAFETY: it is dropped here only.
        unsafe { ManuallyDrop::drop(&mut self.file) };
    }
}

/// A file of which the kernel has something that its file system never takes: whoever closes one that was opened before waits, though
/// nothing is asked of the file by that.
pub struct UnwrittenFile {
    // Goes first: to close a file of it would wait.
    _system: FileSystem,
    _writer: File,
}

impl UnwrittenFile {
    /// With something done before that, with the path where root finds the file. `None` where there is no FUSE, having said so.
    pub fn open_for<T>(test: &str, before: impl FnOnce(&Path) -> T) -> Option<(Self, T)> {
        let mut system = FileSystem::start_with(test, None, true)?;
        let path = system.path();
        let result = before(&path);
        let mut writer = File::options().read(true).write(true).open(path).unwrap();
        writer.write_all(&[7; 4096]).unwrap();
        system.silence();
        let file = UnwrittenFile {
            _system: system,
            _writer: writer,
        };
        Some((file, result))
    }
}

/// A socket with a file in it that was just opened: who closes the socket last closes the file.
pub fn with_file(path: &Path) -> OwnedFd {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let kind = SockType::Stream;
    let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
    let (ours, theirs) = pair.unwrap();
    Tenant::over(ours).send(b"file", &[file.as_raw_fd()]);
    theirs
}

/// Set where the kernel may keep what is written.
const CACHES: &str = "TENANT_CACHES";

/// The part of the file system: mounts itself, and serves until it is told to be silent.
pub fn be_file_system(part: &Part) {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let device = device.unwrap();
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let options = Some(options.as_str());
    mount(Some("silent"), &part.socket, Some("fuse"), flags, options).unwrap();
    let content = std::fs::read(std::env::var_os("TENANT_CONTENT").unwrap()).unwrap();
    let serving = std::thread::spawn(move || serve(device, &content));
    say("mounted");
    while let Some(line) = listen() {
        if line == "be silent" {
            let mut silent = SILENT.lock().unwrap();
            // Before anything is told that is not answered.
            say("silent");
            *silent = true;
        }
    }
    drop(serving);
    // Not by the way of closing files.
    std::process::abort();
}

static SILENT: Mutex<bool> = Mutex::new(false);

/// Answers requests.
fn serve(mut device: File, content: &[u8]) {
    let mut request = vec![0; 1 << 17];
    while let Ok(length) = device.read(&mut request) {
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        assert!(length >= 40);
        let (what, node) = (word(4), word(16));
        if *SILENT.lock().unwrap() {
            say("unanswered");
            continue;
        }
        let answer = match what {
            opcode::INIT => Ok(init()),
            opcode::LOOKUP => Ok(entry(content.len())),
            opcode::GETATTR => Ok([vec![0; 16], attributes(node, content.len())].concat()),
            opcode::READ => {
                // Offset and size in `fuse_read_in`.
                let (from, size) = (word(48) as usize, word(56) as usize);
                let rest = content.get(from..).unwrap_or_default();
                Ok(rest[..size.min(rest.len())].to_vec())
            }
            opcode::OPEN => Ok(vec![0; 16]),
            opcode::FLUSH => Ok(Vec::new()),
            opcode::FORGET | opcode::INTERRUPT => continue,
            _ => Err(libc::ENOSYS),
        };
        let (error, body) = answer.map_or_else(|error| (-error, Vec::new()), |body| (0, body));
        let mut bytes = Vec::new();
        bytes.extend((16 + body.len() as u32).to_ne_bytes());
        bytes.extend(error.to_ne_bytes());
        bytes.extend(&request[8..16]);
        bytes.extend(body);
        let _ = device.write(&bytes);
    }
}

/// `fuse_init_out` of version 7.31, with a write-back cache at most.
fn init() -> Vec<u8> {
    const WRITE_BACK: u32 = 1 << 16;
    let mut words = [0_u32; 16];
    (words[0], words[1]) = (7, 31);
    if std::env::var_os(CACHES).is_some() {
        words[3] = WRITE_BACK;
    }
    (words[5], words[6]) = (65_536, 1);
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `fuse_entry_out`: node 2, attributes that are asked for each time.
fn entry(size: usize) -> Vec<u8> {
    let words = [2_u64, 1, 1, 0, 0];
    let words = words.iter().flat_map(|word| word.to_ne_bytes());
    words.chain(attributes(2, size)).collect()
}

/// `fuse_attr` of the folder (node 1) or the file.
fn attributes(node: u32, size: usize) -> Vec<u8> {
    let longs = [u64::from(node), size as u64, 8, 0, 0, 0];
    let mode = if node == 1 { 0o040_755 } else { 0o100_777 };
    let words = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0_u32];
    let longs = longs.iter().flat_map(|word| word.to_ne_bytes());
    longs
        .chain(words.iter().flat_map(|word| word.to_ne_bytes()))
        .collect()
}
