//! Children that are made past `fork`: by `clone`, `_Fork`, and the system calls by their numbers. libc calls no
//! handlers there, so what they would do is done here, around the call. A child that shares memory or descriptors for
//! longer than `vfork` does is another program inside of this one: then every connection is the kernel's.

use crate::identity::{is_foreign, is_ready};
use crate::program::PROGRAM;
use crate::{demote, process, real, sys, tenant};
use libc::{c_int, c_long, c_ulong, c_void, pid_t};
use rdsock_shm::reason::Reason;
use std::sync::atomic::{AtomicU32, Ordering::*};

/// What a new task is to this process, by the flags of `clone`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Made {
    /// A thread, or a child that borrows the memory until it executes a program: nothing to be done.
    Same,
    /// A process with a copy of everything, as by `fork`.
    Copy,
    /// Something that shares a part for good.
    Sharer,
}

fn made_by(flags: u64) -> Made {
    let has = |flag: c_int| flags & flag as u64 != 0;
    if has(libc::CLONE_THREAD) || has(libc::CLONE_VM) && has(libc::CLONE_VFORK) {
        Made::Same
    } else if has(libc::CLONE_VM) || has(libc::CLONE_FILES) {
        Made::Sharer
    } else {
        Made::Copy
    }
}

/// What is known of children to come.
#[derive(Debug)]
pub struct Children {
    /// 1 when the next child lives in another pid namespace: processes there and here take each other for dead.
    apart: AtomicU32,
}

impl Children {
    /// Nothing out of the ordinary.
    pub const fn new() -> Self {
        Children {
            apart: AtomicU32::new(0),
        }
    }
}

/// Before a child that gets a copy of this process, however it is made.
pub fn before_copy() {
    if PROGRAM.children.apart.load(Relaxed) != 0 {
        demote::abandon_all(Reason::Shared);
    }
}

/// Around a call that makes a child.
struct Birth {
    made: Made,
}

impl Birth {
    fn begin(flags: u64) -> Self {
        let made = if is_ready() && !is_foreign() {
            made_by(flags)
        } else {
            Made::Same
        };
        if flags & libc::CLONE_NEWPID as u64 != 0 && made == Made::Copy {
            demote::abandon_all(Reason::Shared);
        }
        match made {
            Made::Copy => process::before_fork(),
            Made::Sharer => {
                demote::abandon_all(Reason::Shared);
                tenant::disable(Reason::Shared);
            }
            Made::Same => {}
        }
        Birth { made }
    }

    /// In the child, and in the parent; `result` is what the call gave there.
    fn end(self, result: c_long) {
        if self.made != Made::Copy {
            return;
        }
        if result == 0 {
            return process::after_fork_in_child();
        }
        if result < 0 {
            let error = real::errno();
            tenant::fork_failed();
            real::set_errno(error);
        }
        process::after_fork_in_parent();
    }
}

/// What a child of `clone` runs, and with what.
struct Start {
    run: unsafe extern "C" fn(*mut c_void) -> c_int,
    arg: *mut c_void,
}

/// The first function of a child that has a copy of its parent's memory, and so of `start`.
unsafe extern "C" fn start_copy(start: *mut c_void) -> c_int {
    process::after_fork_in_child();
    // SAFETY: `clone` below gives this, and waits inside of the call that made this process.
    unsafe {
        let start = &*start.cast::<Start>();
        (start.run)(start.arg)
    }
}

/// # Safety
/// As `clone(2)`; what comes after the fourth argument is only there when the flags say so, and passes through.
pub unsafe fn clone(
    run: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    stack: *mut c_void,
    flags: c_int,
    arg: *mut c_void,
    parent_tid: *mut c_void,
    tls: *mut c_void,
    child_tid: *mut c_void,
) -> c_int {
    // SAFETY: arguments pass through; the child runs what the caller wants run.
    unsafe {
        let Some(first) = run.filter(|_| !stack.is_null()) else {
            return real::clone(run, stack, flags, arg, parent_tid, tls, child_tid);
        };
        let birth = Birth::begin(flags as u32 as u64);
        if birth.made != Made::Copy {
            return real::clone(run, stack, flags, arg, parent_tid, tls, child_tid);
        }
        let mut start = Start { run: first, arg };
        let start = (&raw mut start).cast();
        let pid = real::clone(
            Some(start_copy),
            stack,
            flags,
            start,
            parent_tid,
            tls,
            child_tid,
        );
        // Only the parent comes here.
        birth.end(pid.into());
        pid
    }
}

/// # Safety
/// As `_Fork(3)`.
pub unsafe fn fork_alone() -> pid_t {
    let birth = Birth::begin(0);
    // SAFETY: takes nothing.
    let pid = unsafe { real::_Fork() };
    birth.end(pid.into());
    pid
}

/// `clone`, `fork` and `vfork` by number. A `vfork` that a function makes for its caller can't lend it its stack: the
/// child gets a copy, and the parent waits all the same.
///
/// # Safety
/// As `clone(2)`.
pub unsafe fn clone_by_number(flags: c_ulong, rest: [c_ulong; 4]) -> c_long {
    let [stack, a, b, c] = rest;
    let birth = Birth::begin(flags);
    // SAFETY: arguments pass through. A child on a stack of its own does not come back here.
    let result = unsafe { real::syscall(libc::SYS_clone, flags, stack, a, b, c, 0) };
    birth.end(result);
    result
}

/// `clone3` by number.
///
/// # Safety
/// As `clone3(2)`.
pub unsafe fn clone3_by_number(args: c_ulong, size: c_ulong) -> c_long {
    let flags = if size >= 8 && !sys::is_bad_pointer(args as *const c_void) {
        // SAFETY: the first word of the program's structure.
        unsafe { *(args as *const u64) }
    } else {
        0
    };
    let birth = Birth::begin(flags);
    // SAFETY: arguments pass through.
    let result = unsafe { real::syscall(libc::SYS_clone3, args, size, 0, 0, 0, 0) };
    birth.end(result);
    result
}

/// # Safety
/// As `unshare(2)`.
pub unsafe fn unshare(flags: c_int) -> c_int {
    // SAFETY: arguments pass through.
    let result = unsafe { real::unshare(flags) };
    if result == 0 && flags & libc::CLONE_NEWPID != 0 {
        PROGRAM.children.apart.store(1, Relaxed);
    }
    result
}

/// # Safety
/// As `setns(2)`.
pub unsafe fn setns(fd: c_int, kind: c_int) -> c_int {
    // SAFETY: arguments pass through.
    let result = unsafe { real::setns(fd, kind) };
    if result == 0 && (kind == 0 || kind & libc::CLONE_NEWPID != 0) {
        PROGRAM.children.apart.store(1, Relaxed);
    }
    result
}
