//! What can go wrong, in the words that a person at a terminal needs, and the exit status of each.

use std::io;

/// Result of everything in this program that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// A reason to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The flags ask for something that can't be done. Exit status 2.
    #[error("{0}")]
    Usage(String),
    /// The operating system refused something. Exit status 1.
    #[error("{doing}: {source}")]
    Io {
        /// What we were doing, for example "connect to 127.0.0.1:7464".
        doing: String,
        /// What the system said.
        source: io::Error,
    },
    /// Standard output is full or closed. Exit status 1.
    #[error(transparent)]
    Output(#[from] rdsock_output::OutputError),
    /// The other end of a connection, or a child process, said something unexpected. Exit status 1.
    #[error("{0}")]
    Peer(String),
    /// A run that should have gone over rdsock did not. Exit status 3.
    #[error("NOT ACCELERATED, so nothing was compared: {0}")]
    NotAccelerated(String),
    /// Ctrl-C or SIGTERM. Exit status 130.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// An [`Error::Io`] with the last error of this thread.
    pub fn last_os(doing: impl Into<String>) -> Self {
        Self::Io {
            doing: doing.into(),
            source: io::Error::last_os_error(),
        }
    }

    /// The status that the process ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Io { .. } | Self::Output(_) | Self::Peer(_) => 1,
            Self::NotAccelerated(_) => 3,
            Self::Interrupted => 130,
        }
    }
}

/// Says what was being done when an [`io::Error`] came up.
pub trait Doing<T> {
    /// Wraps the error; `what` is evaluated only on failure.
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| Error::Io {
            doing: what().into(),
            source,
        })
    }
}
