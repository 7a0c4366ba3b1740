//! One end of a stream, with the steps of the shim's `stream.rs`, `wait.rs`, `io.rs`, `demote.rs`
//! and `tenant/offer.rs`. What the shim answers with a reset is a panic here: two honest ends never
//! reset each other, but in `abandon`, which tells its caller.
//!
//! Where the shim does more: it gives a stopped sleeper a limited time to look before it takes the
//! last wake byte, and it leaves requests standing when the last sleeper goes, since `epoll` asks
//! with the same words.

use super::{Anchor, Got, Memory, direction, take};
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering::*, fence};
use loom::thread::yield_now;
use rdsock_shm::layout::{
    Ask, Direction, EndPage, NOT_SWITCHED, RxState, TxState, anchor, mark, phase, want,
};
use rdsock_shm::lock::{self, Owner, Taken};
use rdsock_shm::ring::{Receiver, Sender};
use rdsock_shm::wake;
use std::sync::Arc;

pub const WAKE_BYTE: u8 = 0xA5;

/// What both ends map, and the connection under it.
pub struct Wire {
    directions: [Direction; 2],
    memory: [Memory; 2],
    anchors: [Anchor; 2],
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
    /// Which end.
    number: usize,
    /// Who locks.
    me: Owner,
}

/// Both ends of a connection: mapped by nobody yet, both directions on the anchor.
pub fn connection(ring_size: usize) -> [End; 2] {
    let wire = Arc::new(Wire {
        directions: [direction(), direction()],
        memory: [Memory::new(ring_size), Memory::new(ring_size)],
        anchors: [Anchor::new(), Anchor::new()],
    });
    [0, 1].map(|number| End {
        wire: wire.clone(),
        page: Arc::new(EndPage::default()),
        conn: Arc::new(Conn {
            phase: AtomicU32::new(ANNOUNCED),
            in_tx: AtomicU32::new(0),
        }),
        number,
        me: Owner::new(number as u32 + 1, 16),
    })
}

/// Both ends of a stream whose directions have moved to the rings already.
pub fn stream(ring_size: usize) -> [End; 2] {
    let ends = connection(ring_size);
    for end in &ends {
        assert!(end.map());
    }
    for end in &ends {
        assert!(end.try_switch());
        let peer = &ends[1 - end.number];
        peer.receiver().switch(0);
        peer.rx().phase.store(phase::RING, Release);
        wake::unask(&end.incoming().bytes.want, want::WAKE);
        wake::unask(&end.out().bytes.want, want::WAKE);
    }
    ends
}

/// What one attempt to receive gave: `io::Took`.
enum Took {
    Some(Vec<u8>),
    Nothing,
    Again,
    /// Somebody else must look first.
    Wait,
    End,
    Left,
}

/// A half's lock, released when this is dropped.
struct Guard<'a> {
    lock: &'a AtomicU64,
    taken: Taken,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        lock::release(self.lock, self.taken);
    }
}

impl End {
    /// Another thread on the same end.
    pub fn thread(&self, number: u64) -> End {
        End {
            me: Owner::new(self.number as u32 + 1, 16 * (number + 1)),
            ..self.clone()
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
    pub fn sends(&self) -> &Anchor {
        &self.wire.anchors[self.number]
    }

    /// Where this end's fd receives.
    pub fn receives(&self) -> &Anchor {
        &self.wire.anchors[1 - self.number]
    }

    fn sender(&self) -> Sender<'_> {
        let ring = self.wire.memory[self.number].ring();
        Sender::new(self.tx(), self.out(), ring, false)
    }

    fn receiver(&self) -> Receiver<'_> {
        let ring = self.wire.memory[1 - self.number].ring();
        Receiver::new(self.rx(), self.incoming(), ring, false)
    }

    fn ring_size(&self) -> u64 {
        self.wire.memory[self.number].ring().size()
    }

