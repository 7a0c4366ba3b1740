//! An anchors' thread: everything that a user's streams to other nodes ask of the kernel, so that poll cores
//! ask nothing of it. It carries the bytes of programs that are on their anchors (before they were
//! promoted, after they left), sends wake bytes, and sees programs close and die. It sleeps in epoll.
//!
//! A program decides what a byte to it costs: loopback wakes whoever waits at the receiving socket in the sender's time, and
//! half a million may (duplicates of one's own end in epoll instances). So no thread sends to programs of two users: each
//! user's streams on a poll core have a [`Desk`] and a thread of their own, which ends with the last of them.

use crate::desk::{Attach, Desk};
use crate::mail::Look;
use crate::memory::{Area, STAGING};
use crate::socket::Socket;
use crate::stream::{NONE, NodeStream, seen, todo};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rdsock_shm::end::{Ahead, Anchor as _, Drained, Got, Shut, Tokens, send_token};
use rdsock_shm::layout::mark;
use rdsock_shm::wake;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The event of the thread's own waker; no ticket has this number.
const WAKER: u64 = 0;
/// Events taken at once.
const EVENTS: usize = 64;
/// Calls that read an anchor, or write it, before the others have their turn. A program that goes on and on is served again
/// behind them.
const ROUNDS: usize = 16;
/// Where the bytes from the program come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// The anchor, up to where the program switches.
    Anchor,
    /// The ring: only wake bytes come on the anchor.
    Ring,
    /// The anchor again, for ever.
    Again,
    /// Nowhere: end of file.
    Ended,
}

/// Where the bytes to the program go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    /// To the anchor, until the program can read the ring.
    Anchor,
    /// They are in its ring.
    Ring,
    /// To the anchor, for ever.
    Again,
    /// Their end was told.
    Ended,
}

/// What is left to do at an anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// Nothing, or epoll tells when there is something.
    Nothing,
    /// Its program goes on and on.
    More,
}

impl Rest {
    fn or(self, other: Rest) -> Rest {
        match self {
            Rest::More => self,
            Rest::Nothing => other,
        }
    }
}

#[derive(Debug)]
struct Anchor {
    socket: Socket,
    // Behind the socket, which it pays for.
    stream: Arc<NodeStream>,
    reading: Reading,
    writing: Writing,
    /// Position after the last byte taken off the anchor.
    received: u64,
    /// Tokens taken off the anchor.
    drained: AtomicU32,
    watches: EpollFlags,
    /// Epoll reports it.
    watched: bool,
    broken: bool,
    /// Both directions have ended; what the program sent may still be unread.
    hung_up: bool,
}

/// The thread's state.
pub(crate) struct Anchors {
    anchors: HashMap<u64, Anchor>,
    core: Arc<Look>,
    epoll: Epoll,
    // Behind the descriptors that it pays for.
    desk: Arc<Desk>,
}

impl Anchors {
    pub fn new(desk: Arc<Desk>, core: Arc<Look>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(
            desk.waker().fd(),
            EpollEvent::new(EpollFlags::EPOLLIN, WAKER),
        )?;
        Ok(Anchors {
            anchors: HashMap::new(),
            core,
            epoll,
            desk,
        })
    }

    pub fn run(mut self) {
        let mut events = [EpollEvent::empty(); EVENTS];
        while !self.desk.stop.load(Ordering::Acquire) {
            self.desk.waker().start_sleep();
            let idle = self.desk.look.is_empty() && self.desk.attach.is_empty();
            let timeout = if idle && !self.desk.stop.load(Ordering::Acquire) {
                EpollTimeout::NONE
            } else {
                EpollTimeout::ZERO
            };
            let count = self.epoll.wait(&mut events, timeout).unwrap_or(0);
            self.desk.waker().end_sleep();
            for event in events.iter().take(count) {
                if event.data() != WAKER {
                    self.on_event(event.data(), event.events());
                }
            }
            for _ in 0..EVENTS {
                let Some(attach) = self.desk.attach.take() else {
                    break;
                };
                self.attach(attach);
            }
            // Not those that are put there meanwhile: their turn is the next one.
            for _ in 0..self.desk.look.len().min(EVENTS) {
                let Some(stream) = self.desk.look.take() else {
                    break;
                };
                self.look(&stream);
            }
        }
        // What it was asked before its end: programs are to see how their streams ended. None of them is gone on with.
        for _ in 0..self.desk.look.len() {
            if let Some(stream) = self.desk.look.take() {
                self.look(&stream);
            }
        }
        self.anchors.clear();
        // They hold their places here.
        while self.desk.look.take().is_some() || self.desk.attach.take().is_some() {}
    }

