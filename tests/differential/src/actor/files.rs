//! Steps that move bytes between a connection and a file or a pipe: `sendfile`, `splicein` (pipe to socket),
//! `spliceout` (socket to pipe).

use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use super::transfer::result;
use super::{Answer, Line, Scene, raw};

/// `sendfile NAME COUNT [offset]`: from a file that holds the next bytes, from its position or from an offset.
fn sendfile(scene: &Scene, line: &Line) -> Answer {
    const NAME: &CStr = c"differential";
    let (fd, place, count) = (
        scene.fd(line.word(1)),
        line.place(0)?,
        line.number(2) as usize,
    );
    // SAFETY: the name is a string; the new descriptor is nobody else's.
    let file = unsafe {
        let made = result(libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC) as isize)?;
        OwnedFd::from_raw_fd(made as RawFd)
    };
    let skipped = if line.has("offset") { 10 } else { 0 };
    let mut bytes = vec![0; skipped + count];
    place
        .direction
        .fill(place.at, bytes.get_mut(skipped..).unwrap_or_default());
    let file = file.as_raw_fd();
    // SAFETY: the buffer and the offset live until the calls return.
    let sent = result(unsafe {
        let mut offset: libc::off_t = skipped as _;
        result(libc::pwrite(file, bytes.as_ptr().cast(), bytes.len(), 0))?;
        match skipped {
            0 => libc::sendfile(fd, file, std::ptr::null_mut(), count),
            _ => libc::sendfile(fd, file, &mut offset, count),
        }
    })?;
    raw::settle(fd);
    Ok(format!("n={sent}"))
}

fn pipe() -> Result<[OwnedFd; 2], Errno> {
    let mut ends = [-1; 2];
    // SAFETY: the kernel stores two new descriptors, which are nobody else's.
    unsafe {
        result(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) as isize)?;
        libc::fcntl(ends[1], libc::F_SETPIPE_SZ, 1 << 17);
        Ok(ends.map(|fd| OwnedFd::from_raw_fd(fd)))
    }
}

fn splice(from: RawFd, to: RawFd, count: usize, flags: u32) -> Result<usize, Errno> {
    let none = std::ptr::null_mut();
    // SAFETY: without offsets.
    result(unsafe { libc::splice(from, none, to, none, count, flags) })
}

/// `splicein NAME COUNT`: bytes from a pipe into the connection.
fn splice_in(scene: &Scene, line: &Line) -> Answer {
    let (fd, place, count) = (
        scene.fd(line.word(1)),
        line.place(0)?,
        line.number(2) as usize,
    );
    let [from, into] = pipe()?;
    let mut bytes = vec![0; count];
    place.direction.fill(place.at, &mut bytes);
    // SAFETY: the buffer lives until the call returns.
    result(unsafe { libc::write(into.as_raw_fd(), bytes.as_ptr().cast(), count) })?;
    drop(into);
    let mut sent = 0;
    while sent < count {
        match splice(from.as_raw_fd(), fd, count - sent, libc::SPLICE_F_NONBLOCK) {
            Ok(0) => break,
            Ok(part) => sent += part,
            Err(error) if sent == 0 => return Err(error),
            Err(_) => break,
        }
    }
    raw::settle(fd);
    Ok(format!("n={sent}"))
}

/// `spliceout NAME COUNT`: bytes of the connection into a pipe, until it gives no more.
fn splice_out(scene: &Scene, line: &Line) -> Answer {
    let (fd, place, count) = (
        scene.fd(line.word(1)),
        line.place(0)?,
        line.number(2) as usize,
    );
    let [from, into] = pipe()?;
    let mut got = 0;
    while got < count {
        match splice(fd, into.as_raw_fd(), count - got, libc::SPLICE_F_NONBLOCK) {
            Ok(0) => break,
            Ok(part) => got += part,
            Err(error) if got == 0 => return Err(error),
            Err(_) => break,
        }
    }
    let mut bytes = vec![0; got];
    // SAFETY: the buffer lives until the call returns.
    let read = result(unsafe { libc::read(from.as_raw_fd(), bytes.as_mut_ptr().cast(), got) })?;
    let fault = place
        .direction
        .fault(place.at, bytes.get(..read).unwrap_or_default());
    Ok(format!("n={got}{}", fault.unwrap_or_default()))
}

/// The steps of this module.
pub fn act(scene: &Scene, line: &Line) -> Option<Answer> {
    Some(match line.word(0) {
        "sendfile" => sendfile(scene, line),
        "splicein" => splice_in(scene, line),
        "spliceout" => splice_out(scene, line),
        _ => return None,
    })
}
