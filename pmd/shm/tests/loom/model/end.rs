//! One end of a stream as loom drives it: the production end over a pipe of bytes, and the calls of a program that waits.
//!
//! A reset is a panic here: two honest ends never reset each other, but in `abandon`, which tells its caller.

use super::{Futex, Given, Memory, Pipe, direction};
use loom::sync::atomic::{AtomicU32, Ordering::*, fence};
use loom::thread::yield_now;
use rdsock_shm::end::{
    self, Anchor, Buffers, Got, How, Limits, Nap, Patience, Process, Received, Sent, Shared, Shut,
    Sleeper, Take, Until,
};
use rdsock_shm::layout::{Counter, Direction, EndPage, RxState, TxState, phase, want};
use rdsock_shm::lock::Owner;
use rdsock_shm::reason::Reason;
use rdsock_shm::wake;
use std::sync::Arc;

/// What both ends map, and the connection under it.
pub struct Wire {
    directions: [Direction; 2],
    memory: [Memory; 2],
    anchors: [Pipe; 2],
    /// For each direction, those who sleep on the word of its consumer.
    naps: [Futex; 2],
}

/// What the processes of an end have for themselves: `conn::Conn`.
struct Conn {
    phase: AtomicU32,
    in_tx: AtomicU32,
}

/// Values of [`Conn::phase`].
const ANNOUNCED: u32 = 1;
const INSTALLING: u32 = 2;
const MAPPED: u32 = 3;

/// One end, as a thread of one of its processes sees it.
#[derive(Clone)]
pub struct End {
    wire: Arc<Wire>,
    page: Arc<EndPage>,
    conn: Arc<Conn>,
    shared: Arc<Shared>,
    /// Which end.
    number: usize,
    /// Which thread.
    thread: u64,
    /// It naps before it sleeps for bytes.
    naps: bool,
}

/// Both ends of a connection: mapped by nobody yet, both directions on the anchor.
pub fn connection(ring_size: usize) -> [End; 2] {
    connection_over(ring_size, [Pipe::new(), Pipe::new()])
}

fn connection_over(ring_size: usize, anchors: [Pipe; 2]) -> [End; 2] {
    let wire = Arc::new(Wire {
        directions: [direction(), direction()],
        memory: [Memory::new(ring_size), Memory::new(ring_size)],
        anchors,
        naps: Default::default(),
    });
    [0, 1].map(|number| {
        let page = Arc::new(EndPage::default());
        // SAFETY: the ends keep what the pointers lead to. There are no bells.
        let shared = unsafe {
            Shared::new(
                wire.directions.as_ptr(),
                &raw const *page,
                std::ptr::null(),
                [wire.memory[0].ring(), wire.memory[1].ring()],
                number as u32,
            )
        };
        End {
            wire: wire.clone(),
            page,
            conn: Arc::new(Conn {
                phase: AtomicU32::new(ANNOUNCED),
                in_tx: AtomicU32::new(0),
            }),
            shared: Arc::new(shared),
            number,
            thread: 1,
            naps: false,
        }
    })
}

/// Both ends of a stream whose directions have moved to the rings already.
pub fn stream(ring_size: usize) -> [End; 2] {
    on_rings(connection(ring_size))
}

/// The same over an anchor that takes so many bytes at a time.
pub fn stream_over(ring_size: usize, room: usize) -> [End; 2] {
    let pipes = [Pipe::with_room(room), Pipe::with_room(room)];
    on_rings(connection_over(ring_size, pipes))
}

fn on_rings(ends: [End; 2]) -> [End; 2] {
    for end in &ends {
        assert!(end.map());
    }
    for end in &ends {
        assert!(end.at().lock_tx().try_switch());
        ends[1 - end.number].at().settle_switch();
        wake::unask(&end.incoming().bytes.want, want::WAKE);
        wake::unask(&end.out().bytes.want, want::WAKE);
    }
    ends
}

impl Anchor for &End {
    unsafe fn send(&self, from: *const u8, len: usize) -> Got {
        // SAFETY: the caller vouches for the bytes.
        match self
            .sends()
            .send_now(unsafe { std::slice::from_raw_parts(from, len) })
        {
            0 => Got::Nothing,
            sent => Got::Bytes(sent),
        }
    }

