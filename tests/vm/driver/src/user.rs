//! Without privilege: a user whose group may open the device, and a limit of locked memory.

use crate::node::Node;
use crate::{Outcome, check};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};

/// The group that the module was told.
const GROUP: u32 = 4242;
const USER: u32 = 1000;
const LIMIT: u64 = 32 << 20;

/// Gives up everything but the group.
pub fn become_driver() -> Outcome {
    setrlimit(Resource::RLIMIT_MEMLOCK, LIMIT, LIMIT)?;
    setgroups(&[])?;
    setgid(Gid::from_raw(GROUP))?;
    setuid(Uid::from_raw(USER))?;
    Ok(())
}

/// More than the limit cannot be mapped, and the error says so.
pub fn beyond_the_limit(node: &Node) -> Outcome {
    let error = match node.rde.space().allocate(LIMIT as usize) {
        Ok(_) => return Err("it was mapped".into()),
        Err(error) => error.to_string(),
    };
    check(error.contains("limit of locked memory"), || error.clone())?;
    // What is within it still can be.
    node.rde.space().allocate(4 << 20)?;
    Ok(())
}
