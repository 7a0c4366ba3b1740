//! From files and pipes onto a stream, and from a stream into a pipe.

use super::send::wait_for_space;
use super::*;
use crate::conn::Use;
use crate::end::End;
use crate::{demote, limits, rest, wait};
use rdsock_shm::end::{MOST, Way};
use rdsock_shm::layout::phase;
use rdsock_shm::reason::Reason;

/// What bytes are read from.
#[derive(Clone, Copy, PartialEq)]
enum Source {
    File,
    Pipe,
}

/// True for an error that says more of how the file was read than of the file: it wants aligned buffers (O_DIRECT), has no
/// positions, or is no file of bytes. What `sendfile` makes of that is the kernel's to say.
fn is_about_reading(error: isize) -> bool {
    matches!(-error as c_int, libc::EINVAL | libc::ESPIPE | libc::EISDIR)
}

/// `sendfile` onto a stream: the file is read straight into the ring. `offset` is where to read,
/// and is moved; without one the file's own position is used, and the file must be a plain one. From a file that can't be
/// read so, the kernel sends: the stream leaves the rings for it.
pub fn send_file<'a>(
    held: &'a Use,
    stream: &'a Stream,
    fd: c_int,
    file: c_int,
    offset: Option<&mut i64>,
    count: usize,
) -> Outcome<'a> {
    let has_plain_way = match &offset {
        Some(_) => true,
        None => match sys::stat_of(file) {
            Some(stat) => is_plain(&stat),
            None => return Outcome::Done(-(libc::EBADF as isize)),
        },
    };
    if has_plain_way {
        match read_in(held, stream, fd, (Source::File, file), offset, count) {
            Outcome::Done(error) if is_about_reading(error) => {}
            other => return other,
        }
    }
    demote::leave(held, fd, Reason::Call);
    match stream.tx().phase.load(Acquire) {
        // Further up the stack somebody sends on the ring: the call fails.
        phase::RING => Outcome::Done(-(libc::EINVAL as isize)),
        _ => read_in(held, stream, fd, (Source::File, file), None, 0),
    }
}

/// True for a file of bytes with a size. Others, and those that the kernel makes as they are read, have ways of their own.
fn is_plain(stat: &libc::stat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFREG && stat.st_size > 0
}

/// What a call reports that has sent nothing, of a connection that is broken.
fn broken(end: &End<'_>) -> isize {
    if end.tell_break() {
        BROKEN
    } else {
        broken_pipe(0)
    }
}

/// Reads a file, or what a pipe holds, straight into the ring.
fn read_in<'a>(
    held: &'a Use,
    stream: &'a Stream,
    fd: c_int,
    (source, file): (Source, c_int),
    mut offset: Option<&mut i64>,
    count: usize,
) -> Outcome<'a> {
    let end = stream.at(held, fd);
    let mut done = 0_usize;
    let mut waits = wait::Waits::new();
    let count = count.min(MOST);
    loop {
        let half = end.lock_tx();
        match half.way() {
            Way::Ring => {}
            Way::Behind => {
                drop(half);
                match rest::for_room(&end, held, &mut waits, 0, done != 0) {
                    Ok(()) => continue,
                    Err(error) => {
                        return Outcome::Done(if done == 0 { error } else { done as isize });
                    }
                }
            }
            Way::Kernel(counted) if done == 0 => return Outcome::Kernel(counted),
            Way::Kernel(counted) => {
                drop(half);
                drop(waits);
                let rest = count - done;
                let sent = match source {
                    Source::File => sys::sendfile(fd, file, offset.as_deref_mut(), rest),
                    Source::Pipe => sys::splice(file, fd, rest, libc::SPLICE_F_NONBLOCK),
                };
                if counted.is_some() {
                    drop(counted);
                    end.after_kernel_send();
                }
                return Outcome::Done(done as isize + sent.max(0));
            }
            Way::Pipe | Way::Broken if done != 0 => return Outcome::Done(done as isize),
            Way::Pipe => {
                drop(half);
                return Outcome::Done(broken_pipe(0));
            }
            Way::Broken => {
                drop(half);
                return Outcome::Done(broken(&end));
            }
        }
        let (mut full, mut stop) = (false, None);
        while done < count && stop.is_none() && stream.tx().phase.load(Relaxed) == phase::RING {
            let space = match half
                .sender
                .reserve(((count - done) as u64).min(limits::FILE_PIECE.get()))
            {
                Ok(Some(space)) => space,
                Ok(None) => {
                    full = true;
                    break;
                }
                Err(_) => {
                    end.reset(Reason::Violation);
                    return Outcome::Done(if done == 0 {
                        broken(&end)
                    } else {
                        done as isize
                    });
                }
            };
            let (at, len) = half.sender.piece(space);
            // SAFETY: the piece is reserved space of the ring.
            let got = unsafe { sys::pread(file, at, len, offset.as_ref().map(|at| **at)) };
            let used = got.max(0) as u64;
            if used != space.len && !half.sender.give_back(space, used) {
                // Only a handler that sent in the middle of this brings us here: its bytes lie
                // behind a gap that cannot be closed.
                end.reset(Reason::Call);
                return Outcome::Done(broken(&end));
            }
            if let Some(offset) = offset.as_deref_mut() {
                *offset += used as i64;
            }
            done += used as usize;
            if got <= 0 {
                stop = Some(got);
            }
            half.publish();
        }
        if full {
            half.follow_wants();
        }
        drop(half);
        match stop {
            Some(error) if error < 0 && done == 0 => return Outcome::Done(error),
            Some(_) => return Outcome::Done(done as isize),
            None if done == count => return Outcome::Done(done as isize),
            None => {}
        }
        if full
            && stream.tx().phase.load(Relaxed) == phase::RING
            && let Err(error) = wait_for_space(&end, held, &mut waits, 0, done)
        {
            return Outcome::Done(if done == 0 { error } else { done as isize });
        }
    }
}

