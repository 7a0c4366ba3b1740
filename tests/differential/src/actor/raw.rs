//! System calls that pass the shim by, so that looking changes nothing; and signals.
//!
//! They only ask: of the anchor of a stream they take and change nothing.

use std::arch::asm;
use std::os::fd::RawFd;

use libc::{c_int, c_long};

const SIOCOUTQNSD: c_long = 0x894B;

/// A system call of five arguments, without libc.
///
/// # Safety
/// As the call.
#[cfg(target_arch = "x86_64")]
unsafe fn call(number: c_long, args: [c_long; 5]) -> c_long {
    let result;
    // SAFETY: as the caller says; the kernel changes these registers alone.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
            in("r10") args[3], in("r8") args[4], lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// A system call of five arguments, without libc.
///
/// # Safety
/// As the call.
#[cfg(target_arch = "aarch64")]
unsafe fn call(number: c_long, args: [c_long; 5]) -> c_long {
    let result;
    // SAFETY: as the caller says.
    unsafe {
        asm!("svc 0", in("x8") number, inlateout("x0") args[0] => result, in("x1") args[1], in("x2") args[2],
            in("x3") args[3], in("x4") args[4], options(nostack));
    }
    result
}

/// Waits until TCP has sent what it was given, for 5 ms at most: what is sent over loopback has arrived.
pub fn settle(fd: RawFd) {
    for _ in 0..50 {
        let mut unsent: c_int = 0;
        let args = [fd.into(), SIOCOUTQNSD, &raw mut unsent as c_long, 0, 0];
        // SAFETY: the kernel stores an int.
        let done = unsafe { call(libc::SYS_ioctl, args) };
        if done < 0 || unsent == 0 {
            return;
        }
        nap(100);
    }
}

/// Bytes that the kernel's TCP has sent and received on a connection: they stand still where rings carry it.
pub fn kernel_bytes(fd: RawFd) -> Option<(u64, u64)> {
    let mut told = [0_u8; 256];
    let mut length: libc::socklen_t = 256;
    let args = [
        fd.into(),
        libc::IPPROTO_TCP.into(),
        libc::TCP_INFO.into(),
        told.as_mut_ptr() as c_long,
        &raw mut length as c_long,
    ];
    // SAFETY: the kernel stores at most `length` bytes.
    let done = unsafe { call(libc::SYS_getsockopt, args) };
    let word = |at: usize| {
        let bytes = told.get(at..at + 8)?.try_into().ok()?;
        Some(u64::from_ne_bytes(bytes))
    };
    // tcpi_bytes_sent and tcpi_bytes_received of linux/tcp.h.
    (done == 0 && length >= 208).then(|| Some((word(200)?, word(128)?)))?
}

/// Sleeps.
pub fn nap(microseconds: u64) {
    std::thread::sleep(std::time::Duration::from_micros(microseconds));
}

/// The calling thread's number.
pub fn thread_number() -> c_int {
    // SAFETY: no requirements.
    unsafe { libc::gettid() }
}

extern "C" fn note(_: c_int) {}

/// SIGUSR1 interrupts calls, SIGUSR2 lets them go on, and nothing ends the process; SIGPIPE is ignored.
pub fn note_signals() {
    let handler = note as extern "C" fn(c_int) as usize;
    for (signal, flags, handler) in [
        (libc::SIGUSR1, 0, handler),
        (libc::SIGUSR2, libc::SA_RESTART, handler),
        (libc::SIGPIPE, 0, libc::SIG_IGN),
        (libc::SIGIO, 0, libc::SIG_IGN),
    ] {
        // SAFETY: an empty action is all zeros; the handler does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler;
            action.sa_flags = flags;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}
