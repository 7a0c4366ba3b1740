//! Which system calls the daemon may make, and why. Only `filter.rs` and the tests call this.
//!
//! The lists come from `strace -f` of the tests of this crate and of the end-to-end tests with each kind of device. A call
//! that is missing shows in the kernel's log (`type=1326`, with its number), and with `confine = "log"` it is made all
//! the same.

use super::DeviceKind;
use libc::c_long;
use seccompiler::{
    BackendError, SeccompCmpArgLen as Length, SeccompCmpOp as Is, SeccompCondition as Condition,
    SeccompRule,
};
use std::collections::BTreeMap;

/// Whatever their arguments are.
const FREE: &[c_long] = &[
    // Files and sockets that are open.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    // A stream's memory is given its size, and the pages that have to be there at once.
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_flock,
    // Names of files: to look at them, above all in /proc. Opening is below.
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    // The control socket and the models' ones are removed at the end.
    libc::SYS_unlinkat,
    // Programs of other users: who they are, and the sockets that they hold. `setns` is below.
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_capget,
    // Sockets. Which ones may be made is below.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    // Waiting: for events, for time, for changes in a models' directory; timers that interrupt what lingers for a porter.
    // `epoll_create1` and `eventfd2` are for links that are made anew.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_signalfd4,
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_timer_gettime,
    libc::SYS_timer_delete,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    // Memory, and on which NUMA node it lies. `mmap` and `mprotect` are below.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_memfd_create,
    // A page of memory that others map is put into a pipe, so that the kernel leaves it where it is.
    libc::SYS_pipe2,
    libc::SYS_splice,
    libc::SYS_mbind,
    libc::SYS_set_mempolicy,
    libc::SYS_get_mempolicy,
    // Threads, as Rust and libc make, place, wake and end them. `clone` is below.
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_sched_yield,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Signals to oneself. `tgkill` and `kill` are below.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    // What libc and the daemon ask about themselves, and of the kernel.
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getrandom,
];

/// Older calls of x86_64 for the same, which libc makes there.
#[cfg(target_arch = "x86_64")]
const FREE_HERE: &[c_long] = &[
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_readlink,
    libc::SYS_unlink,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
];
#[cfg(not(target_arch = "x86_64"))]
const FREE_HERE: &[c_long] = &[];

/// A model's links meet in a directory, which they make, with files that they lock. Only they write files at all.
const MODEL: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_mkdirat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
];
#[cfg(target_arch = "x86_64")]
const MODEL_HERE: &[c_long] = &[libc::SYS_mkdir, libc::SYS_rename, libc::SYS_chmod];
#[cfg(not(target_arch = "x86_64"))]
const MODEL_HERE: &[c_long] = &[];

/// Calls that no part of the daemon and of libc makes: who makes one has taken the daemon over. Then it is better ended:
/// streams live on without it.
const FATAL: &[c_long] = &[
    // Other programs.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_unshare,
    libc::SYS_chroot,
    // Into other processes, as CAP_SYS_PTRACE would let it.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    // Files past all permissions, as CAP_DAC_READ_SEARCH would let it, out of containers too.
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    // Mounts, as CAP_SYS_ADMIN would let it.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_mount_setattr,
    // The kernel itself.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    // Its operations pass no filter.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // The machine.
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_syslog,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
];

/// Calls that end the daemon.
pub fn fatal() -> &'static [c_long] {
    FATAL
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// Calls that are made, each with rules of which one must hold; with none, whatever its arguments are.
pub fn allowed(device: DeviceKind) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    let (model, model_here) = match device {
        DeviceKind::Model => (MODEL, MODEL_HERE),
        _ => (&[][..], &[][..]),
    };
    opening(&mut rules)?;
    for call in [FREE, FREE_HERE, model, model_here].concat() {
        rules.insert(call, Vec::new());
    }
    sockets(&mut rules)?;
    controls(&mut rules, device)?;
    memory(&mut rules)?;
    processes(&mut rules)?;
    Ok(rules)
}

/// The argument, counted from 0, taken as 32 bits.
fn argument(index: u8, is: Is, value: u64) -> Result<Condition, BackendError> {
    Condition::new(index, Length::Dword, is, value)
}

/// Of the bits in `mask`, exactly those of `value` are set.
fn bits(index: u8, mask: u64, value: u64) -> Result<Condition, BackendError> {
    argument(index, Is::MaskedEq(mask), value)
}

/// One rule for each value that the argument may have.
fn one_of(index: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |value: &u64| SeccompRule::new(vec![argument(index, Is::Eq, *value)?]);
    values.iter().map(rule).collect()
}

