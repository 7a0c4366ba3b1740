//! Programs that are started by `posix_spawn` and its kin, `system` and `popen`: libc makes the child by itself, and calls
//! no handler. What the child gets is counted before, since the parent may close it before the child has asked for it.

mod actions;

use crate::conn::{self, CONNS, Kind, Use};
use crate::identity::{is_foreign, is_ready};
use crate::process::{
    finish, fits_new_program, in_path, is_dynamic, is_kept_over_exec, names_shim,
};
use crate::program::PROGRAM;
use crate::{demote, real, tenant};
pub use actions::Actions;
use libc::{c_char, c_int, c_void};
use rdsock_shm::reason::Reason;
use std::ffi::CStr;

/// # Safety
/// As `posix_spawn_file_actions_init`.
pub unsafe fn posix_spawn_file_actions_init(actions: *mut c_void) -> c_int {
    PROGRAM.actions.forget(actions);
    // SAFETY: as the caller says.
    unsafe { real::posix_spawn_file_actions_init(actions) }
}

/// # Safety
/// As `posix_spawn_file_actions_destroy`.
pub unsafe fn posix_spawn_file_actions_destroy(actions: *mut c_void) -> c_int {
    PROGRAM.actions.forget(actions);
    // SAFETY: as the caller says.
    unsafe { real::posix_spawn_file_actions_destroy(actions) }
}

/// # Safety
/// As `posix_spawn_file_actions_adddup2`.
pub unsafe fn posix_spawn_file_actions_adddup2(
    actions: *mut c_void,
    fd: c_int,
    new: c_int,
) -> c_int {
    // SAFETY: as the caller says.
    let result = unsafe { real::posix_spawn_file_actions_adddup2(actions, fd, new) };
    // Also where it is no connection yet: it may be one when the program is spawned.
    if result == 0 && is_ready() && !is_foreign() {
        PROGRAM.actions.note(actions, fd, new);
    }
    result
}

/// Streams that a spawned program was counted for, once each, by their connections' numbers.
struct Given([u64; CONNS / 64]);

impl Given {
    /// A stream goes to the new program, if that can ask for it.
    fn give(&mut self, held: &Use, fd: c_int, keep: bool) {
        finish(held, fd);
        if !fits_new_program(held, keep) {
            demote::abandon(held, fd, Reason::Exec);
            return;
        }
        let bit = 1 << (held.index % 64);
        if let Some(word) = self.0.get_mut(held.index / 64)
            && *word & bit == 0
            && let Some(stream) = held.conn.stream()
            && demote::is_on_rings(stream)
        {
            *word |= bit;
            stream.count_holder();
        }
    }

    /// There is no such program.
    fn take_back(&self) {
        for (number, word) in self.0.iter().enumerate().filter(|(_, word)| **word != 0) {
            for index in (number * 64..).take(64) {
                if word & 1 << (index % 64) != 0
                    && let Some(held) = conn::by_index(index)
                    && let Some(stream) = held.conn.stream()
                {
                    stream.uncount_holder();
                }
            }
        }
    }
}

/// True when a new program gets any connection: where each is closed by `exec`, nothing has to be done.
fn gets_any(actions: *const c_void) -> bool {
    let is_connection = |fd: c_int| matches!(conn::kind(fd), Kind::Conn(_));
    let mut any = PROGRAM.actions.has_missed_some();
    PROGRAM
        .actions
        .copies(actions, |fd, _| any |= is_connection(fd));
    let mut from = 0;
    while let Some(fd) = conn::next_noted(from).filter(|_| !any) {
        any = is_connection(fd) && is_kept_over_exec(fd);
        from = fd + 1;
    }
    any
}

/// Makes ready for a new program, calls what starts it, and takes back what was done for one that does not come to be.
fn spawn(
    loads_shim: impl FnOnce() -> bool,
    actions: *const c_void,
    start: impl FnOnce() -> c_int,
) -> c_int {
    if !is_ready() || is_foreign() || !gets_any(actions) {
        return start();
    }
    tenant::before_exec();
    let mut given = Given([0; CONNS / 64]);
    if crate::process::has_streams() {
        let keep = loads_shim() && !PROGRAM.actions.has_missed_some();
        // What the program is meant to get comes first: where both ends are here, the other one must not end before.
        PROGRAM.actions.copies(actions, |fd, new| {
            if let Some(held) = conn::of(fd) {
                given.give(&held, fd, keep && crate::process::is_looked_at(new));
            }
        });
        let mut from = 0;
        while let Some(fd) = conn::next_noted(from) {
            if let Some(held) = conn::of(fd)
                && is_kept_over_exec(fd)
            {
                given.give(&held, fd, keep && crate::process::is_looked_at(fd));
            }
            from = fd + 1;
        }
        if PROGRAM.actions.has_missed_some() {
            demote::abandon_all(Reason::Exec);
        }
    }
    let error = start();
    if error != 0 {
        let number = real::errno();
        given.take_back();
        real::set_errno(number);
    }
    error
}

macro_rules! spawns {
    ($($name:ident by $finds:ident;)*) => {
        $(
            /// # Safety
            /// As `posix_spawn(3)`.
            pub unsafe fn $name(
                child: *mut c_int,
                path: *const c_char,
                actions: *const c_void,
                attributes: *const c_void,
                argv: *const *mut c_char,
                envp: *const *mut c_char,
            ) -> c_int {
                // SAFETY: as the caller says.
                unsafe {
                    let loads = || !path.is_null() && names_shim(envp.cast()) && $finds(CStr::from_ptr(path));
                    spawn(loads, actions, || real::$name(child, path, actions, attributes, argv, envp))
                }
            }
        )*
    };
}

/// The program at a path.
fn by_path(path: &CStr) -> bool {
    is_dynamic(path, 0)
}

/// The program of this name.
fn by_name(file: &CStr) -> bool {
    in_path(file, |path| is_dynamic(path, 0))
}

spawns! {
    posix_spawn by by_path;
    posix_spawnp by by_name;
    pidfd_spawn by by_path;
    pidfd_spawnp by by_name;
}

/// Whether the shell that libc starts loads the shim.
fn shell_loads() -> bool {
    // SAFETY: environ is libc's.
    unsafe { names_shim(crate::process::environment()) && is_dynamic(c"/bin/sh", 0) }
}

/// # Safety
/// As `system(3)`.
pub unsafe fn system(command: *const c_char) -> c_int {
    let mut status = -1;
    spawn(shell_loads, std::ptr::null(), || {
        // SAFETY: as the caller says.
        status = unsafe { real::system(command) };
        // There was a shell, whatever came of it.
        c_int::from(status == -1)
    });
    status
}

/// # Safety
/// As `popen(3)`.
pub unsafe fn popen(command: *const c_char, mode: *const c_char) -> *mut libc::FILE {
    let mut file = std::ptr::null_mut();
    spawn(shell_loads, std::ptr::null(), || {
        // SAFETY: as the caller says.
        file = unsafe { real::popen(command, mode) };
        c_int::from(file.is_null())
    });
    file
}
