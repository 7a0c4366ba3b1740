//! Finds a program, and tells whether the dynamic loader will load the shim into it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use elf::file::Class;
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access, getegid, geteuid};

use super::image::{self, Image};

/// The file that a command's name means, found as a shell does.
pub fn resolve(name: &OsStr) -> Result<PathBuf, Errno> {
    if name.is_empty() {
        return Err(Errno::ENOENT);
    }
    if name.as_bytes().contains(&b'/') {
        return executable(Path::new(name)).map(|()| name.into());
    }
    let paths = std::env::var_os("PATH").unwrap_or("/bin:/usr/bin".into());
    let mut failure = Errno::ENOENT;
    for dir in std::env::split_paths(&paths) {
        let path = dir.join(name);
        match executable(&path) {
            Ok(()) => return Ok(path),
            Err(Errno::EACCES) => failure = Errno::EACCES,
            Err(_) => {}
        }
    }
    Err(failure)
}

fn executable(path: &Path) -> Result<(), Errno> {
    access(path, AccessFlags::F_OK)?;
    if path.is_dir() {
        return Err(Errno::EACCES);
    }
    access(path, AccessFlags::X_OK)
}

/// Whether a program loads preloaded libraries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loads {
    /// It does.
    Yes,
    /// It does not, for this reason.
    No(&'static str),
    /// That can't be seen.
    Unknown,
}

/// Why a program of another libc loads the shim, and gets nothing from it.
pub const OTHER_LIBC: &str = "is made for another C library than glibc";

/// Looks at a program's file; at its interpreter's for a script.
pub fn loads_libraries(path: &Path) -> Loads {
    looks(path, 4)
}

/// Looks at the file of a program that runs: that is no script. A process can have another file shown in its place, and what that names is
/// not to be opened by who looks.
pub fn has_loaded_libraries(pid: i32) -> Loads {
    looks(&PathBuf::from(format!("/proc/{pid}/exe")), 0)
}

fn looks(path: &Path, depth: u32) -> Loads {
    let Some(mut file) = image::open(path) else {
        return Loads::Unknown;
    };
    if let Some(interpreter) = interpreter(&mut file) {
        // A script's own set-user-id bits count for nothing.
        return match depth {
            0 => Loads::Unknown,
            _ => looks(Path::new(&interpreter), depth - 1),
        };
    }
    if gains_rights(path) {
        return Loads::No("is set-user-id, set-group-id or has capabilities");
    }
    let Some(image) = Image::of(&file) else {
        return Loads::Unknown;
    };
    if image.class != Class::ELF64 {
        return Loads::No("is a 32-bit program");
    }
    match image.loader {
        None => Loads::No("is statically linked"),
        Some(name) if is_glibcs_loader(&name) => Loads::Yes,
        Some(_) => Loads::No(OTHER_LIBC),
    }
}

/// Whether this is the loader of glibc, by its name: `/lib64/ld-linux-x86-64.so.2`, or as it is called elsewhere.
fn is_glibcs_loader(path: &[u8]) -> bool {
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    name.starts_with(b"ld-linux") || name.starts_with(b"ld-2.")
}

/// The program that a script's first line names.
fn interpreter(file: &mut File) -> Option<String> {
    use std::io::{Seek, SeekFrom};
    let mut start = [0; 256];
    let len = file.read(&mut start).ok()?;
    file.seek(SeekFrom::Start(0)).ok()?;
    let line = start.get(..len)?.strip_prefix(b"#!")?;
    let line = line.split(|byte| *byte == b'\n').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split_whitespace();
    let interpreter = words.next()?;
    if !interpreter.ends_with("/env") {
        return Some(interpreter.to_owned());
    }
    let name = words.find(|word| !word.starts_with('-') && !word.contains('='))?;
    Some(resolve(OsStr::new(name)).ok()?.to_str()?.to_owned())
}

/// Does executing this file give rights that the caller lacks, so that the loader ignores
/// LD_PRELOAD?
fn gains_rights(path: &Path) -> bool {
    let Ok(meta) = std::fs::metadata(path) else {
        return false;
    };
    let user = meta.mode() & libc::S_ISUID != 0 && meta.uid() != geteuid().as_raw();
    let group = meta.mode() & (libc::S_ISGID | libc::S_IXGRP) == libc::S_ISGID | libc::S_IXGRP
        && meta.gid() != getegid().as_raw();
    user || group || (has_capabilities(path) && !geteuid().is_root())
}

