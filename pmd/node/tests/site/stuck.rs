//! A page of memory that does not answer (userfaultfd): whoever touches it waits, the kernel on behalf of a call too.

use memmap2::{MmapMut, MmapOptions};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::thread::JoinHandle;

const PAGE: usize = 4096;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, Api);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, Register);

/// Such a page. Dropped, it answers.
struct Page {
    events: OwnedFd,
    map: MmapMut,
}

impl Page {
    fn new() -> nix::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: takes flags, and returns a new descriptor or -1.
        let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let made = Errno::result(made)? as i32;
        // SAFETY: the call has returned it, and nobody else owns it.
        let events = unsafe { OwnedFd::from_raw_fd(made) };
        let map = MmapOptions::new().len(PAGE).map_anon();
        let map = map.map_err(|_| Errno::ENOMEM)?;
        let mut api = Api {
            api: 0xaa,
            ..Api::default()
        };
        let mut whole = Register {
            start: map.as_ptr() as u64,
            len: PAGE as u64,
            mode: 1,
            ioctls: 0,
        };
        // SAFETY: both read and write the structure that they are given.
        unsafe {
            uffdio_api(events.as_raw_fd(), &raw mut api)?;
            uffdio_register(events.as_raw_fd(), &raw mut whole)?;
        }
        Ok(Page { events, map })
    }
}

/// A socket whose lock somebody holds: each call on it waits, of whatever thread.
pub struct Stuck {
    page: Option<Page>,
    holder: Option<JoinHandle<()>>,
}

impl Stuck {
    /// Holds the lock of a socket on which a byte waits, or is to come. `None` where there is no userfaultfd, having said so.
    pub fn new(socket: &TcpStream) -> Option<Self> {
        let page = match Page::new() {
            Ok(page) => page,
            Err(error) => {
                eprintln!("SKIPPED, NOTHING WAS CHECKED: there is no userfaultfd here: {error}");
                return None;
            }
        };
        let (socket, at) = (socket.try_clone().unwrap(), page.map.as_ptr() as usize);
        let holder = std::thread::spawn(move || {
            // SAFETY: the page lives as long as this thread: see `drop`. Nobody refers to its bytes.
            let got = unsafe {
                let at = at as *mut libc::c_void;
                libc::recv(socket.as_raw_fd(), at, 1, libc::MSG_PEEK)
            };
            assert_eq!(got, 1);
        });
        let mut fds = [PollFd::new(page.events.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(60_000_u16)), Ok(1));
        Some(Stuck {
            page: Some(page),
            holder: Some(holder),
        })
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        if let (Some(Page { events, map }), Some(holder)) = (self.page.take(), self.holder.take()) {
            drop(events);
            let _ = holder.join();
            drop(map);
        }
    }
}
