//! The life of the process: loading, fork, exec.

use crate::conn::{self, Kind, born};
use crate::fds::{self, STDERR};
use crate::identity::{self, is_foreign, is_ready};
use crate::program::PROGRAM;
use crate::tcp_info::TcpInfo;
use crate::{
    between, brand, children, clock, demote, epoll, host, limits, lost, numbers, real, stream, sys,
    tenant, wait,
};
use libc::{c_char, c_int};
use rdsock_shm::reason::Reason;
use std::ffi::CStr;
use std::sync::atomic::{AtomicU32, Ordering::*};

/// Inherited descriptors that are looked at when a program starts.
const INHERITED: usize = 256;

#[cfg(not(test))]
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn(c_int, *const *const c_char, *const *const c_char) = construct;

/// The program ends by `exit`: its connections are closed as the kernel will close them, but in
/// order: bytes that the other end asked to have again, the end mark, and no unread wake byte, for
/// which the kernel would reset the connection. Called last, since the handlers of the program's and
/// the destructors of its libraries may still send. In a sandbox nothing is done: it may end the process for a call of the shim's.
extern "C" fn at_exit(_: *mut libc::c_void) {
    if !is_ready() || is_foreign() || conn::are_forgotten() {
        return;
    }
    conn::each(|index, conn| {
        if let Some(held) = conn::by_index(index) {
            demote::before_close(&held, conn.fd.load(Relaxed));
        }
    });
}

/// Called by the loader, with what `main` gets (by glibc's): libc may not have been set up yet.
extern "C" fn construct(_: c_int, _: *const *const c_char, environment: *const *const c_char) {
    real::resolve();
    sys::live_beside(&host::LIBC);
    // SAFETY: it takes nothing, and no other thread runs yet.
    unsafe { rdsock_find_memcpy() };
    // In a program of another libc it does nothing: every call is that libc's own. Nor in one that has rights which its
    // caller lacks (set-user-id, say), whose environment is the caller's.
    // SAFETY: both ask for a number.
    if unsafe { rdsock_is_glibc() == 0 || rdsock_is_privileged() != 0 } {
        return;
    }
    // SAFETY: the loader's array, and the program cannot change it yet.
    let env = |name: &CStr| unsafe { value_of(environment, name) };
    identity::note();
    clock::start();
    let disabled = env(c"RDSOCK_DISABLE").is_some_and(is_disabling);
    let spin = env(c"RDSOCK_SPIN_US")
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.parse().ok());
    // SAFETY: no other thread runs yet.
    unsafe { limits::start(env(c"RDSOCK_TEST_LIMITS")) };
    wait::start(spin, cores());
    tenant::start(env(c"RDSOCK_SOCKET"), disabled);
    if !disabled {
        fds::start();
        identity::note_threads(real::symbol(c"__libc_single_threaded").cast());
        epoll::start();
        follow_forks();
        // SAFETY: a function of this library, which stays until the process has ended.
        unsafe { rdsock_at_exit(at_exit) };
    }
    identity::note_ready();
    if !disabled {
        adopt_inherited();
    }
}

unsafe extern "C" {
    /// Of `csrc/libc.c`: glibc's `__register_atfork`.
    fn rdsock_follow_forks(
        before: extern "C" fn(),
        in_parent: extern "C" fn(),
        in_child: extern "C" fn(),
    );
    /// Of `csrc/libc.c`: finds the best copy function of this libc.
    fn rdsock_find_memcpy();
    /// Of `csrc/libc.c`: glibc's `__cxa_atexit`.
    fn rdsock_at_exit(last: extern "C" fn(*mut libc::c_void)) -> c_int;
    /// Of `csrc/libc.c`: whether this is the libc that the shim was made for.
    fn rdsock_is_glibc() -> c_int;
    /// Of `csrc/libc.c`: whether the program was given rights that its caller lacks.
    fn rdsock_is_privileged() -> c_int;
}

/// Has libc call us around each `fork`.
fn follow_forks() {
    // SAFETY: the handlers are functions of this library, which is never unloaded before the
    // process ends (it is preloaded).
    unsafe { rdsock_follow_forks(before_fork, after_fork_in_parent, after_fork_in_child) };
}