/// `splice` from a pipe onto a stream: what the pipe holds now is read straight into the ring.
pub fn splice_in<'a>(
    held: &'a Use,
    stream: &'a Stream,
    fd: c_int,
    pipe: c_int,
    len: usize,
    wait: bool,
) -> Outcome<'a> {
    if stream.tx().phase.load(Acquire) != phase::RING {
        match read_in(held, stream, fd, (Source::Pipe, pipe), None, 0) {
            Outcome::Done(0) => {}
            other => return other,
        }
    }
    let mut waits = wait::Waits::new();
    loop {
        match sys::ioctl_int(pipe, libc::FIONREAD) {
            None => return Outcome::Done(-(libc::EINVAL as isize)),
            Some(0) => {}
            Some(ready) => {
                drop(waits);
                let len = len.min(ready as usize);
                return read_in(held, stream, fd, (Source::Pipe, pipe), None, len);
            }
        }
        let seen = sys::poll_one(pipe, libc::POLLIN, 0);
        if seen < 0 {
            return Outcome::Done(seen);
        }
        let readable = sys::ioctl_int(pipe, libc::FIONREAD) != Some(0);
        if seen & libc::POLLHUP as isize != 0 && !readable {
            return Outcome::Done(0);
        }
        let nonblocking =
            !wait || sys::fcntl(pipe, libc::F_GETFL, 0) & libc::O_NONBLOCK as isize != 0;
        if nonblocking && !readable {
            return Outcome::Done(AGAIN);
        }
        if !readable {
            let woken = waits.for_pipe(pipe, libc::POLLIN);
            if woken < 0 {
                return Outcome::Done(woken);
            }
        }
    }
}

/// Bytes that a pipe takes without blocking once it is writable: the most that [`limits::PIPE_PIECE`] can be.
const PIPE_PIECE: usize = 4096;

/// `splice` from a stream into a pipe: as much as is there and the pipe has room for.
pub fn splice_out<'a>(
    held: &'a Use,
    stream: &'a Stream,
    fd: c_int,
    pipe: c_int,
    len: usize,
    wait: bool,
) -> Outcome<'a> {
    if !matches!(
        stream.rx().phase.load(Acquire),
        phase::RING | phase::SWITCHING
    ) {
        return Outcome::Kernel(None);
    }
    let mut done = 0;
    loop {
        // It waits for the first byte, and for room for that.
        match splice_piece(held, stream, fd, pipe, len - done, wait && done == 0) {
            Outcome::Done(moved) if moved > 0 => done += moved as usize,
            outcome if done == 0 => return outcome,
            Outcome::Done(_) => return Outcome::Done(done as isize),
            Outcome::Kernel(_) => {
                let moved = sys::splice(fd, pipe, len - done, libc::SPLICE_F_NONBLOCK);
                return Outcome::Done(done as isize + moved.max(0));
            }
        }
        if done >= len {
            return Outcome::Done(done as isize);
        }
    }
}

fn splice_piece<'a>(
    held: &'a Use,
    stream: &'a Stream,
    fd: c_int,
    pipe: c_int,
    len: usize,
    wait: bool,
) -> Outcome<'a> {
    let mut bytes = [0_u8; PIPE_PIECE];
    let start = bytes.as_mut_ptr();
    let part = |len: usize| iovec {
        iov_base: start.cast(),
        iov_len: len,
    };
    let wanted = part(len.min(limits::PIPE_PIECE.get() as usize));
    // SAFETY: one entry that describes the local buffer.
    let Ok(room) = (unsafe { buffers(&wanted, 1, 0) }) else {
        return Outcome::Done(AGAIN);
    };
    let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
    // Wait for bytes first, then for room, then move them.
    let ready = match recv(held, stream, fd, &room, libc::MSG_PEEK | flags) {
        Outcome::Done(ready) if ready > 0 => ready as usize,
        other => return other,
    };
    let mut waits = wait::Waits::new();
    loop {
        let seen = sys::poll_one(pipe, libc::POLLOUT, 0);
        if seen & libc::POLLOUT as isize != 0 && seen > 0 {
            break;
        }
        if seen < 0 || !wait {
            return Outcome::Done(if seen < 0 { seen } else { AGAIN });
        }
        let woken = waits.for_pipe(pipe, libc::POLLOUT);
        if woken < 0 {
            return Outcome::Done(woken);
        }
    }
    drop(waits);
    let found = part(ready);
    // SAFETY: as above.
    let Ok(found) = (unsafe { buffers(&found, 1, 0) }) else {
        return Outcome::Done(AGAIN);
    };
    match recv(held, stream, fd, &found, libc::MSG_DONTWAIT) {
        Outcome::Done(got) if got > 0 => {
            // SAFETY: `got` bytes of the local buffer are filled.
            Outcome::Done(unsafe { sys::write(pipe, start, got as usize) })
        }
        other => other,
    }
}
