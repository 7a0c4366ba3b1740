//! The agenda: what the control thread waits for, and what is due.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// What an epoll event is about; in the event's 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Token {
    /// A control socket: somebody calls.
    Listener(u64),
    /// A signal.
    Signals,
    /// A porter has found something.
    Found,
    /// Notices of the fabric.
    Fabric,
    /// The system wants the fabric's device back.
    WantedBack,
    /// A listener for anchors.
    Anchors(u64),
    /// A control connection.
    Connection(u64),
    /// A connection to a program that listens, for this stream.
    Call(u64),
}

impl Token {
    const BITS: u32 = 4;

    fn to_word(self) -> u64 {
        let (kind, number) = match self {
            Token::Listener(listener) => (0, listener),
            Token::Signals => (1, 0),
            Token::Found => (2, 0),
            Token::Fabric => (3, 0),
            Token::WantedBack => (4, 0),
            Token::Anchors(listener) => (5, listener),
            Token::Connection(id) => (6, id),
            Token::Call(ticket) => (7, ticket),
        };
        number << Self::BITS | kind
    }

    fn from_word(word: u64) -> Option<Self> {
        let number = word >> Self::BITS;
        Some(match word & ((1 << Self::BITS) - 1) {
            0 => Token::Listener(number),
            1 => Token::Signals,
            2 => Token::Found,
            3 => Token::Fabric,
            4 => Token::WantedBack,
            5 => Token::Anchors(number),
            6 => Token::Connection(number),
            7 => Token::Call(number),
            _ => return None,
        })
    }
}

/// Something to look at later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Due {
    /// A connection must have said who it is.
    Handshake(u64),
    /// A connection's messages may be sent now.
    Send(u64),
    /// A process that has hung up had its time.
    Watch(u64),
    /// Does anybody still hold this stream? Asked for the so-manieth time.
    Stream(u64, u32),
    /// A program must have made the anchor of a stream to another node.
    Anchor(u64),
    /// It must be known who listens where another node asks for a stream.
    Incoming(u64),
    /// A program that listens must have taken a connection.
    Call(u64),
    /// Memory for the next streams is to be made.
    Stock,
    /// Callers are let in again at this listener.
    Callers(usize),
    /// Anchors are taken again at this listener.
    Anchors(usize),
    /// Are tenants still who they were?
    Sweep,
}

/// See the module's text.
#[derive(Debug)]
pub struct Agenda {
    epoll: Epoll,
    due: BinaryHeap<Reverse<(Instant, Due)>>,
}

impl Agenda {
    /// Waits for nothing yet.
    pub fn new() -> nix::Result<Self> {
        Ok(Agenda {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            due: BinaryHeap::new(),
        })
    }

    /// Waits until this can be read, too.
    pub fn watch(&self, fd: impl AsFd, token: Token) -> nix::Result<()> {
        self.watch_for(fd, EpollFlags::EPOLLIN, token)
    }

    /// Waits for these flags of it, too.
    pub fn watch_for(&self, fd: impl AsFd, flags: EpollFlags, token: Token) -> nix::Result<()> {
        self.epoll.add(fd, EpollEvent::new(flags, token.to_word()))
    }

    /// Waits for other flags than before.
    pub fn rewatch(&self, fd: impl AsFd, flags: EpollFlags, token: Token) -> nix::Result<()> {
        let mut event = EpollEvent::new(flags, token.to_word());
        self.epoll.modify(fd, &mut event)
    }

    /// Waits for it no more, if it did.
    pub fn unwatch(&self, fd: impl AsFd) {
        let _ = self.epoll.delete(fd);
    }

    /// Something is due after this time.
    pub fn after(&mut self, time: Duration, due: Due) {
        self.due.push(Reverse((Instant::now() + time, due)));
    }

    /// What is due by now, one after the other.
    pub fn next_due(&mut self, now: Instant) -> Option<Due> {
        let Reverse((at, _)) = self.due.peek()?;
        (*at <= now).then(|| self.due.pop().map(|Reverse((_, due))| due))?
    }

    /// Waits for something to happen or to be due, at most until `end`, or for ever.
    pub fn wait(&self, end: Option<Instant>) -> nix::Result<Vec<(Token, EpollFlags)>> {
        let due = self.due.peek().map(|Reverse((at, _))| *at);
        let end = due.into_iter().chain(end).min();
        let timeout = end.map_or(EpollTimeout::NONE, |end| {
            let wait = end.saturating_duration_since(Instant::now());
            // Rounded up, so as not to wake just before.
            let millis = wait.as_nanos().div_ceil(1_000_000).min(3_600_000) as u32;
            EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::NONE)
        });
        let mut events = [EpollEvent::empty(); 64];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => return Err(error),
        };
        let events = events.iter().take(count);
        let known = |event: &EpollEvent| Some((Token::from_word(event.data())?, event.events()));
        Ok(events.filter_map(known).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_their_words() {
        let tokens = [
            Token::Listener(17),
            Token::Signals,
            Token::Found,
            Token::Fabric,
            Token::WantedBack,
            Token::Anchors(1),
            Token::Connection(77),
            Token::Call(1 << 59),
        ];
        for token in tokens {
            assert_eq!(Token::from_word(token.to_word()), Some(token));
        }
        assert_eq!(Token::from_word(15), None);
    }

    #[test]
    fn what_is_due_comes_in_order_of_time() {
        let mut agenda = Agenda::new().unwrap();
        agenda.after(Duration::from_secs(60), Due::Callers(0));
        agenda.after(Duration::from_millis(2), Due::Send(2));
        agenda.after(Duration::from_millis(1), Due::Send(1));
        assert_eq!(
            agenda.next_due(Instant::now() - Duration::from_secs(1)),
            None
        );
        let later = Instant::now() + Duration::from_secs(1);
        assert_eq!(agenda.next_due(later), Some(Due::Send(1)));
        assert_eq!(agenda.next_due(later), Some(Due::Send(2)));
        assert_eq!(agenda.next_due(later), None);
        // The wait ends when the next one is due, not when it was told to end.
        agenda.after(Duration::ZERO, Due::Callers(0));
        assert!(
            agenda
                .wait(Some(later + Duration::from_secs(600)))
                .unwrap()
                .is_empty()
        );
    }
}