/// The value of a variable.
///
/// # Safety
/// `environment` is null or a null-terminated array of C strings, which stay as they are.
unsafe fn value_of(environment: *const *const c_char, name: &CStr) -> Option<&'static CStr> {
    let mut at = environment;
    // SAFETY: the caller vouches for the array.
    unsafe {
        while !at.is_null() && !(*at).is_null() {
            let entry = CStr::from_ptr(*at).to_bytes_with_nul();
            if let Some(value) = entry.strip_prefix(name.to_bytes())
                && let Some(value) = value.strip_prefix(b"=")
            {
                return CStr::from_bytes_with_nul(value).ok();
            }
            at = at.add(1);
        }
    }
    None
}

fn cores() -> usize {
    // SAFETY: a set of bits; zeroes are a value, and it is valid for writes of its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return 2;
        }
        libc::CPU_COUNT(&set) as usize
    }
}

/// Sockets that another program image has left to this one.
fn adopt_inherited() {
    let mut fds = [libc::pollfd {
        fd: -1,
        events: 0,
        revents: 0,
    }; INHERITED];
    for (fd, entry) in fds.iter_mut().enumerate() {
        entry.fd = fd as c_int;
    }
    sys::poll_now(&mut fds);
    for entry in fds
        .iter()
        .filter(|entry| entry.revents & libc::POLLNVAL == 0)
    {
        let fd = entry.fd;
        if !is_tcp(fd) {
            continue;
        }
        match TcpInfo::of(fd) {
            // Whatever has ended since: the ring may have bytes that nobody has received yet.
            Some(info) if info.was_connected() => {
                let twin = (0..fd).find(|other| {
                    matches!(conn::kind(*other), Kind::Conn(_)) && is_same_socket(*other, fd)
                });
                if let Some(Kind::Conn(index)) = twin.map(conn::kind) {
                    numbers::add(fd, Kind::Conn(index));
                } else if let Some(index) = numbers::track(fd, born::UNKNOWN) {
                    if let Some(conn) = conn::at(index) {
                        conn.shared.store(1, Relaxed);
                    }
                    tenant::look_up(index, fd);
                    if let Some(held) = conn::of(fd)
                        && held.conn.stream().is_none()
                    {
                        if brand::is_on(fd) {
                            lose(&held, fd);
                        } else {
                            between::inherited(&held, fd);
                        }
                    }
                    if fd <= STDERR
                        && let Some(held) = conn::of(fd)
                    {
                        demote::abandon(&held, fd, Reason::Stdio);
                    }
                }
            }
            Some(TcpInfo {
                state: TcpInfo::LISTEN,
                ..
            }) => {
                numbers::track(fd, born::NOT_YET);
            }
            _ => {}
        }
    }
}

/// The connection was a stream, and this program is not given it: to the kernel's socket alone it could say and hear what is wrong.
fn lose(held: &conn::Use, fd: c_int) {
    lost::put_reset(fd);
    tenant::lost(held);
    sys::warn(
        "an inherited connection was reset: the daemon did not give this program what the program before had of it \
         (it is stopped, at a limit, or refuses this program)",
    );
}

fn is_same_socket(a: c_int, b: c_int) -> bool {
    sys::cookie(a).is_some_and(|a| Some(a) == sys::cookie(b))
}

/// True for a TCP socket over IPv4 or IPv6.
pub fn is_tcp(fd: c_int) -> bool {
    let option = |name| sys::getsockopt::<c_int>(fd, libc::SOL_SOCKET, name);
    option(libc::SO_PROTOCOL) == Some(libc::IPPROTO_TCP)
        && matches!(
            option(libc::SO_DOMAIN),
            Some(libc::AF_INET | libc::AF_INET6)
        )
}

/// A fork that is under way.
#[derive(Debug)]
pub struct Fork {
    /// 1 when it has taken the tenant's lock.
    locked: AtomicU32,
}

impl Fork {
    /// There is none.
    pub const fn new() -> Self {
        Fork {
            locked: AtomicU32::new(0),
        }
    }
}

/// Before a child gets a copy of this process.
pub extern "C" fn before_fork() {
    children::before_copy();
    PROGRAM
        .fork
        .locked
        .store(u32::from(tenant::before_fork()), Relaxed);
}

/// After that, in the parent.
pub extern "C" fn after_fork_in_parent() {
    if PROGRAM.fork.locked.swap(0, Relaxed) != 0 {
        tenant::after_fork_in_parent();
    }
}

/// And in the child.
pub extern "C" fn after_fork_in_child() {
    identity::note();
    epoll::after_fork_in_child();
    tenant::after_fork_in_child();
}

