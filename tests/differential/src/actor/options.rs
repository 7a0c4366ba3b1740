//! Steps that make, change and end connections: `listen dial accept shut close dup nonblock linger demote …`.

use std::mem::size_of_val;
use std::os::fd::RawFd;

use libc::{c_int, c_void, in_addr, sockaddr_in, socklen_t};
use nix::errno::Errno;

use super::transfer::result;
use super::{Answer, Line, Scene};

fn done(value: c_int) -> Answer {
    result(value as isize).map(|_| "ok".to_owned())
}

fn set<T>(fd: RawFd, level: c_int, name: c_int, value: &T) -> Answer {
    let (value, length) = (
        std::ptr::from_ref(value).cast::<c_void>(),
        size_of_val(value),
    );
    // SAFETY: the value lives until the call returns.
    done(unsafe { libc::setsockopt(fd, level, name, value, length as socklen_t) })
}

fn get(fd: RawFd, level: c_int, name: c_int) -> Result<c_int, Errno> {
    let mut value: c_int = 0;
    let mut length = size_of_val(&value) as socklen_t;
    // SAFETY: the value lives until the call returns.
    let got = unsafe { libc::getsockopt(fd, level, name, (&raw mut value).cast(), &mut length) };
    result(got as isize).map(|_| value)
}

fn loopback(port: u16) -> sockaddr_in {
    sockaddr_in {
        sin_family: libc::AF_INET as _,
        sin_port: port.to_be(),
        sin_addr: in_addr {
            s_addr: u32::from(std::net::Ipv4Addr::LOCALHOST).to_be(),
        },
        sin_zero: [0; 8],
    }
}

const LENGTH: socklen_t = size_of::<sockaddr_in>() as socklen_t;

/// A socket whose buffers do not grow.
fn stream_socket() -> Result<RawFd, Errno> {
    // SAFETY: no requirements.
    let fd =
        result(unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) } as isize)? as RawFd;
    let size: c_int = 128 << 10;
    set(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, &size)?;
    set(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, &size)?;
    set(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, &1_i32)?;
    Ok(fd)
}

/// `listen`: the port.
fn listen(scene: &Scene) -> Answer {
    let fd = stream_socket()?;
    let mut name = loopback(0);
    let mut length = LENGTH;
    // SAFETY: names and lengths live until the calls return.
    unsafe {
        done(libc::bind(fd, (&raw const name).cast(), LENGTH))?;
        done(libc::listen(fd, 100))?;
        done(libc::getsockname(fd, (&raw mut name).cast(), &mut length))?;
    }
    scene.keep("listener", fd);
    Ok(u16::from_be(name.sin_port).to_string())
}

/// `dial NAME PORT`.
fn dial(scene: &Scene, line: &Line) -> Answer {
    let fd = stream_socket()?;
    let name = loopback(line.number(2) as u16);
    scene.keep(line.word(1), fd);
    // SAFETY: the name lives until the call returns.
    done(unsafe { libc::connect(fd, (&raw const name).cast(), LENGTH) })
}

/// `accept NAME`.
fn accept(scene: &Scene, line: &Line) -> Answer {
    let none = std::ptr::null_mut();
    // SAFETY: no address is asked for.
    let fd = result(unsafe { libc::accept(scene.fd("listener"), none, none.cast()) } as isize)?;
    scene.keep(line.word(1), fd as RawFd);
    set(fd as RawFd, libc::IPPROTO_TCP, libc::TCP_NODELAY, &1_i32)
}

/// `dup NAME NEW [dup|fcntl]`, and `dup2 NAME NEW`, which makes `NEW` in the place of an old `NEW`.
fn duplicate(scene: &Scene, line: &Line) -> Answer {
    let (fd, new) = (scene.fd(line.word(1)), line.word(2));
    // SAFETY: plain descriptor calls.
    let made = result(unsafe {
        match (line.word(0), line.word(3)) {
            ("dup2", _) => libc::dup2(fd, scene.fd(new)),
            (_, "fcntl") => libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0),
            _ => libc::dup(fd),
        }
    } as isize)?;
    scene.keep(new, made as RawFd);
    Ok("ok".to_owned())
}

/// `close NAME`, and `closerange NAME`, which closes one by the call for many.
fn close(scene: &Scene, line: &Line) -> Answer {
    let fd = scene.forget(line.word(1));
    // SAFETY: a descriptor of this scene's own; a range of that one alone.
    done(unsafe {
        match (line.word(0), u32::try_from(fd)) {
            ("closerange", Ok(number)) => libc::close_range(number, number, 0),
            _ => libc::close(fd),
        }
    })
}

