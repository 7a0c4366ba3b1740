//! All that the core knows of its process: one structure, each part of which belongs to the module that declares it, and is changed
//! there alone; and who is told of what becomes of its connections ([`TOLD`]). Layers above are named here alone, and nobody is called. The
//! thresholds (`limits.rs`) and what the libc beside it gives (`sys/host.rs`) are no part of it: they stay as they are from the
//! constructor on.

use crate::clock::Clock;
use crate::conn::{Connections, Told};
use crate::end::Waited;
use crate::epoll;
use crate::fds::Fds;
use crate::identity::Identity;
use crate::nap::Naps;
use crate::signals::Watches;
use crate::tenant::{self, Tenant};

/// What is known of a process. A test makes its own.
#[derive(Debug)]
pub struct Process {
    /// Which process it is.
    pub identity: Identity,
    /// What its clocks say of each other.
    pub clock: Clock,
    /// Its table of descriptors.
    pub fds: Fds,
    /// Its connections.
    pub connections: Connections,
    /// What it is to the daemon.
    pub tenant: Tenant,
    /// How long it has waited for others.
    pub waited: Waited,
    /// Whether its receives may nap.
    pub naps: Naps,
    /// Signals that its waits watch.
    pub watches: Watches,
}

impl Process {
    /// Before anything has happened.
    pub const fn new() -> Self {
        Process {
            identity: Identity::new(),
            clock: Clock::new(),
            fds: Fds::new(),
            connections: Connections::new(),
            tenant: Tenant::new(),
            waited: Waited::new(),
            naps: Naps::new(),
            watches: Watches::new(),
        }
    }
}

/// Of the process that this is loaded into.
pub static PROCESS: Process = Process::new();

/// Who is told: those that wait, and the daemon.
pub static TOLD: Told = Told {
    changed: epoll::changed,
    left: epoll::demoted,
    declines: epoll::declines,
    mapping: epoll::begin_mapping,
    mapped: epoll::mapped,
    closed: tenant::closed,
};
