//! Programs that are started by `posix_spawn` and its kin, `system` and `popen`: libc makes the child by itself, and calls
//! no handler. What the child gets is counted before, since the parent may close it before the child has asked for it.

use crate::conn::{self, CONNS, Kind, Use};
use crate::process::{
    fits_new_program, in_path, is_dynamic, is_foreign, is_kept_over_exec, is_ready, names_shim,
};
use crate::{demote, real, sys, tenant};
use libc::{c_char, c_int, c_void};
use rdsock_shm::reason::Reason;
use std::ffi::CStr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering::*};

/// File actions that are remembered at once, of all objects.
const ACTIONS: usize = 1 << 16;

/// A descriptor that a spawned program gets under another number: what `adddup2` was told for one object of file actions.
struct Action {
    /// The object, while it says so; else null.
    of: AtomicPtr<c_void>,
    /// The descriptor and its new number, in the upper and the lower half.
    copy: AtomicU64,
    /// Which of an object's actions comes first.
    turn: AtomicU32,
}

/// Mapped with the first action.
static TABLE: AtomicPtr<Action> = AtomicPtr::new(std::ptr::null_mut());
/// One more than the highest entry ever used.
static HIGH: AtomicU32 = AtomicU32::new(0);
static TURNS: AtomicU32 = AtomicU32::new(0);
/// 1 when an action could not be noted: a spawned program may get anything then.
static OVERFLOWN: AtomicU32 = AtomicU32::new(0);

fn entry(index: usize) -> Option<&'static Action> {
    let table = TABLE.load(Acquire);
    // SAFETY: the table has so many zeroed entries, of atomics, and is never unmapped.
    (index < ACTIONS && !table.is_null()).then(|| unsafe { &*table.add(index) })
}

fn entries() -> impl Iterator<Item = &'static Action> {
    (0..HIGH.load(Acquire) as usize).map_while(entry)
}

fn make_table() {
    let size = ACTIONS * size_of::<Action>();
    if TABLE.load(Acquire).is_null()
        && let Some(table) = sys::map(-1, size)
        && TABLE
            .compare_exchange(std::ptr::null_mut(), table.cast(), AcqRel, Relaxed)
            .is_err()
    {
        // SAFETY: just mapped, and another thread's stands in its place.
        unsafe { sys::unmap(table, size) };
    }
}

/// Notes an action of an object. False when there is no room.
fn note(of: *mut c_void, fd: c_int, new: c_int) -> bool {
    make_table();
    let copy = u64::from(fd as u32) << 32 | u64::from(new as u32);
    let turn = TURNS.fetch_add(1, Relaxed);
    // Taken under a name that is nobody's until the rest is there.
    let taken = std::ptr::without_provenance_mut(1);
    for index in 0..ACTIONS {
        let Some(action) = entry(index) else {
            return false;
        };
        let null = std::ptr::null_mut();
        if action
            .of
            .compare_exchange(null, taken, AcqRel, Relaxed)
            .is_ok()
        {
            action.copy.store(copy, Relaxed);
            action.turn.store(turn, Relaxed);
            action.of.store(of, Release);
            HIGH.fetch_max(index as u32 + 1, AcqRel);
            return true;
        }
    }
    false
}

/// An object of file actions begins, or ends.
fn forget(of: *mut c_void) {
    for action in entries() {
        let _ = action
            .of
            .compare_exchange(of, std::ptr::null_mut(), AcqRel, Relaxed);
    }
}

/// The new numbers that an object's actions give, with the descriptor that each was copied from at first.
fn copies(of: *const c_void, mut found: impl FnMut(c_int, c_int)) {
    let numbers = |action: &Action| {
        let copy = action.copy.load(Relaxed);
        ((copy >> 32) as c_int, copy as u32 as c_int)
    };
    let own = || entries().filter(move |action| action.of.load(Acquire).cast_const() == of);
    for action in own() {
        let (mut from, new) = numbers(action);
        // It may be a copy of a copy.
        let mut turn = action.turn.load(Relaxed);
        let before = |turn: u32, from: c_int| {
            own()
                .filter(|other| other.turn.load(Relaxed) < turn && numbers(other).1 == from)
                .max_by_key(|other| other.turn.load(Relaxed))
        };
        while let Some(other) = before(turn, from) {
            from = numbers(other).0;
            turn = other.turn.load(Relaxed);
        }
        found(from, new);
    }
}

/// # Safety
/// As `posix_spawn_file_actions_init`.
pub unsafe fn posix_spawn_file_actions_init(actions: *mut c_void) -> c_int {
    forget(actions);
    // SAFETY: as the caller says.
    unsafe { real::posix_spawn_file_actions_init(actions) }
}

/// # Safety
/// As `posix_spawn_file_actions_destroy`.
pub unsafe fn posix_spawn_file_actions_destroy(actions: *mut c_void) -> c_int {
    forget(actions);
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
    if result == 0 && is_ready() && !is_foreign() && !note(actions, fd, new) {
        OVERFLOWN.store(1, Relaxed);
    }
    result
}

/// Streams that a spawned program was counted for, once each, by their connections' numbers.
struct Given([u64; CONNS / 64]);

impl Given {
    /// A stream goes to the new program, if that can ask for it.
    fn give(&mut self, held: &Use, fd: c_int, keep: bool) {
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
            stream.page().holders.fetch_add(1, AcqRel);
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
                    stream.page().holders.fetch_sub(1, AcqRel);
                }
            }
        }
    }
}

/// True when a new program gets any connection: where each is closed by `exec`, nothing has to be done.
fn gets_any(actions: *const c_void) -> bool {
    let is_connection = |fd: c_int| matches!(conn::kind(fd), Kind::Conn(_));
    let mut any = OVERFLOWN.load(Relaxed) != 0;
    copies(actions, |fd, _| any |= is_connection(fd));
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
        let keep = loads_shim() && OVERFLOWN.load(Relaxed) == 0;
        // What the program is meant to get comes first: where both ends are here, the other one must not end before.
        copies(actions, |fd, new| {
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
        if OVERFLOWN.load(Relaxed) != 0 {
            demote::abandon_all(Reason::Exec);
        }
    }
    let error = start();
    if error != 0 {
        let number = sys::errno();
        given.take_back();
        sys::set_errno(number);
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
