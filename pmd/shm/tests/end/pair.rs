//! Both ends of a connection in one thread, over two queues of bytes with little room.

use rdsock_shm::end::{
    Anchor, Buffers, End, Got, How, Limits, Patience, Process, Received, Sent, Shared, Shut, Take,
    Until,
};
use rdsock_shm::layout::{
    BELLS, Bell, Counter, Direction, EndPage, MIN_RING, NOT_SWITCHED, anchor, phase,
};
use rdsock_shm::lock::Owner;
use rdsock_shm::reason::Reason;
use rdsock_shm::ring::RingMemory;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Bytes of each ring.
pub const RING: usize = MIN_RING as usize;
/// Bytes that lie on an anchor at most.
pub const ROOM: usize = 3000;
/// Milliseconds that a process may wait for others,
pub const PATIENCE: u32 = 100;
/// in so many.
pub const EVERY: u32 = 10_000;

/// One direction of the anchor.
#[derive(Debug, Default)]
struct Pipe {
    bytes: RefCell<VecDeque<u8>>,
    /// Room, where it is not [`ROOM`].
    room: Cell<Option<usize>>,
    sent: Cell<u64>,
    ended: Cell<bool>,
    /// It has ended with this error, which who looks takes.
    error: Cell<Option<i32>>,
    /// Urgent data comes next, which a receive passes over, and behind which nothing counts as unread.
    urgent: Cell<bool>,
    /// Nobody can say how much is there.
    uncounted: Cell<bool>,
}

impl Pipe {
    fn room(&self) -> usize {
        self.room.get().unwrap_or(ROOM)
    }

    fn look(&self) -> Got {
        match self.bytes.borrow().len() {
            0 => match self.error.take() {
                Some(error) => Got::Error(error),
                None if self.ended.get() => Got::End,
                None => Got::Nothing,
            },
            _ => Got::Bytes(1),
        }
    }

    fn send(&self, bytes: &[u8]) -> usize {
        let mut queue = self.bytes.borrow_mut();
        let len = bytes.len().min(self.room().saturating_sub(queue.len()));
        queue.extend(&bytes[..len]);
        self.sent.set(self.sent.get() + len as u64);
        len
    }
}

/// What both ends map, and the anchor.
#[derive(Debug)]
pub struct Wire {
    directions: Box<[Direction; 2]>,
    memory: [Box<[Cell<u8>]>; 2],
    bells: Option<Box<[Bell; BELLS]>>,
    pipes: [Pipe; 2],
    limits: Limits,
    spent: [Rc<AtomicU64>; 2],
}

/// One end and its process.
#[derive(Debug)]
pub struct Side<'a> {
    wire: &'a Wire,
    page: Box<EndPage>,
    number: usize,
    mapped: Cell<bool>,
    clock: Cell<u64>,
    broken: Cell<Option<Reason>>,
    left: Cell<Option<Reason>>,
    /// The connection was broken under it.
    cut: Cell<bool>,
    /// What a close does.
    linger: Cell<u64>,
    /// Bytes that the other end's kernel has not taken.
    unsent: Cell<u64>,
    /// Waits for room, and all that were given to others or to the anchor.
    waits: Cell<[u32; 2]>,
    /// What was waited, as `Patience` keeps it.
    spent: Rc<AtomicU64>,
    looks: Cell<u32>,
    /// Processes that are no more, and those that run another program, without the anchor.
    gone: RefCell<[Vec<u32>; 2]>,
    /// How often it was said that something has changed here,
    changes: Cell<u32>,
    /// and that with what it was about, when it was last compared.
    noted: Cell<(u32, [u32; 6])>,
    /// How often it has woken who naps, at either end.
    naps_ended: Cell<u32>,
    /// Calls on the anchor that may still be made, where that was said.
    calls_left: Cell<Option<u32>>,
}

/// A value made of zeroes.
///
/// # Safety
/// Zeroes are a value of it.
unsafe fn zeroed<T>() -> Box<T> {
    // SAFETY: the caller vouches for it.
    Box::new(unsafe { std::mem::zeroed() })
}

impl Wire {
    /// A connection that nobody has mapped.
    pub fn new() -> Self {
        Self::with(Limits::DEFAULT)
    }

