//! `rdsock run`: sets up the environment and becomes the program.

mod image;
mod library;
mod program;
mod refusal;
mod standard;

use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::errno::Errno;

use crate::cli::RunArgs;
use crate::daemon;
pub use library::find_library;
pub use program::{Loads, OTHER_LIBC, has_loaded_libraries, loads_libraries};

const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

fn warn(text: impl std::fmt::Display) {
    rdsock_output::complain(
        "rdsock",
        format_args!("{text}: the program runs over the kernel"),
    );
}

/// Runs the program. Returns only when that fails.
pub fn run(args: RunArgs) -> ExitCode {
    let Some(name) = args.command.first() else {
        return ExitCode::from(2);
    };
    let path = match program::resolve(name) {
        Ok(path) => path,
        Err(error) => return fail(name, Path::new(name), error),
    };
    let added = prepare(&path, &args).unwrap_or_default();
    let error = exec(&path, &args.command, &environment(added));
    fail(name, &path, error)
}

/// Says why a program can't be run, as a shell does.
fn fail(name: &OsStr, path: &Path, error: Errno) -> ExitCode {
    let complain = |why: &str| {
        rdsock_output::complain("rdsock", format_args!("{}: {why}", name.display()));
    };
    // What is there needs something that is not: then that is what is named.
    if error == Errno::ENOENT && std::fs::metadata(path).is_err() {
        complain("not found");
        return ExitCode::from(NOT_FOUND);
    }
    match name.as_bytes().contains(&b'/') || path != Path::new(name) {
        true => complain(&refusal::explain(path, error)),
        false => complain("what $PATH has of this name is not executable for this user"),
    }
    match error {
        Errno::ENOENT => ExitCode::from(NOT_FOUND),
        _ => ExitCode::from(NOT_EXECUTABLE),
    }
}

/// What accelerates the program, as variables of its environment; `None`, with one warning, when
/// something is missing.
fn prepare(path: &Path, args: &RunArgs) -> Option<Vec<(&'static str, OsString)>> {
    if let Loads::No(why) = loads_libraries(path) {
        warn(format_args!(
            "{} {why}, so the shim can't be loaded into it",
            path.display()
        ));
    }
    let Some(library) = find_library() else {
        warn("librdsock.so is neither beside rdsock nor in ../lib/rdsock (set $RDSOCK_LIB)");
        return None;
    };
    let found = daemon::find().unwrap_or_else(|silent| {
        warn(format_args!("{silent}; until it does"));
        Some(silent.path)
    });
    let socket = match found {
        Some(path) => path,
        None if args.no_daemon => {
            warn("no daemon runs");
            return None;
        }
        None => daemon::start()
            .inspect_err(|error| {
                warn(format_args!(
                    "no daemon runs and none could be started: {error}"
                ));
            })
            .ok()?,
    };
    let preload = preload(library, std::env::var_os("LD_PRELOAD"));
    let sanitizer = sanitizer(std::env::var_os("ASAN_OPTIONS"));
    let mut added = vec![
        ("LD_PRELOAD", preload),
        ("RDSOCK_SOCKET", socket.into()),
        ("ASAN_OPTIONS", sanitizer),
    ];
    if let Some(spin) = args.spin_us {
        added.push(("RDSOCK_SPIN_US", spin.to_string().into()));
    }
    Some(added)
}

/// The library, in front of what is preloaded already.
fn preload(library: PathBuf, before: Option<OsString>) -> OsString {
    let mut list = library.clone().into_os_string();
    let before = before.unwrap_or_default();
    let separates = |byte: &u8| matches!(byte, b':' | b' ');
    for other in before.as_bytes().split(separates) {
        if !other.is_empty() && other != library.as_os_str().as_bytes() {
            list.push(":");
            list.push(OsStr::from_bytes(other));
        }
    }
    list
}

/// What keeps gcc's and clang's AddressSanitizer, where it is a shared library, from ending the program because the shim
/// was loaded before it. The shim takes over no function that it must see first. In front, so that what the user says counts.
fn sanitizer(before: Option<OsString>) -> OsString {
    let mut options = OsString::from("verify_asan_link_order=0");
    for other in before.iter().filter(|before| !before.is_empty()) {
        options.push(":");
        options.push(other);
    }
    options
}

/// This process's environment with some variables set anew.
fn environment(added: Vec<(&'static str, OsString)>) -> Vec<CString> {
    let kept = std::env::vars_os().filter(|(name, _)| !added.iter().any(|(new, _)| name == new));
    let added = added
        .iter()
        .map(|(name, value)| (OsString::from(name), value.clone()));
    kept.chain(added)
        .filter_map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            CString::new(name.into_vec()).ok()
        })
        .collect()
}

/// Becomes the program; returns why not. Done by hand, since the standard library's way would
/// also reset the signal mask.
fn exec(path: &Path, command: &[OsString], environment: &[CString]) -> Errno {
    let strings = |words: &[OsString]| -> Result<Vec<CString>, Errno> {
        let string = |word: &OsString| CString::new(word.as_bytes()).map_err(|_| Errno::EINVAL);
        words.iter().map(string).collect()
    };
    let (path, mut arguments) = match (CString::new(path.as_os_str().as_bytes()), strings(command))
    {
        (Ok(path), Ok(arguments)) => (path, arguments),
        _ => return Errno::EINVAL,
    };
    standard::close_again_at_exec();
    let Err(error) = nix::unistd::execve(&path, &arguments, environment);
    if error != Errno::ENOEXEC || !refusal::is_text(Path::new(OsStr::from_bytes(path.as_bytes()))) {
        return error;
    }
    // A script without a first line that names its interpreter: the shell's.
    arguments.splice(..1, [c"sh".to_owned(), path]);
    let Err(error) = nix::unistd::execve(c"/bin/sh", &arguments, environment);
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_the_sanitizer_are_kept_and_count() {
        let options = |before: &str| sanitizer(Some(before.into()));
        assert_eq!(options(""), "verify_asan_link_order=0");
        assert_eq!(
            options("detect_leaks=0"),
            "verify_asan_link_order=0:detect_leaks=0"
        );
    }

    #[test]
    fn the_shim_comes_before_what_is_preloaded_already() {
        let list = |before: &str| preload("/l.so".into(), Some(before.into()));
        assert_eq!(list(""), "/l.so");
        assert_eq!(list("/a.so /b.so"), "/l.so:/a.so:/b.so");
        assert_eq!(list("/a.so:/l.so"), "/l.so:/a.so");
    }
}
