//! What the shim knows of the calls of its program: of how it makes processes, and of what it hands to the kernel. Each part belongs to
//! the module that declares it, as in [`crate::state`].

use crate::children::Children;
use crate::handing_over::Netlink;
use crate::process::Fork;
use crate::spawn::Actions;

/// What is known of a program. A test makes its own.
#[derive(Debug)]
pub struct Program {
    pub fork: Fork,
    pub children: Children,
    /// What it has put into its objects of file actions.
    pub actions: Actions,
    pub netlink: Netlink,
}

impl Program {
    /// Before anything has happened.
    pub const fn new() -> Self {
        Program {
            fork: Fork::new(),
            children: Children::new(),
            actions: Actions::new(),
            netlink: Netlink::new(),
        }
    }
}

/// The one that the shim is loaded into.
pub static PROGRAM: Program = Program::new();