    /// The same, with other thresholds than a program has.
    pub fn with(limits: Limits) -> Self {
        let wire = Wire {
            // SAFETY: made of atomics and integers.
            directions: unsafe { zeroed() },
            memory: [
                vec![Cell::new(0); RING].into(),
                vec![Cell::new(0); RING].into(),
            ],
            // SAFETY: as above.
            bells: Some(unsafe { zeroed() }),
            pipes: Default::default(),
            limits,
            spent: Default::default(),
        };
        for direction in &*wire.directions {
            direction.producer.switch_at.store(NOT_SWITCHED, Relaxed);
        }
        wire
    }

    /// Of two users, who have no bells of each other.
    pub fn between_users() -> Self {
        Wire {
            bells: None,
            ..Self::new()
        }
    }

    /// Whose end 1 belongs to a process that has others as well, with one account of what was waited.
    pub fn of_process(account: &Rc<AtomicU64>) -> Self {
        Wire {
            spent: [Rc::default(), account.clone()],
            ..Self::new()
        }
    }

    /// Its two ends.
    pub fn sides(&self) -> [Side<'_>; 2] {
        [0, 1].map(|number| Side {
            wire: self,
            // SAFETY: as above.
            page: unsafe { zeroed() },
            number,
            mapped: Cell::new(false),
            clock: Cell::new(0),
            broken: Cell::new(None),
            left: Cell::new(None),
            cut: Cell::new(false),
            linger: Cell::new(0),
            unsent: Cell::new(0),
            waits: Cell::default(),
            spent: self.spent[number].clone(),
            looks: Cell::new(0),
            gone: RefCell::default(),
            changes: Cell::new(0),
            naps_ended: Cell::new(0),
            calls_left: Cell::new(None),
            noted: Cell::default(),
        })
    }

    /// The bytes of a ring.
    pub fn ring(&self, number: usize) -> &[Cell<u8>] {
        &self.memory[number]
    }

    /// What one end has mapped.
    pub fn shared(&self, side: &Side<'_>) -> Shared {
        // SAFETY: the wire outlives the ends; the rings are touched by their halves only.
        unsafe {
            let ring = |number: usize| {
                let start = self.memory[number].as_ptr();
                RingMemory::new(start.cast_mut().cast(), RING as u64)
            };
            Shared::new(
                self.directions.as_ptr(),
                &raw const *side.page,
                (self.bells.as_ref()).map_or(std::ptr::null(), |bells| bells.as_ptr()),
                [ring(0), ring(1)],
                side.number as u32,
            )
        }
    }
}

impl Anchor for &Side<'_> {
    unsafe fn send(&self, from: *const u8, len: usize) -> Got {
        // SAFETY: the caller vouches for the bytes.
        let bytes = unsafe { std::slice::from_raw_parts(from, len) };
        match self.out().send(bytes) {
            0 => Got::Nothing,
            sent => Got::Bytes(sent),
        }
    }

    fn peek(&self) -> Got {
        self.note_call();
        self.incoming().look()
    }

    unsafe fn take(&self, to: *mut u8, len: usize, how: Take) -> Got {
        let seen = self.peek();
        if seen != Got::Bytes(1) {
            return seen;
        }
        if matches!(how, Take::Into | Take::Discard) {
            self.incoming().urgent.set(false);
        }
        let mut queue = self.incoming().bytes.borrow_mut();
        let len = len.min(queue.len());
        for at in 0..len {
            if matches!(how, Take::Into | Take::Peek) {
                // SAFETY: the caller vouches for the buffer.
                unsafe { to.add(at).write(queue[at]) };
            }
        }
        if matches!(how, Take::Into | Take::Discard) {
            queue.drain(..len);
        }
        Got::Bytes(len)
    }

    unsafe fn peek_behind(&self, skip: u64, to: *mut u8, len: usize) -> Got {
        let queue = self.incoming().bytes.borrow();
        let behind = queue.iter().skip(skip as usize).take(len);
        let got = behind.clone().count();
        for (at, byte) in behind.enumerate() {
            // SAFETY: the caller vouches for the buffer.
            unsafe { to.add(at).write(*byte) };
        }
        if got == 0 {
            Got::Nothing
        } else {
            Got::Bytes(got)
        }
    }

    fn unread(&self) -> Option<u64> {
        self.note_call();
        if self.incoming().uncounted.get() {
            return None;
        }
        if self.incoming().urgent.get() {
            return Some(0);
        }
        Some(self.incoming().bytes.borrow().len() as u64)
    }

    fn unsent(&self) -> Option<u64> {
        Some(self.unsent.get())
    }

    fn sent(&self) -> Option<u64> {
        Some(self.out().sent.get())
    }

    fn received(&self) -> Option<u64> {
        Some(self.incoming().sent.get() - self.unread()?)
    }

    fn is_open(&self) -> bool {
        !self.out().ended.get() && !self.incoming().ended.get()
    }

    fn shut(&self, which: Shut) {
        if which == Shut::Sending {
            self.out().ended.set(true);
        }
    }

    fn break_at_close(&self) {}

    fn linger(&self) -> u64 {
        self.linger.get()
    }

    fn set_linger(&self, linger: u64) {
        self.linger.set(linger);
    }

    fn break_now(&self) {
        self.cut.set(true);
    }

    /// Nothing comes by waiting here, but time passes.
    fn wait(&self, what: Until, ms: u32) -> bool {
        let there = match what {
            Until::Room => !self.is_full(),
            Until::Bytes => self.peek() != Got::Nothing,
        };
        if !there {
            self.note_wait(u64::from(ms));
        }
        there
    }

    fn wait_fd(&self) -> i32 {
        -1
    }
}

