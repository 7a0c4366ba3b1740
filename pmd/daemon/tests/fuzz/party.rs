//! What a fuzzer says to the daemon, and what it may be told for it. A party is one tenant's memory, with
//! all that was asked through it; a link is one control connection.

use std::collections::{HashMap, HashSet};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    connect, recvmsg, sendmsg, socket,
};
use rdsock_shm::control::{Between, Lookup, Message, Request, from_bytes, kind, parse, request};
use rdsock_shm::layout::{QUEUE_SLOTS, TenantMemory};
use rdsock_shm::sync::Ordering;

use crate::dice::Dice;
use crate::tenant::Memory;

/// What was asked through one memory at most, before another one takes its place.
const ASKED: usize = 20_000;
/// Puts that find the queue full, before it is given up.
const FULL: u32 = 200;

/// Times that a link gives way to the daemon.
const GIVE_WAY: usize = 5_000;

/// A tenant's memory.
pub struct Party {
    pub memory: Memory,
    /// A daemon has sent this memory.
    pub is_attached: bool,
    /// Which sockets, as (descriptor, cookie), were named for a connection record and generation.
    claims: HashMap<(u32, u32), Vec<(i32, u64)>>,
    questions: HashSet<u64>,
    claimed: usize,
    /// Its queue was written past the rules, so it is not known what was asked.
    pub scribbled: bool,
    full: u32,
    /// Requests that the daemon had taken when it was last looked at.
    taken: u32,
}

impl Party {
    pub fn new() -> Self {
        Party {
            memory: Memory::new(),
            is_attached: false,
            claims: HashMap::new(),
            questions: HashSet::new(),
            claimed: 0,
            scribbled: false,
            full: 0,
            taken: 0,
        }
    }

    /// Requests that the daemon has taken since this was last asked.
    pub fn newly_taken(&mut self) -> u64 {
        let taken = self.memory.header().taken.load(Ordering::Relaxed);
        let before = std::mem::replace(&mut self.taken, taken);
        match self.scribbled {
            // It may be anything now.
            true => 0,
            false => taken.wrapping_sub(before).into(),
        }
    }

    /// Better replaced when nobody uses it.
    pub fn is_worn(&self) -> bool {
        self.scribbled || self.full > FULL || self.claimed + self.questions.len() > ASKED
    }

    /// Maps the memory that the daemon has sent. What to say of it.
    pub fn take(&mut self, file: OwnedFd) -> Message {
        self.is_attached = true;
        (self.full, self.taken) = (0, 0);
        self.memory.take(file)
    }

    /// Puts a request. True when there was room.
    pub fn put(&mut self, request: &Request) -> bool {
        if matches!(request.what, request::ANNOUNCE | request::HOLDS) {
            self.claim(request.conn, request.generation, request.fd, request.cookie);
        }
        let put = self.memory.put(request);
        self.full = if put { 0 } else { self.full + 1 };
        put
    }

    fn claim(&mut self, conn: u32, generation: u32, fd: i32, cookie: u64) {
        let claims = self.claims.entry((conn, generation)).or_default();
        if !claims.contains(&(fd, cookie)) {
            claims.push((fd, cookie));
            self.claimed += 1;
        }
    }

    /// Notes what a datagram asks.
    pub fn note(&mut self, datagram: &[u8]) {
        match parse(datagram) {
            Ok((kind::LOOKUP, body)) => {
                if let Some(lookup) = from_bytes::<Lookup>(body) {
                    let Lookup {
                        conn, generation, ..
                    } = lookup;
                    self.claim(conn, generation, lookup.fd, lookup.cookie);
                }
            }
            Ok((kind::REACH | kind::WHOIS, body)) => {
                if let Some(question) = from_bytes::<Between>(body) {
                    self.questions.insert(question.question);
                }
            }
            _ => {}
        }
    }

    /// The sockets that were named for a connection, if it was spoken of at all.
    pub fn claims(&self, conn: u32, generation: u32) -> Option<&[(i32, u64)]> {
        self.claims.get(&(conn, generation)).map(Vec::as_slice)
    }

    pub fn asked(&self, question: u64) -> bool {
        self.questions.contains(&question)
    }

    /// Writes anything into some of its words.
    pub fn scribble(&mut self, dice: &mut Dice) {
        self.scribbled = true;
        let all = size_of::<TenantMemory>() / 8;
        for _ in 0..1 + dice.below(64) {
            let word = match dice.below(4) {
                0 => dice.below(all),
                1 => dice.below(64),
                // A slot's sequence, near to what is expected.
                2 => 64 + 16 * dice.below(QUEUE_SLOTS),
                _ => 64 + dice.below(16 * QUEUE_SLOTS),
            };
            let value = match dice.below(4) {
                0 => dice.below(3 * QUEUE_SLOTS) as u64,
                1 => u64::MAX,
                2 => 0,
                _ => dice.word(),
            };
            self.memory.word(8 * word).store(value, Ordering::SeqCst);
        }
    }
}

/// A control connection.
pub struct Link {
    pub socket: OwnedFd,
    /// Its party, by number, when a HELLO was sent.
    pub party: Option<usize>,
    /// Another process's: to be written to, but not read.
    pub foreign: bool,
    /// Never reads.
    pub deaf: bool,
    /// Datagrams that the daemon may not have taken yet.
    pub sent: u64,
}

impl Link {
    pub fn over(socket: OwnedFd, dice: &mut Dice) -> Self {
        Link {
            socket,
            party: None,
            foreign: false,
            deaf: dice.once_in(2),
            sent: 0,
        }
    }

    /// Gives way until there is something to be read, or for long enough.
    pub fn has_message_soon(&self) -> bool {
        for _ in 0..GIVE_WAY {
            let mut events = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut events, PollTimeout::ZERO) != Ok(0) {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    /// Gives way until the daemon has taken what was sent, or for long enough; returns how much that
    /// was. When it has hung up, it has taken at least one.
    pub fn settle(&mut self) -> u64 {
        for _ in 0..GIVE_WAY {
            let mut flags = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
            if poll(&mut flags, PollTimeout::ZERO) != Ok(0) {
                return std::mem::take(&mut self.sent).min(1);
            }
            let mut unread: i32 = 0;
            // SAFETY: the call writes one integer.
            unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::TIOCOUTQ, &mut unread) };
            if unread == 0 {
                return std::mem::take(&mut self.sent);
            }
            std::thread::yield_now();
        }
        0
    }

    /// Connects; `None` when the daemon can't take one now.
    pub fn open(path: &Path, dice: &mut Dice) -> Option<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        match connect(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()) {
            Ok(()) => Some(Self::over(socket, dice)),
            Err(Errno::EAGAIN) => None,
            Err(error) => panic!("the daemon is gone: {error}"),
        }
    }

    pub fn send(&self, bytes: &[u8], fds: &[RawFd]) -> nix::Result<usize> {
        send(self.socket.as_raw_fd(), bytes, fds)
    }
}

/// Sends a datagram with descriptors, and never waits.
pub fn send(socket: RawFd, bytes: &[u8], fds: &[RawFd]) -> nix::Result<usize> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<UnixAddr>(socket, &[IoSlice::new(bytes)], control, flags, None)
}

/// Receives a datagram with descriptors, if there is one.
pub fn receive(socket: RawFd, buffer: &mut [u8]) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; 253]);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<UnixAddr>(socket, &mut parts, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            // SAFETY: just received, owned by nobody else.
            let owned = numbers
                .into_iter()
                .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
            fds.extend(owned);
        }
    }
    Ok((message.bytes, fds))
}
