//! On which core a process or thread runs.

use crate::error::{Error, Result};
use core_affinity::CoreId;

/// The cores that this process may run on, ascending.
pub fn allowed() -> Vec<usize> {
    let mut cores: Vec<usize> = core_affinity::get_core_ids()
        .unwrap_or_default()
        .iter()
        .map(|core| core.id)
        .collect();
    cores.sort_unstable();
    cores
}

/// Pins the calling thread, and the threads that it starts from now on, to `core`; `None` does nothing.
pub fn pin(core: Option<usize>) -> Result<()> {
    match core {
        Some(id) if !core_affinity::set_for_current(CoreId { id }) => Err(Error::Usage(format!(
            "can't run on core {id}: allowed are {:?}",
            allowed()
        ))),
        _ => Ok(()),
    }
}