/// `demote NAME HOW`: what rings can't do, and what on Linux changes nothing that a program sees.
fn demote(scene: &Scene, line: &Line) -> Answer {
    let fd = scene.fd(line.word(1));
    match line.word(2) {
        "lowat" => {
            set(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &2_i32)?;
            set(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &1_i32)
        }
        "stamp" => set(fd, libc::SOL_SOCKET, libc::SO_TIMESTAMP, &1_i32),
        "async" => {
            // SAFETY: flags alone; nobody is the owner, so that no signal is sent.
            unsafe {
                let old = libc::fcntl(fd, libc::F_GETFL);
                done(libc::fcntl(fd, libc::F_SETFL, old | libc::O_ASYNC))?;
                done(libc::fcntl(fd, libc::F_SETFL, old))
            }
        }
        // A control that no socket knows.
        // SAFETY: it has no argument that points anywhere.
        _ => done(unsafe { libc::ioctl(fd, 0xAB00, 0) }),
    }
}

fn nonblock(scene: &Scene, line: &Line) -> Answer {
    let (fd, on) = (scene.fd(line.word(1)), line.word(2) == "on");
    if line.word(3) == "ioctl" {
        let mut value = c_int::from(on);
        // SAFETY: the kernel reads an int.
        return done(unsafe { libc::ioctl(fd, libc::FIONBIO, &mut value) });
    }
    let flag = if on { libc::O_NONBLOCK } else { 0 };
    // SAFETY: flags alone.
    unsafe {
        let old = libc::fcntl(fd, libc::F_GETFL);
        done(old)?;
        done(libc::fcntl(
            fd,
            libc::F_SETFL,
            old & !libc::O_NONBLOCK | flag,
        ))
    }
}

fn timeout(scene: &Scene, line: &Line) -> Answer {
    let limit = libc::timeval {
        tv_sec: line.number(2) / 1000,
        tv_usec: line.number(2) % 1000 * 1000,
    };
    let name = match line.word(0) {
        "rcvtimeo" => libc::SO_RCVTIMEO,
        _ => libc::SO_SNDTIMEO,
    };
    set(scene.fd(line.word(1)), libc::SOL_SOCKET, name, &limit)
}

fn linger(scene: &Scene, line: &Line) -> Answer {
    let seconds = line.number(2) as c_int;
    let value = libc::linger {
        l_onoff: c_int::from(seconds >= 0),
        l_linger: seconds.max(0),
    };
    set(
        scene.fd(line.word(1)),
        libc::SOL_SOCKET,
        libc::SO_LINGER,
        &value,
    )
}

fn shut(scene: &Scene, line: &Line) -> Answer {
    let how = match line.word(2) {
        "rd" => libc::SHUT_RD,
        "wr" => libc::SHUT_WR,
        _ => libc::SHUT_RDWR,
    };
    // SAFETY: no requirements.
    done(unsafe { libc::shutdown(scene.fd(line.word(1)), how) })
}

fn unread(scene: &Scene, line: &Line) -> Answer {
    let mut count: c_int = 0;
    // SAFETY: the kernel stores an int.
    done(unsafe { libc::ioctl(scene.fd(line.word(1)), libc::FIONREAD, &mut count) })?;
    Ok(count.to_string())
}

/// The steps of this module.
pub fn act(scene: &Scene, line: &Line) -> Option<Answer> {
    let fd = scene.fd(line.word(1));
    Some(match line.word(0) {
        "listen" => listen(scene),
        "dial" => dial(scene, line),
        "accept" => accept(scene, line),
        "dup" | "dup2" => duplicate(scene, line),
        "close" | "closerange" => close(scene, line),
        "demote" => demote(scene, line),
        "nonblock" => nonblock(scene, line),
        "rcvtimeo" | "sndtimeo" => timeout(scene, line),
        "linger" => linger(scene, line),
        "shut" => shut(scene, line),
        "fionread" => unread(scene, line),
        "inq" => set(fd, libc::IPPROTO_TCP, 36, &1_i32),
        "nodelay" => set(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_NODELAY,
            &(line.number(2) as c_int),
        ),
        "isnodelay" => get(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY).map(|on| on.to_string()),
        "err" => get(fd, libc::SOL_SOCKET, libc::SO_ERROR).map(|error| match error {
            0 => "none".to_owned(),
            error => format!("{:?}", Errno::from_raw(error)),
        }),
        _ => return None,
    })
}
