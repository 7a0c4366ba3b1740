//! All that the shim knows of its process: one structure, each part of which belongs to the module that declares it, and is changed
//! there alone. It calls nobody. What is told of libc (`real.rs`) and the thresholds (`limits.rs`) are no part of it: they stay as
//! they are from the constructor on.

use crate::children::Children;
use crate::clock::Clock;
use crate::conn::Connections;
use crate::end::Waited;
use crate::fds::Fds;
use crate::handing_over::Netlink;
use crate::identity::Identity;
use crate::process::Fork;
use crate::signals::Watches;
use crate::spawn::Actions;
use crate::tenant::Tenant;

/// What is known of a process. A test makes its own.
#[derive(Debug)]
pub struct Process {
    pub identity: Identity,
    pub clock: Clock,
    pub fds: Fds,
    pub connections: Connections,
    pub tenant: Tenant,
    pub waited: Waited,
    pub watches: Watches,
    pub fork: Fork,
    pub children: Children,
    /// What the program has put into its objects of file actions.
    pub actions: Actions,
    pub netlink: Netlink,
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
            watches: Watches::new(),
            fork: Fork::new(),
            children: Children::new(),
            actions: Actions::new(),
            netlink: Netlink::new(),
        }
    }
}

/// Of the process that the shim is loaded into.
pub static PROCESS: Process = Process::new();
