//! Which capabilities stay. Only `mod.rs` calls this.
//!
//! The crate `caps` makes the calls: nix has none for capabilities.

use super::DeviceKind;
use caps::{CapSet, Capability, CapsHashSet};

/// What a daemon that runs as root needs all the time. Another user's has none of these, and loses nothing.
pub fn serving(device: DeviceKind) -> CapsHashSet {
    let mut kept = CapsHashSet::from([
        // `pidfd_getfd`, `/proc/PID/exe`, `/proc/PID/fd/N` and `/proc/PID/ns/net` of other users' processes.
        Capability::CAP_SYS_PTRACE,
        // Without it, root could not list `/proc/PID/fd` of another user's process, which has the mode 0500; nor read a
        // configuration again that belongs to somebody else.
        Capability::CAP_DAC_READ_SEARCH,
        // `setns` into the network namespaces of containers. And descriptors on their way to a program that does not read
        // them count against a limit of the user (root), which this lifts.
        Capability::CAP_SYS_ADMIN,
        // Memory that programs are handed is made immutable, so that none of them can stall a poll core by making holes in it.
        Capability::CAP_LINUX_IMMUTABLE,
    ]);
    if device == DeviceKind::Vfio {
        // The memory of each stream is locked, beyond RLIMIT_MEMLOCK where that is low.
        kept.insert(Capability::CAP_IPC_LOCK);
    }
    kept
}

/// What it takes to open the device, and never again.
pub fn opening(device: DeviceKind) -> CapsHashSet {
    match device {
        // rdsock-vfio asks for this one, or for its group. The file may belong to somebody else.
        DeviceKind::Vfio => [Capability::CAP_NET_ADMIN, Capability::CAP_DAC_OVERRIDE].into(),
        // The socket may be that of a user who serves the device.
        DeviceKind::VfioUser => [Capability::CAP_DAC_OVERRIDE].into(),
        DeviceKind::None | DeviceKind::Model => CapsHashSet::new(),
    }
}

/// This thread, and each that it makes, has no capability but these, and can't get another one than those of
/// `bounds` by executing a program.
pub fn keep(kept: &CapsHashSet, bounds: &CapsHashSet) -> Result<(), caps::errors::CapsError> {
    let now = |set| caps::read(None, set);
    if !now(CapSet::Ambient)?.is_empty() {
        caps::clear(None, CapSet::Ambient)?;
    }
    // While there is CAP_SETPCAP. A service manager that took that away has set these bounds, too.
    if now(CapSet::Effective)?.contains(&Capability::CAP_SETPCAP) {
        for beyond in now(CapSet::Bounding)?.difference(bounds) {
            caps::drop(None, CapSet::Bounding, *beyond)?;
        }
    }
    // The effective ones first: they have to be among those that are permitted.
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        let before = now(set)?;
        let after: CapsHashSet = match set {
            CapSet::Inheritable => CapsHashSet::new(),
            _ => before.intersection(kept).copied().collect(),
        };
        if after != before {
            caps::set(None, set, &after)?;
        }
    }
    Ok(())
}

/// Names of the capabilities of this thread, sorted.
pub fn names() -> Vec<String> {
    let permitted = caps::read(None, CapSet::Permitted).unwrap_or_default();
    let mut names: Vec<String> = permitted.iter().map(Capability::to_string).collect();
    names.sort();
    names
}