    fn attach(&mut self, Attach { stream, socket }: Attach) {
        if let Err(error) = self
            .epoll
            .add(&socket, EpollEvent::new(WATCHES, stream.ticket))
        {
            tracing::warn!("an anchor can't be watched: {error}");
            stream.seen.fetch_or(seen::BROKEN, Ordering::AcqRel);
            return self.core.put(&stream);
        }
        let anchor = Anchor::new(stream.clone(), socket);
        self.anchors.insert(stream.ticket, anchor);
        self.look(&stream);
    }

    fn on_event(&mut self, ticket: u64, flags: EpollFlags) {
        let Some(anchor) = self.anchors.get_mut(&ticket) else {
            return;
        };
        // What was sent comes before the end, whatever that is, and is read before a send finds it.
        let end = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
        let mut rest = Rest::Nothing;
        if flags.intersects(EpollFlags::EPOLLIN | end) {
            rest = anchor.read();
        }
        if rest == Rest::More && flags.intersects(end) {
            // The end is told of again, when all that has been read.
            return self.core.put(&anchor.stream);
        }
        if flags.intersects(EpollFlags::EPOLLERR) && anchor.reading != Reading::Ended {
            anchor.fail("the program's socket has an error");
        }
        if flags.intersects(EpollFlags::EPOLLHUP) {
            anchor.hang_up();
        }
        if flags.intersects(EpollFlags::EPOLLOUT) {
            rest = rest.or(anchor.write());
        }
        self.after(ticket, rest);
    }

    /// Something was done for a stream: what is left to do comes behind what others wait for.
    fn after(&mut self, ticket: u64, rest: Rest) {
        let Some(anchor) = self.anchors.get_mut(&ticket) else {
            return;
        };
        anchor.watch(&self.epoll);
        if rest == Rest::More {
            self.desk.look.put(&anchor.stream);
        }
        self.core.put(&anchor.stream);
    }

    fn look(&mut self, stream: &Arc<NodeStream>) {
        let Some(anchor) = self.anchors.get_mut(&stream.ticket) else {
            // Not attached yet: `attach` looks.
            return;
        };
        let what = stream.todo.swap(0, Ordering::AcqRel);
        if what & (todo::BROKEN | todo::OVER) != 0 {
            if what & todo::BROKEN != 0 {
                anchor.write();
                anchor.reset();
            }
            let _ = self.epoll.delete(&anchor.socket);
            self.anchors.remove(&stream.ticket);
            return;
        }
        if what & (todo::WAKE_BYTES | todo::WAKE_SPACE) != 0 {
            anchor.wake(what);
        }
        let rest = anchor.write().or(anchor.read());
        self.after(stream.ticket, rest);
    }
}

/// What an anchor is watched for at first.
const WATCHES: EpollFlags = EpollFlags::EPOLLIN;

impl Anchor {
    fn new(stream: Arc<NodeStream>, socket: OwnedFd) -> Self {
        Anchor {
            socket: Socket::new(socket),
            reading: Reading::Anchor,
            writing: Writing::Anchor,
            received: 0,
            drained: AtomicU32::new(0),
            watches: WATCHES,
            watched: true,
            broken: false,
            hung_up: false,
            stream,
        }
    }

    fn note(&self, what: u32) {
        self.stream.seen.fetch_or(what, Ordering::AcqRel);
    }

    fn fail(&mut self, why: &str) {
        tracing::debug!(stream = self.stream.ticket, "broken by its program: {why}");
        self.broken = true;
        self.note(seen::BROKEN);
    }

    fn hang_up(&mut self) {
        self.hung_up = true;
        if self.reading == Reading::Ended {
            self.note(seen::CLOSED);
        }
    }

    /// Has epoll report what can be done, and nothing else.
    fn watch(&mut self, epoll: &Epoll) {
        let no_room = self.is_reading_bytes() && self.staging_room() == 0;
        self.stream.is_stalled.store(no_room, Ordering::Release);
        if self.hung_up || self.broken {
            // It would be reported for ever, and there is nothing more to wait for.
            if std::mem::replace(&mut self.watched, false) {
                let _ = epoll.delete(&self.socket);
            }
            return;
        }
        let mut wanted = EpollFlags::empty();
        let stalled = self.reading == Reading::Ended || no_room || self.waits_for_end();
        wanted.set(EpollFlags::EPOLLIN, !stalled);
        let unsent = self.is_writing_bytes()
            && self.stream.arrived.load(Ordering::Acquire)
                != self.stream.given.load(Ordering::Relaxed);
        wanted.set(EpollFlags::EPOLLOUT, unsent);
        if wanted == self.watches {
            return;
        }
        self.watches = wanted;
        let mut event = EpollEvent::new(wanted, self.stream.ticket);
        if epoll.modify(&self.socket, &mut event).is_err() {
            self.fail("its socket can't be watched");
        }
    }

