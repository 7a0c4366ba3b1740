//! An anchors' thread: everything that a user's streams to other nodes ask of the kernel, so that poll cores
//! ask nothing of it. It carries the bytes of programs that are on their anchors (before they were
//! promoted, after they left), sends wake bytes, and sees programs close and die. It sleeps in epoll.
//!
//! A program decides what a byte to it costs: loopback wakes whoever waits at the receiving socket in the sender's time, and
//! half a million may (duplicates of one's own end in epoll instances). So no thread sends to programs of two users: each
//! user's streams on a poll core have a [`Desk`] and a thread of their own, which ends with the last of them.

use crate::desk::{Attach, Desk};
use crate::mail::Look;
use crate::memory::STAGING;
use crate::socket::{Side, Socket};
use crate::stream::{NONE, NodeStream, todo};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rdsock_shm::end::End;
use rdsock_shm::layout::{anchor, mark, phase};
use rdsock_shm::reason::Reason;
use rdsock_shm::wake;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// The event of the thread's own waker; no ticket has this number.
const WAKER: u64 = 0;
/// Events taken at once.
const EVENTS: usize = 64;
/// Calls that read an anchor, or write it, before the others have their turn. A program that goes on and on is served again
/// behind them.
const ROUNDS: usize = 16;
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
    watches: EpollFlags,
    /// Epoll reports it.
    watched: bool,
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
            let anchor = Anchor::new(stream.clone(), socket);
            anchor.end().reset(Reason::NoMemory);
            return self.core.put(&stream);
        }
        let anchor = Anchor::new(stream.clone(), socket);
        // From here on the program may switch when it likes: where it has ended already, it has nothing to send.
        anchor.end().promote(true);
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
        if flags.intersects(EpollFlags::EPOLLERR) && !anchor.stream.has_told() {
            anchor.end().note_end(true);
        }
        if flags.intersects(EpollFlags::EPOLLHUP) {
            anchor.stream.hung_up.store(true, Ordering::Release);
        }
        // A program that has left both rings says so with the token that ends its own one.
        if flags.intersects(EpollFlags::EPOLLOUT) || anchor.stream.has_left() {
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
            watches: WATCHES,
            watched: true,
            stream,
        }
    }

    /// The daemon's end of the connection.
    fn end(&self) -> End<'_, Side<'_>> {
        let stream = &*self.stream;
        End {
            shared: stream.shared(),
            socket: Side {
                socket: &self.socket,
                stream,
            },
        }
    }

    fn receiving(&self) -> u32 {
        self.stream.shared().rx().phase.load(Ordering::Acquire)
    }

    fn sending(&self) -> u32 {
        self.stream.shared().tx().phase.load(Ordering::Acquire)
    }

    /// Has epoll report what can be done, and nothing else.
    fn watch(&mut self, epoll: &Epoll) {
        let no_room = self.is_reading_bytes() && self.staging_room() == 0;
        self.stream.is_stalled.store(no_room, Ordering::Release);
        let has_told = self.stream.has_told();
        if self.stream.hung_up.load(Ordering::Relaxed) || self.is_broken() {
            // It would be reported for ever, and there is nothing more to wait for.
            if std::mem::replace(&mut self.watched, false) {
                let _ = epoll.delete(&self.socket);
            }
            return;
        }
        let mut wanted = EpollFlags::empty();
        let stalled = has_told || no_room || self.waits_for_end();
        wanted.set(EpollFlags::EPOLLIN, !stalled);
        let unsent = self.is_writing_bytes() && self.stream.arrived() != self.stream.given();
        wanted.set(EpollFlags::EPOLLOUT, unsent);
        if wanted == self.watches {
            return;
        }
        self.watches = wanted;
        let mut event = EpollEvent::new(wanted, self.stream.ticket);
        if let Err(error) = epoll.modify(&self.socket, &mut event) {
            tracing::warn!("an anchor can't be watched: {error}");
            self.end().reset(Reason::NoMemory);
        }
    }

    fn is_broken(&self) -> bool {
        let told = self.stream.shared().rx().anchor.load(Ordering::Relaxed);
        told & anchor::BROKEN != 0 || self.receiving() == phase::RESET
    }

    fn is_reading_bytes(&self) -> bool {
        !self.stream.has_told() && self.receiving() != phase::RING
    }

    fn is_writing_bytes(&self) -> bool {
        matches!(self.sending(), phase::ANCHOR | phase::LEAVING)
    }

    fn staging_room(&self) -> u64 {
        let received = self.stream.shared().rx().tail.load(Ordering::Relaxed);
        let freed = self.stream.freed.load(Ordering::SeqCst);
        STAGING.saturating_sub(received.saturating_sub(freed))
    }

    /// The program has ended its ring, and the poll core has not come to that end yet.
    fn waits_for_end(&self) -> bool {
        self.receiving() == phase::RING
            && self.end().outstanding() == 0
            && self.has_ended_ring()
            && self.stream.shared().has_bytes()
    }

    fn has_ended_ring(&self) -> bool {
        self.stream.out().producer.mark.load(Ordering::Acquire) & mark::END != 0
    }

    /// Takes what there is off the anchor, up to a bound.
    fn read(&mut self) -> Rest {
        for _ in 0..ROUNDS {
            let went_on = match self.receiving() {
                _ if self.stream.has_told() => false,
                phase::RING => self.read_tokens(),
                _ => self.read_bytes(),
            };
            if !went_on {
                return Rest::Nothing;
            }
        }
        Rest::More
    }

    fn read_bytes(&self) -> bool {
        let end = self.end();
        let tail = &end.shared.rx().tail;
        let (at, room) = (tail.load(Ordering::Relaxed), self.staging_room());
        let memory = &self.stream.memory;
        let went_on = memory.with_staging(at, room, |to| end.receive_anchor(to));
        let staged = tail.load(Ordering::Relaxed);
        if self.receiving() != phase::RING {
            self.stream.staged.store(staged, Ordering::SeqCst);
        }
        went_on
    }

    /// Looks at an anchor that has tokens alone, and goes on with what the program has behind its ring. True when it does.
    fn read_tokens(&self) -> bool {
        let end = self.end();
        end.look();
        if self.has_ended_ring() && end.outstanding() == 0 && !end.shared.has_bytes() {
            end.settle_incoming();
        }
        self.receiving() == phase::DEMOTED
    }

    /// Gives the program what has arrived, up to a bound, or has it read its ring.
    fn write(&mut self) -> Rest {
        let end = self.end();
        let ends_at = self.stream.ends_at.load(Ordering::SeqCst);
        if self.is_writing_bytes() && ends_at != NONE && ends_at == self.stream.arrived() {
            end.note_shut_sending();
        }
        let before = self.sending();
        let more = end.send_in_place(ROUNDS);
        self.after_switch(before);
        if more { Rest::More } else { Rest::Nothing }
    }

    /// Where the program has just been led to its ring, it finds what comes there, where the engine puts it.
    fn after_switch(&self, before: u32) {
        if before != phase::ANCHOR || self.sending() != phase::RING {
            return;
        }
        fence(Ordering::SeqCst);
        // What the poll core has left to this thread before it saw that.
        if self.stream.ends_at.load(Ordering::SeqCst) != NONE {
            self.stream.shared().end_in_place();
        }
        if self.stream.answer(&self.stream.incoming().bytes) {
            self.wake(todo::WAKE_BYTES);
        }
    }

    /// Sends wake bytes that were taken from the program's asks.
    fn wake(&self, what: u32) {
        let before = self.sending();
        self.end().send_token_in_place();
        if what & todo::WAKE_BYTES != 0 {
            wake::rung(&self.stream.incoming().bytes.want);
        }
        if what & todo::WAKE_SPACE != 0 {
            wake::rung(&self.stream.out().space.want);
        }
        self.after_switch(before);
    }

    /// The stream is broken: the program sees ECONNRESET, unless both directions had ended before. The other node may have told of
    /// an end before it knew that its program has died with bytes unread: TCP would have told of the break alone.
    fn reset(&self) {
        if !self.stream.has_shut() {
            let marks = &self.stream.incoming().producer.mark;
            marks.fetch_and(!mark::FIN, Ordering::AcqRel);
        }
        self.end().reset(Reason::PeerReset);
    }
}

#[cfg(test)]
mod tests;
