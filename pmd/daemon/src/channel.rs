//! A control connection: datagrams with descriptors in, datagrams with descriptors out, nothing blocks.
//!
//! Descriptors that a stranger sends are taken in by a porter alone ([`unpack`]): to close one may have to be waited
//! for, and so may be to drop a message that holds one. So the control thread looks first whether a datagram brings
//! any ([`receive`]), and hands the channel to a porter if it does. A porter closes the socket, too.
//!
//! A socket that was handed over (ADOPT) is a stranger's itself: he may have kept it, take messages away between two looks, and
//! hold its lock for as long as he likes. So porters receive all that comes there. To send, and to ask whether
//! something has come, takes no lock that can be held for long.
//!
//! To send and to receive wakes whoever waits at the other end, at the expense of whoever does it: half a million watchers
//! cost tens of milliseconds. So both are loads, quick ones as a rule: one datagram in, what waits out.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, MsgFlags, Shutdown, UnixAddr, sendmsg, setsockopt, shutdown, sockopt,
};
use rdsock_shm::control::{Message, kind, parse};

use crate::accounts::{Charge, Over, Thing};
use crate::diag::is_seqpacket;
use crate::found::Found;
use crate::memory::{BadBoard, Bells};
use crate::porters::{self, Owner, Porters};
use crate::process::Peer;
use crate::sentry::Awaited;

/// A descriptor that a stranger has as well, or something else of that kind.
pub type Foreign<T = OwnedFd> = porters::Foreign<Found, T>;
/// Who closes it.
pub type Closer = porters::Closer<Found>;

/// What comes there.
impl Awaited for Arc<Foreign> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

/// Longest datagram that is a message; a longer one is cut off by the kernel and is none.
const LONGEST: usize = 256;
/// Descriptors for which there is room: one is the most that a message brings that makes sense, and two show that it makes none. Further ones
/// the kernel lets go of itself, in the time of who receives, and nobody has them here.
const MAX_FDS: usize = 2;
/// Descriptors that it takes to look at what a message brings: a socket, and who has made it ([`Peer`]).
pub const LUGGAGE_DESCRIPTORS: u64 = 3;
const _: () = assert!(MAX_FDS as u64 <= LUGGAGE_DESCRIPTORS);

/// A datagram from the other side.
#[derive(Debug)]
pub struct Received {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Process that sent it, by the kernel's word.
    pub sender: i32,
    /// What came beside it.
    pub luggage: Luggage,
}

impl Received {
    /// It says nothing but that there is something to look at.
    pub fn is_kick(&self) -> bool {
        matches!(parse(&self.bytes), Ok((kind::KICK, _)))
    }
}

/// What came beside a message, as a porter has found it.
#[derive(Debug)]
pub enum Luggage {
    /// Nothing.
    None,
    /// Of a HELLO: the bell board that a tenant brings along.
    Bells(Result<Bells, BadBoard>),
    /// Of an ADOPT: a control connection, with the process that made it.
    Channel(Foreign, Peer),
    /// Likewise, of a process that has ended since. It is closed already.
    Left,
    /// There was something, and no room for it on its user's account, or no descriptor free. The kernel has let go of it.
    NoRoom,
    /// What makes no sense there. It is closed already.
    Other,
}

/// A datagram to the other side.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The descriptors beside it.
    pub fds: Vec<Arc<Foreign>>,
}

/// What a receive found.
#[derive(Debug)]
pub enum Receive {
    /// A datagram.
    Message(Received),
    /// A datagram that brings descriptors: a porter has to take it in.
    Descriptors,
    /// Nothing now.
    Nothing,
    /// The other side has hung up.
    Closed,
}

/// How far a send came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Everything is sent.
    Done,
    /// The socket is full: it becomes writable when the other side reads.
    Full,
    /// Too many fds are on their way to processes that do not read, or there is no memory: no
    /// event will say when that ends.
    Later,
}

impl From<Message> for Outgoing {
    fn from(message: Message) -> Self {
        Outgoing {
            bytes: message.as_bytes().to_vec(),
            fds: Vec::new(),
        }
    }
}

