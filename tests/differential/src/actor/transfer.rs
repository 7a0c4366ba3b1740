//! Steps that move bytes by one call each: `send write writev sendmsg recv read readv recvmsg sendfile splicein
//! spliceout`, and `fill`, `drain` and `pump`, which make several.

use std::os::fd::RawFd;

use libc::{c_int, c_void, iovec};
use nix::errno::Errno;

use super::{Answer, Line, Scene, raw};
use crate::control::Place;

/// The answer of a call: its result, or the error.
pub fn result(value: isize) -> Result<usize, Errno> {
    usize::try_from(value).map_err(|_| Errno::last())
}

fn flags(line: &Line) -> c_int {
    let all = [
        ("dontwait", libc::MSG_DONTWAIT),
        ("peek", libc::MSG_PEEK),
        ("waitall", libc::MSG_WAITALL),
        ("trunc", libc::MSG_TRUNC),
        ("more", libc::MSG_MORE),
        ("oob", libc::MSG_OOB),
    ];
    let named = all.iter().filter(|(name, _)| line.has(name));
    named.fold(libc::MSG_NOSIGNAL, |flags, (_, bit)| flags | bit)
}

/// Cuts a buffer into parts of uneven sizes, one of them empty.
fn parts(bytes: &mut [u8], count: usize) -> Vec<iovec> {
    let mut rest = bytes;
    let mut all = Vec::new();
    for part in 1..count.max(1) {
        let size = (rest.len() * part / (2 * count)).min(rest.len());
        let (first, behind) = rest.split_at_mut(size);
        all.push(first);
        rest = behind;
    }
    all.push(rest);
    let part = |bytes: &mut [u8]| iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    all.into_iter().map(part).collect()
}

fn message(parts: &mut [iovec], control: &mut [u8]) -> libc::msghdr {
    // SAFETY: an empty message is all zeros.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len() as _;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = control.len() as _;
    message
}

/// Sends bytes by the call that the step names.
fn put(line: &Line, fd: RawFd, bytes: &mut [u8]) -> Result<usize, Errno> {
    let (from, len) = (bytes.as_mut_ptr().cast::<c_void>(), bytes.len());
    let mut parts = parts(bytes, line.number(3) as usize);
    // SAFETY: the buffers live until the call returns.
    result(unsafe {
        match line.word(0) {
            "write" => libc::write(fd, from, len),
            "writev" => libc::writev(fd, parts.as_ptr(), parts.len() as c_int),
            "sendmsg" => libc::sendmsg(fd, &message(&mut parts, &mut []), flags(line)),
            _ => libc::send(fd, from, len, flags(line)),
        }
    })
}

/// Receives bytes by the call that the step names, and what `recvmsg` tells beside them.
fn take(line: &Line, fd: RawFd, bytes: &mut [u8]) -> Result<(usize, String), Errno> {
    let (to, len) = (bytes.as_mut_ptr().cast::<c_void>(), bytes.len());
    let mut parts = parts(bytes, line.number(3) as usize);
    let mut told = String::new();
    // SAFETY: the buffers live until the call returns.
    let got = result(unsafe {
        match line.word(0) {
            "read" => libc::read(fd, to, len),
            "readv" => libc::readv(fd, parts.as_ptr(), parts.len() as c_int),
            "recvmsg" => {
                let mut control = [0_u64; 8];
                let (_, control, _) = control.align_to_mut::<u8>();
                let mut message = message(&mut parts, control);
                let got = libc::recvmsg(fd, &mut message, flags(line));
                if got >= 0 {
                    told = beside(&message);
                }
                got
            }
            _ => libc::recv(fd, to, len, flags(line)),
        }
    })?;
    Ok((got, told))
}

/// Flags of a message, and the control message of `TCP_INQ`.
fn beside(message: &libc::msghdr) -> String {
    let mut told = format!(" flags={:#x}", message.msg_flags & !libc::MSG_CMSG_CLOEXEC);
    // SAFETY: the kernel, or who stands for it, has filled the message in.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(message);
        while let Some(found) = control.as_ref() {
            let first = libc::CMSG_DATA(control).cast::<c_int>().read_unaligned();
            // Not the time of an arrival.
            if found.cmsg_level != libc::SOL_SOCKET {
                told += &format!(" {}:{}={first}", found.cmsg_level, found.cmsg_type);
            }
            control = libc::CMSG_NXTHDR(message, control);
        }
    }
    told
}

fn send(scene: &Scene, line: &Line) -> Answer {
    let (fd, place) = (scene.fd(line.word(1)), line.place(0)?);
    let mut bytes = vec![0; line.number(2) as usize];
    place.direction.fill(place.at, &mut bytes);
    let sent = put(line, fd, &mut bytes)?;
    raw::settle(fd);
    Ok(format!("n={sent}"))
}

