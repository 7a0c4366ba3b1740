//! The table of all that stands in front of libc's functions. A row is all that a new one needs, beside its body:
//!
//! - `exports.rs` makes the exported function, which calls the body; `also` names others that are the same.
//! - `syscalls.rs` makes the arm of `syscall(2)` for the system call of that `number`.
//! - `real.rs` makes the function that calls libc's own: `early` ones are found when the program starts, `late` ones (of other
//!   libraries, of newer versions of libc, or seldom called) with their first call. An `alias` has none: its body is another's.
//! - `.ci/docs` makes the list in docs/socket-semantics.md, by classes.
//!
//! Types are C's, of a 64-bit machine; variable arguments come in registers, each as one word.

/// Gives the table to a macro, which picks what it is interested in.
macro_rules! table {
    ($then:ident) => {
        $then! {
            functions {
                /// A connection begins to be followed, or its ends are told.
                Makes {
                    early fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int
                        = calls::sockets::socket, number SYS_socket;
                    early fn bind(fd: c_int, address: *const sockaddr, len: socklen_t) -> c_int = calls::sockets::bind;
                    early fn listen(fd: c_int, backlog: c_int) -> c_int = calls::sockets::listen, number SYS_listen;
                    early fn connect(fd: c_int, address: *const sockaddr, len: socklen_t) -> c_int
                        = calls::sockets::connect, number SYS_connect;
                    early fn accept(fd: c_int, address: *mut sockaddr, len: *mut socklen_t) -> c_int
                        = calls::sockets::accept, number SYS_accept;
                    early fn accept4(fd: c_int, address: *mut sockaddr, len: *mut socklen_t, flags: c_int) -> c_int
                        = calls::sockets::accept4, number SYS_accept4;
                    early fn getsockname(fd: c_int, address: *mut sockaddr, len: *mut socklen_t) -> c_int
                        = calls::names::getsockname, number SYS_getsockname;
                    early fn getpeername(fd: c_int, address: *mut sockaddr, len: *mut socklen_t) -> c_int
                        = calls::names::getpeername, number SYS_getpeername;
                }
                /// Bytes move: on the ring where there is one, else in the kernel, and enough of them promote a connection.
                Moves {
                    early fn read(fd: c_int, buf: *mut c_void, len: size_t) -> ssize_t
                        = calls::read_write::read, number SYS_read;
                    early fn write(fd: c_int, buf: *const c_void, len: size_t) -> ssize_t
                        = calls::read_write::write, number SYS_write;
                    early fn readv(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t
                        = calls::read_write::readv, number SYS_readv;
                    early fn writev(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t
                        = calls::read_write::writev, number SYS_writev;
                    early fn preadv2(fd: c_int, iov: *const iovec, count: c_int, offset: off_t, flags: c_int) -> ssize_t
                        = calls::read_write::preadv2, also preadv64v2;
                    early fn pwritev2(fd: c_int, iov: *const iovec, count: c_int, offset: off_t, flags: c_int) -> ssize_t
                        = calls::read_write::pwritev2, also pwritev64v2;
                    early fn recv(fd: c_int, buf: *mut c_void, len: size_t, flags: c_int) -> ssize_t = calls::send_recv::recv;
                    early fn send(fd: c_int, buf: *const c_void, len: size_t, flags: c_int) -> ssize_t = calls::send_recv::send;
                    early fn recvfrom(fd: c_int, buf: *mut c_void, len: size_t, flags: c_int, from: *mut sockaddr,
                        fromlen: *mut socklen_t) -> ssize_t
                        = calls::send_recv::recvfrom, number SYS_recvfrom;
                    early fn sendto(fd: c_int, buf: *const c_void, len: size_t, flags: c_int, to: *const sockaddr,
                        tolen: socklen_t) -> ssize_t
                        = calls::send_recv::sendto, number SYS_sendto;
                    early fn recvmsg(fd: c_int, msg: *mut msghdr, flags: c_int) -> ssize_t
                        = calls::send_recv::recvmsg, number SYS_recvmsg;
                    early fn sendmsg(fd: c_int, msg: *const msghdr, flags: c_int) -> ssize_t
                        = calls::send_recv::sendmsg, number SYS_sendmsg;
                    early fn recvmmsg(fd: c_int, msgs: *mut mmsghdr, count: c_uint, flags: c_int, limit: *mut timespec) -> c_int
                        = calls::send_recv::recvmmsg, number SYS_recvmmsg;
                    early fn sendmmsg(fd: c_int, msgs: *mut mmsghdr, count: c_uint, flags: c_int) -> c_int
                        = calls::send_recv::sendmmsg, number SYS_sendmmsg;
                    early fn sendfile(out: c_int, from: c_int, offset: *mut off_t, count: size_t) -> ssize_t
                        = calls::files::sendfile, number SYS_sendfile;
                    early fn sendfile64(out: c_int, from: c_int, offset: *mut off64_t, count: size_t) -> ssize_t
                        = calls::files::sendfile64;
                    early fn splice(from: c_int, from_at: *mut off64_t, to: c_int, to_at: *mut off64_t, len: size_t,
                        flags: c_uint) -> ssize_t
                        = calls::files::splice, number SYS_splice;
                    alias fn __read_chk(fd: c_int, buf: *mut c_void, len: size_t, room: size_t) -> ssize_t
                        = calls::checked::__read_chk;
                    alias fn __recv_chk(fd: c_int, buf: *mut c_void, len: size_t, room: size_t, flags: c_int) -> ssize_t
                        = calls::checked::__recv_chk;
                    alias fn __recvfrom_chk(fd: c_int, buf: *mut c_void, len: size_t, room: size_t, flags: c_int,
                        from: *mut sockaddr, fromlen: *mut socklen_t) -> ssize_t
                        = calls::checked::__recvfrom_chk;
                }
                /// A program waits for several descriptors.
                Waits {
                    early fn poll(fds: *mut pollfd, count: nfds_t, ms: c_int) -> c_int
                        = calls::poll::poll, #[cfg(target_arch = "x86_64")] number SYS_poll;
                    early fn ppoll(fds: *mut pollfd, count: nfds_t, limit: *const timespec, mask: *const sigset_t) -> c_int
                        = calls::poll::ppoll, number SYS_ppoll;
                    early fn select(count: c_int, read: *mut fd_set, write: *mut fd_set, except: *mut fd_set,
                        limit: *mut timeval) -> c_int
                        = calls::poll::select, #[cfg(target_arch = "x86_64")] number SYS_select;
                    early fn pselect(count: c_int, read: *mut fd_set, write: *mut fd_set, except: *mut fd_set,
                        limit: *const timespec, mask: *const sigset_t) -> c_int
                        = calls::poll::pselect;
                    early fn sigsuspend(mask: *const sigset_t) -> c_int = calls::poll::sigsuspend;
                    early fn pause() -> c_int = calls::poll::pause;
                    alias fn __poll_chk(fds: *mut pollfd, count: nfds_t, ms: c_int, room: size_t) -> c_int
                        = calls::checked::__poll_chk;
                    alias fn __ppoll_chk(fds: *mut pollfd, count: nfds_t, limit: *const timespec, mask: *const sigset_t,
                        room: size_t) -> c_int
                        = calls::checked::__ppoll_chk;
                    early fn epoll_create(size: c_int) -> c_int
                        = calls::epoll::epoll_create, #[cfg(target_arch = "x86_64")] number SYS_epoll_create;
                    early fn epoll_create1(flags: c_int) -> c_int = calls::epoll::epoll_create1, number SYS_epoll_create1;
                    early fn epoll_ctl(epfd: c_int, op: c_int, fd: c_int, event: *mut epoll_event) -> c_int
                        = calls::epoll::epoll_ctl, number SYS_epoll_ctl;
                    early fn epoll_wait(epfd: c_int, events: *mut epoll_event, most: c_int, ms: c_int) -> c_int
                        = calls::epoll::epoll_wait, #[cfg(target_arch = "x86_64")] number SYS_epoll_wait;
                    early fn epoll_pwait(epfd: c_int, events: *mut epoll_event, most: c_int, ms: c_int,
                        mask: *const sigset_t) -> c_int
                        = calls::epoll::epoll_pwait, number SYS_epoll_pwait;
                    early fn epoll_pwait2(epfd: c_int, events: *mut epoll_event, most: c_int, limit: *const timespec,
                        mask: *const sigset_t) -> c_int
                        = calls::epoll::epoll_pwait2, number SYS_epoll_pwait2;
                }
                /// An option, a flag or a control: what the shim does not know to leave bytes alone demotes.
                Controls {
                    early fn fcntl(fd: c_int, command: c_int, arg: c_ulong) -> c_int
                        = options::fcntl, also fcntl64, number SYS_fcntl;
                    early fn ioctl(fd: c_int, request: c_ulong, arg: c_ulong) -> c_int = options::ioctl, number SYS_ioctl;
                    early fn getsockopt(fd: c_int, level: c_int, name: c_int, value: *mut c_void, len: *mut socklen_t) -> c_int
                        = options::getsockopt, number SYS_getsockopt;
                    early fn setsockopt(fd: c_int, level: c_int, name: c_int, value: *const c_void, len: socklen_t) -> c_int
                        = options::setsockopt, number SYS_setsockopt;
                    early fn sockatmark(fd: c_int) -> c_int = calls::sockets::sockatmark;
                }
                /// A descriptor gets another number.
                Copies {
                    early fn dup(fd: c_int) -> c_int = calls::descriptors::dup, number SYS_dup;
                    early fn dup2(old: c_int, new: c_int) -> c_int
                        = calls::descriptors::dup2, #[cfg(target_arch = "x86_64")] number SYS_dup2;
                    early fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int = calls::descriptors::dup3, number SYS_dup3;
                }
                /// A descriptor, or a direction of its connection, ends.
                Closes {
                    early fn close(fd: c_int) -> c_int = calls::descriptors::close, number SYS_close;
                    early fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int
                        = calls::descriptors::close_range, number SYS_close_range;
                    alias fn closefrom(first: c_int) -> () = calls::descriptors::closefrom;
                    early fn shutdown(fd: c_int, how: c_int) -> c_int = calls::sockets::shutdown, number SYS_shutdown;
                }
                /// Another process, or another program, gets what this one has open.
                Passes {
                    early fn execve(path: *const c_char, argv: *const *const c_char, envp: *const *const c_char) -> c_int
                        = process::rdsock_execve, number SYS_execve;
                    alias fn execv(path: *const c_char, argv: *const *const c_char) -> c_int = process::execv;
                    alias fn execvp(file: *const c_char, argv: *const *const c_char) -> c_int = process::rdsock_execvp;
                    early fn execvpe(file: *const c_char, argv: *const *const c_char, envp: *const *const c_char) -> c_int
                        = process::execvpe;
                    early fn fexecve(fd: c_int, argv: *const *const c_char, envp: *const *const c_char) -> c_int
                        = process::fexecve;
                    alias fn execveat(folder: c_int, path: *const c_char, argv: *const *const c_char,
                        envp: *const *const c_char, flags: c_int) -> c_int
                        = process::execveat, number SYS_execveat;
                    early fn posix_spawn(pid: *mut pid_t, path: *const c_char, actions: *const c_void,
                        attr: *const c_void, argv: *const *mut c_char, envp: *const *mut c_char) -> c_int
                        = spawn::posix_spawn;
                    early fn posix_spawnp(pid: *mut pid_t, file: *const c_char, actions: *const c_void,
                        attr: *const c_void, argv: *const *mut c_char, envp: *const *mut c_char) -> c_int
                        = spawn::posix_spawnp;
                    late fn pidfd_spawn(pidfd: *mut c_int, path: *const c_char, actions: *const c_void,
                        attr: *const c_void, argv: *const *mut c_char, envp: *const *mut c_char) -> c_int
                        = spawn::pidfd_spawn;
                    late fn pidfd_spawnp(pidfd: *mut c_int, file: *const c_char, actions: *const c_void,
                        attr: *const c_void, argv: *const *mut c_char, envp: *const *mut c_char) -> c_int
                        = spawn::pidfd_spawnp;
                    early fn posix_spawn_file_actions_init(actions: *mut c_void) -> c_int
                        = spawn::posix_spawn_file_actions_init;
                    early fn posix_spawn_file_actions_destroy(actions: *mut c_void) -> c_int
                        = spawn::posix_spawn_file_actions_destroy;
                    early fn posix_spawn_file_actions_adddup2(actions: *mut c_void, fd: c_int, new: c_int) -> c_int
                        = spawn::posix_spawn_file_actions_adddup2;
                    early fn system(command: *const c_char) -> c_int = spawn::system;
                    early fn popen(command: *const c_char, mode: *const c_char) -> *mut libc::FILE = spawn::popen;
                    late fn clone(run: Option<unsafe extern "C" fn(*mut c_void) -> c_int>, stack: *mut c_void,
                        flags: c_int, arg: *mut c_void, parent_tid: *mut c_void, tls: *mut c_void,
                        child_tid: *mut c_void) -> c_int
                        = children::clone;
                    late fn _Fork() -> pid_t = children::fork_alone;
                    late fn unshare(flags: c_int) -> c_int = children::unshare, number SYS_unshare;
                    late fn setns(fd: c_int, kind: c_int) -> c_int = children::setns, number SYS_setns;
                }
                /// Something comes to use connections behind the shim's back: those that it may use are demoted first.
                Demotes {
                    late fn aio_read(block: *mut aiocb) -> c_int = calls::aio::aio_read;
                    late fn aio_read64(block: *mut aiocb) -> c_int = calls::aio::aio_read64;
                    late fn aio_write(block: *mut aiocb) -> c_int = calls::aio::aio_write;
                    late fn aio_write64(block: *mut aiocb) -> c_int = calls::aio::aio_write64;
                    late fn lio_listio(mode: c_int, list: *const *mut aiocb, count: c_int, event: *mut sigevent) -> c_int
                        = calls::aio::lio_listio;
                    late fn lio_listio64(mode: c_int, list: *const *mut aiocb, count: c_int, event: *mut sigevent) -> c_int
                        = calls::aio::lio_listio64;
                    late fn io_submit(context: *mut c_void, count: c_long, blocks: *const *const c_void) -> c_int
                        = calls::aio::io_submit;
                    late fn io_uring_queue_init(entries: c_uint, ring: *mut c_void, flags: c_uint) -> c_int
                        = calls::aio::io_uring_queue_init;
                    late fn io_uring_queue_init_params(entries: c_uint, ring: *mut c_void, params: *mut c_void) -> c_int
                        = calls::aio::io_uring_queue_init_params;
                    late fn io_uring_queue_init_mem(entries: c_uint, ring: *mut c_void, params: *mut c_void,
                        memory: *mut c_void, size: size_t) -> c_int
                        = calls::aio::io_uring_queue_init_mem;
                    late fn io_uring_setup(entries: c_uint, params: *mut c_void) -> c_int = calls::aio::io_uring_setup;
                    late fn mount(source: *const c_char, target: *const c_char, kind: *const c_char, flags: c_ulong,
                        options: *const c_void) -> c_int
                        = handing_over::mount, number SYS_mount;
                    late fn fsconfig(fd: c_int, command: c_uint, key: *const c_char, value: *const c_void, number: c_int) -> c_int
                        = handing_over::fsconfig;
                    early fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int = handing_over::open;
                    early fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int = handing_over::open64;
                    early fn openat(folder: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int
                        = handing_over::openat;
                    early fn openat64(folder: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int
                        = handing_over::openat64;
                    alias fn __open_2(path: *const c_char, flags: c_int, mode: mode_t) -> c_int = handing_over::__open_2;
                    alias fn __open64_2(path: *const c_char, flags: c_int, mode: mode_t) -> c_int = handing_over::__open64_2;
                    alias fn __openat_2(folder: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int
                        = handing_over::__openat_2;
                    alias fn __openat64_2(folder: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int
                        = handing_over::__openat64_2;
                    early fn fdopen(fd: c_int, mode: *const c_char) -> *mut libc::FILE = calls::stdio::fdopen;
                    early fn prctl(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int
                        = syscalls::prctl, number SYS_prctl;
                }
                /// Memory is locked, without the rings; a call is made by its number.
                Others {
                    late fn mlockall(flags: c_int) -> c_int = locked::mlockall, number SYS_mlockall;
                    early fn syscall(number: c_long, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong, e: c_ulong,
                        f: c_ulong) -> c_long
                        = syscalls::syscall;
                }
            }

            // System calls that have no function of their own, or take other arguments than it.
            numbers {
                SYS_preadv2 = syscalls::preadv2;
                SYS_pwritev2 = syscalls::pwritev2;
                SYS_pselect6 = syscalls::pselect6;
                SYS_clone = syscalls::clone;
                SYS_clone3 = syscalls::clone3;
                #[cfg(target_arch = "x86_64")]
                SYS_fork = syscalls::fork;
                #[cfg(target_arch = "x86_64")]
                SYS_vfork = syscalls::vfork;
                SYS_io_uring_setup = syscalls::io_uring_setup;
                SYS_io_submit = syscalls::io_submit;
                SYS_bpf = syscalls::bpf;
                SYS_fsconfig = syscalls::fsconfig;
                SYS_seccomp = syscalls::seccomp;
            }

            // Those with variable arguments, which C gathers (`csrc/variadic.c`).
            variadic {
                execl => rdsock_execl;
                execlp => rdsock_execlp;
                execle => rdsock_execle;
                dprintf => rdsock_dprintf;
                vdprintf => rdsock_vdprintf;
                __dprintf_chk => rdsock_dprintf_chk;
                __vdprintf_chk => rdsock_vdprintf_chk;
            }

            // Those that look who has called them, and must find the program: the shim has its turn before.
            passed_through {
                dlopen => plugins::before_dlopen;
                dlmopen => plugins::before_dlmopen;
            }

            // Those of libc that stand behind variadic ones.
            real_alone {
                early fn vdprintf(fd: c_int, format: *const c_char, arguments: *mut c_void) -> c_int;
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;
    use std::process::Command;

    macro_rules! names {
        (
            functions { $(
                $(#[doc = $class:literal])+ $word:ident { $(
                    $how:ident fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty
                        = $body:path $(, also $alias:ident)* $(, $(#[$at:meta])* number $number:ident)?;
                )* }
            )* }
            numbers { $($numbers:tt)* }
            variadic { $($variadic:ident => $gathers:ident;)* }
            passed_through { $($passed:ident => $before:path;)* }
            real_alone { $($alone:tt)* }
        ) => {
            /// The names of the table.
            const NAMES: &[&str] = &[
                $( $( stringify!($name), $( stringify!($alias), )* )* )*
                $( stringify!($variadic), )*
                $( stringify!($passed), )*
            ];
        };
    }

    table! { names }

    /// What the built library exports, but for what its parts in C and in Rust have of one another.
    fn exported() -> BTreeSet<String> {
        let folder = std::env::var_os("RDSOCK_BIN_DIR").map_or_else(
            || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/release"),
            PathBuf::from,
        );
        let library = folder.join("librdsock.so");
        assert!(
            library.is_file(),
            "{} is missing: run `make` in the workspace's root first (or set RDSOCK_BIN_DIR)",
            library.display()
        );
        let output = Command::new("nm")
            .args(["-D", "--defined-only"])
            .arg(&library)
            .output()
            .expect("nm (binutils) is installed");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout)
            .expect("names are text")
            .lines()
            .filter_map(|line| line.split_whitespace().last())
            .filter(|name| !name.starts_with("rdsock_"))
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn the_library_exports_what_is_in_the_table() {
        let table: BTreeSet<String> = NAMES.iter().map(|name| name.to_string()).collect();
        assert_eq!(table.len(), NAMES.len(), "a name is there twice");
        assert_eq!(exported(), table);
    }
}