/// True for a descriptor that a program which this one turns into, or starts, gets under the same number.
pub fn is_kept_over_exec(fd: c_int) -> bool {
    let flags = sys::fcntl(fd, libc::F_GETFD, 0);
    flags >= 0 && flags & libc::FD_CLOEXEC as isize == 0
}

/// True when any connection has been on rings.
pub fn has_streams() -> bool {
    let mut any = false;
    conn::each(|_, conn| any |= conn.stream().is_some());
    any
}

/// Before exec: streams that the new program would have as plain sockets leave the rings, unless it
/// loads the shim and can ask the daemon for them.
fn before_exec(loads_shim: bool) {
    if !is_ready() {
        return;
    }
    tenant::before_exec();
    if !has_streams() {
        return;
    }
    if !is_foreign() {
        each_stream(|stream| stream.go(stream::pid()));
    }
    // A vfork child may have the connection under a number that its parent does not know.
    for fd in 0..conn::high_fd().max(if is_foreign() { INHERITED as c_int } else { 0 }) {
        if !is_kept_over_exec(fd) {
            continue;
        }
        if let Some(held) = conn::of(fd) {
            keep_or_abandon(&held, fd, loads_shim && fd < INHERITED as c_int);
        } else if is_foreign()
            && let Some(wanted) = sys::cookie(fd)
        {
            conn::each(|index, conn| {
                if conn.stream().is_some()
                    && conn.cookie.load(Relaxed) == wanted
                    && let Some(held) = conn::by_index(index)
                {
                    keep_or_abandon(&held, fd, loads_shim);
                }
            });
        }
    }
}

/// True for a number at which a program that starts looks for connections: see [`adopt_inherited`].
pub fn is_looked_at(fd: c_int) -> bool {
    fd > STDERR && fd < INHERITED as c_int
}

/// True when a program can ask the daemon for this stream, if it asks at all (`keep`), and has room for it.
pub fn fits_new_program(held: &conn::Use, keep: bool) -> bool {
    keep && tenant::is_known(held.conn)
        && held.conn.stream().is_none_or(demote::has_other_end)
        && sys::limit_of(libc::RLIMIT_AS) == libc::RLIM_INFINITY
}

/// Both directions may be the kernel's, and nobody has said so yet.
pub fn finish(held: &conn::Use, fd: c_int) {
    if let Some(stream) = held.conn.stream() {
        stream.at(held, fd).finished(Reason::PeerDemoted);
    }
}

/// What becomes of a stream that another program image gets.
fn keep_or_abandon(held: &conn::Use, fd: c_int, keep: bool) {
    finish(held, fd);
    if fd <= STDERR || !fits_new_program(held, keep) {
        demote::abandon(held, fd, Reason::Exec);
    } else if let Some(stream) = held.conn.stream() {
        let pid = sys::getpid();
        if is_foreign() && !stream.is_held_by(pid) {
            stream.count_holder();
        }
        stream.at(held, fd).hold(pid);
    }
}

fn each_stream(found: impl Fn(&stream::Stream)) {
    conn::each(|_, conn| {
        if let Some(stream) = conn.stream() {
            found(stream);
        }
    });
}

/// Runs another program by `call`, which comes back only where it fails.
fn run(loads_shim: bool, call: impl FnOnce() -> c_int) -> c_int {
    before_exec(loads_shim);
    let result = call();
    if is_ready() && !is_foreign() {
        each_stream(|stream| stream.stay(stream::pid()));
    }
    result
}

/// True when a program with this environment loads the shim, if it can, and uses it with the daemon that this one has.
///
/// # Safety
/// `envp` is null or a null-terminated array of C strings.
pub unsafe fn names_shim(envp: *const *const c_char) -> bool {
    // SAFETY: the caller vouches for the array, and it is looked at now.
    let value = |name: &CStr| unsafe { value_of(envp, name) };
    let list = value(c"LD_PRELOAD");
    if value(c"RDSOCK_DISABLE").is_some_and(is_disabling)
        || !tenant::leads_to_daemon(value(c"RDSOCK_SOCKET"))
    {
        return false;
    }
    let Some(list) = list else { return false };
    let mut parts = list.to_bytes().split(|byte| b": ".contains(byte));
    parts.any(|part| part.ends_with(b"librdsock.so") && is_there(part))
}

