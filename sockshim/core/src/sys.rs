//! System calls without libc: no cancellation point, no errno, no interposed symbol.
//! A result below 0 is the negated error number.

use libc::{c_int, c_void};

/// # Safety
/// As the system call `number` demands of its arguments.
#[inline]
pub unsafe fn call(number: libc::c_long, a: [usize; 6]) -> isize {
    #[cfg(target_arch = "x86_64")]
    {
        let result: isize;
        // SAFETY: the Linux system call convention; the kernel changes rax, rcx and r11 only.
        unsafe {
            std::arch::asm!("syscall", inlateout("rax") number as isize => result,
                in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3], in("r8") a[4],
                in("r9") a[5], lateout("rcx") _, lateout("r11") _, options(nostack));
        }
        result
    }
    #[cfg(target_arch = "aarch64")]
    {
        let result: isize;
        // SAFETY: the Linux system call convention; the kernel changes x0 only.
        unsafe {
            std::arch::asm!("svc 0", in("x8") number, inlateout("x0") a[0] as isize => result,
                in("x1") a[1], in("x2") a[2], in("x3") a[3], in("x4") a[4], in("x5") a[5],
                options(nostack));
        }
        result
    }
}

macro_rules! syscall {
    ($number:ident $(, $arg:expr)*) => {{
        #[allow(unused_mut)]
        let mut args = [0_usize; 6];
        let mut _n = 0;
        $( if let Some(place) = args.get_mut(_n) { *place = $arg as usize; } _n += 1; )*
        // SAFETY: the wrapper below that holds this call states or checks what the call needs.
        unsafe { call(libc::$number, args) }
    }};
}

mod futex;
mod host;
mod peek;
mod processes;
mod room;
mod thread_name;

pub use futex::{futex_wait, futex_wake, is_unfiltered};
pub use host::{Host, host, live_beside};
pub use peek::peek_behind;
pub use processes::{is_alive, may_have_open};
pub use room::{leaves_room, limit_of, most_mappings};
pub use thread_name::thread_name;