impl Outgoing {
    /// What it counts on its user's account while it waits.
    fn weight(&self) -> u64 {
        (self.bytes.len() + size_of::<Self>()) as u64
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Channel {
    socket: Arc<Foreign>,
    queue: VecDeque<Outgoing>,
    /// Datagrams that are being sent, and what they weigh.
    under_way: Option<(usize, u64)>,
    /// What waits to be sent, on its user's account.
    unread: Charge,
}

/// Datagrams to be sent, by whoever carries that ([`Batch::send`]).
#[derive(Debug)]
pub struct Batch {
    socket: Arc<Foreign>,
    queue: VecDeque<Outgoing>,
}

/// What became of them.
#[derive(Debug)]
pub struct Sent {
    /// How many were sent.
    pub count: usize,
    /// Those that were not.
    unsent: VecDeque<Outgoing>,
    /// How far that came.
    pub flushed: io::Result<Flush>,
}

impl Batch {
    /// Sends what the socket takes. May be much work: who sends wakes whoever waits at the other end.
    pub fn send(mut self) -> Sent {
        let mut count = 0;
        let flushed = loop {
            let Some(message) = self.queue.front() else {
                break Ok(Flush::Done);
            };
            match send(&self.socket, message) {
                Ok(()) => {
                    self.queue.pop_front();
                    count += 1;
                }
                Err(Errno::EAGAIN) => break Ok(Flush::Full),
                Err(Errno::ETOOMANYREFS | Errno::ENOBUFS | Errno::ENOMEM) => {
                    break Ok(Flush::Later);
                }
                Err(Errno::EINTR) => {}
                Err(error) => break Err(error.into()),
            }
        };
        Sent {
            count,
            unsent: self.queue,
            flushed,
        }
    }
}

fn send(socket: &Foreign, message: &Outgoing) -> Result<(), Errno> {
    let fds: Vec<RawFd> = message.fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let parts = [IoSlice::new(&message.bytes)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &parts, control, flags, None).map(drop)
}

impl Channel {
    /// Takes over a connected socket. `unread` is charged with what waits to be sent.
    pub fn new(socket: Foreign, unread: Charge) -> Self {
        Channel {
            socket: Arc::new(socket),
            queue: VecDeque::new(),
            under_way: None,
            unread,
        }
    }

    /// The socket.
    pub fn socket(&self) -> &Arc<Foreign> {
        &self.socket
    }

    /// Has something come? Waits for nobody, whoever else has the socket.
    pub fn has_message(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
    }

    /// Queues a datagram. Fails when the other side does not read what it has asked for. Consequence: it is cut off.
    pub fn queue(&mut self, message: Outgoing) -> Result<(), Over> {
        self.unread.more(Thing::Unread, message.weight())?;
        self.queue.push_back(message);
        Ok(())
    }

    /// Closes it, when what is queued was sent.
    pub fn dismiss(self, porters: &Porters<Found>) {
        dismiss_with(porters, self.socket, self.queue);
    }

    /// Datagrams that wait.
    pub fn queued(&self) -> usize {
        self.queue.len() + self.under_way.map_or(0, |(count, _)| count)
    }

    /// What is to be sent now, if anything is, and nothing is being sent: [`Channel::sent`] is to be told what became of
    /// it.
    pub fn batch(&mut self) -> Option<Batch> {
        if self.queue.is_empty() || self.under_way.is_some() {
            return None;
        }
        let queue = std::mem::take(&mut self.queue);
        let weight = queue.iter().map(Outgoing::weight).sum();
        self.under_way = Some((queue.len(), weight));
        let socket = self.socket.clone();
        Some(Batch { socket, queue })
    }

    /// What became of a batch.
    pub fn sent(&mut self, sent: Sent) -> io::Result<Flush> {
        let weight = self.under_way.take().map_or(0, |(_, weight)| weight);
        let left: u64 = sent.unsent.iter().map(Outgoing::weight).sum();
        self.unread.less(Thing::Unread, weight.saturating_sub(left));
        for message in sent.unsent.into_iter().rev() {
            self.queue.push_front(message);
        }
        sent.flushed
    }
}

/// The next datagram on a socket that nobody else has, unless it brings descriptors. May be much work: who receives wakes
/// whoever waits to send.
pub fn receive(socket: &Foreign) -> io::Result<Receive> {
    match take(socket, MsgFlags::MSG_PEEK, 0)? {
        // Nobody else reads, so what is there is what was looked at.
        Taken::Whole(..) => {}
        Taken::CutOff(..) => return Ok(Receive::Descriptors),
        Taken::Nothing => return Ok(Receive::Nothing),
        Taken::Closed => return Ok(Receive::Closed),
    }
    match take(socket, MsgFlags::empty(), 0)? {
        Taken::Whole(bytes, sender, _) => Ok(Receive::Message(Received {
            bytes,
            sender,
            luggage: Luggage::None,
        })),
        Taken::CutOff(..) | Taken::Nothing => Ok(Receive::Nothing),
        Taken::Closed => Ok(Receive::Closed),
    }
}

/// `SO_PASSRIGHTS` of the kernel: whether others can send descriptors to a socket. They are told EPERM where they can't.
const PASS_RIGHTS: i32 = 83;

/// Do descriptors come in there from now on? As before where the kernel can't keep them away.
pub fn take_files(socket: &impl AsFd, whether: bool) {
    let whether = libc::c_int::from(whether);
    // SAFETY: the call reads one integer.
    unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            PASS_RIGHTS,
            (&raw const whether).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
    }
}

/// Have no descriptors come in there, since the kernel keeps them away?
pub fn has_no_files(socket: &Foreign) -> bool {
    let mut whether: libc::c_int = 1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the call writes one integer, and how long it is.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            PASS_RIGHTS,
            (&raw mut whether).cast(),
            &raw mut len,
        )
    };
    got == 0 && whether == 0
}