    fn peek(&self) -> Got {
        got(&self.receives().look(1))
    }

    unsafe fn take(&self, to: *mut u8, len: usize, how: Take) -> Got {
        let given = match how {
            Take::Into | Take::Discard => self.receives().receive(len as u64),
            Take::Peek | Take::Count => self.receives().look(len),
        };
        if let (Given::Bytes(bytes), Take::Into | Take::Peek) = (&given, how) {
            // SAFETY: the caller vouches for `len` bytes, and there are no more.
            unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
        got(&given)
    }

    fn unread(&self) -> Option<u64> {
        Some(self.receives().unread())
    }

    fn sent(&self) -> Option<u64> {
        Some(self.sends().sent())
    }

    fn received(&self) -> Option<u64> {
        Some(self.receives().received())
    }

    fn is_open(&self) -> bool {
        !self.sends().has_ended() && !self.receives().has_ended()
    }

    fn shut(&self, which: Shut) {
        if which == Shut::Sending {
            self.sends().end();
        }
    }

    fn break_at_close(&self) {}

    fn wait(&self, what: Until, _: u32) -> bool {
        match what {
            Until::Room => {
                self.sends().wait_for_room();
                true
            }
            Until::Bytes => self.receives().sleep(),
        }
    }

    fn wait_fd(&self) -> i32 {
        -1
    }
}

fn got(given: &Given) -> Got {
    match given {
        Given::Bytes(bytes) => Got::Bytes(bytes.len()),
        Given::Nothing => Got::Nothing,
        Given::End => Got::End,
    }
}

impl Process for &End {
    fn me(&self) -> Owner {
        Owner::new(self.number as u32 + 1, 16 * self.thread)
    }

    fn is_sending(&self) -> bool {
        self.conn.in_tx.load(SeqCst) != 0
    }

    fn give_way(&self) {
        yield_now();
    }

    fn rest(&self) {
        yield_now();
    }

    /// Time stands still: nobody is ever late.
    fn milliseconds(&self) -> u64 {
        0
    }

    /// Nor is anybody ever out of patience.
    fn patience(&self) -> Patience<'_> {
        Patience {
            spent: None,
            most: 1,
            every: 1,
        }
    }

    fn is_running(&self, _: u32) -> bool {
        true
    }

    fn name(&self) -> u64 {
        self.thread
    }

    fn is_awake(&self, _: u64) -> bool {
        true
    }

    fn barrier(&self) {
        panic!("nobody is hot here");
    }

    fn has_barriers(&self) -> bool {
        false
    }

    fn wake(&self, word: &AtomicU32) {
        let directions = self.wire.directions.iter();
        for (direction, naps) in directions.zip(&self.wire.naps) {
            if std::ptr::eq(word, &direction.bytes.want) {
                naps.wake();
            }
        }
    }

    fn count(&self, _: Counter) {}

    fn look_later(&self) {}

    fn limits(&self) -> Limits {
        Limits {
            piece: 4,
            ..Limits::DEFAULT
        }
    }

    fn broken(&self, reason: Reason) {
        panic!("end {} resets the stream: {reason:?}", self.number);
    }

    fn left(&self, _: Reason) {}
}

/// Calls `with` with the buffers that are one slice.
fn with_buffers<T>(bytes: *mut u8, len: usize, with: impl FnOnce(&Buffers) -> T) -> T {
    let part = libc::iovec {
        iov_base: bytes.cast(),
        iov_len: len,
    };
    // SAFETY: one entry, which lives as long as the call.
    let buffers = unsafe { Buffers::new(&part, 1, |_| Ok::<_, ()>(())) };
    with(&buffers.unwrap())
}

impl End {
    /// Another thread on the same end.
    pub fn thread(&self, number: u64) -> End {
        End {
            thread: number + 1,
            ..self.clone()
        }
    }

    /// The same thread, when it naps before it sleeps.
    pub fn napping(&self) -> End {
        End {
            naps: true,
            ..self.clone()
        }
    }

    /// The time of this end's nap is over, if a thread naps.
    pub fn end_nap(&self) {
        self.wire.naps[1 - self.number].wake();
    }

