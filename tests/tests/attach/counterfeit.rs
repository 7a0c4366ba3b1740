//! A daemon that is none: it takes connections of shims, and says to them what a test wants. It makes a
//! stream for one end only, whose other end never comes.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    UnixAddr, UnixCredentials, accept4, bind, connect, listen, recvmsg, sendmsg, setsockopt,
    socket, sockopt,
};
use rdsock_shm::control::{
    Message, Pod, Promote, Request, Welcome, from_bytes, kind, parse, request,
};
use rdsock_shm::layout::{
    BellBoard, DATA_OFFSET, Direction, MIN_RING, NOT_SWITCHED, Producer, StreamHeader,
    TenantMemory, stream_bytes,
};
use rdsock_shm::queue::Taker;
use rdsock_shm::sync::Ordering;
use rdsock_tests::Folder;

/// Where shims connect to.
pub struct Counterfeit {
    folder: Folder,
    listener: OwnedFd,
}

impl Counterfeit {
    pub fn new() -> Self {
        Self::with_room_for(64)
    }

    /// One more caller than these may wait.
    pub fn with_room_for(callers: i32) -> Self {
        Self::at("rdsockd.sock", callers)
    }

    /// Only at the socket of this user, and nowhere else.
    pub fn for_user(user: u32) -> Self {
        Self::at(&format!("rdsockd.sock.users/{user}"), 64)
    }

    fn at(name: &str, callers: i32) -> Self {
        let folder = Folder::new();
        let listener = serve(&folder.at(name), callers);
        Counterfeit { folder, listener }
    }

    /// A stranger's, which everybody may call.
    pub fn of_stranger(stranger: u32) -> Self {
        let folder = Folder::new();
        let listener = serve_as(stranger, folder.at("rdsockd.sock"));
        Counterfeit { folder, listener }
    }

    /// Has a stranger serve beside this one, where a user calls first.
    pub fn crossed_by(&self, stranger: u32, user: u32) -> OwnedFd {
        serve_as(
            stranger,
            self.folder.at(&format!("rdsockd.sock.users/{user}")),
        )
    }

    pub fn path(&self) -> PathBuf {
        self.folder.at("rdsockd.sock")
    }

    /// Has so many callers wait that there is no room for more. They say nothing, and hang up when dropped.
    pub fn crowd(&self) -> Vec<OwnedFd> {
        let address = UnixAddr::new(&self.path()).unwrap();
        let mut crowd = Vec::new();
        loop {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let caller = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
            match connect(caller.as_raw_fd(), &address) {
                Ok(()) => crowd.push(caller),
                Err(Errno::EAGAIN) => return crowd,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The next caller that says HELLO. Who says nothing, as `rdsock run` does when it looks for a daemon,
    /// is passed over.
    pub fn accept(&self, limit: Duration) -> Option<Attachment> {
        let end = Instant::now() + limit;
        loop {
            let mut attachment = self.next(end.saturating_duration_since(Instant::now()))?;
            if attachment.greeted() {
                return Some(attachment);
            }
        }
    }

    /// The next caller that says HELLO, which stays unread.
    pub fn accept_silently(&self, limit: Duration) -> Option<Attachment> {
        let end = Instant::now() + limit;
        loop {
            let attachment = self.next(end.saturating_duration_since(Instant::now()))?;
            let seen = is_readable(&attachment.socket, Duration::from_secs(10));
            let mut byte = [0];
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            let peeked = nix::sys::socket::recv(attachment.socket.as_raw_fd(), &mut byte, flags);
            if seen && peeked.is_ok_and(|length| length != 0) {
                return Some(attachment);
            }
        }
    }

    fn next(&self, limit: Duration) -> Option<Attachment> {
        if !is_readable(&self.listener, limit) {
            return None;
        }
        let fd = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
        // SAFETY: just accepted, owned by nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        setsockopt(&socket, sockopt::PassCred, &true).unwrap();
        Some(Attachment {
            socket,
            memory: None,
            taker: Taker::new(),
            file: None,
        })
    }
}

fn serve(path: &Path, callers: i32) -> OwnedFd {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&listener, Backlog::new(callers).unwrap()).unwrap();
    listener
}

/// The kernel tells callers who has called `listen`: a thread that is that user.
fn serve_as(user: u32, path: PathBuf) -> OwnedFd {
    let served = std::thread::spawn(move || {
        let listener = serve(&path, 64);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
        // SAFETY: takes three integers. The call itself, without libc, is this thread's alone.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
        assert_eq!(result, 0, "only root can be another user");
        listen(&listener, Backlog::new(64).unwrap()).unwrap();
        listener
    });
    served.join().unwrap()
}

fn is_readable(fd: &OwnedFd, limit: Duration) -> bool {
    use std::os::fd::AsFd;
    let timeout = PollTimeout::try_from(limit).unwrap();
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, timeout).unwrap() != 0
}

/// A shim that has connected.
pub struct Attachment {
    socket: OwnedFd,
    memory: Option<NonNull<TenantMemory>>,
    taker: Taker,
    file: Option<File>,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if let Some(memory) = self.memory {
            // SAFETY: mapped by `make_memory`, and not used after this.
            let _ = unsafe { munmap(memory.cast(), size_of::<TenantMemory>()) };
        }
    }
}