/// The thread pointer: distinct for each thread of a process.
#[inline]
pub fn thread_pointer() -> u64 {
    let value: u64;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the psABI keeps the thread pointer's own address at fs:0.
    unsafe {
        std::arch::asm!("mov {}, fs:0", out(reg) value, options(nostack, readonly, preserves_flags));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: reading the register has no effect.
    unsafe {
        std::arch::asm!("mrs {}, tpidr_el0", out(reg) value, options(nostack, nomem, preserves_flags));
    }
    value
}

/// True when the kernel does not have a call, or a filter acts as if: old profiles of containers answer what they do not
/// know with EPERM or EACCES, not with ENOSYS. `error` is an error number, negated or not. Every fall-back asks here.
pub fn is_missing(error: c_int) -> bool {
    matches!(error.abs(), libc::ENOSYS | libc::EPERM | libc::EACCES)
}

/// This process.
pub fn getpid() -> u32 {
    syscall!(SYS_getpid) as u32
}

/// Effective user and group of this thread.
pub fn effective_ids() -> [u32; 2] {
    [syscall!(SYS_geteuid) as u32, syscall!(SYS_getegid) as u32]
}

/// Real, effective and saved user of this thread.
pub fn users() -> [u32; 3] {
    // Nobody's, where a filter forbids the call.
    let mut users = [u32::MAX; 3];
    let [real, effective, saved] = &mut users;
    syscall!(
        SYS_getresuid,
        real as *mut u32,
        effective as *mut u32,
        saved as *mut u32
    );
    users
}

/// As `shutdown(2)`.
pub fn shutdown(fd: c_int, how: c_int) {
    syscall!(SYS_shutdown, fd, how);
}

/// As `close(2)`.
pub fn close(fd: c_int) -> isize {
    syscall!(SYS_close, fd)
}

/// `MSG_DONTWAIT` receive into a buffer; `flags` are added.
pub fn recv_now(fd: c_int, buf: &mut [u8], flags: c_int) -> isize {
    syscall!(
        SYS_recvfrom,
        fd,
        buf.as_mut_ptr(),
        buf.len(),
        flags | libc::MSG_DONTWAIT,
        0,
        0
    )
}

/// # Safety
/// `buf` is valid for writes of `len` bytes.
pub unsafe fn recv_raw(fd: c_int, buf: *mut u8, len: usize, flags: c_int) -> isize {
    syscall!(SYS_recvfrom, fd, buf, len, flags, 0, 0)
}

/// # Safety
/// `buf` is valid for reads of `len` bytes.
pub unsafe fn send_raw(fd: c_int, buf: *const u8, len: usize, flags: c_int) -> isize {
    syscall!(SYS_sendto, fd, buf, len, flags, 0, 0)
}

/// # Safety
/// `msg` points to a valid message header.
pub unsafe fn sendmsg(fd: c_int, msg: *const libc::msghdr, flags: c_int) -> isize {
    syscall!(SYS_sendmsg, fd, msg, flags)
}

/// # Safety
/// `msg` points to a valid message header.
pub unsafe fn recvmsg(fd: c_int, msg: *mut libc::msghdr, flags: c_int) -> isize {
    syscall!(SYS_recvmsg, fd, msg, flags)
}

/// `poll(2)` without waiting.
pub fn poll_now(fds: &mut [libc::pollfd]) -> isize {
    poll_for(fds, Some(0))
}

/// Waits for any of the fds, at most so many milliseconds, or for ever.
pub fn poll_for(fds: &mut [libc::pollfd], ms: Option<i64>) -> isize {
    let limit = ms.map(|ms| libc::timespec {
        tv_sec: ms / 1000,
        tv_nsec: ms % 1000 * 1_000_000,
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    syscall!(SYS_ppoll, fds.as_mut_ptr(), fds.len(), limit, 0, 0)
}

/// Waits for a single fd, at most `ms` milliseconds.
pub fn poll_one(fd: c_int, events: i16, ms: i64) -> isize {
    let mut one = [libc::pollfd {
        fd,
        events,
        revents: 0,
    }];
    let count = poll_for(&mut one, Some(ms));
    if count > 0 {
        one[0].revents as isize
    } else {
        count
    }
}

/// A socket's option of this size, if it has it.
pub fn getsockopt<T>(fd: c_int, level: c_int, name: c_int) -> Option<T> {
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    let mut len = std::mem::size_of::<T>() as libc::socklen_t;
    let result = syscall!(
        SYS_getsockopt,
        fd,
        level,
        name,
        value.as_mut_ptr(),
        &raw mut len
    );
    // SAFETY: zeroed, and callers ask for plain integers or structures of integers.
    (result == 0).then(|| unsafe { value.assume_init() })
}

/// As `setsockopt(2)`.
pub fn setsockopt<T>(fd: c_int, level: c_int, name: c_int, value: &T) -> isize {
    syscall!(
        SYS_setsockopt,
        fd,
        level,
        name,
        value as *const T,
        std::mem::size_of::<T>()
    )
}

/// Does a filter of packets judge what comes on a socket?
pub fn has_filter(fd: c_int) -> bool {
    // Asked for no byte of it, the kernel says how many instructions there are; nothing of a filter that it can't show.
    let mut count: libc::socklen_t = 0;
    let nothing = std::ptr::null_mut::<u8>();
    let result = syscall!(
        SYS_getsockopt,
        fd,
        libc::SOL_SOCKET,
        libc::SO_GET_FILTER,
        nothing,
        &raw mut count
    );
    result == -(libc::EACCES as isize) || result == 0 && count != 0
}

/// The kernel's number of a socket.
pub fn cookie(fd: c_int) -> Option<u64> {
    getsockopt(fd, libc::SOL_SOCKET, libc::SO_COOKIE)
}

/// The kernel's number of the network namespace that a socket is in; 0 where it has none.
pub fn network_namespace(fd: c_int) -> u64 {
    getsockopt(fd, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE).unwrap_or(0)
}

/// `bind`.
pub fn bind(fd: c_int, name: &libc::sockaddr_storage, len: libc::socklen_t) -> isize {
    syscall!(SYS_bind, fd, name as *const libc::sockaddr_storage, len)
}

/// As `listen(2)`.
pub fn listen(fd: c_int, backlog: c_int) -> isize {
    syscall!(SYS_listen, fd, backlog)
}

/// As `connect(2)`.
pub fn connect(fd: c_int, name: &libc::sockaddr_storage, len: libc::socklen_t) -> isize {
    syscall!(SYS_connect, fd, name as *const libc::sockaddr_storage, len)
}

/// Puts a descriptor in the place of another one: `dup3(2)`, and it is kept over exec.
pub fn copy_to(fd: c_int, place: c_int) -> isize {
    syscall!(SYS_dup3, fd, place, 0)
}

/// `getsockname` or, with `peer`, `getpeername`.
pub fn name_of(fd: c_int, peer: bool) -> Option<libc::sockaddr_storage> {
    let mut name = std::mem::MaybeUninit::<libc::sockaddr_storage>::zeroed();
    let mut len = std::mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    let result = if peer {
        syscall!(SYS_getpeername, fd, name.as_mut_ptr(), &raw mut len)
    } else {
        syscall!(SYS_getsockname, fd, name.as_mut_ptr(), &raw mut len)
    };
    // SAFETY: zeroed, and made of integers.
    (result == 0).then(|| unsafe { name.assume_init() })
}

/// Traffic class of what came from the other end when a socket of IPv6 was accepted.
pub fn traffic_class(fd: c_int) -> Option<u8> {
    /// Room for all that a program can have asked for.
    const ROOM: usize = 64;
    /// Length, level and type.
    const HEAD: usize = 16;
    let asked = getsockopt::<c_int>(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS)?;
    if asked == 0 {
        setsockopt(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, &1i32);
    }
    let told = getsockopt::<[u64; ROOM]>(fd, libc::IPPROTO_IPV6, libc::IPV6_2292PKTOPTIONS);
    if asked == 0 {
        setsockopt(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, &0i32);
    }
    let told = told?;
    let mut rest = told.as_slice();
    // Control messages, each of whole words.
    while let [len, kind, value, ..] = rest
        && *len as usize > HEAD
    {
        let [level, kind] = [*kind as u32 as c_int, (*kind >> 32) as c_int];
        if cfg!(target_endian = "little")
            && (level, kind) == (libc::IPPROTO_IPV6, libc::IPV6_TCLASS)
        {
            return Some(*value as u8);
        }
        rest = rest.get((*len as usize).div_ceil(8)..)?;
    }
    None
}

/// An `ioctl` that stores an int.
pub fn ioctl_int(fd: c_int, request: u64) -> Option<c_int> {
    let mut value: c_int = 0;
    (syscall!(SYS_ioctl, fd, request, &raw mut value) == 0).then_some(value)
}

/// As `fcntl(2)`.
pub fn fcntl(fd: c_int, command: c_int, arg: usize) -> isize {
    syscall!(SYS_fcntl, fd, command, arg)
}

/// As `socket(2)`.
pub fn socket(domain: c_int, kind: c_int, protocol: c_int) -> isize {
    syscall!(SYS_socket, domain, kind, protocol)
}

/// A pair of connected UNIX sockets.
pub fn socketpair(kind: c_int) -> Option<[c_int; 2]> {
    let mut fds = [-1; 2];
    (syscall!(SYS_socketpair, libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) == 0).then_some(fds)
}

/// `connect(2)` of a UNIX socket.
pub fn connect_unix(fd: c_int, address: &libc::sockaddr_un, len: usize) -> isize {
    syscall!(SYS_connect, fd, address as *const libc::sockaddr_un, len)
}

/// Breaks a TCP connection at once: the other end gets RST, this one ECONNRESET.
pub fn disconnect(fd: c_int) -> isize {
    // SAFETY: zeroes are an address, of no family.
    let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
    nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
    let size = std::mem::size_of::<libc::sockaddr>();
    syscall!(SYS_connect, fd, &raw const nowhere, size)
}

/// As `memfd_create(2)`.
pub fn memfd(name: &std::ffi::CStr, flags: u32) -> isize {
    syscall!(SYS_memfd_create, name.as_ptr(), flags)
}

/// What the kernel says of an open file.
pub fn stat_of(fd: c_int) -> Option<libc::stat> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: zeroed, and made of integers.
    (syscall!(SYS_fstat, fd, stat.as_mut_ptr()) == 0).then(|| unsafe { stat.assume_init() })
}

/// What the kernel says of the file at a path.
///
/// # Safety
/// `path` is a C string.
pub unsafe fn stat_at(path: *const libc::c_char) -> Option<libc::stat> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: zeroed, and made of integers; the caller vouches for the path.
    (syscall!(SYS_newfstatat, libc::AT_FDCWD, path, stat.as_mut_ptr(), 0) == 0)
        .then(|| unsafe { stat.assume_init() })
}

/// True for a program that gets capabilities when it is executed, so that its loader preloads nothing.
pub fn has_capabilities(fd: c_int) -> bool {
    syscall!(SYS_fgetxattr, fd, c"security.capability".as_ptr(), 0, 0) > 0
}

/// Size of a file, in bytes.
pub fn file_size(fd: c_int) -> Option<u64> {
    Some(stat_of(fd)?.st_size as u64)
}

/// True for a file that is sealed against shrinking: a load from its mapping never faults.
pub fn cannot_shrink(fd: c_int) -> bool {
    let seals = fcntl(fd, libc::F_GET_SEALS, 0);
    seals >= 0 && seals as c_int & libc::F_SEAL_SHRINK != 0
}

/// Maps `len` bytes of a file shared and writable, or with `fd` -1 private zeroes. `None` when the kernel refuses.
///
/// A mapping costs nothing until it is touched, also in a program that locks all its future memory
/// (`mlockall(MCL_FUTURE)`): the kernel fills what it may access at once, so it is made without access, and gets that
/// when it is unlocked.
pub fn map(fd: c_int, len: usize) -> Option<*mut u8> {
    let at = map_at(std::ptr::null_mut(), libc::PROT_NONE, 0, fd, len);
    if (-4095..=0).contains(&at) {
        return None;
    }
    unlock(at as *mut u8, len);
    if syscall!(SYS_mprotect, at, len, libc::PROT_READ | libc::PROT_WRITE) != 0 {
        // SAFETY: just mapped, and nobody has seen it.
        unsafe { unmap(at as *mut u8, len) };
        return None;
    }
    Some(at as *mut u8)
}

/// Maps what [`map`] would in the place of what is mapped there, in one step: a program that locks its future memory has
/// it filled. False when the kernel refuses; then what was there still is.
///
/// # Safety
/// `at` is a mapping of `len` bytes of this process's own, and what uses it may find the new bytes there.
pub unsafe fn map_over(at: *mut u8, fd: c_int, len: usize) -> bool {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let is_mapped = map_at(at, access, libc::MAP_FIXED, fd, len) == at as isize;
    if is_mapped {
        unlock(at, len);
    }
    is_mapped
}

fn map_at(at: *mut u8, access: c_int, more: c_int, fd: c_int, len: usize) -> isize {
    let flags = if fd < 0 {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE
    } else {
        libc::MAP_SHARED
    };
    syscall!(SYS_mmap, at, len, access, flags | more, fd, 0)
}

/// Keeps a mapping in memory: all of it, or what is used of it.
pub fn lock(at: usize, len: usize, on_fault: bool) -> isize {
    let result = syscall!(SYS_mlock2, at, len, usize::from(on_fault));
    if !on_fault && is_missing(result as c_int) {
        return syscall!(SYS_mlock, at, len);
    }
    result
}

/// Lets the kernel take pages of a mapping away again, and fill none.
pub fn unlock(at: *mut u8, len: usize) {
    syscall!(SYS_munlock, at, len);
}

/// # Safety
/// Nothing uses the mapping any more.
pub unsafe fn unmap(at: *mut u8, len: usize) {
    syscall!(SYS_munmap, at, len);
}

/// As `madvise(2)`.
pub fn advise(at: *mut u8, len: usize, advice: c_int) {
    syscall!(SYS_madvise, at, len, advice);
}

/// An epoll instance, closed on exec.
pub fn epoll_create() -> isize {
    syscall!(SYS_epoll_create1, libc::EPOLL_CLOEXEC)
}

/// An eventfd, closed on exec.
pub fn eventfd() -> isize {
    syscall!(SYS_eventfd2, 0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
}

/// Makes an eventfd readable.
pub fn eventfd_add(fd: c_int) {
    let one = 1_u64;
    syscall!(SYS_write, fd, &raw const one, 8);
}

/// As `epoll_ctl(2)`.
pub fn epoll_ctl(epfd: c_int, op: c_int, fd: c_int, event: Option<&libc::epoll_event>) -> isize {
    let event = event.map_or(std::ptr::null(), |event| event as *const libc::epoll_event);
    syscall!(SYS_epoll_ctl, epfd, op, fd, event)
}

/// `epoll_wait(2)` without waiting.
pub fn epoll_now(epfd: c_int, events: &mut [libc::epoll_event]) -> isize {
    syscall!(
        SYS_epoll_pwait,
        epfd,
        events.as_mut_ptr(),
        events.len().min(i32::MAX as usize),
        0,
        0,
        8
    )
}

/// As `sched_yield(2)`.
pub fn sched_yield() {
    syscall!(SYS_sched_yield);
}

/// The number of the core that this thread runs on, plus 1; 0 when it is not known.
#[inline]
pub fn core() -> u32 {
    ((host().getcpu)() + 1) as u32
}

/// True when the kernel closes ranges of descriptors in one call.
pub fn has_close_range() -> bool {
    // No descriptor has this number.
    syscall!(SYS_close_range, u32::MAX, u32::MAX, 0) == 0
}

/// As `close_range(2)`.
pub fn close_range(first: u32, last: u32, flags: c_int) -> isize {
    syscall!(SYS_close_range, first, last, flags)
}

/// Opens a folder, to be listed.
pub fn open_folder(path: &std::ffi::CStr) -> isize {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    syscall!(SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0)
}

/// The next entries of a folder, as the kernel writes them; how many bytes.
pub fn list(folder: c_int, entries: &mut [u64]) -> isize {
    let size = size_of_val(entries);
    syscall!(SYS_getdents64, folder, entries.as_mut_ptr(), size)
}

/// The next [`list`] begins at the first entry.
pub fn rewind(folder: c_int) {
    syscall!(SYS_lseek, folder, 0, libc::SEEK_SET);
}

/// Calls `found` with each entry of a [`list`] of `len` bytes that is named by a number.
pub fn each_number(entries: &[u64], len: usize, mut found: impl FnMut(c_int)) {
    // linux_dirent64: the entry's length at 16, its name from 19 on.
    let byte = |at: usize| {
        entries
            .get(at / 8)
            .map_or(0, |word| word.to_ne_bytes()[at % 8])
    };
    let mut at = 0;
    while at + 19 < len {
        let size = usize::from(u16::from_ne_bytes([byte(at + 16), byte(at + 17)]));
        let mut name = (at + 19..at + size).map(byte).take_while(|byte| *byte != 0);
        let number = name.try_fold(0_u32, |number, byte| {
            let digit = byte.is_ascii_digit().then(|| u32::from(byte - b'0'))?;
            number.checked_mul(10)?.checked_add(digit)
        });
        if let Some(number) = number.and_then(|number| c_int::try_from(number).ok()) {
            found(number);
        }
        at += size.max(19);
    }
}

/// True while a process has this thread.
pub fn is_thread_alive(pid: u32, thread: u32) -> bool {
    syscall!(SYS_tgkill, pid, thread, 0) != -(libc::ESRCH as isize)
}

/// This thread.
pub fn gettid() -> u32 {
    syscall!(SYS_gettid) as u32
}

/// Sends a signal to this thread.
pub fn raise(signal: c_int) {
    syscall!(SYS_tgkill, getpid(), gettid(), signal);
}

/// Writes to the standard error output, for a process that is about to end.
pub fn print_error(text: &str) {
    syscall!(SYS_write, libc::STDERR_FILENO, text.as_ptr(), text.len());
}

/// Blocks all signals of this thread; the mask before.
pub fn block_signals() -> u64 {
    block_these_signals(u64::MAX)
}

/// Blocks these signals of this thread as well; the mask before.
pub fn block_these_signals(signals: u64) -> u64 {
    let mut old = 0_u64;
    syscall!(
        SYS_rt_sigprocmask,
        libc::SIG_BLOCK,
        &raw const signals,
        &raw mut old,
        8
    );
    old
}

/// Puts this mask of signals in place again.
pub fn restore_signals(mask: u64) {
    syscall!(SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, 0, 8);
}

/// An fd that is readable while one of these signals waits for the thread that looks, blocked: a new one, or `fd`, if that is
/// one. Negative on failure.
pub fn signal_fd(fd: c_int, signals: u64) -> c_int {
    syscall!(SYS_signalfd4, fd, &raw const signals, 8, libc::SFD_CLOEXEC) as c_int
}

/// The signals that wait for this thread, blocked.
pub fn pending_signals() -> u64 {
    let mut pending = 0_u64;
    syscall!(SYS_rt_sigpending, &raw mut pending, 8);
    pending
}

/// Whether the handler of a signal starts calls again (`SA_RESTART`); `None` without a handler.
fn restarts(signal: c_int) -> Option<bool> {
    // As the kernel has it: handler, flags, restorer, mask.
    let mut action = [0_usize; 4];
    syscall!(SYS_rt_sigaction, signal, 0, &raw mut action, 8);
    let is_handled = action[0] != libc::SIG_DFL && action[0] != libc::SIG_IGN;
    is_handled.then_some(action[1] & libc::SA_RESTART as usize != 0)
}

fn each_signal(of: u64) -> impl Iterator<Item = c_int> {
    (1..=64).filter(move |signal| of & (1 << (signal - 1)) != 0)
}

/// True when one of these signals has a handler that interrupts calls.
pub fn interrupt(signals: u64) -> bool {
    each_signal(signals).any(|signal| restarts(signal) == Some(false))
}

/// Those of these signals that have a handler which starts calls again.
pub fn restarting_signals(of: u64) -> u64 {
    each_signal(of)
        .filter(|signal| restarts(*signal) == Some(true))
        .fold(0, |all, signal| all | 1 << (signal - 1))
}

/// Takes part in global expedited membarriers; true when the kernel has them.
pub fn register_membarrier() -> bool {
    const REGISTER_GLOBAL_EXPEDITED: usize = 1 << 2;
    syscall!(SYS_membarrier, REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0
}

/// A full barrier on every thread of every process that takes part.
/// False when the kernel refuses.
pub fn membarrier() -> bool {
    const GLOBAL_EXPEDITED: usize = 1 << 1;
    syscall!(SYS_membarrier, GLOBAL_EXPEDITED, 0, 0) == 0
}

/// # Safety
/// `buf` is valid for writes of `len` bytes; `offset` is null or points to an offset.
pub unsafe fn pread(fd: c_int, buf: *mut u8, len: usize, offset: Option<i64>) -> isize {
    match offset {
        Some(offset) => syscall!(SYS_pread64, fd, buf, len, offset),
        None => syscall!(SYS_read, fd, buf, len),
    }
}

/// # Safety
/// `buf` is valid for reads of `len` bytes.
pub unsafe fn pwrite(fd: c_int, buf: *const u8, len: usize, offset: usize) -> isize {
    syscall!(SYS_pwrite64, fd, buf, len, offset)
}

/// # Safety
/// `buf` is valid for reads of `len` bytes.
pub unsafe fn write(fd: c_int, buf: *const u8, len: usize) -> isize {
    syscall!(SYS_write, fd, buf, len)
}

/// Sends from a file, from `offset` on, which is moved, or from the file's own position.
pub fn sendfile(to: c_int, file: c_int, offset: Option<&mut i64>, len: usize) -> isize {
    let offset = offset.map_or(std::ptr::null_mut(), std::ptr::from_mut);
    syscall!(SYS_sendfile, to, file, offset, len)
}

/// Moves bytes between a pipe and something else.
pub fn splice(from: c_int, to: c_int, len: usize, flags: u32) -> isize {
    syscall!(SYS_splice, from, 0, to, 0, len, flags)
}

/// Opens a path read-only, for looking at a program before exec, or at what the system says. Where a FIFO lies in its place, nobody waits.
pub fn open_read(path: *const libc::c_char) -> isize {
    open_at(libc::AT_FDCWD, path)
}

/// As [`open_read`], from a folder on.
pub fn open_at(folder: c_int, path: *const libc::c_char) -> isize {
    syscall!(
        SYS_openat,
        folder,
        path,
        libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK,
        0
    )
}

/// Writes a line to stderr: the only thing the shim ever says, once per cause.
pub fn warn(text: &str) {
    warn_with(&[text]);
}

/// As [`warn`], with a line in pieces.
pub fn warn_with(pieces: &[&str]) {
    for piece in ["rdsock: "].iter().chain(pieces).chain(&["\n"]) {
        // SAFETY: a string is valid for its length.
        unsafe { write(2, piece.as_ptr(), piece.len()) };
    }
}

/// A number in digits, which are put into `room`.
pub fn decimal(mut number: u32, room: &mut [u8; 10]) -> &str {
    let mut start = room.len();
    for (place, digit) in room.iter_mut().enumerate().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        start = place;
        if number == 0 {
            break;
        }
    }
    let digits = room.get(start..).unwrap_or_default();
    std::str::from_utf8(digits).unwrap_or_default()
}

/// A pointer that cannot be the program's: null and the kernel's half.
pub fn is_bad_pointer(at: *const c_void) -> bool {
    (at as usize) < 4096 || (at as isize) < 0
}