fn receive(scene: &Scene, line: &Line) -> Answer {
    let (fd, place) = (scene.fd(line.word(1)), line.place(0)?);
    let mut bytes = vec![0; line.number(2) as usize];
    let (got, told) = take(line, fd, &mut bytes)?;
    let bytes = bytes.get(..got).unwrap_or(&bytes);
    let fault = match line.has("trunc") {
        true => None,
        false => place.direction.fault(place.at, bytes),
    };
    Ok(format!("n={got}{told}{}", fault.unwrap_or_default()))
}

/// Sends until nothing more is taken, now and a little later.
fn fill(scene: &Scene, line: &Line) -> Answer {
    let (fd, place) = (scene.fd(line.word(1)), line.place(0)?);
    let mut bytes = vec![0; 64 << 10];
    let (mut sent, mut idle, mut queued) = (0, 0, unsent(fd));
    // On a busy machine the kernel may still be moving bytes on.
    while idle < 20 || queued != unsent(fd) {
        queued = unsent(fd);
        place.direction.fill(place.at + sent as u64, &mut bytes);
        match put(&Line::new(&["send", "", "", "dontwait"]), fd, &mut bytes) {
            Ok(count) => (sent, idle) = (sent + count, 0),
            Err(Errno::EAGAIN) => {
                idle += 1;
                raw::nap(500);
            }
            Err(error) => return Ok(format!("n={sent} {error:?}")),
        }
    }
    Ok(format!("n={sent} full"))
}

/// Bytes that the other end has not received (`SIOCOUTQ`).
fn unsent(fd: RawFd) -> c_int {
    let mut count = 0;
    // SAFETY: the number lives until the call returns.
    unsafe { libc::ioctl(fd, libc::TIOCOUTQ, &raw mut count) };
    count
}

/// Receives so many bytes; each may take a second.
fn drain(scene: &Scene, line: &Line) -> Answer {
    let (fd, place) = (scene.fd(line.word(1)), line.place(0)?);
    let whole = line.number(2) as usize;
    let mut bytes = vec![0; 100 << 10];
    let (mut got, mut tries) = (0, 0);
    while got < whole && tries < 1000 {
        let most = bytes.len().min(whole - got);
        let step = Line::new(&["recv", "", "", "dontwait"]);
        match take(&step, fd, bytes.get_mut(..most).unwrap_or_default()) {
            Ok((0, _)) => break,
            Ok((count, _)) => {
                let fault = place.direction.fault(
                    place.at + got as u64,
                    bytes.get(..count).unwrap_or_default(),
                );
                if let Some(fault) = fault {
                    return Ok(format!("n={} of {whole}{fault}", got + count));
                }
                (got, tries) = (got + count, 0);
            }
            Err(Errno::EAGAIN) => {
                tries += 1;
                raw::nap(1000);
            }
            Err(error) => return Ok(format!("n={got} of {whole} {error:?}")),
        }
    }
    Ok(format!("n={got} of {whole}"))
}

/// One byte on each of several connections: `pump send c0a c1a …`, `pump recv c0b …`.
fn pump(scene: &Scene, line: &Line) -> Answer {
    let names = line.rest(2);
    let mut done = String::new();
    for (name, place) in names.iter().zip(&line.places) {
        let fd = scene.fd(name);
        let outcome = match line.word(1) {
            "send" => pump_out(fd, *place),
            _ => pump_in(fd, *place),
        };
        done += match outcome {
            Ok(()) => "1",
            Err(_) => "0",
        };
    }
    Ok(done)
}

fn pump_out(fd: RawFd, place: Place) -> Result<(), Errno> {
    let mut byte = [place.direction.byte(place.at)];
    put(&Line::new(&["send", "", "", "dontwait"]), fd, &mut byte).map(drop)
}

fn pump_in(fd: RawFd, place: Place) -> Result<(), Errno> {
    let mut byte = [0];
    for _ in 0..500 {
        match take(&Line::new(&["recv", "", "", "dontwait"]), fd, &mut byte) {
            Ok((1, _)) if byte == [place.direction.byte(place.at)] => return Ok(()),
            Err(Errno::EAGAIN) => raw::nap(200),
            Err(error) => return Err(error),
            Ok(_) => return Err(Errno::EBADMSG),
        }
    }
    Err(Errno::ETIMEDOUT)
}

/// What the kernel's TCP has carried on each of several connections.
fn counters(scene: &Scene, line: &Line) -> Answer {
    let count = |name: &String| match raw::kernel_bytes(scene.fd(name)) {
        Some((sent, received)) => format!("{sent}/{received} "),
        None => "- ".to_owned(),
    };
    Ok(line.rest(1).iter().map(count).collect())
}

/// The steps of this module.
pub fn act(scene: &Scene, line: &Line) -> Option<Answer> {
    Some(match line.word(0) {
        "send" | "write" | "writev" | "sendmsg" => send(scene, line),
        "recv" | "read" | "readv" | "recvmsg" => receive(scene, line),
        "fill" => fill(scene, line),
        "drain" => drain(scene, line),
        "pump" => pump(scene, line),
        "counters" => counters(scene, line),
        _ => return None,
    })
}