fn has_capabilities(path: &Path) -> bool {
    let Ok(path) = std::ffi::CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    let name = c"security.capability".as_ptr();
    // SAFETY: two strings that end in 0; a size of 0 asks for the length only.
    unsafe { libc::getxattr(path.as_ptr(), name, std::ptr::null_mut(), 0) > 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use elf::abi::PT_INTERP;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn names_are_found_as_in_a_shell() {
        assert!(resolve(OsStr::new("sh")).is_ok());
        assert_eq!(
            resolve(OsStr::new("no-such-program-here")),
            Err(Errno::ENOENT)
        );
        assert_eq!(resolve(OsStr::new("/no/such/program")), Err(Errno::ENOENT));
        assert_eq!(resolve(OsStr::new("/etc/passwd")), Err(Errno::EACCES));
        assert_eq!(resolve(OsStr::new("/")), Err(Errno::EACCES));
    }

    #[test]
    fn scripts_are_followed_to_their_interpreter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("script");
        let mut file = File::create(&path).unwrap();
        file.write_all(b"#!/usr/bin/env -S sh -x\n").unwrap();
        assert_eq!(loads_libraries(&path), Loads::Yes);
        let set_user = std::fs::Permissions::from_mode(0o4755);
        std::fs::set_permissions(&path, set_user).unwrap();
        assert_eq!(loads_libraries(&path), Loads::Yes);
    }

    /// What a program's file says is its owner's word, and `rdsock why` looks at those of all users.
    #[test]
    fn no_file_has_much_memory_taken() {
        let dir = tempfile::tempdir().unwrap();
        let elf = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = std::fs::read("/proc/self/exe").unwrap();
            change(&mut bytes);
            let path = dir.path().join(name);
            let mut file = File::create(&path).unwrap();
            file.write_all(&bytes).unwrap();
            // Of which nothing is written.
            file.set_len(1 << 42).unwrap();
            path
        };
        const SECTIONS: usize = 64;
        // Section headers behind the file's header: the first says how many there are. The system does not look there.
        let many_sections = elf("sections", &|bytes| {
            bytes[40..48].copy_from_slice(&(SECTIONS as u64 + 4096).to_ne_bytes());
            bytes[60..62].copy_from_slice(&[0, 0]);
            let size = SECTIONS + 4096 + 32;
            bytes[size..size + 8].copy_from_slice(&(1_u64 << 34).to_ne_bytes());
        });
        assert_eq!(loads_libraries(&many_sections), Loads::Yes);
        let many_segments = elf("segments", &|bytes| {
            bytes[40..48].copy_from_slice(&(SECTIONS as u64 + 4096).to_ne_bytes());
            bytes[56..58].copy_from_slice(&[0xff, 0xff]);
            let count = SECTIONS + 4096 + 44;
            bytes[count..count + 4].copy_from_slice(&u32::MAX.to_ne_bytes());
        });
        assert_eq!(loads_libraries(&many_segments), Loads::Unknown);
        let long_name = elf("name", &|bytes| {
            let headers = SECTIONS..SECTIONS + 56 * usize::from(bytes[56]);
            for header in headers.step_by(56) {
                if bytes[header..header + 4] == PT_INTERP.to_ne_bytes() {
                    bytes[header + 32..header + 40].copy_from_slice(&(1_u64 << 41).to_ne_bytes());
                }
            }
        });
        assert_eq!(loads_libraries(&long_name), Loads::Unknown);
    }

    /// To open something else may wait, or do something: a FIFO, a device.
    #[test]
    fn only_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let script = dir.path().join("script");
        std::fs::write(&script, format!("#!{}\n", fifo.display())).unwrap();
        let (answer, answers) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for path in [fifo, script, "/dev/zero".into()] {
                answer.send(loads_libraries(&path)).unwrap();
            }
        });
        for _ in 0..3 {
            let loads = answers.recv_timeout(std::time::Duration::from_secs(10));
            assert_eq!(loads, Ok(Loads::Unknown));
        }
    }

    #[test]
    fn the_loader_tells_the_libc() {
        assert!(is_glibcs_loader(b"/lib64/ld-linux-x86-64.so.2"));
        assert!(!is_glibcs_loader(b"/lib/ld-musl-x86_64.so.1"));
    }

    #[test]
    fn a_file_without_an_interpreter_is_static() {
        // Our own program header table, cut down to a file that says nothing of a loader.
        let mut bytes = std::fs::read("/proc/self/exe").unwrap();
        bytes[56] = 0; // e_phnum
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("static");
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(loads_libraries(&path), Loads::No("is statically linked"));
        assert_eq!(loads_libraries(Path::new("/proc/self/exe")), Loads::Yes);
        assert_eq!(loads_libraries(Path::new("/etc/passwd")), Loads::Unknown);
    }
}