    fn lock_tx(&self) -> Guard<'_> {
        let lock = &self.tx().lock;
        Guard {
            lock,
            taken: take(lock, self.me),
        }
    }

    fn lock_rx(&self) -> Guard<'_> {
        let lock = &self.rx().lock;
        Guard {
            lock,
            taken: take(lock, self.me),
        }
    }

    /// `Stream::has_bytes`.
    fn has_bytes(&self) -> bool {
        self.incoming().producer.head.load(Acquire) != self.rx().tail.load(Relaxed)
    }

    /// True when what this end receives is the kernel's again.
    pub fn reads_kernel(&self) -> bool {
        self.rx().phase.load(Acquire) == phase::DEMOTED
    }

    /// `Stream::reset`.
    fn reset(&self, why: &str) {
        panic!("end {} resets the stream: {why}", self.number);
    }

    // stream.rs: waking the other end.

    /// `Stream::answer`.
    fn answer(&self, ask: &Ask) -> u32 {
        let taken = wake::take(&ask.want);
        if taken & want::WAKE != 0 && taken & (want::DEMOTED | want::CLOSED) == 0 {
            self.send_wake();
            wake::rung(&ask.want);
        }
        taken
    }

    /// `Stream::send_wake`.
    fn send_wake(&self) {
        self.out().producer.wakes.fetch_add(1, AcqRel);
        self.sends().send(&[WAKE_BYTE]);
    }

    /// `Stream::begin_ringing`.
    fn begin_ringing(&self, request: &AtomicU32) -> bool {
        request
            .fetch_update(AcqRel, Acquire, |old| {
                (old & want::DEMOTED == 0)
                    .then_some(old & !(want::BELL | want::WAKE) | want::RINGING)
            })
            .is_ok()
    }

    // stream.rs: wake bytes on this end's side of the anchor. The receiving half is held.

    /// `RxGuard::outstanding`.
    pub fn outstanding(&self) -> u32 {
        let sent = self.incoming().producer.wakes.load(Acquire);
        sent.wrapping_sub(self.rx().drained.load(Relaxed))
    }

    /// `RxGuard::drain`: not while somebody sleeps who has not looked since these bytes came, and not
    /// before the ring is read, since the program's own bytes may come first.
    fn drain(&self) {
        if self.rx().phase.load(Acquire) == phase::RING && self.rx().waiters.load(SeqCst) == 0 {
            self.take_wakes(self.outstanding());
        }
    }

    /// `RxGuard::take_wakes`.
    fn take_wakes(&self, most: u32) {
        if most == 0 {
            return;
        }
        match self.receives().receive(most.into()) {
            Got::Bytes(bytes) => {
                self.rx().drained.fetch_add(bytes.len() as u32, Relaxed);
                if bytes.iter().any(|byte| *byte != WAKE_BYTE) {
                    self.reset("a byte that is no wake byte");
                }
            }
            Got::Nothing => {}
            Got::End => self.note_end(),
        }
    }

    /// `Stream::note_end`.
    fn note_end(&self) {
        self.rx().anchor.fetch_or(anchor::EOF, AcqRel);
    }

    /// `RxGuard::look`.
    fn look(&self) {
        self.drain();
        if self.outstanding() != 0 || self.rx().anchor.load(Relaxed) != 0 {
            return;
        }
        match self.receives().look() {
            Got::Bytes(_) => {
                let ended = self.incoming().producer.mark.load(Acquire) & mark::END != 0;
                if self.outstanding() == 0 && !ended && self.rx().phase.load(Relaxed) == phase::RING
                {
                    self.reset("a byte that nobody counted");
                }
            }
            Got::Nothing => {}
            Got::End => self.note_end(),
        }
    }

    // tenant/offer.rs: the start.

    /// `tenant::install`: the connection's kernel calls have ended, so the position stands still
    /// but for what arrives.
    fn install(&self) {
        let position = self.receives().received();
        self.rx().tail.store(position, Relaxed);
        self.rx().phase.store(phase::SWITCHING, Release);
        self.incoming().bytes.want.fetch_or(want::WAKE, SeqCst);
        self.incoming().consumer.ready.store(1, Release);
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
        self.install();
        phase.store(MAPPED, SeqCst);
        true
    }

    // io.rs: sending.

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

    /// `io::try_switch`. The sending half is held.
    fn try_switch(&self) -> bool {
        fence(SeqCst);
        if self.out().consumer.ready.load(Acquire) != 1
            || self.conn.in_tx.load(SeqCst) != 0
            || self.tx().in_kernel.load(SeqCst) != 0
            || self.out().bytes.want.load(Acquire) & want::DEMOTED != 0
        {
            return false;
        }
        self.sender().switch(self.sends().sent());
        self.tx().phase.store(phase::RING, Release);
        true
    }

    /// `io::send`, blocking, of all the bytes; and what its caller does with the rest.
    fn send_on_stream(&self, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let guard = self.lock_tx();
            let counted = match self.tx().phase.load(Acquire) {
                phase::RING => None,
                phase::ANCHOR if self.is_leaving() => {
                    self.end_sending();
                    if self.tx().phase.load(Acquire) == phase::ANCHOR {
                        self.tx().in_kernel.fetch_add(1, SeqCst);
                        Some(true)
                    } else {
                        Some(false)
                    }
                }
                phase::ANCHOR if self.try_switch() => None,
                phase::ANCHOR => {
                    self.tx().in_kernel.fetch_add(1, SeqCst);
                    Some(true)
                }
                _ => Some(false),
            };
            if let Some(counted) = counted {
                // `calls::transfer`.
                drop(guard);
                self.sends().send(&bytes[done..]);
                if counted {
                    self.tx().in_kernel.fetch_sub(1, SeqCst);
                    self.after_kernel_send();
                }
                return;
            }
            self.fill(bytes, &mut done);
            drop(guard);
            if done == bytes.len() || self.tx().phase.load(Relaxed) != phase::RING {
                continue;
            }
            if self.peer_has_left() {
                self.follow();
                continue;
            }
            // `io::peer_has_gone`.
            if self.rx().phase.load(Acquire) == phase::RING {
                let guard = self.lock_rx();
                self.look();
                drop(guard);
            }
            if !self.sendable(1) {
                self.for_space();
            }
        }
    }

    /// `io::fill`. The sending half is held.
    fn fill(&self, bytes: &[u8], done: &mut usize) {
        let sender = self.sender();
        while *done < bytes.len() {
            let Some(space) = sender.reserve((bytes.len() - *done) as u64).unwrap() else {
                return;
            };
            // SAFETY: the slice is at least as long as the reservation.
            unsafe { sender.fill(space, 0, bytes[*done..].as_ptr(), space.len as usize) };
            sender.publish();
            *done += space.len as usize;
            if wake::asked(&self.out().bytes) != 0 {
                let taken = self.answer(&self.out().bytes);
                self.after_answer(taken);
                if self.tx().phase.load(Relaxed) != phase::RING {
                    return;
                }
            }
        }
    }

    /// `io::after_kernel_send`.
    fn after_kernel_send(&self) {
        fence(SeqCst);
        if self.is_leaving() {
            let _guard = self.lock_tx();
            self.end_sending();
        }
        if self.rx().phase.load(Acquire) == phase::RING
            && wake::asked(&self.incoming().space) & want::WAKE != 0
        {
            self.answer_space();
        }
    }

    // io.rs: receiving.

    /// `io::recv`, blocking: at most `most` bytes, none at the end.
    pub fn receive(&self, most: u64) -> Vec<u8> {
        let mut answer = false;
        loop {
            if answer {
                answer = false;
                self.answer_space();
            }
            let guard = self.lock_rx();
            let took = match self.rx().phase.load(Acquire) {
                phase::RING => self.take(most, &mut answer),
                phase::SWITCHING => self.take_switching(most),
                _ => {
                    drop(guard);
                    return self.receive_in_kernel(most);
                }
            };
            match took {
                Took::Some(bytes) => {
                    drop(guard);
                    if answer {
                        self.answer_space();
                    }
                    return bytes;
                }
                Took::Again => continue,
                Took::Wait => {
                    drop(guard);
                    yield_now();
                    continue;
                }
                Took::End => return Vec::new(),
                Took::Left => {
                    drop(guard);
                    self.follow();
                    continue;
                }
                Took::Nothing => {}
            }
            drop(guard);
            self.for_bytes();
        }
    }

    fn receive_in_kernel(&self, most: u64) -> Vec<u8> {
        loop {
            match self.receives().receive(most) {
                Got::Bytes(bytes) => return bytes,
                Got::End => return Vec::new(),
                Got::Nothing => self.receives().sleep(),
            };
        }
    }

    /// `io::recv`, not blocking: `None` is EAGAIN. With `look`, the anchor is looked at, as it is
    /// now and then.
    pub fn try_receive(&self, most: u64, look: bool) -> Option<Vec<u8>> {
        let mut answer = false;
        loop {
            let guard = self.lock_rx();
            let took = match self.rx().phase.load(Acquire) {
                phase::RING => self.take(most, &mut answer),
                phase::SWITCHING => self.take_switching(most),
                _ => {
                    drop(guard);
                    return match self.receives().receive(most) {
                        Got::Bytes(bytes) => Some(bytes),
                        Got::End => Some(Vec::new()),
                        Got::Nothing => None,
                    };
                }
            };
            match took {
                Took::Some(bytes) => {
                    drop(guard);
                    if answer {
                        self.answer_space();
                    }
                    return Some(bytes);
                }
                Took::Again => continue,
                Took::Wait => {
                    drop(guard);
                    yield_now();
                    continue;
                }
                Took::End => return Some(Vec::new()),
                Took::Left => {
                    drop(guard);
                    self.follow();
                    continue;
                }
                Took::Nothing => {
                    if look {
                        self.look();
                    }
                    return None;
                }
            }
        }
    }

    /// `poll::sleep` whose time is over at once.
    pub fn poll_in_vain(&self) {
        wake::ask(&self.incoming().bytes.want, want::WAKE);
        self.poll();
        wake::unask(&self.incoming().bytes.want, want::WAKE);
        wake::unask(&self.out().space.want, want::WAKE);
    }

    /// A sender of this end wants space, and has been taken off the processor.
    pub fn asks_for_space(&self) {
        wake::ask(&self.out().space.want, want::WAKE);
    }

    /// `demote::shutdown(SHUT_WR)`, on the ring.
    pub fn shut(&self) {
        let _guard = self.lock_tx();
        assert_eq!(self.tx().phase.load(Acquire), phase::RING);
        self.sender().publish();
        self.out().producer.mark.fetch_or(mark::FIN, SeqCst);
        if wake::asked(&self.out().bytes) != 0 {
            let taken = self.answer(&self.out().bytes);
            self.after_answer(taken);
        }
    }

    /// `demote::before_close` and the close of the fd.
    pub fn close(&self) {
        if self.tx().phase.load(Acquire) == phase::RING {
            self.out().producer.mark.fetch_or(mark::FIN, AcqRel);
        }
        for request in [&self.incoming().bytes.want, &self.out().space.want] {
            request.fetch_or(want::CLOSED, SeqCst);
        }
        self.sends().end();
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

    /// `io::take`. The receiving half is held.
    fn take(&self, most: u64, answer: &mut bool) -> Took {
        let receiver = self.receiver();
        let Some(available) = receiver.available().unwrap() else {
            return self.take_end();
        };
        let len = most.min(available.len);
        let mut bytes = vec![0; len as usize];
        // SAFETY: the buffer has `len` bytes.
        unsafe { receiver.copy(available, 0, bytes.as_mut_ptr(), bytes.len()) };
        assert!(receiver.consume(available, len));
        if receiver.publish() && wake::asked(&self.incoming().space) != 0 {
            *answer = true;
        }
        Took::Some(bytes)
    }

    /// `io::take_end`. The receiving half is held.
    fn take_end(&self) -> Took {
        let marks = self.incoming().producer.mark.load(Acquire);
        let seen = self.rx().anchor.load(Acquire);
        if marks == 0 && seen == 0 {
            return Took::Nothing;
        }
        if self.receiver().available_now().unwrap().is_some() {
            return Took::Again;
        }
        if marks & mark::END != 0 {
            return self.incoming_ended();
        }
        Took::End
    }

    /// `io::take_switching`. The receiving half is held.
    fn take_switching(&self, most: u64) -> Took {
        let position = self.rx().tail.load(Relaxed);
        let mut limit = most;
        let switched = self.incoming().producer.switch_at.load(Acquire);
        let (ready, ended) = if switched == NOT_SWITCHED {
            let ready = self.receives().unread();
            let marks = self.incoming().producer.mark.load(Acquire);
            (ready, marks & mark::END != 0)
        } else {
            (u64::MAX, false)
        };
        match Receiver::switch_at(self.incoming()) {
            Some(at) if at == position => {
                self.receiver().switch(at);
                self.rx().phase.store(phase::RING, Release);
                return Took::Again;
            }
            Some(at) if at < position => {
                self.reset("it switched behind what was received");
                return Took::Again;
            }
            Some(at) => limit = limit.min(at - position),
            None if ended => return self.incoming_ended(),
            None => limit = limit.min(ready),
        }
        // The peer may have switched, written and closed since: then the ring comes first.
        let end = |before: u64| {
            let now = self.incoming().producer.switch_at.load(Acquire);
            if now == before {
                Took::End
            } else {
                Took::Again
            }
        };
        if limit == 0 {
            return match self.receives().look() {
                Got::End => end(switched),
                Got::Nothing => Took::Nothing,
                Got::Bytes(_) => Took::Again,
            };
        }
        match self.receives().receive(limit) {
            Got::Bytes(bytes) => {
                self.rx().tail.store(position + bytes.len() as u64, Relaxed);
                Took::Some(bytes)
            }
            Got::End => end(switched),
            Got::Nothing => Took::Nothing,
        }
    }

    /// `io::answer_space`: under the sending half's lock, so that no wake byte comes behind the last.
    fn answer_space(&self) {
        let _guard = self.lock_tx();
        if self.tx().phase.load(Acquire) == phase::ANCHOR && !self.try_switch() {
            return;
        }
        if self.tx().phase.load(Acquire) == phase::RING {
            self.answer(&self.incoming().space);
        }
    }

    // wait.rs

    /// `wait::receivable`.
    fn receivable(&self) -> bool {
        self.has_bytes()
            || self.incoming().producer.mark.load(Acquire) != 0
            || self.rx().anchor.load(Relaxed) != 0
            || self.rx().phase.load(Relaxed) != phase::RING
    }

    /// `wait::sendable`.
    fn sendable(&self, enough: u64) -> bool {
        let head = self.tx().head.load(Relaxed) & !(1 << 63);
        let tail = self.out().consumer.tail.load(Acquire);
        let left = want::DEMOTED | want::CLOSED | want::LEAVE;
        self.ring_size().saturating_sub(head.saturating_sub(tail)) >= enough
            || self.out().bytes.want.load(Relaxed) & left != 0
            || self.rx().anchor.load(Relaxed) != 0
            || self.tx().phase.load(Relaxed) != phase::RING
    }

    /// Sleeps on the anchor until somebody sends, unless `ready` once the other end is asked.
    ///
    /// Whoever is counted in `waiters` was so before the wake bytes that are now on the anchor came
    /// (or looks at once), and stays counted until it is awake. So they are taken off by a sleeper
    /// that finds nobody counted; and a request is taken back when the last one has left.
    fn sleep(&self, word: &AtomicU32, ready: impl Fn() -> bool) {
        let waiters = &self.rx().waiters;
        let guard = self.lock_rx();
        self.drain();
        let others = waiters.fetch_add(1, SeqCst);
        if others != 0 && self.outstanding() != 0 {
            // They are about to look.
            waiters.fetch_sub(1, SeqCst);
            drop(guard);
            yield_now();
            return;
        }
        drop(guard);
        wake::ask(word, want::WAKE);
        let alive = ready() || self.receives().sleep();
        if waiters.fetch_sub(1, SeqCst) == 1 {
            let _guard = self.lock_rx();
            if waiters.load(SeqCst) == 0 {
                wake::unask(&self.incoming().bytes.want, want::WAKE);
                wake::unask(&self.out().space.want, want::WAKE);
            }
        }
        if !alive {
            self.note_end();
        }
    }

    /// `wait::for_bytes` and `wait::for_anchor`.
    fn for_bytes(&self) {
        self.sleep(&self.incoming().bytes.want, || {
            if self.rx().phase.load(Acquire) == phase::SWITCHING {
                let at = self.incoming().producer.switch_at.load(Acquire);
                at == self.rx().tail.load(Relaxed)
                    || self.incoming().producer.mark.load(Acquire) != 0
            } else {
                self.receivable()
            }
        });
    }

    /// `wait::for_space`.
    fn for_space(&self) {
        if self.rx().phase.load(Acquire) == phase::SWITCHING
            && self.receives().look() != Got::Nothing
        {
            yield_now();
            return;
        }
        self.sleep(&self.out().space.want, || {
            self.sendable(self.ring_size() / 3)
        });
    }

    // demote.rs

    /// `demote::after_answer`. The sending half is held.
    fn after_answer(&self, taken: u32) {
        if taken & (want::DEMOTED | want::LEAVE) != 0 {
            self.end_sending();
        }
    }

    /// This end has left, and its own direction may not have ended yet.
    fn is_leaving(&self) -> bool {
        self.incoming().bytes.want.load(Acquire) & want::LEAVE != 0
    }

    /// `demote::end_sending`. The sending half is held.
    fn end_sending(&self) {
        let producer = &self.out().producer;
        let before = self.tx().phase.load(Acquire);
        if before != phase::RING && before != phase::ANCHOR {
            return;
        }
        for request in [&self.incoming().bytes.want, &self.out().space.want] {
            request.fetch_or(want::LEAVE, SeqCst);
        }
        fence(SeqCst);
        if before == phase::ANCHOR {
            if self.tx().in_kernel.load(SeqCst) != 0 {
                // The thread that is in there comes back to this.
                return;
            }
            if !self.try_switch() {
                // The other end is not ready, and sees LEAVE when it is; or it is the kernel's.
                producer.mark.fetch_or(mark::END, SeqCst);
                self.tx().phase.store(phase::DEMOTED, Release);
                return;
            }
        }
        self.sender().publish();
        if self.begin_ringing(&self.out().bytes.want) {
            producer.wakes.fetch_add(1, AcqRel);
            producer.mark.fetch_or(mark::END, SeqCst);
            self.sends().send(&[WAKE_BYTE]);
            wake::rung(&self.out().bytes.want);
            self.tx().phase.store(phase::DEMOTED, Release);
        } else {
            self.send_again();
        }
    }

    /// `demote::send_again`. The sending half is held.
    fn send_again(&self) {
        let stop = self.out().consumer.stop.load(Acquire);
        let from = stop.max(self.out().producer.switch_at.load(Relaxed));
        let bytes = self.sender().published(from).unwrap();
        if !bytes.is_empty() {
            self.sends().send(&bytes);
        }
        self.tx().phase.store(phase::DEMOTED, Release);
    }

    /// `demote::incoming_ended`. The receiving half is held.
    fn incoming_ended(&self) -> Took {
        if self.outstanding() != 0 && self.rx().waiters.load(SeqCst) != 0 {
            // The last wake byte ends their sleep, too.
            return Took::Wait;
        }
        self.take_last_wakes();
        self.rx().phase.store(phase::DEMOTED, Release);
        Took::Left
    }

    /// `demote::take_last_wakes`. The receiving half is held.
    fn take_last_wakes(&self) {
        loop {
            self.take_wakes(self.outstanding());
            if self.outstanding() == 0 {
                return;
            }
            assert!(self.receives().sleep(), "a counted wake byte is missing");
        }
    }

    /// `demote::follow`.
    fn follow(&self) {
        let _guard = self.lock_tx();
        self.end_sending();
    }

    /// `demote::peer_has_left`.
    fn peer_has_left(&self) -> bool {
        self.out().bytes.want.load(Relaxed) & (want::DEMOTED | want::LEAVE) != 0
            && matches!(self.tx().phase.load(Relaxed), phase::RING | phase::ANCHOR)
    }

    /// What any later call that looks for readiness does: `ready::of`.
    pub fn poll(&self) {
        if self.peer_has_left() {
            self.follow();
        }
        if self.incoming().producer.mark.load(Acquire) & mark::END != 0 {
            self.settle_incoming();
        }
    }

    /// `demote::settle_incoming`.
    fn settle_incoming(&self) {
        let _guard = self.lock_rx();
        let ended = self.incoming().producer.mark.load(Acquire) & mark::END != 0;
        let unswitched = self.incoming().producer.switch_at.load(Acquire) == NOT_SWITCHED;
        let phase = self.rx().phase.load(Acquire);
        if ended
            && (phase == phase::RING && !self.has_bytes()
                || phase == phase::SWITCHING && unswitched)
        {
            self.incoming_ended();
        }
    }

    /// `demote::leave`.
    pub fn leave(&self) {
        let _guard = self.lock_tx();
        self.end_sending();
    }

    /// `demote::abandon`. False: the stream is reset, since bytes that the kernel should have are in
    /// a ring that the other end has left already, or have wake bytes behind them.
    pub fn abandon(&self) -> bool {
        let _tx = self.lock_tx();
        let _rx = self.lock_rx();
        let position = self.rx().tail.load(Relaxed);
        self.incoming().consumer.stop.store(position, Release);
        let requests = [&self.incoming().bytes.want, &self.out().space.want];
        for request in requests {
            request.fetch_or(want::DEMOTED, SeqCst);
        }
        for request in requests {
            while request.load(Acquire) & want::RINGING != 0 {
                yield_now();
            }
        }
        self.end_sending();
        if self.rx().phase.load(Acquire) == phase::DEMOTED {
            return true;
        }
        let switched = self.incoming().producer.switch_at.load(Acquire);
        let quiet = self.outstanding() == 0
            || switched == position
            || self.rx().phase.load(Relaxed) == phase::RING;
        // An end is marked by a sender that has not seen DEMOTED, and will not send again.
        let ended = self.incoming().producer.mark.load(Acquire) & mark::END != 0;
        let unread = switched != NOT_SWITCHED
            && self.incoming().producer.head.load(Acquire) > position.max(switched);
        if !quiet || ended && unread {
            return false;
        }
        self.take_last_wakes();
        self.rx().phase.store(phase::DEMOTED, Release);
        true
    }
}