/// Files are opened to be read. So the memory of other processes (`/proc/PID/mem`) and the settings of the kernel can't be
/// written. And nobody is let open more by the daemon than before.
fn opening(rules: &mut Rules) -> Result<(), BackendError> {
    let writing = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC;
    let reading = SeccompRule::new(vec![bits(2, writing as u64, libc::O_RDONLY as u64)?])?;
    rules.insert(libc::SYS_openat, vec![reading]);
    rules.insert(libc::SYS_fchmod, one_of(1, &[0])?);
    Ok(())
}

/// To tenants, to listeners, to the kernel's list of connections.
fn sockets(rules: &mut Rules) -> Result<(), BackendError> {
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];
    let mut made = one_of(0, &families.map(|family| family as u64))?;
    made.push(SeccompRule::new(vec![
        argument(0, Is::Eq, libc::AF_NETLINK as u64)?,
        argument(2, Is::Eq, libc::NETLINK_SOCK_DIAG as u64)?,
    ])?);
    rules.insert(libc::SYS_socket, made);
    let pairs = one_of(0, &[libc::AF_UNIX as u64])?;
    rules.insert(libc::SYS_socketpair, pairs);
    Ok(())
}

/// `ioctl` and `prctl`, by what they ask for: a terminal that was got from another process takes no keystrokes (`TIOCSTI`).
fn controls(rules: &mut Rules, device: DeviceKind) -> Result<(), BackendError> {
    // What is in a socket's buffers; not to block; the same for close-on-exec.
    let plain = [libc::FIONREAD, libc::TIOCOUTQ, libc::FIONBIO, libc::FIOCLEX];
    let mut asked = one_of(1, &plain)?;
    let of_type = |letter: u8| SeccompRule::new(vec![bits(1, 0xff00, u64::from(letter) << 8)?]);
    // Memory in which nobody makes holes, and whether some is.
    let flags = [libc::FS_IOC_GETFLAGS, libc::FS_IOC_SETFLAGS];
    asked.extend(one_of(1, &flags)?);
    // What a process has mapped at an address, and who it is. Not in which namespaces: see `process::namespace_in`.
    use crate::process::{PIDFD_GET_INFO, PROCMAP_QUERY};
    asked.extend(one_of(1, &[PROCMAP_QUERY, PIDFD_GET_INFO])?);
    if device == DeviceKind::Vfio {
        // VFIO and iommufd share the letter.
        asked.push(of_type(b';')?);
    }
    rules.insert(libc::SYS_ioctl, asked);
    // A thread's name; names of memory, which libc gives.
    let options = [libc::PR_SET_NAME, libc::PR_SET_VMA];
    let options = one_of(0, &options.map(|option| option as u64))?;
    rules.insert(libc::SYS_prctl, options);
    Ok(())
}

/// No page is both written and executed. Pages may be executed as they are mapped, since the name of a user in the
/// configuration may have libc load a library (NSS); none becomes executable later.
fn memory(rules: &mut Rules) -> Result<(), BackendError> {
    let (write, execute) = (libc::PROT_WRITE as u64, libc::PROT_EXEC as u64);
    let without = |bit| SeccompRule::new(vec![bits(2, bit, 0)?]);
    rules.insert(libc::SYS_mmap, vec![without(write)?, without(execute)?]);
    rules.insert(libc::SYS_mprotect, vec![without(execute)?]);
    Ok(())
}

/// Threads of this process; no other processes, no namespaces but those of networks, no signal to others, no
/// limits and no weight of others.
fn processes(rules: &mut Rules) -> Result<(), BackendError> {
    let own = u64::from(std::process::id());
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    let thread = libc::CLONE_THREAD as u64;
    let mask = thread | namespaces as u64;
    let clone = SeccompRule::new(vec![bits(0, mask, thread)?])?;
    rules.insert(libc::SYS_clone, vec![clone]);
    let network = one_of(1, &[libc::CLONE_NEWNET as u64])?;
    rules.insert(libc::SYS_setns, network);
    for call in [libc::SYS_kill, libc::SYS_tgkill] {
        rules.insert(call, one_of(0, &[own])?);
    }
    rules.insert(libc::SYS_prlimit64, one_of(0, &[0, own])?);
    // A thread weighs less than others: the one that calls.
    let own_thread = SeccompRule::new(vec![
        argument(0, Is::Eq, libc::PRIO_PROCESS as u64)?,
        argument(1, Is::Eq, 0)?,
    ])?;
    rules.insert(libc::SYS_setpriority, vec![own_thread]);
    Ok(())
}
