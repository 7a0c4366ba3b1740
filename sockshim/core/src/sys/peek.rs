//! A look at bytes of a socket that lie behind others, which stay there as well.

use super::call;
use libc::{c_int, iovec};

/// Bytes that are passed over by one entry.
const STEP: usize = 4096;
/// Entries for those.
const STEPS: usize = 64;

/// Copies bytes that lie behind `skip` others, without waiting; how many. None where so many can't be passed over.
///
/// # Safety
/// `to` is valid for writes of `len` bytes.
pub unsafe fn peek_behind(fd: c_int, skip: u64, to: *mut u8, len: usize) -> usize {
    let mut room = [0_u8; STEP];
    let mut parts = [iovec {
        iov_base: room.as_mut_ptr().cast(),
        iov_len: 0,
    }; STEPS + 1];
    let (mut left, mut count) = (skip, 0);
    for part in parts.iter_mut().take(STEPS) {
        if left == 0 {
            break;
        }
        // One piece of memory for all of them: nobody looks at it.
        part.iov_len = left.min(STEP as u64) as usize;
        left -= part.iov_len as u64;
        count += 1;
    }
    let Some(last) = parts.get_mut(count).filter(|_| left == 0) else {
        return 0;
    };
    *last = iovec {
        iov_base: to.cast(),
        iov_len: len,
    };
    // SAFETY: zeroes are a value of it.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = (count + 1) as _;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    let got = syscall!(SYS_recvmsg, fd, &raw mut message, flags);
    (got.max(0) as u64).saturating_sub(skip) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn bytes_behind_others_are_copied_and_all_stay() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut other, _) = listener.accept().unwrap();
        let sent: Vec<u8> = (0..10_000_u32).map(|at| (at % 251) as u8).collect();
        one.write_all(&sent).unwrap();
        one.shutdown(std::net::Shutdown::Write).unwrap();
        // All of it has come, and the end.
        let mut all = vec![0; sent.len()];
        while other.peek(&mut all).unwrap() != sent.len() {}
        for (skip, len) in [(0, 10), (1, 9), (4096, 4), (9000, 1000), (9990, 100)] {
            let mut room = vec![0; len];
            // SAFETY: as long as it says.
            let got = unsafe { peek_behind(other.as_raw_fd(), skip, room.as_mut_ptr(), len) };
            let from = skip as usize;
            assert_eq!(room[..got], sent[from..sent.len().min(from + len)]);
        }
        let mut room = [0; 8];
        let behind = |skip, room: &mut [u8; 8]| {
            // SAFETY: as long as it says.
            unsafe { peek_behind(other.as_raw_fd(), skip, room.as_mut_ptr(), 8) }
        };
        assert_eq!(behind(10_000, &mut room), 0);
        assert_eq!(behind(1 << 40, &mut room), 0, "too many");
        let mut rest = Vec::new();
        other.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, sent);
    }
}