impl Attachment {
    /// Reads HELLO and makes memory for the caller. False where that hangs up instead.
    fn greeted(&mut self) -> bool {
        assert!(is_readable(&self.socket, Duration::from_secs(10)));
        let Some((kind, _, fds)) = self.receive() else {
            return false;
        };
        assert_eq!(kind, kind::HELLO);
        // The bell board, where it has one.
        assert!(fds.len() <= 1, "{} descriptors", fds.len());
        self.make_memory();
        true
    }

    fn make_memory(&mut self) {
        let file = memory_of(c"rdsock-tenant", size_of::<TenantMemory>() as u64);
        let length = size_of::<TenantMemory>().try_into().unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, which nobody else knows.
        let memory = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0) };
        self.memory = Some(memory.unwrap().cast());
        self.file = Some(file);
    }

    fn receive(&self) -> Option<(u16, Option<UnixCredentials>, Vec<OwnedFd>)> {
        let mut bytes = [0; 256];
        let mut room = nix::cmsg_space!([RawFd; 4], UnixCredentials);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let fd = self.socket.as_raw_fd();
        let message = recvmsg::<UnixAddr>(fd, &mut parts, Some(&mut room), flags).ok()?;
        let (mut sender, mut fds) = (None, Vec::new());
        for part in message.cmsgs().unwrap() {
            match part {
                ControlMessageOwned::ScmCredentials(who) => sender = Some(who),
                ControlMessageOwned::ScmRights(numbers) => {
                    // SAFETY: just received, owned by nobody else.
                    fds.extend(
                        numbers
                            .into_iter()
                            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                    );
                }
                _ => {}
            }
        }
        let length = message.bytes;
        let (kind, _) = parse(bytes.get(..length)?).ok()?;
        Some((kind, sender, fds))
    }

    /// Who has sent the messages that are there now, without repetition; but for ADOPT, which a child may send.
    pub fn senders(&self) -> Vec<u32> {
        let mut senders = Vec::new();
        while let Some((what, sender, _)) = self.receive() {
            if what == kind::ADOPT {
                continue;
            }
            senders.push(sender.expect("the kernel names the sender").pid() as u32);
        }
        senders.dedup();
        senders
    }

    fn memory(&self) -> &TenantMemory {
        // SAFETY: mapped as long as `self`; all that is read of it is atomic.
        unsafe { self.memory.expect("it has said HELLO").as_ref() }
    }

    /// Sends a message, and counts it where the shim looks.
    pub fn send<T: Pod>(&self, what: u16, body: &T, fds: &[RawFd]) {
        let message = Message::new(what, body);
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(message.as_bytes())];
        let fd = self.socket.as_raw_fd();
        let _ = sendmsg::<UnixAddr>(fd, &parts, control, MsgFlags::MSG_NOSIGNAL, None);
    }

    /// Takes it in, as a daemon that sleeps: sends it its memory, and waits until it has mapped that.
    pub fn welcome(&self) {
        self.offer();
        let has_mapped = self.has_mapped(Duration::from_secs(60));
        assert!(has_mapped, "it does not map its memory");
    }

    /// Sends it its memory, as a daemon that sleeps.
    pub fn offer(&self) {
        let fixed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        fcntl(self.file(), FcntlArg::F_ADD_SEALS(fixed)).unwrap();
        let header = &self.memory().header;
        header.daemon_sleeps.store(1, Ordering::SeqCst);
        self.send_memory();
    }

    /// Waits until it has mapped its memory.
    pub fn has_mapped(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while self.receive().map(|(kind, ..)| kind) != Some(kind::ATTACHED) {
            let left = end.saturating_duration_since(Instant::now());
            if !is_readable(&self.socket, left) {
                return false;
            }
        }
        true
    }

    /// Sends it its memory, whatever that is.
    pub fn send_memory(&self) {
        let welcome = Welcome {
            tenant: 1,
            answer_us: 0,
            judges: 0,
        };
        self.send(kind::WELCOME, &welcome, &[self.file().as_raw_fd()]);
    }

    /// Whether it asks for another control connection.
    pub fn asks_to_adopt(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while is_readable(&self.socket, end.saturating_duration_since(Instant::now())) {
            match self.receive() {
                Some((kind::ADOPT, ..)) => return true,
                Some(_) => {}
                None => return false,
            }
        }
        false
    }

    /// True when it hangs up and has said nothing before.
    pub fn hangs_up(&self, limit: Duration) -> bool {
        is_readable(&self.socket, limit) && self.receive().is_none()
    }

    fn file(&self) -> &File {
        self.file.as_ref().expect("it has said HELLO")
    }

    fn count_message(&self) {
        self.memory()
            .header
            .messages
            .fetch_add(1, Ordering::Release);
    }

    /// The next request of its queue.
    pub fn take(&mut self) -> Option<Request> {
        let memory = self.memory.expect("it has said HELLO");
        // SAFETY: as in `memory`; the taker is another field.
        self.taker.take(unsafe { &(*memory.as_ptr()).queue })
    }

    /// The next request of this kind.
    pub fn wait_for(&mut self, what: u32, limit: Duration) -> Request {
        let end = Instant::now() + limit;
        loop {
            match self.take() {
                Some(request) if request.what == what => return request,
                Some(request) => assert_ne!(request.what, request::MAPPED, "it was mapped"),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
            assert!(Instant::now() < end, "no request {what}");
        }
    }

    /// Offers a stream, whose memory, end page and bells are sealed but for one of them.
    pub fn promote(&self, announced: &Request, unsealed: Option<usize>) {
        let sizes = [stream_bytes(MIN_RING), 4096, size_of::<BellBoard>() as u64];
        let files = sizes.into_iter().map(|bytes| memory_of(c"test", bytes));
        let files: Vec<File> = files.collect();
        for direction in 0..2 {
            let at = offset_of!(StreamHeader, directions) + direction * size_of::<Direction>();
            let at = at + offset_of!(Direction, producer) + offset_of!(Producer, switch_at);
            files[0]
                .write_all_at(&NOT_SWITCHED.to_ne_bytes(), at as u64)
                .unwrap();
        }
        for (number, file) in files.iter().enumerate() {
            if Some(number) != unsealed {
                fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
            }
        }
        let promote = Promote {
            conn: announced.conn,
            generation: announced.generation,
            stream_id: 1,
            ring_size: MIN_RING,
            data_offset: DATA_OFFSET,
            ..from_bytes(&[0; size_of::<Promote>()]).unwrap()
        };
        let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        self.send(kind::PROMOTE, &promote, &fds);
        self.count_message();
    }
}

fn memory_of(name: &std::ffi::CStr, bytes: u64) -> File {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags).unwrap());
    file.set_len(bytes).unwrap();
    file
}
