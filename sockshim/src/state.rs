//! All that the shim knows of its process: one structure, each part of which belongs to the module that declares it, and is changed
//! there alone. It calls nobody. What is told of libc (`real.rs`) and the thresholds (`limits.rs`) are no part of it: they stay as
//! they are from the constructor on.

use crate::identity::Identity;

/// What is known of a process. A test makes its own.
#[derive(Debug)]
pub struct Process {
    pub identity: Identity,
}

impl Process {
    /// Before anything has happened.
    pub const fn new() -> Self {
        Process {
            identity: Identity::new(),
        }
    }
}

/// Of the process that the shim is loaded into.
pub static PROCESS: Process = Process::new();
