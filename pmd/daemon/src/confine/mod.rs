//! What a daemon that was taken over can't do: capabilities that it does not need are given up, and a filter of
//! system calls (seccomp) refuses those that it never makes. `docs/threat-model.md` says what remains.
//!
//! `daemon.rs` calls, in this order:
//!
//! 1. [`Confinement::begin`] when limits are raised and the control socket is made, and *before the first thread*.
//!    Capabilities, the bounding set and `no_new_privs` are each thread's own: threads that are made later have them from
//!    the thread that makes them.
//! 2. [`Confinement::device_is_open`] between opening the device and starting the poll cores, in the thread that did
//!    both. Opening takes two capabilities more (see `capabilities.rs`). A model makes threads while it is
//!    opened, and needs neither of the two, so no thread ever has them but this one.
//! 3. [`Confinement::filter`] when all is set up, before anybody is served. By then there are threads (poll cores, anchors,
//!    the model's links), so the filter is put on all of them in one step (`SECCOMP_FILTER_FLAG_TSYNC`). Later threads
//!    (one for each network namespace that is looked into) have it from their maker.
//!
//! What the kernel does not grant is warned of and shown by `rdsock stat`; the daemon goes on, since programs under it do
//! not work better when it is gone. It never opens anything, and never asks anybody else's leave.
//!
//! # Why not Landlock
//!
//! A process in a Landlock domain may look into no process outside of it. `hook_ptrace_access_check` in the kernel's
//! `security/landlock/task.c` refuses every kind of access, reading too, to a process that is not in the same domain or in
//! one below it, whatever the domain restricts and whatever capabilities there are. So `/proc/PID/fd/N`, `/proc/PID/exe`,
//! `/proc/PID/ns/net` and `pidfd_getfd` fail for every tenant, and these are how the daemon verifies who
//! holds a connection. The test `landlock_hides_the_sockets_of_other_processes` shows it. A domain for some threads only
//! (the poll cores) holds nobody: threads write into each other's memory. It would take a second process, outside
//! of the domain, that looks for the daemon; whoever has the daemon would then ask that process.

mod calls;
mod capabilities;
mod filter;

use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use crate::fabric::Device;
pub use filter::{Filter, FilterError};

/// The key `confine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Confine {
    /// Capabilities are given up, and system calls that the daemon does not make are refused.
    On,
    /// Capabilities are given up; system calls that would be refused are made, and logged by the kernel.
    Log,
    /// Nothing of that.
    Off,
}

/// What is in force, for `rdsock stat`.
#[derive(Clone, Debug, Serialize)]
pub struct Confinement {
    #[serde(rename = "wanted")]
    confine: Confine,
    /// Which calls are allowed depends on it.
    #[serde(skip)]
    device: DeviceKind,
    no_new_privs: bool,
    /// What this thread, and each that it makes, may still do.
    capabilities: Vec<String>,
    /// System calls that are not on the list: "refused", "logged" or "allowed".
    other_calls: &'static str,
    /// What could not be done.
    missing: Vec<String>,
}

/// What the daemon needs for its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// No other nodes.
    None,
    /// A model in this process. Its links meet in a directory, where they make files.
    Model,
    /// A device behind a socket.
    VfioUser,
    /// The kernel's VFIO.
    Vfio,
}

impl From<Option<&Device>> for DeviceKind {
    fn from(device: Option<&Device>) -> Self {
        match device {
            None => DeviceKind::None,
            Some(Device::Model(_)) => DeviceKind::Model,
            Some(Device::VfioUser(_)) => DeviceKind::VfioUser,
            Some(Device::Vfio(_)) => DeviceKind::Vfio,
        }
    }
}

impl Confinement {
    /// The first step; see the module's text.
    pub fn begin(confine: Confine, device: DeviceKind) -> Self {
        let mut confinement = Confinement {
            confine,
            device,
            no_new_privs: false,
            capabilities: capabilities::names(),
            other_calls: "allowed",
            missing: Vec::new(),
        };
        if confine == Confine::Off {
            return confinement;
        }
        match nix::sys::prctl::set_no_new_privs() {
            Ok(()) => confinement.no_new_privs = true,
            Err(error) => confinement.lacks("no_new_privs", &error),
        }
        confinement.reduce(true);
        confinement
    }

    /// The second step: the device, if there is one, is open.
    pub fn device_is_open(&mut self) {
        if self.confine != Confine::Off {
            self.reduce(false);
        }
    }

    /// Capabilities down to what serving takes, and what opening the device takes if that is still to come.
    fn reduce(&mut self, opening: bool) {
        let mut kept = capabilities::serving(self.device);
        let bounds = kept.clone();
        if opening {
            kept.extend(capabilities::opening(self.device));
        }
        if let Err(error) = capabilities::keep(&kept, &bounds) {
            self.lacks("capabilities", &error);
        }
        self.capabilities = capabilities::names();
    }

    /// The third step: nobody is served before.
    pub fn filter(&mut self) {
        if self.confine == Confine::Off {
            info!("not confined: confine = \"off\"");
            return;
        }
        self.device_is_open();
        let filter = match self.confine {
            Confine::On => Filter::refusing(self.device),
            Confine::Log | Confine::Off => Filter::logging(self.device),
        };
        match filter.and_then(|filter| filter.apply()) {
            Ok(()) if self.confine == Confine::On => self.other_calls = "refused",
            Ok(()) => self.other_calls = "logged",
            Err(error) => self.lacks("filter of system calls", &error),
        }
        debug!("no Landlock: it would hide the sockets of all programs from the daemon");
        let capabilities = self.capabilities.join(" ");
        info!(
            capabilities,
            no_new_privs = self.no_new_privs,
            other_calls = self.other_calls,
            "confined"
        );
    }

    fn lacks(&mut self, what: &str, error: &dyn std::fmt::Display) {
        warn!("confined less than wanted: {what}: {error}");
        self.missing.push(format!("{what}: {error}"));
    }
}