    /// The production end.
    pub fn at(&self) -> end::End<'_, &End> {
        end::End {
            shared: &self.shared,
            socket: self,
        }
    }

    pub fn tx(&self) -> &TxState {
        &self.page.tx
    }

    pub fn rx(&self) -> &RxState {
        &self.page.rx
    }

    pub fn out(&self) -> &Direction {
        &self.wire.directions[self.number]
    }

    pub fn incoming(&self) -> &Direction {
        &self.wire.directions[1 - self.number]
    }

    /// Where this end's fd sends.
    pub fn sends(&self) -> &Pipe {
        &self.wire.anchors[self.number]
    }

    /// Where this end's fd receives.
    pub fn receives(&self) -> &Pipe {
        &self.wire.anchors[1 - self.number]
    }

    /// True when what this end receives is the kernel's again.
    pub fn reads_kernel(&self) -> bool {
        self.rx().phase.load(Acquire) == phase::DEMOTED
    }

    pub fn outstanding(&self) -> u32 {
        self.at().outstanding()
    }

    /// `tenant::follow`: follows the daemon's offer, unless a kernel call is under way. False: it is
    /// kept for later.
    pub fn map(&self) -> bool {
        let phase = &self.conn.phase;
        if phase
            .compare_exchange(ANNOUNCED, INSTALLING, SeqCst, Relaxed)
            .is_err()
        {
            return true;
        }
        fence(SeqCst);
        if self.conn.in_tx.load(SeqCst) != 0 {
            phase.store(ANNOUNCED, SeqCst);
            return false;
        }
        assert!(self.at().promote(false));
        phase.store(MAPPED, SeqCst);
        true
    }

    /// `calls::transfer`, of a send.
    pub fn send(&self, bytes: &[u8]) {
        loop {
            if self.conn.phase.load(Acquire) == MAPPED {
                return self.send_on_stream(bytes);
            }
            self.conn.in_tx.fetch_add(1, SeqCst);
            fence(SeqCst);
            let phase = self.conn.phase.load(SeqCst);
            let plain = phase != INSTALLING && phase != MAPPED;
            if plain {
                self.sends().send(bytes);
            }
            self.conn.in_tx.fetch_sub(1, SeqCst);
            if plain {
                return;
            }
            if phase == INSTALLING {
                yield_now();
            }
        }
    }

    /// `io::send`, blocking, of all the bytes; and what its caller does with the rest.
    fn send_on_stream(&self, bytes: &[u8]) {
        let end = self.at();
        let mut done = 0;
        with_buffers(bytes.as_ptr().cast_mut(), bytes.len(), |from| {
            loop {
                match end.send(from, &mut done) {
                    Sent::All => return,
                    Sent::Kernel(counted) => {
                        self.sends().send(&bytes[done..]);
                        if counted.is_some() {
                            drop(counted);
                            end.after_kernel_send();
                        }
                        return;
                    }
                    Sent::Pipe | Sent::Broken => panic!("the direction has ended"),
                    // `rest::wait`.
                    Sent::Behind => {
                        self.sends().wait_for_room();
                        continue;
                    }
                    Sent::Full => {}
                }
                if !self.shared.is_sendable(1) {
                    self.for_space();
                    // `io::send` when it has slept.
                    end.look();
                }
            }
        });
    }

    /// `io::recv`, blocking: at most `most` bytes, none at the end.
    pub fn receive(&self, most: u64) -> Vec<u8> {
        let end = self.at();
        let mut slept = false;
        loop {
            let mut bytes = vec![0; most as usize];
            let mut done = 0;
            let received = with_buffers(bytes.as_mut_ptr(), bytes.len(), |to| {
                end.receive(to, How::default(), &mut done)
            });
            match received {
                Received::Bytes => {
                    bytes.truncate(done);
                    return bytes;
                }
                Received::End => return Vec::new(),
                Received::Kernel => return self.receive_in_kernel(most),
                Received::Nothing if slept => {
                    end.look();
                    slept = false;
                }
                Received::Nothing => {
                    self.for_bytes();
                    slept = true;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn receive_in_kernel(&self, most: u64) -> Vec<u8> {
        loop {
            match self.receives().receive(most) {
                Given::Bytes(bytes) => return bytes,
                Given::End => return Vec::new(),
                Given::Nothing => self.receives().sleep(),
            };
        }
    }

    /// `io::recv`, not blocking: `None` is EAGAIN. With `look`, the anchor is looked at, as it is
    /// now and then.
    pub fn try_receive(&self, most: u64, look: bool) -> Option<Vec<u8>> {
        let end = self.at();
        let mut bytes = vec![0; most as usize];
        let mut done = 0;
        let received = with_buffers(bytes.as_mut_ptr(), bytes.len(), |to| {
            end.receive(to, How::default(), &mut done)
        });
        match received {
            Received::Bytes => {
                bytes.truncate(done);
                Some(bytes)
            }
            Received::End => Some(Vec::new()),
            Received::Kernel => match self.receives().receive(most) {
                Given::Bytes(bytes) => Some(bytes),
                Given::End => Some(Vec::new()),
                Given::Nothing => None,
            },
            Received::Nothing => {
                if look {
                    end.look();
                }
                None
            }
            other => panic!("{other:?}"),
        }
    }

    /// Receives all that comes until `most` bytes are there.
    pub fn receive_all(&self, most: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < most {
            let bytes = self.receive((most - all.len()) as u64);
            assert!(!bytes.is_empty(), "the end comes after {all:?}");
            all.extend(bytes);
        }
        all
    }

    /// `poll::sleep` whose time is over at once.
    pub fn poll_in_vain(&self) {
        self.at().ask_for_bytes(want::WAKE);
        self.poll();
        wake::unask(&self.incoming().bytes.want, want::WAKE);
        wake::unask(&self.out().space.want, want::WAKE);
    }

    /// A sender of this end wants space, and has been taken off the processor.
    pub fn asks_for_space(&self) {
        self.at().ask_for_space(want::WAKE);
    }

    /// `shutdown(SHUT_WR)`, on the ring.
    pub fn shut(&self) {
        assert!(self.at().shut_sending());
    }

    /// The close of the fd.
    pub fn close(&self) {
        self.at().close(false);
        self.sends().end();
    }

    /// Sleeps on the anchor until somebody sends, unless `is_ready` once the other end is asked: `wait::sleep`.
    fn sleep(&self, ask: impl FnOnce(), is_ready: impl FnOnce() -> bool) {
        let Some(sleeper) = Sleeper::enter(&self.at()) else {
            return yield_now();
        };
        ask();
        let alive = is_ready() || self.receives().sleep();
        drop(sleeper);
        if !alive {
            self.at().note_end(false);
        }
    }

    /// `nap::until`.
    fn nap(&self) {
        if let Some(nap) = Nap::enter(&self.at())
            && !self.shared.may_receive()
        {
            let (word, value) = nap.place();
            self.wire.naps[1 - self.number].sleep(word, value);
        }
    }

    /// `wait::for_bytes`.
    fn for_bytes(&self) {
        if self.naps {
            self.nap();
            if self.shared.may_receive() {
                return;
            }
        }
        let ask = || {
            self.at().ask_for_bytes(want::WAKE);
        };
        self.sleep(ask, || self.shared.may_receive());
    }

    /// `wait::for_space`.
    fn for_space(&self) {
        self.at().settle_switch();
        if self.shared.is_switching() && self.receives().look(1) != Given::Nothing {
            return yield_now();
        }
        let ask = || self.at().ask_for_space(want::WAKE);
        self.sleep(ask, || self.shared.is_sendable(self.shared.ring_size() / 3));
    }

    /// What any later call that looks for readiness does: `ready::settle`.
    pub fn poll(&self) {
        let end = self.at();
        end.settle_switch();
        end.settle_reset();
        end.send_rest();
        if self.shared.peer_has_left() {
            end.follow();
        }
        end.settle_incoming();
    }

    /// What a program does that goes on waiting, until the other end has left and has all that it left in the ring.
    pub fn poll_until_kernel_sends(&self) {
        while self.tx().phase.load(Acquire) != phase::DEMOTED {
            self.poll();
            yield_now();
        }
    }

    /// Leaves the rings.
    pub fn leave(&self) {
        self.at().leave();
    }

    /// Leaves the rings at once. False: the stream is to be reset, since bytes that the kernel should have are in
    /// a ring that the other end has left already, or have tokens behind them.
    pub fn abandon(&self) -> bool {
        self.at().abandon().is_ok()
    }
}
