//! The one writer of what our programs print, for the tools and the daemon's command line. Knows nothing of rdsock.
//!
//! Standard output that is full or closed is an error that the program ends with; a reader that has gone ends it quietly.
//! What can't be said on standard error is lost. Nothing here panics, as `println!` and `eprintln!` do: programs that
//! print by this crate deny both.
//!
//! Text does nothing to a terminal: what would is written out ([`in_line`]). JSON goes another way, as it is ([`json`]).

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod folder;
mod plain;

pub use folder::fill;
pub use plain::in_line;

use std::fmt::{Arguments, Display};
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Standard output can't be written to.
#[derive(Debug, thiserror::Error)]
#[error("can't write to standard output: {0}")]
pub struct OutputError(#[from] io::Error);

/// Standard output was closed when the program was started. Rust's start-up opens /dev/null in its place.
static CLOSED: AtomicBool = AtomicBool::new(false);
/// Who read standard output has gone.
static GONE: AtomicBool = AtomicBool::new(false);

extern "C" fn look() {
    // SAFETY: asks for the flags of a number, whatever it is.
    CLOSED.store(unsafe { libc::fcntl(1, libc::F_GETFD) } < 0, Relaxed);
}

// SAFETY: a function pointer in the list of those that run before `main`; it uses nothing of the Rust runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

fn judge(done: io::Result<()>) -> Result<(), OutputError> {
    // So that a linker that takes only what is used takes that, too.
    std::hint::black_box(LOOK);
    match done {
        Ok(()) if CLOSED.load(Relaxed) => Err(io::Error::from_raw_os_error(libc::EBADF).into()),
        Err(error) => {
            GONE.store(error.kind() == io::ErrorKind::BrokenPipe, Relaxed);
            Err(error.into())
        }
        Ok(()) => Ok(()),
    }
}

/// Writes to standard output, all of it and at once. See [`line!`].
pub fn write(text: Arguments) -> Result<(), OutputError> {
    bytes(plain::lines(&text.to_string()).as_bytes())
}

/// Writes a line of JSON to standard output, as it is.
pub fn json(text: impl Display) -> Result<(), OutputError> {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes to standard output what is as it should be.
pub fn bytes(text: &[u8]) -> Result<(), OutputError> {
    let mut out = io::stdout().lock();
    judge(out.write_all(text).and_then(|()| out.flush()))
}

/// Writes a line to standard output, as `println!` does, but gives the error back.
#[macro_export]
macro_rules! line {
    ($($text:tt)*) => {
        $crate::write(format_args!("{}\n", format_args!($($text)*)))
    };
}

/// Says something on standard error: `PROGRAM: TEXT`.
pub fn complain(program: &str, text: impl Display) {
    say(format_args!("{program}: {text}"));
}

/// Writes a line to standard error.
pub fn say(text: impl Display) {
    // Nobody is left to be told that this fails.
    let text = format!("{text}\n");
    let _ = io::stderr().write_all(plain::lines(&text).as_bytes());
}

/// Says why a program ends. Quiet when that is since nobody reads its output any more.
pub fn failed(program: &str, error: impl Display) {
    if !GONE.load(Relaxed) {
        complain(program, error);
    }
}

/// The command line of a program, or what it ends with: after `--help`, or when the line makes no sense.
pub fn parse<T: clap::Parser>(program: &str) -> Result<T, ExitCode> {
    T::try_parse().map_err(|error| {
        let shown = error.print().and_then(|()| io::stdout().flush());
        let status = ExitCode::from(error.exit_code() as u8);
        if error.use_stderr() {
            return status;
        }
        match judge(shown) {
            Ok(()) => status,
            Err(error) => {
                failed(program, error);
                ExitCode::FAILURE
            }
        }
    })
}
