//! An instance of `/proc` of one's own.
//!
//! Anybody can have the kernel keep the lock of a folder in `/proc`, for as long as he likes: one thread reads the folder into a
//! page that does not answer, and another one removes a name there, which waits to write. Whoever looks for a name that the
//! kernel does not know by heart waits behind that. Each instance has locks of its own (from Linux 5.8 on), and nobody else comes to
//! this one.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Mounts it, in a mount namespace of this process's own, which hears of what is mounted elsewhere. To be called before there are
/// threads. Fails without `CAP_SYS_ADMIN`; then `/proc` is everybody's, and who looks there may be held up.
pub fn mount_own() -> nix::Result<()> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_SLAVE | MsFlags::MS_REC, NONE)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, NONE)
}