impl Process for &Side<'_> {
    fn me(&self) -> Owner {
        Owner::new(self.number as u32 + 1, 16)
    }

    fn is_sending(&self) -> bool {
        false
    }

    fn give_way(&self) {}

    fn rest(&self) {
        self.note_wait(1);
    }

    /// Passes by [`Side::note_wait`] alone, but for those who are late.
    fn milliseconds(&self) -> u64 {
        self.clock.get()
    }

    fn patience(&self) -> Patience<'_> {
        Patience {
            spent: Some(&self.spent),
            most: PATIENCE,
            every: EVERY,
        }
    }

    fn is_running(&self, pid: u32) -> bool {
        !self.gone.borrow()[0].contains(&pid)
    }

    fn may_have_anchor(&self, pid: u32) -> bool {
        !self.gone.borrow()[1].contains(&pid)
    }

    fn name(&self) -> u64 {
        self.number as u64 + 1
    }

    fn is_awake(&self, _: u64) -> bool {
        true
    }

    fn barrier(&self) {}

    fn has_barriers(&self) -> bool {
        false
    }

    fn wake(&self, _: &AtomicU32) {
        self.naps_ended.set(self.naps_ended.get() + 1);
    }

    fn count(&self, _: Counter) {}

    fn changed(&self) {
        self.changes.set(self.changes.get() + 1);
    }

    fn look_later(&self) {
        self.looks.set(self.looks.get() + 1);
    }

    fn limits(&self) -> Limits {
        self.wire.limits
    }

    fn broken(&self, reason: Reason) {
        self.broken.set(Some(reason));
    }

    fn left(&self, reason: Reason) {
        self.left.set(Some(reason));
    }
}

/// Calls `with` with the buffers that are one slice.
pub fn with_buffers<T>(bytes: *mut u8, len: usize, with: impl FnOnce(&Buffers) -> T) -> T {
    let part = libc::iovec {
        iov_base: bytes.cast(),
        iov_len: len,
    };
    // SAFETY: one entry, which lives as long as the call.
    let buffers = unsafe { Buffers::new(&part, 1, |_| Ok::<_, ()>(())) };
    with(&buffers.unwrap())
}

/// What a program's receive gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gave {
    /// So many bytes; none at the end.
    Bytes(Vec<u8>),
    /// EAGAIN.
    Nothing,
    /// ECONNRESET.
    Broken,
}