    fn is_reading_bytes(&self) -> bool {
        matches!(self.reading, Reading::Anchor | Reading::Again)
    }

    fn is_writing_bytes(&self) -> bool {
        matches!(self.writing, Writing::Anchor | Writing::Again)
    }

    fn staging_room(&self) -> u64 {
        let freed = self.stream.freed.load(Ordering::SeqCst);
        STAGING.saturating_sub(self.received.saturating_sub(freed))
    }

    /// The program has ended its ring, and the poll core has not come to that end yet.
    fn waits_for_end(&self) -> bool {
        self.reading == Reading::Ring
            && self.tokens().outstanding() == 0
            && self.has_ended_ring()
            && self.stream.resumes_at.load(Ordering::Acquire) == NONE
    }

    fn has_ended_ring(&self) -> bool {
        self.stream.out().producer.mark.load(Ordering::Acquire) & mark::END != 0
    }

    /// What the program has sent to wake this end.
    fn tokens(&self) -> Tokens<'_> {
        Tokens::new(&self.stream.out().producer, &self.drained)
    }

    /// Takes what there is off the anchor, up to a bound.
    fn read(&mut self) -> Rest {
        for _ in 0..ROUNDS {
            let went_on = match self.reading {
                _ if self.broken => false,
                Reading::Anchor | Reading::Again => self.read_bytes(),
                Reading::Ring => self.read_tokens(),
                Reading::Ended => false,
            };
            if !went_on {
                return Rest::Nothing;
            }
        }
        Rest::More
    }

    fn read_bytes(&mut self) -> bool {
        // First how much there is, then whether the program has switched: what was there before
        // the switch is data.
        let Some(unread) = self.socket.unread() else {
            self.fail("its socket does not say what there is to read");
            return false;
        };
        let mut most = self.staging_room();
        if self.reading == Reading::Anchor {
            match Ahead::of(&self.stream.out().producer, self.received) {
                Ahead::Ring => {
                    self.reading = Reading::Ring;
                    return true;
                }
                Ahead::Anchor(bytes) => most = most.min(bytes),
                Ahead::Unswitched => {}
                Ahead::Impossible => {
                    self.fail("it says that it switched before bytes that it has sent");
                    return false;
                }
            }
        }
        if most == 0 {
            return false;
        }
        if unread == 0 {
            return self.look_for_end();
        }
        let at = self.received;
        let most = most.min(unread);
        let memory = &self.stream.memory;
        match memory.receive(self.socket.as_fd(), Area::Staging, at, most) {
            Ok(0) => self.end_of_file(),
            Ok(got) => {
                self.received += got;
                self.stream.staged.store(self.received, Ordering::SeqCst);
                true
            }
            Err(error) => self.failed(&error),
        }
    }

    /// Nothing has come, or the end has. A byte that comes meanwhile is left there: it may be a token, sent
    /// behind a switch.
    fn look_for_end(&mut self) -> bool {
        match self.socket.peek() {
            Got::End => self.end_of_file(),
            Got::Bytes(_) => true,
            Got::Nothing => false,
            Got::Error(error) => self.failed(&io::Error::from_raw_os_error(error)),
        }
    }

    fn read_tokens(&mut self) -> bool {
        match self.tokens().take(&self.socket) {
            Drained::Tokens(_) | Drained::Nothing => {}
            Drained::Foreign(_) => {
                self.fail("a byte that is no token");
                return false;
            }
            Drained::End => return self.end_of_file(),
            Drained::Error => return self.end_behind_tokens(),
        }
        if self.tokens().outstanding() != 0 {
            return false;
        }
        if self.has_ended_ring() {
            let resumes_at = self.stream.resumes_at.load(Ordering::Acquire);
            if resumes_at == NONE {
                return false;
            }
            self.received = resumes_at;
            self.stream.staged.store(resumes_at, Ordering::Release);
            self.reading = Reading::Again;
            return true;
        }
        match self.socket.peek() {
            Got::End => self.end_of_file(),
            Got::Nothing => false,
            Got::Error(_) => self.end_behind_tokens(),
            Got::Bytes(_) => {
                // Somebody went past the shim, unless it was counted or ended meanwhile.
                let explained = self.tokens().outstanding() != 0 || self.has_ended_ring();
                if !explained {
                    self.fail("a byte that was not counted");
                }
                explained
            }
        }
    }

    /// The kernel of a program that has gone resets the connection for unread tokens. Whether it left bytes unread, the ring
    /// tells.
    fn end_behind_tokens(&mut self) -> bool {
        self.hung_up = true;
        self.end_of_file()
    }

    fn end_of_file(&mut self) -> bool {
        self.reading = Reading::Ended;
        let both = if self.hung_up { seen::CLOSED } else { 0 };
        self.note(seen::EOF | both);
        false
    }

    /// A receive or send failed: true to try again.
    fn failed(&mut self, error: &io::Error) -> bool {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EAGAIN) => false,
            Some(Errno::EINTR) => true,
            _ if self.reading == Reading::Ring => self.end_behind_tokens(),
            _ => {
                self.fail("its socket has an error");
                false
            }
        }
    }

    /// Gives the program what has arrived, up to a bound, or has it read its ring.
    fn write(&mut self) -> Rest {
        if self.stream.has_left() {
            self.leave();
        }
        for _ in 0..ROUNDS {
            if self.broken || !self.is_writing_bytes() || !self.write_bytes() {
                return Rest::Nothing;
            }
        }
        Rest::More
    }

    fn write_bytes(&mut self) -> bool {
        let given = self.stream.given.load(Ordering::Relaxed);
        let ready = &self.stream.incoming().consumer.ready;
        if self.writing == Writing::Anchor && ready.load(Ordering::Acquire) == 1 {
            self.switch(given);
            return false;
        }
        let arrived = self.stream.arrived.load(Ordering::SeqCst);
        if arrived <= given {
            if self.stream.ends_at.load(Ordering::SeqCst) == given {
                self.writing = Writing::Ended;
                self.socket.shut(Shut::Sending);
            }
            return false;
        }
        let area = Area::Ring(1 - self.stream.end);
        let memory = &self.stream.memory;
        match memory.send(self.socket.as_fd(), area, given, arrived - given) {
            Ok(sent) => {
                self.stream.given.store(given + sent, Ordering::Release);
                true
            }
            Err(error) => self.failed(&error),
        }
    }

    /// From here on, the program finds what comes in its ring, where the engine puts it.
    fn switch(&mut self, at: u64) {
        self.writing = Writing::Ring;
        let incoming = self.stream.incoming();
        incoming.producer.origin.store(0, Ordering::Relaxed);
        incoming.producer.switch_at.store(at, Ordering::Release);
        self.stream.on_ring.store(true, Ordering::SeqCst);
        // What the poll core has left to this thread before it saw that.
        if self.stream.ends_at.load(Ordering::SeqCst) != NONE {
            self.stream.mark_end();
        }
        if self.stream.has_left() {
            // It has just read its last from the ring, or never came there.
            self.leave();
        } else if self.stream.answer(&incoming.bytes) {
            self.wake(todo::WAKE_BYTES);
        }
    }

    /// The program left its ring where `stop` says, and reads the anchor; or it will never come to
    /// its ring.
    fn leave(&mut self) {
        match self.writing {
            Writing::Anchor => self.writing = Writing::Again,
            Writing::Ring => self.leave_ring(),
            Writing::Again | Writing::Ended => {}
        }
    }

    fn leave_ring(&mut self) {
        let consumer = &self.stream.incoming().consumer;
        // It may not have read all that was given to the anchor, where that still lies.
        let given = self.stream.given.load(Ordering::Relaxed);
        let stop = consumer.stop.load(Ordering::Acquire).max(given);
        let arrived = self.stream.arrived.load(Ordering::Acquire);
        // The engine stores the head word before the poll core hears of it.
        let head = self.stream.incoming().producer.head.load(Ordering::Acquire);
        if stop > arrived.max(head) {
            return self.fail("it left its ring where it can't have been");
        }
        self.stream.given.store(stop, Ordering::Release);
        self.stream.on_ring.store(false, Ordering::SeqCst);
        self.writing = Writing::Again;
    }

    /// Sends wake bytes that were taken from the program's asks.
    fn wake(&mut self, what: u32) {
        let incoming = self.stream.incoming();
        // Before the switch it would be read as data; then the program reads the anchor, and wakes
        // from the data themselves.
        if self.writing == Writing::Anchor && incoming.consumer.ready.load(Ordering::Acquire) == 1 {
            self.switch(self.stream.given.load(Ordering::Relaxed));
        }
        let incoming = self.stream.incoming();
        if self.writing == Writing::Ring {
            send_token(&incoming.producer, &self.socket, || {});
        }
        if what & todo::WAKE_BYTES != 0 {
            wake::rung(&incoming.bytes.want);
        }
        if what & todo::WAKE_SPACE != 0 {
            wake::rung(&self.stream.out().space.want);
        }
    }

    /// The stream is broken: the program sees ECONNRESET, unless it has seen an end before. The other node may have told of an end
    /// before it knew that its program has died with bytes unread: TCP would have told of the break alone.
    fn reset(&mut self) {
        let marks = &self.stream.incoming().producer.mark;
        let broken = |before: u32| Some(before & !mark::FIN | mark::RESET);
        let _ = marks.fetch_update(Ordering::AcqRel, Ordering::Acquire, broken);
        self.socket.break_at_close();
    }
}

#[cfg(test)]
mod tests;
