//! The filter of system calls, as the kernel takes it. Only `mod.rs` and the tests call this.
//!
//! Two programs, of which the kernel takes the stricter answer: one ends the process on calls that only an intruder makes;
//! the other allows the calls of `calls.rs`. A call that neither names fails with ENOSYS, as on a kernel that does not
//! have it, and the kernel logs it. It does not end the daemon: after an update, libc may make a call that nobody here has
//! thought of, and libc is made to get along on kernels that lack it. So `clone3` falls back to `clone`, whose
//! flags a filter can see. The kernel remembers which calls are allowed whatever their arguments are, and does not run the programs for
//! these (since Linux 5.11), so the order of a list costs nothing.

use super::DeviceKind;
use super::calls;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch, sock_filter,
};
use std::collections::BTreeMap;
use std::io;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// This processor is none of those that the lists are for.
    #[error("made for x86_64 and aarch64 alone")]
    Processor,
    /// It can't be expressed.
    #[error("no program: {0}")]
    Program(#[from] BackendError),
    /// The kernel refuses it.
    #[error("the kernel takes none (CONFIG_SECCOMP_FILTER): {0}")]
    System(#[from] io::Error),
    /// This thread was not given it.
    #[error("thread {0} has another filter of its own")]
    Thread(i64),
}

/// Programs for the kernel, in the order in which they are applied.
#[derive(Debug)]
pub struct Filter(Vec<BpfProgram>);

impl Filter {
    /// Refuses what is not listed.
    pub fn refusing(device: DeviceKind) -> Result<Self, FilterError> {
        let arch = arch()?;
        let fatal = calls::fatal().iter().map(|call| (*call, Vec::new()));
        let (allow, fail) = (
            SeccompAction::Allow,
            SeccompAction::Errno(libc::ENOSYS as u32),
        );
        let kill = SeccompAction::KillProcess;
        Ok(Filter(vec![
            program(fatal.collect(), allow.clone(), kill, arch)?,
            program(calls::allowed(device)?, fail, allow, arch)?,
        ]))
    }

    /// Has the kernel log what is not listed.
    pub fn logging(device: DeviceKind) -> Result<Self, FilterError> {
        let (log, allow) = (SeccompAction::Log, SeccompAction::Allow);
        let rules = calls::allowed(device)?;
        Ok(Filter(vec![program(rules, log, allow, arch()?)?]))
    }

    /// Puts it on all threads of this process, for good. Each has `no_new_privs` from then on.
    pub fn apply(&self) -> Result<(), FilterError> {
        nix::sys::prctl::set_no_new_privs().map_err(io::Error::from)?;
        self.0.iter().try_for_each(apply)
    }
}

fn arch() -> Result<TargetArch, FilterError> {
    match std::env::consts::ARCH {
        "x86_64" => Ok(TargetArch::x86_64),
        "aarch64" => Ok(TargetArch::aarch64),
        _ => Err(FilterError::Processor),
    }
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
    arch: TargetArch,
) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, otherwise, listed, arch)?.try_into()
}

/// `struct sock_fprog` of `linux/filter.h`.
#[repr(C)]
struct Program {
    len: libc::c_ushort,
    filter: *const sock_filter,
}

/// seccompiler has this, without `SECCOMP_FILTER_FLAG_LOG`.
fn apply(program: &BpfProgram) -> Result<(), FilterError> {
    let program = Program {
        len: program.len() as libc::c_ushort,
        filter: program.as_ptr(),
    };
    // SAFETY: the kernel copies the program, whose length and address are those of a live vector.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_LOG,
            &raw const program,
        )
    };
    match returned {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error().into()),
        thread => Err(FilterError::Thread(thread)),
    }
}