impl Side<'_> {
    fn out(&self) -> &Pipe {
        &self.wire.pipes[self.number]
    }

    fn incoming(&self) -> &Pipe {
        &self.wire.pipes[1 - self.number]
    }

    /// Why the stream was broken, where it was.
    pub fn broken(&self) -> Option<Reason> {
        self.broken.get()
    }

    /// A process ends.
    pub fn ends(&self, pid: u32) {
        self.gone.borrow_mut()[0].push(pid);
    }

    /// A process runs another program, which has not got the anchor.
    pub fn runs_another(&self, pid: u32) {
        self.gone.borrow_mut()[1].push(pid);
    }

    /// Why both directions are the kernel's, where they are.
    pub fn left(&self) -> Option<Reason> {
        self.left.get()
    }

    /// The end is mapped.
    pub fn is_mapped(&self) -> bool {
        self.mapped.get()
    }

    /// No room on the anchor.
    pub fn is_full(&self) -> bool {
        self.out().bytes.borrow().len() >= self.out().room()
    }

    /// From now on so many bytes lie at most on the anchor that this end sends on.
    pub fn set_room(&self, room: usize) {
        self.out().room.set(Some(room));
    }

    /// So many bytes were sent on the anchor that the other end's kernel has no room for.
    pub fn set_unsent(&self, bytes: u64) {
        self.unsent.set(bytes);
    }

    /// Time passes while this end waits.
    fn note_wait(&self, ms: u64) {
        let [count, all] = self.waits.get();
        self.waits.set([count + 1, all + ms as u32]);
        self.pass(ms);
    }

    /// Time passes.
    pub fn pass(&self, ms: u64) {
        self.clock.set(self.clock.get() + ms);
    }

    /// How often this end has waited, and how many milliseconds in all.
    pub fn waits(&self) -> [u32; 2] {
        self.waits.get()
    }

    /// True when the connection was broken under the end.
    pub fn is_cut(&self) -> bool {
        self.cut.get()
    }

    /// True when this end's direction of the anchor has ended.
    pub fn has_shut(&self) -> bool {
        self.out().ended.get()
    }

    /// Bytes that came to this end's anchor past everybody.
    pub fn slip(&self, bytes: &[u8]) {
        self.incoming().send(bytes);
    }

    /// Urgent data comes next on this end's anchor, before what is there.
    pub fn slip_urgent(&self) {
        let pipe = self.incoming();
        if !pipe.urgent.replace(true) {
            pipe.sent.set(pipe.sent.get() + 1);
        }
    }

    /// What is on this end's anchor can't be counted any more.
    pub fn lose_count(&self) {
        self.incoming().uncounted.set(true);
    }

    /// This end's anchor ends, past everybody: with an error, or without.
    pub fn slip_end(&self, error: Option<i32>) {
        self.incoming().error.set(error);
        self.incoming().ended.set(true);
    }

    /// What the kernel says of this end's anchor: bits of `poll`.
    pub fn bits(&self) -> i16 {
        let pipe = self.incoming();
        let (there, room) = (!pipe.bytes.borrow().is_empty(), !self.is_full());
        let (ended, broken) = (pipe.ended.get(), pipe.error.get().is_some());
        let bits = [
            (there || ended, libc::POLLIN | libc::POLLRDNORM),
            (room || ended, libc::POLLOUT | libc::POLLWRNORM),
            (ended, libc::POLLRDHUP),
            (broken, libc::POLLERR | libc::POLLHUP),
        ];
        bits.iter()
            .filter(|(is, _)| *is)
            .fold(0, |all, (_, bit)| all | bit)
    }

    /// True when a look at the anchor finds its end.
    pub fn has_heard_end(&self) -> bool {
        self.on_anchor() == 0 && self.incoming().ended.get()
    }

    /// No more calls than these on the anchor from now on.
    pub fn count_calls(&self, most: u32) {
        self.calls_left.set(Some(most));
    }

    fn note_call(&self) {
        if let Some(left) = self.calls_left.get() {
            assert_ne!(left, 0, "a step has no end");
            self.calls_left.set(Some(left - 1));
        }
    }

    /// How often this end has woken a thread that naps, at either end.
    pub fn naps_ended(&self) -> u32 {
        self.naps_ended.get()
    }

    /// Bytes on this end's side of the anchor, tokens among them.
    pub fn on_anchor(&self) -> usize {
        self.incoming().bytes.borrow().len()
    }
}

/// One end, with what it has mapped: the calls of a program that never waits.
#[derive(Debug)]
pub struct Program<'a> {
    /// What it has mapped.
    pub shared: Shared,
    /// The end.
    pub side: &'a Side<'a>,
}

impl<'a> Program<'a> {
    /// Of an end.
    pub fn new(side: &'a Side<'a>) -> Self {
        Program {
            shared: side.wire.shared(side),
            side,
        }
    }

