//! `syscall`: programs that make socket calls by number get the same functions.

use crate::{calls, children, conn, demote, handing_over, locked, options, process, real, tenant};
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
    conn::forget_all();
}

/// # Safety
/// As `prctl(2)`: its arguments come in registers, as in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prctl(
    option: c_int,
    a: c_ulong,
    b: c_ulong,
    c: c_ulong,
    d: c_ulong,
) -> c_int {
    if option == libc::PR_SET_SECCOMP {
        before_sandbox();
    }
    // SAFETY: as the caller says.
    unsafe { real::prctl(option, a, b, c, d) }
}

/// # Safety
/// As `syscall(2)`: its arguments come in registers (and the last on the stack), as in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: c_ulong,
    b: c_ulong,
    c: c_ulong,
    d: c_ulong,
    e: c_ulong,
    f: c_ulong,
) -> c_long {
    let fd = a as c_int;
    // SAFETY: each function gets the arguments that the system call of this number has.
    unsafe {
        match number {
            libc::SYS_read => calls::read(fd, b as _, c as _) as _,
            libc::SYS_write => calls::write(fd, b as _, c as _) as _,
            libc::SYS_readv => calls::readv(fd, b as _, c as _) as _,
            libc::SYS_writev => calls::writev(fd, b as _, c as _) as _,
            libc::SYS_recvfrom => calls::recvfrom(fd, b as _, c as _, d as _, e as _, f as _) as _,
            libc::SYS_sendto => calls::sendto(fd, b as _, c as _, d as _, e as _, f as _) as _,
            libc::SYS_recvmsg => calls::recvmsg(fd, b as _, c as _) as _,
            libc::SYS_sendmsg => calls::sendmsg(fd, b as _, c as _) as _,
            libc::SYS_recvmmsg => calls::recvmmsg(fd, b as _, c as _, d as _, e as _) as _,
            libc::SYS_sendmmsg => calls::sendmmsg(fd, b as _, c as _, d as _) as _,
            libc::SYS_sendfile => calls::sendfile(fd, b as _, c as _, d as _) as _,
            libc::SYS_splice => calls::splice(fd, b as _, c as _, d as _, e as _, f as _) as _,
            libc::SYS_socket => calls::socket(fd, b as _, c as _) as _,
            libc::SYS_connect => calls::connect(fd, b as _, c as _) as _,
            libc::SYS_listen => calls::listen(fd, b as _) as _,
            libc::SYS_accept => calls::accept(fd, b as _, c as _) as _,
            libc::SYS_accept4 => calls::accept4(fd, b as _, c as _, d as _) as _,
            libc::SYS_getsockname => calls::getsockname(fd, b as _, c as _) as _,
            libc::SYS_getpeername => calls::getpeername(fd, b as _, c as _) as _,
            libc::SYS_shutdown => calls::shutdown(fd, b as _) as _,
            libc::SYS_close => calls::close(fd) as _,
            libc::SYS_close_range => calls::close_range(a as _, b as _, c as _) as _,
            libc::SYS_preadv2 => calls::preadv2(fd, b as _, c as _, d as _, f as _) as _,
            libc::SYS_pwritev2 => calls::pwritev2(fd, b as _, c as _, d as _, f as _) as _,
            libc::SYS_dup => calls::dup(fd) as _,
            libc::SYS_dup3 => calls::dup3(fd, b as _, c as _) as _,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_dup2 => calls::dup2(fd, b as _) as _,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_poll => calls::poll(a as _, b as _, c as _) as _,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_select => calls::select(fd, b as _, c as _, d as _, e as _) as _,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_epoll_wait => calls::epoll_wait(fd, b as _, c as _, d as _) as _,
            libc::SYS_ppoll => calls::ppoll(a as _, b as _, c as _, d as _) as _,
            libc::SYS_pselect6 => {
                // The last argument points to the mask and its size.
                let mask = if f == 0 {
                    std::ptr::null()
                } else {
                    *(f as *const *const libc::sigset_t)
                };
                calls::pselect(fd, b as _, c as _, d as _, e as _, mask) as _
            }
            #[cfg(target_arch = "x86_64")]
            libc::SYS_epoll_create => calls::epoll_create(fd) as _,
            libc::SYS_epoll_create1 => calls::epoll_create1(fd) as _,
            libc::SYS_epoll_ctl => calls::epoll_ctl(fd, b as _, c as _, d as _) as _,
            libc::SYS_epoll_pwait => calls::epoll_pwait(fd, b as _, c as _, d as _, e as _) as _,
            libc::SYS_epoll_pwait2 => calls::epoll_pwait2(fd, b as _, c as _, d as _, e as _) as _,
            libc::SYS_fcntl => options::fcntl(fd, b as _, c) as _,
            libc::SYS_ioctl => options::ioctl(fd, b, c) as _,
            libc::SYS_setsockopt => options::setsockopt(fd, b as _, c as _, d as _, e as _) as _,
            libc::SYS_getsockopt => options::getsockopt(fd, b as _, c as _, d as _, e as _) as _,
            libc::SYS_execve => process::rdsock_execve(a as _, b as _, c as _) as _,
            libc::SYS_execveat => process::execveat(fd, b as _, c as _, d as _, e as _) as _,
            libc::SYS_clone => children::clone_by_number(a, [b, c, d, e]),
            libc::SYS_clone3 => children::clone3_by_number(a, b),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_fork => children::clone_by_number(SIGCHLD, [0; 4]),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_vfork => {
                children::clone_by_number(SIGCHLD | libc::CLONE_VFORK as c_ulong, [0; 4])
            }
            libc::SYS_unshare => children::unshare(fd) as _,
            libc::SYS_setns => children::setns(fd, b as _) as _,
            libc::SYS_io_uring_setup => {
                calls::making_uring();
                real::syscall(number, a, b, c, d, e, f)
            }
            libc::SYS_io_submit => {
                calls::submitting(b as _, c as _);
                real::syscall(number, a, b, c, d, e, f)
            }
            libc::SYS_bpf => {
                if a == BPF_MAP_UPDATE_ELEM {
                    handing_over::put_into_map(b as _, c);
                }
                real::syscall(number, a, b, c, d, e, f)
            }
            libc::SYS_mount => handing_over::mount(a as _, b as _, c as _, d, e as _) as _,
            libc::SYS_fsconfig => {
                handing_over::configuring(b as _, c as _, d as _, e as _);
                real::syscall(number, a, b, c, d, e, f)
            }
            libc::SYS_mlockall => locked::mlockall(fd) as _,
            libc::SYS_prctl => prctl(a as _, b, c, d, e) as _,
            libc::SYS_seccomp => {
                if a == SECCOMP_SET_MODE_STRICT || a == SECCOMP_SET_MODE_FILTER {
                    before_sandbox();
                }
                real::syscall(number, a, b, c, d, e, f)
            }
            _ => real::syscall(number, a, b, c, d, e, f),
        }
    }
}