/// Nothing comes in any more. Has nothing come? Else who closes the socket lets go of that, and wakes whoever waits to send for each message;
/// for descriptors among it he waits for as long as who has sent them likes. For a socket that nobody else has.
pub fn is_left_empty(socket: &Foreign) -> bool {
    let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
    matches!(
        take(socket, MsgFlags::MSG_PEEK, 0),
        Ok(Taken::Nothing | Taken::Closed)
    )
}

/// On whose behalf is sent: what is received and looked at for the same connection need not be waited for.
pub fn sender(owner: Owner) -> Owner {
    const SENDS: u64 = 1 << 63;
    Owner {
        connection: owner.connection | SENDS,
        ..owner
    }
}

/// Closes a control connection when it has no user any more, and says this before. What is unread is read first: else the
/// other side would be told ECONNRESET, before it could read why it was refused.
pub fn dismiss(porters: &Porters<Found>, socket: Arc<Foreign>, last: Outgoing) {
    dismiss_with(porters, socket, VecDeque::from([last]));
}

/// The same, with what was not sent any more: that may be the last to hold a stream's memory.
fn dismiss_with(porters: &Porters<Found>, socket: Arc<Foreign>, unsent: VecDeque<Outgoing>) {
    // Behind what is being sent. To shut it down wakes whoever waits at the other end, too.
    porters.give(sender(socket.owner()), move || {
        let queue = unsent;
        let batch = Batch {
            socket: socket.clone(),
            queue,
        };
        let unsent = batch.send();
        // Nothing comes in from now on.
        let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        // The kernel drops descriptors that there is no room for.
        while matches!(
            take(&socket, MsgFlags::empty(), 0),
            Ok(Taken::Whole(..) | Taken::CutOff(..))
        ) {}
        drop(unsent);
        None
    });
}

enum Taken {
    /// A datagram, its sender, and its descriptors.
    Whole(Vec<u8>, i32, Vec<OwnedFd>),
    /// The same, where there were more than there was room for, or descriptors free.
    CutOff(Vec<u8>, i32, Vec<OwnedFd>),
    Nothing,
    Closed,
}

/// Room for the control messages of a datagram: its sender, and [`MAX_FDS`] descriptors.
type Control = [u64; 7];
const _: () = assert!(size_of::<Control>() >= 32 + 16 + 4 * MAX_FDS);

/// A pidfd of the sender. The kernel adds it to each message where whoever has the socket, too, has asked for that (`SO_PASSPIDFD`).
const SCM_PIDFD: i32 = 4;

/// Receives a datagram with room for `fds` descriptors.
fn take(socket: &Foreign, flags: MsgFlags, fds: usize) -> io::Result<Taken> {
    let (mut bytes, mut control) = ([0u8; LONGEST], [0u64; size_of::<Control>() / 8]);
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: CMSG_SPACE only computes.
    let space = unsafe {
        let of_fds = match fds {
            0 => 0,
            _ => libc::CMSG_SPACE((size_of::<RawFd>() * fds) as u32),
        };
        libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) + of_fds
    };
    // SAFETY: integers and pointers; zeroes are a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = (space as usize).min(size_of::<Control>()) as _;
    let flags = flags | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let len = loop {
        // SAFETY: the message's parts are valid for writes of their lengths, and outlive the call.
        let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags.bits()) };
        match (len, Errno::last()) {
            (0.., _) => break len as usize,
            (_, Errno::EINTR) => {}
            (_, Errno::EAGAIN) => return Ok(Taken::Nothing),
            (_, Errno::ECONNRESET) => return Ok(Taken::Closed),
            (_, error) => return Err(error.into()),
        }
    };
    let (sender, fds) = unpack_control(&message);
    let is_cut_off = message.msg_flags & libc::MSG_CTRUNC != 0;
    let bytes = bytes.get(..len).unwrap_or(&[]).to_vec();
    Ok(match (len, sender) {
        _ if is_cut_off => Taken::CutOff(bytes, sender.unwrap_or(0), fds),
        (0, None) => Taken::Closed,
        _ => Taken::Whole(bytes, sender.unwrap_or(0), fds),
    })
}