    /// The production end.
    pub fn end(&self) -> End<'_, &'a Side<'a>> {
        End {
            shared: &self.shared,
            socket: self.side,
        }
    }

    /// The daemon's offer is followed.
    pub fn map(&self) {
        if !self.side.mapped.get() {
            self.side.mapped.set(self.end().promote(true));
        }
    }

    /// As a thread that is inside a kernel send when the stream comes.
    pub fn send_on_anchor(&self, bytes: &[u8]) -> usize {
        self.side.out().send(bytes)
    }

    /// Sends what goes at once; how much. `None`: the direction has ended.
    /// Goes on with a send of which so many bytes have gone.
    pub fn go_on(&self, bytes: &[u8], mut done: usize) -> Sent<'_> {
        with_buffers(bytes.as_ptr().cast_mut(), bytes.len(), |from| {
            self.end().send(from, &mut done)
        })
    }

    pub fn send(&self, bytes: &[u8]) -> Option<usize> {
        if !self.side.mapped.get() {
            return Some(self.side.out().send(bytes));
        }
        let (end, mut done) = (self.end(), 0);
        let sent = with_buffers(bytes.as_ptr().cast_mut(), bytes.len(), |from| {
            end.send(from, &mut done)
        });
        match sent {
            Sent::All | Sent::Full | Sent::Behind => Some(done),
            Sent::Kernel(counted) => {
                done += self.side.out().send(&bytes[done..]);
                if counted.is_some() {
                    drop(counted);
                    end.after_kernel_send();
                }
                Some(done)
            }
            Sent::Pipe | Sent::Broken => None,
        }
    }

    /// Receives what is there.
    pub fn receive(&self, most: usize, how: How) -> Gave {
        let mut bytes = vec![0; most];
        let mut done = 0;
        let received = with_buffers(bytes.as_mut_ptr(), most, |to| {
            if self.side.mapped.get() {
                self.end().receive(to, how, &mut done)
            } else {
                Received::Kernel
            }
        });
        match received {
            Received::Bytes => {
                bytes.truncate(done);
                Gave::Bytes(bytes)
            }
            Received::End => Gave::Bytes(Vec::new()),
            Received::Nothing | Received::Few(_) if done == 0 => Gave::Nothing,
            Received::Kernel => {
                let take = if how.peek { Take::Peek } else { Take::Into };
                // SAFETY: the buffer's own rest.
                let rest =
                    unsafe { (&self.side).take(bytes.as_mut_ptr().add(done), most - done, take) };
                match rest {
                    Got::Bytes(got) => done += got,
                    Got::Nothing if done == 0 => return Gave::Nothing,
                    _ => {}
                }
                bytes.truncate(done);
                Gave::Bytes(bytes)
            }
            Received::Error(_) => Gave::Broken,
            Received::Nothing | Received::Few(_) => {
                bytes.truncate(done);
                Gave::Bytes(bytes)
            }
        }
    }

    /// What a question does before it is answered.
    pub fn poll(&self) {
        if !self.side.mapped.get() {
            return;
        }
        let end = self.end();
        end.settle_switch();
        end.settle_reset();
        end.send_rest();
        if self.shared.peer_has_left() {
            end.follow();
        }
        end.settle_incoming();
    }

    /// True when nothing has changed at this end since the last question that was not said: whoever waits elsewhere for
    /// the connection is told by nobody else.
    pub fn has_said_changes(&self) -> bool {
        let (rx, tx) = (self.shared.rx(), self.shared.tx());
        let told = anchor::EOF | anchor::BROKEN;
        let words = [
            rx.phase.load(Relaxed),
            tx.phase.load(Relaxed),
            rx.shut.load(Relaxed),
            tx.shut.load(Relaxed),
            rx.anchor.load(Relaxed) & told,
            rx.drained.load(Relaxed),
        ];
        let now = (self.side.changes.get(), words);
        let before = self.side.noted.replace(now);
        before.1 == now.1 || before.0 != now.0
    }

    /// Where the incoming direction is: a value of [`phase`].
    pub fn receives_by(&self) -> u32 {
        self.shared.rx().phase.load(Relaxed)
    }

    /// Where the outgoing direction is.
    pub fn sends_by(&self) -> u32 {
        self.shared.tx().phase.load(Relaxed)
    }
}

/// Calls `with` with both ends of a stream, mapped, and with `on_rings` moved to the rings.
pub fn stream(on_rings: bool, with: impl FnOnce(&Program<'_>, &Program<'_>)) {
    stream_over(Wire::new(), on_rings, with);
}

/// The same over this connection.
pub fn stream_over(wire: Wire, on_rings: bool, with: impl FnOnce(&Program<'_>, &Program<'_>)) {
    let [one, other] = wire.sides();
    let (one, other) = (Program::new(&one), Program::new(&other));
    one.map();
    other.map();
    if on_rings {
        for (from, to) in [(&one, &other), (&other, &one)] {
            assert_eq!(from.send(b"x"), Some(1));
            assert_eq!(to.receive(1, How::default()), Gave::Bytes(b"x".into()));
            assert_eq!(
                (from.sends_by(), to.receives_by()),
                (phase::RING, phase::RING)
            );
        }
    }
    with(&one, &other);
}
