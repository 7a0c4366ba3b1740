//! Why a program can't be run, in words that name what is at fault: the file, its interpreter, or its loader.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use super::image::{self, Image};

/// Scripts whose interpreters are scripts, as deep as the kernel goes.
const DEPTH: usize = 5;

/// Says why this file could not be executed.
pub fn explain(path: &Path, error: Errno) -> String {
    match error {
        Errno::ENOENT | Errno::EACCES | Errno::ENOTDIR | Errno::ELOOP => {}
        Errno::ENOEXEC => return "is in a format that this machine can't run".into(),
        Errno::E2BIG => return "can't be executed: arguments and environment are too long".into(),
        other => return format!("can't be executed: {}", other.desc()),
    }
    if let Err(fault) = executable(path) {
        return fault;
    }
    let mut file = path.to_owned();
    for _ in 0..DEPTH {
        let Some(interpreter) = interpreter(&file) else {
            break;
        };
        if let Err(fault) = executable(&interpreter) {
            let of = match file == path {
                true => String::new(),
                false => format!(" of {}", file.display()),
            };
            return format!(
                "its interpreter{of}, {}, {fault}{}",
                interpreter.display(),
                hint(&interpreter)
            );
        }
        file = interpreter;
    }
    if let Some(loader) = loader(&file)
        && let Err(fault) = executable(&loader)
    {
        let of = match file == path {
            true => "the loader that it needs".into(),
            false => format!("the loader that {} needs", file.display()),
        };
        return format!("{of}, {}, {fault}", loader.display());
    }
    match error {
        Errno::EACCES => {
            "can't be executed: permission denied (is the file system mounted noexec?)".into()
        }
        other => format!("can't be executed: {}", other.desc()),
    }
}

fn executable(path: &Path) -> Result<(), String> {
    if path.is_dir() {
        return Err("is a directory".into());
    }
    match access(path, AccessFlags::F_OK) {
        Err(Errno::ENOENT) => return Err("is not there".into()),
        Err(error) => return Err(format!("can't be reached: {}", error.desc())),
        Ok(()) => {}
    }
    access(path, AccessFlags::X_OK)
        .map_err(|_| "is not executable for this user: chmod +x makes it so".into())
}

fn hint(interpreter: &Path) -> &'static str {
    match interpreter.as_os_str().as_bytes().ends_with(b"\r") {
        true => ": the first line ends in a carriage return, which counts as part of the name",
        false => "",
    }
}

/// What the kernel takes from a script's first line.
fn interpreter(path: &Path) -> Option<PathBuf> {
    let start = start(path)?;
    let line = start.strip_prefix(b"#!")?;
    let line = line.split(|byte| matches!(byte, b'\n' | 0)).next()?;
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let name = line.split(blank).find(|word| !word.is_empty())?;
    Some(OsStr::from_bytes(name).into())
}

fn start(path: &Path) -> Option<Vec<u8>> {
    let mut start = Vec::new();
    image::open(path)?.take(256).read_to_end(&mut start).ok()?;
    Some(start)
}

/// The loader that a program's file names.
fn loader(path: &Path) -> Option<PathBuf> {
    let name = Image::of(&image::open(path)?)?.loader?;
    Some(OsStr::from_bytes(&name).into())
}

/// Whether a file that the kernel can't run is text, for a shell to run: no shell runs what has a zero in its first line.
pub fn is_text(path: &Path) -> bool {
    let start = start(path).unwrap_or_default();
    let line = start
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    !line.contains(&0)
}
