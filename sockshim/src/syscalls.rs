//! `syscall`: programs that make socket calls by number get the same functions.

use crate::calls::{aio, poll, read_write};
use crate::{children, demote, handing_over, numbers, real, syscalls, tenant};
use libc::{c_int, c_long, c_ulong};
use rdsock_shm::reason::Reason;

/// Operations of `seccomp(2)`, from linux/seccomp.h.
const SECCOMP_SET_MODE_STRICT: c_ulong = 0;
const SECCOMP_SET_MODE_FILTER: c_ulong = 1;

/// Of linux/bpf.h.
const BPF_MAP_UPDATE_ELEM: c_ulong = 2;

/// What a forked child's end tells its parent.
#[cfg(target_arch = "x86_64")]
const SIGCHLD: c_ulong = libc::SIGCHLD as c_ulong;

/// A filter may forbid any call that the shim makes, at the price of the program's life: the kernel
/// has every connection from here on, and the shim does nothing any more.
fn before_sandbox() {
    demote::abandon_all(Reason::Sandbox);
    tenant::disable(Reason::Sandbox);
    numbers::forget_connections();
}

/// # Safety
/// As `prctl(2)`: its arguments come in registers, as in C.
pub unsafe fn prctl(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int {
    if option == libc::PR_SET_SECCOMP {
        before_sandbox();
    }
    // SAFETY: as the caller says.
    unsafe { real::prctl(option, a, b, c, d) }
}

/// The six words of a system call.
type Words = [c_ulong; 6];

/// Makes a system call, as it is.
///
/// # Safety
/// As the system call of this number.
unsafe fn pass(number: c_long, words: Words) -> c_long {
    let [a, b, c, d, e, f] = words;
    // SAFETY: as the caller says.
    unsafe { real::syscall(number, a, b, c, d, e, f) }
}

/// The functions of the table that are system calls with the same arguments.
macro_rules! taking_words {
    (() $($rest:tt)*) => {};
    (($number:ident) $name:ident($($arg:ident: $ty:ty),*) = $body:path) => {
        /// # Safety
        /// As the system call of this name.
        #[inline(always)]
        #[allow(dead_code)]
        pub unsafe fn $name(words: Words) -> c_long {
            let mut words = words.into_iter();
            $( let $arg = words.next().unwrap_or(0) as $ty; )*
            // SAFETY: as the caller says.
            unsafe { $body($($arg),*) as c_long }
        }
    };
}

macro_rules! by_number {
    (
        functions { $(
            $(#[doc = $class:literal])+ $word:ident { $(
                $how:ident fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty
                    = $body:path $(, also $alias:ident)* $(, $(#[$at:meta])* number $number:ident)?;
            )* }
        )* }
        numbers { $( $(#[$alone_at:meta])* $alone:ident = $alone_body:path; )* }
        variadic { $($variadic:tt)* }
        passed_through { $($passed_through:tt)* }
        real_alone { $($real_alone:tt)* }
    ) => {
        mod words {
            use super::Words;
            use crate::{calls, children, handing_over, locked, options, process, syscalls};
            use libc::*;

            $( $( taking_words! { ($($number)?) $name($($arg: $ty),*) = $body } )* )*
        }

        /// # Safety
        /// As `syscall(2)`: its arguments come in registers (and the last on the stack), as in C.
        pub unsafe fn syscall(
            number: c_long,
            a: c_ulong,
            b: c_ulong,
            c: c_ulong,
            d: c_ulong,
            e: c_ulong,
            f: c_ulong,
        ) -> c_long {
            let all = [a, b, c, d, e, f];
            // SAFETY: each function gets the arguments that the system call of this number has.
            unsafe {
                match number {
                    $( $( $( $(#[$at])* libc::$number => words::$name(all), )? )* )*
                    $( $(#[$alone_at])* libc::$alone => $alone_body(all), )*
                    _ => pass(number, all),
                }
            }
        }
    };
}

table! { by_number }

/// # Safety
/// As `preadv2(2)`: the position comes in two words, of which the first has all.
unsafe fn preadv2([fd, iov, count, offset, _, flags]: Words) -> c_long {
    // SAFETY: as the caller says.
    unsafe { read_write::preadv2(fd as _, iov as _, count as _, offset as _, flags as _) as _ }
}

/// # Safety
/// As `pwritev2(2)`, likewise.
unsafe fn pwritev2([fd, iov, count, offset, _, flags]: Words) -> c_long {
    // SAFETY: as the caller says.
    unsafe { read_write::pwritev2(fd as _, iov as _, count as _, offset as _, flags as _) as _ }
}

/// # Safety
/// As `pselect6(2)`: its last argument points to the mask and its size.
unsafe fn pselect6([count, read, write, except, limit, mask]: Words) -> c_long {
    // SAFETY: as the caller says.
    unsafe {
        let mask = match mask {
            0 => std::ptr::null(),
            at => *(at as *const *const libc::sigset_t),
        };
        poll::pselect(
            count as _,
            read as _,
            write as _,
            except as _,
            limit as _,
            mask,
        ) as _
    }
}

/// # Safety
/// As `clone(2)`.
unsafe fn clone([flags, a, b, c, d, _]: Words) -> c_long {
    // SAFETY: as the caller says.
    unsafe { children::clone_by_number(flags, [a, b, c, d]) }
}

/// # Safety
/// As `clone3(2)`.
unsafe fn clone3([args, size, ..]: Words) -> c_long {
    // SAFETY: as the caller says.
    unsafe { children::clone3_by_number(args, size) }
}

/// # Safety
/// As `fork(2)`.
#[cfg(target_arch = "x86_64")]
unsafe fn fork(_: Words) -> c_long {
    // SAFETY: as the caller says.
    unsafe { children::clone_by_number(SIGCHLD, [0; 4]) }
}

/// # Safety
/// As `vfork(2)`.
#[cfg(target_arch = "x86_64")]
unsafe fn vfork(_: Words) -> c_long {
    // SAFETY: as the caller says.
    unsafe { children::clone_by_number(SIGCHLD | libc::CLONE_VFORK as c_ulong, [0; 4]) }
}

/// # Safety
/// As `io_uring_setup(2)`.
unsafe fn io_uring_setup(words: Words) -> c_long {
    aio::making_uring();
    // SAFETY: as the caller says.
    unsafe { pass(libc::SYS_io_uring_setup, words) }
}

/// # Safety
/// As `io_submit(2)`.
unsafe fn io_submit(words: Words) -> c_long {
    let [_, count, blocks, ..] = words;
    // SAFETY: as the caller says.
    unsafe {
        aio::submitting(count as _, blocks as _);
        pass(libc::SYS_io_submit, words)
    }
}

/// # Safety
/// As `bpf(2)`.
unsafe fn bpf(words: Words) -> c_long {
    let [command, attributes, size, ..] = words;
    // SAFETY: as the caller says.
    unsafe {
        if command == BPF_MAP_UPDATE_ELEM {
            handing_over::put_into_map(attributes as _, size);
        }
        pass(libc::SYS_bpf, words)
    }
}

/// # Safety
/// As `fsconfig(2)`.
unsafe fn fsconfig(words: Words) -> c_long {
    let [_, command, key, value, descriptor, _] = words;
    // SAFETY: as the caller says.
    unsafe {
        handing_over::configuring(command as _, key as _, value as _, descriptor as _);
        pass(libc::SYS_fsconfig, words)
    }
}

/// # Safety
/// As `seccomp(2)`.
unsafe fn seccomp(words: Words) -> c_long {
    let [operation, ..] = words;
    if operation == SECCOMP_SET_MODE_STRICT || operation == SECCOMP_SET_MODE_FILTER {
        before_sandbox();
    }
    // SAFETY: as the caller says.
    unsafe { pass(libc::SYS_seccomp, words) }
}