/// True for a file that can be read. It may be out of reach after a `chroot`.
fn is_there(path: &[u8]) -> bool {
    let mut text = [0_u8; 1024];
    for (to, from) in text.iter_mut().take(1023).zip(path) {
        *to = *from;
    }
    let fd = sys::open_read(text.as_ptr().cast()) as c_int;
    if fd >= 0 {
        sys::close(fd);
    }
    fd >= 0
}

/// Whether a value of `RDSOCK_DISABLE` turns the shim off.
fn is_disabling(value: &CStr) -> bool {
    value != c"0" && value != c""
}

/// True when the program at `path` has a dynamic loader that will load the shim: an ELF file of this
/// machine with glibc's loader, and no set-user-id bit and no capabilities, or a script whose
/// interpreter is one.
pub fn is_dynamic(path: &CStr, depth: u32) -> bool {
    let fd = sys::open_read(path.as_ptr()) as c_int;
    if fd < 0 {
        return false;
    }
    let answer = is_dynamic_file(fd, depth);
    sys::close(fd);
    answer
}

fn is_dynamic_file(fd: c_int, depth: u32) -> bool {
    let mut bytes = [0_u8; 1024];
    if sys::stat_of(fd).is_none_or(|stat| stat.st_mode & 0o6000 != 0) || sys::has_capabilities(fd) {
        return false;
    }
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { sys::pread(fd, bytes.as_mut_ptr(), bytes.len() - 1, Some(0)) };
    if got < 64 && !bytes.starts_with(b"#!") {
        return false;
    }
    if bytes.starts_with(b"#!") && depth == 0 {
        let Some(line) = bytes.get_mut(2..) else {
            return false;
        };
        let start = line.iter().position(|byte| *byte != b' ').unwrap_or(0);
        let Some(word) = line.get_mut(start..) else {
            return false;
        };
        let end = word
            .iter()
            .position(|byte| b" \t\n\0".contains(byte))
            .unwrap_or(0);
        if let Some(byte) = word.get_mut(end) {
            *byte = 0;
        }
        return CStr::from_bytes_until_nul(word).is_ok_and(|path| is_dynamic(path, 1));
    }
    if !bytes.starts_with(b"\x7fELF\x02") {
        return false;
    }
    // Elf64_Ehdr: e_phoff at 32, e_phentsize at 54, e_phnum at 56; p_type is a header's first word.
    let word = |at: usize, len: usize| {
        bytes.get(at..at + len).map_or(0, |bytes| {
            bytes
                .iter()
                .rev()
                .fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
        })
    };
    const PT_INTERP: u64 = 3;
    // e_machine: x86-64, AArch64.
    const MACHINE: u64 = if cfg!(target_arch = "x86_64") {
        62
    } else {
        183
    };
    if word(18, 2) != MACHINE {
        return false;
    }
    let (headers, size, count) = (
        word(32, 8) as usize,
        word(54, 2) as usize,
        word(56, 2) as usize,
    );
    if headers >= 1024 {
        return false;
    }
    let mut all = (0..count.min(64)).map(|i| headers + i * size);
    let Some(header) = all.find(|at| word(*at, 4) == PT_INTERP) else {
        return false;
    };
    // Where the loader's name is: p_offset.
    is_glibcs_loader(fd, word(header + 8, 8))
}

/// True when a program's file names, at `offset`, a loader of glibc: `/lib64/ld-linux-x86-64.so.2`, or as it is called
/// elsewhere. Another libc's loads the shim, but that does nothing there.
fn is_glibcs_loader(fd: c_int, offset: u64) -> bool {
    let mut name = [0_u8; 512];
    // SAFETY: the buffer is valid for its length.
    unsafe { sys::pread(fd, name.as_mut_ptr(), name.len() - 1, Some(offset as i64)) };
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let base = name.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    base.starts_with(b"ld-linux") || base.starts_with(b"ld-2.")
}

/// # Safety
/// As `execve`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdsock_execve(
    path: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
) -> c_int {
    // SAFETY: the caller vouches for the strings.
    unsafe {
        // A program that cannot be run changes nothing.
        if path.is_null() || !is_program(path) {
            return real::execve(path, argv, envp);
        }
        let loads_shim = names_shim(envp) && is_dynamic(CStr::from_ptr(path), 0);
        run(loads_shim, || real::execve(path, argv, envp))
    }
}