/// The sender (`None` where the kernel says nothing, 0 where that one can't be seen from here) and the descriptors of a message
/// that was received, also of one whose control messages were cut off. A message without bytes has a sender, and the end of all has none.
fn unpack_control(message: &libc::msghdr) -> (Option<i32>, Vec<OwnedFd>) {
    let (mut sender, mut fds) = (None, Vec::new());
    // SAFETY: the kernel has filled the control messages up to `msg_controllen`, and the macros keep within that. It has
    // just made the fds, and nothing else owns them.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(message);
        while !at.is_null() {
            let data = libc::CMSG_DATA(at);
            let bytes = ((*at).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
            match ((*at).cmsg_level, (*at).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS | SCM_PIDFD) => {
                    for number in 0..bytes / size_of::<RawFd>() {
                        let fd = data.cast::<RawFd>().add(number).read_unaligned();
                        // In place of a pidfd that can't be had there is an error.
                        if fd >= 0 {
                            fds.push(OwnedFd::from_raw_fd(fd));
                        }
                    }
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if bytes >= size_of::<libc::ucred>() => {
                    sender = Some(data.cast::<libc::ucred>().read_unaligned().pid);
                }
                _ => {}
            }
            at = libc::CMSG_NXTHDR(message, at);
        }
    }
    (sender, fds)
}

/// Takes in a datagram, and looks at the descriptors that it brings: with `room` on an account for these, which is in use until they are
/// closed; else the kernel lets go of them. May wait: for a porter.
pub fn unpack(socket: &Foreign, room: Option<Arc<Charge>>) -> io::Result<Receive> {
    let most = room.as_ref().map_or(0, |_| MAX_FDS);
    let (bytes, sender, fds, whole) = match take(socket, MsgFlags::empty(), most)? {
        Taken::Whole(bytes, sender, fds) => (bytes, sender, fds, true),
        Taken::CutOff(bytes, sender, fds) => (bytes, sender, fds, false),
        Taken::Nothing => return Ok(Receive::Nothing),
        Taken::Closed => return Ok(Receive::Closed),
    };
    let brought = |fd| {
        let foreign = socket.closer().foreign(fd);
        room.iter().cloned().fold(foreign, Foreign::paid_by)
    };
    let luggage = match parse(&bytes) {
        _ if !whole && fds.len() < MAX_FDS => Luggage::NoRoom,
        _ if !whole => Luggage::Other,
        _ if fds.is_empty() => Luggage::None,
        Ok((kind::HELLO, _)) => Luggage::Bells(bells(fds, brought)),
        Ok((kind::ADOPT, [])) => channel(fds, brought).unwrap_or(Luggage::Other),
        _ => Luggage::Other,
    };
    Ok(Receive::Message(Received {
        bytes,
        sender,
        luggage,
    }))
}

fn bells(fds: Vec<OwnedFd>, brought: impl Fn(OwnedFd) -> Foreign) -> Result<Bells, BadBoard> {
    let [bells] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| BadBoard::Number)?;
    Bells::check(brought(bells))
}

fn channel(fds: Vec<OwnedFd>, brought: impl Fn(OwnedFd) -> Foreign) -> Option<Luggage> {
    let [socket] = <[OwnedFd; 1]>::try_from(fds).ok()?;
    if !is_seqpacket(socket.as_fd()) {
        return None;
    }
    let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL).ok()?);
    fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).ok()?;
    setsockopt(&socket, sockopt::PassCred, &true).ok()?;
    match Peer::of(&socket) {
        Ok(peer) => Some(Luggage::Channel(brought(socket), peer)),
        // So say kernels that give no pidfd of a process that has been waited for.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => {
            Some(Luggage::Left)
        }
        Err(_) => None,
    }
}

/// What lets go of what a test has made.
#[cfg(test)]
pub(crate) fn closer_of_test() -> Closer {
    let starter = crate::starter::Starter::new().unwrap();
    let porters = Porters::new(starter, crate::shares::Known::default()).unwrap();
    porters.closer(Owner {
        uid: 0,
        connection: 1,
    })
}
