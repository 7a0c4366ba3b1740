//! Control groups as files: where they are mounted, which one a process is in, and what one says about memory. All of it may wait.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

/// The two kinds of control groups. Of each kind, the memory of all processes is counted in one tree at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A tree for each controller, or for some of them.
    First,
    /// One tree for all.
    Second,
}

impl Kind {
    /// The files of a group that limit memory. Beyond `memory.high` its programs are held up until there is less, which for rings
    /// there never is.
    fn limits(self) -> &'static [&'static str] {
        match self {
            Kind::First => &["memory.limit_in_bytes"],
            Kind::Second => &["memory.max", "memory.high"],
        }
    }
}

/// A tree of control groups that the daemon sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its kind.
    pub kind: Kind,
    /// The group that is seen at the mount point.
    root: PathBuf,
    point: PathBuf,
}

/// Bytes of a path that is looked at, and of a file's text.
const MOST: u64 = 4096 + 4096;

/// From this on, it is no limit: the first kind has no word for that.
const ENDLESS: u64 = 1 << 62;

impl Mount {
    /// One at this place.
    pub fn new(kind: Kind, root: impl Into<PathBuf>, point: impl Into<PathBuf>) -> Self {
        Mount {
            kind,
            root: root.into(),
            point: point.into(),
        }
    }

    /// Those in a text like `/proc/self/mountinfo` in which memory may be counted: those that show the most first.
    pub fn all_in(mountinfo: &[u8]) -> Vec<Self> {
        let mut found: Vec<Mount> = mountinfo
            .split(|byte| *byte == b'\n')
            .filter_map(Self::parse)
            .collect();
        found.sort_by_key(|mount| mount.root.components().count());
        found
    }

    /// A line: id, parent, device, root, mount point, options, further ones, `-`, type, source, options of the type.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.split(|byte| *byte == b' ');
        let (root, point) = (words.nth(3)?, words.next()?);
        let mut words = words.skip_while(|word| *word != b"-").skip(1);
        let (kind, options) = (words.next()?, words.nth(1)?);
        let kind = match kind {
            b"cgroup" if has_memory(options) => Kind::First,
            b"cgroup2" => Kind::Second,
            _ => return None,
        };
        Some(Mount::new(kind, plain(root), plain(point)))
    }

    /// The folder of a group, `None` where it is not seen here.
    pub fn folder_of(&self, group: &Path) -> Option<PathBuf> {
        let is_plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
        let below = group.strip_prefix(&self.root).ok()?;
        group
            .components()
            .all(is_plain)
            .then(|| self.point.join(below))
    }

    /// A folder and those above it up to the mount point, which comes first.
    pub fn levels<'a>(&self, folder: &'a Path) -> Vec<&'a Path> {
        let mut levels: Vec<&Path> = folder
            .ancestors()
            .take_while(|level| level.starts_with(&self.point))
            .collect();
        levels.reverse();
        levels
    }
}

/// Is `memory` one of these words?
fn has_memory(words: &[u8]) -> bool {
    words
        .split(|byte| *byte == b',')
        .any(|word| word == b"memory")
}

/// A path as the kernel writes it there: blanks and the like as three octal digits behind a backslash.
fn plain(written: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = written;
    while let Some((first, behind)) = rest.split_first() {
        let code = (*first == b'\\').then(|| behind.get(..3)).flatten();
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

/// The group in which a process's memory is counted, from a text like `/proc/PID/cgroup`. Where both kinds are in use, a controller is
/// in a tree of the first kind or in that of the second one.
pub fn group_in(text: &[u8]) -> Option<(Kind, &Path)> {
    let mut second = None;
    for line in text.split(|byte| *byte == b'\n') {
        let mut words = line.splitn(3, |byte| *byte == b':');
        let (Some(number), Some(controllers), Some(path)) =
            (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let path = Path::new(OsStr::from_bytes(path));
        if has_memory(controllers) {
            return Some((Kind::First, path));
        }
        if number == b"0" && controllers.is_empty() {
            second = Some((Kind::Second, path));
        }
    }
    second
}

/// Bytes of memory that a group may have; `None` where it has no limit of its own.
pub fn limit_of(kind: Kind, folder: &Path) -> io::Result<Option<u64>> {
    let mut least = None;
    for name in kind.limits() {
        let limit = match File::open(folder.join(name)).and_then(whole) {
            Ok(text) => parse_limit(&text)?,
            Err(error) if is_none(&error) => None,
            Err(error) => return Err(error),
        };
        least = least.into_iter().chain(limit).min();
    }
    Ok(least)
}

/// The group is not there (any more), has no such limit, or is not the daemon's to see.
fn is_none(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | NotADirectory | PermissionDenied)
        || error.raw_os_error() == Some(libc::ENODEV)
}

fn parse_limit(text: &[u8]) -> io::Result<Option<u64>> {
    let text = text.trim_ascii();
    if text == b"max" {
        return Ok(None);
    }
    let number = std::str::from_utf8(text).ok();
    let number: Option<u64> = number.and_then(|text| text.parse().ok());
    let limit = number.ok_or(io::ErrorKind::InvalidData)?;
    Ok((limit < ENDLESS).then_some(limit))
}

/// What stands in a short file of the kernel's.
pub fn whole(file: File) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.take(MOST).read_to_end(&mut text)?;
    match text.len() as u64 {
        MOST => Err(io::ErrorKind::InvalidData.into()),
        _ => Ok(text),
    }
}