/// # Safety
/// `path` is a C string.
unsafe fn is_program(path: *const c_char) -> bool {
    // SAFETY: a C string.
    unsafe {
        libc::access(path, libc::X_OK) == 0
            && sys::stat_at(path).is_some_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFREG)
    }
}

/// # Safety
/// As `execvpe`.
unsafe fn execvpe_with(
    file: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
) -> c_int {
    // SAFETY: the caller vouches for the strings.
    unsafe {
        if file.is_null() {
            return real::execvpe(file, argv, envp);
        }
        let loads_shim =
            names_shim(envp) && in_path(CStr::from_ptr(file), |path| is_dynamic(path, 0));
        run(loads_shim, || real::execvpe(file, argv, envp))
    }
}

/// Calls `test` with the file that `execvp` would take.
pub fn in_path(file: &CStr, mut test: impl FnMut(&CStr) -> bool) -> bool {
    if file.to_bytes().contains(&b'/') {
        return test(file);
    }
    // SAFETY: getenv's string is used at once.
    let path = unsafe {
        let value = libc::getenv(c"PATH".as_ptr());
        if value.is_null() {
            c"/bin:/usr/bin"
        } else {
            CStr::from_ptr(value)
        }
    };
    for folder in path.to_bytes().split(|byte| *byte == b':') {
        let mut buffer = [0_u8; 4096];
        let parts = folder.iter().chain(b"/").chain(file.to_bytes());
        for (to, from) in buffer.iter_mut().take(4095).zip(parts) {
            *to = *from;
        }
        if let Ok(candidate) = CStr::from_bytes_until_nul(&buffer)
            // SAFETY: a C string.
            && unsafe { libc::access(candidate.as_ptr(), libc::X_OK) } == 0
        {
            return test(candidate);
        }
    }
    false
}

unsafe extern "C" {
    static environ: *const *const c_char;
}

/// libc's present environment.
///
/// # Safety
/// No other thread changes it.
pub unsafe fn environment() -> *const *const c_char {
    // SAFETY: as the caller says.
    unsafe { environ }
}

/// # Safety
/// As `execvp`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdsock_execvp(file: *const c_char, argv: *const *const c_char) -> c_int {
    // SAFETY: as the caller says; environ is libc's.
    unsafe { execvpe_with(file, argv, environ) }
}

/// # Safety
/// As `execv`.
pub unsafe fn execv(path: *const c_char, argv: *const *const c_char) -> c_int {
    // SAFETY: as the caller says; environ is libc's.
    unsafe { rdsock_execve(path, argv, environ) }
}

/// # Safety
/// As `execvpe`.
pub unsafe fn execvpe(
    file: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
) -> c_int {
    // SAFETY: as the caller says.
    unsafe { execvpe_with(file, argv, envp) }
}

/// # Safety
/// As `fexecve`.
pub unsafe fn fexecve(fd: c_int, argv: *const *const c_char, envp: *const *const c_char) -> c_int {
    // SAFETY: as the caller says.
    unsafe {
        let loads_shim = names_shim(envp) && is_dynamic_file(fd, 0);
        run(loads_shim, || real::fexecve(fd, argv, envp))
    }
}

/// # Safety
/// As `execveat(2)`.
pub unsafe fn execveat(
    folder: c_int,
    path: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
    flags: c_int,
) -> c_int {
    // SAFETY: as the caller says.
    unsafe {
        let run_it = || {
            let args = [path as _, argv as _, envp as _, flags as _];
            let [path, argv, envp, flags] = args;
            real::syscall(libc::SYS_execveat, folder as _, path, argv, envp, flags, 0) as c_int
        };
        if sys::is_bad_pointer(path.cast()) {
            return run_it();
        }
        let is_fd = flags & libc::AT_EMPTY_PATH != 0 && *path == 0;
        let file = if is_fd {
            folder
        } else {
            sys::open_at(folder, path) as c_int
        };
        if file < 0 {
            return run_it();
        }
        let loads_shim = names_shim(envp) && is_dynamic_file(file, 0);
        if !is_fd {
            sys::close(file);
        }
        run(loads_shim, run_it)
    }
}

/// libc's `vdprintf`; the argument list passes through as the pointer that it is in these ABIs.
///
/// # Safety
/// As `vdprintf(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdsock_real_vdprintf(
    fd: c_int,
    format: *const c_char,
    arguments: *mut libc::c_void,
) -> c_int {
    // SAFETY: as the caller says.
    unsafe { real::vdprintf(fd, format, arguments) }
}
