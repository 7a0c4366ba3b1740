//! What a node keeps for one peer: the greeting, the posts in flight, the lists of its streams.
//! Streams are named here only by their places.

use crate::counters::{Count, Counters};
use crate::id::{Place, StreamId};
use crate::list::List;
use crate::message::Refusal;
use std::collections::VecDeque;

/// How far the session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// HELLOs are exchanged; streams, if there are any, wait.
    Greeting,
    /// Both know each other; each names the streams that it knows.
    Resuming,
    /// Up.
    Live,
}

/// A pass over all streams of the session, a few at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sweep {
    /// Name the streams to the peer.
    Name,
    /// End the streams that the peer has not named.
    Settle,
    /// End all streams: the peer is gone.
    End,
}

/// Something in flight to the peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Post {
    /// Place of its stream.
    pub(crate) stream: Option<usize>,
    pub(crate) what: What,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum What {
    /// Bytes of the stream, from a position to another.
    Write {
        from: u64,
        to: u64,
    },
    /// A message of the stream, by its `wire` flag.
    Said(u16),
    /// First half of the message that follows.
    Offer,
    Hello,
    Resumed,
    Alive,
    /// REFUSE for a connect that found no place.
    Reply(StreamId, Refusal),
}

/// First half of a connect that came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    pub(crate) from: StreamId,
    pub(crate) place: Place,
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
}

/// What a node keeps for one peer.
pub(crate) struct Session {
    pub(crate) state: State,
    /// Our tag: what the peer has to write into its messages. Another one for each session.
    pub(crate) tag: u32,
    /// The peer's tag, 0 while unknown.
    pub(crate) peer_tag: u32,
    /// The peer's epoch, 0 while unknown.
    pub(crate) peer_epoch: u64,
    /// The peer's tag that our last HELLO carried.
    pub(crate) echoed: u32,
    /// Our tag as the peer's last HELLO had it.
    pub(crate) peer_echo: u32,
    /// Connects that the peer lets stand unanswered.
    pub(crate) peer_pending: u32,
    /// When something was last heard, and sent, in ns.
    pub(crate) heard: u64,
    pub(crate) sent: u64,
    /// When the next HELLO is due, in ns.
    pub(crate) hello_at: u64,
    /// When the streams of a lost session end, in ns.
    pub(crate) give_up_at: u64,
    /// The peer's streams have to end before it is greeted.
    pub(crate) gone: bool,
    /// Nothing of an earlier session is in flight.
    pub(crate) drained: bool,
    /// NodeUp, NodeGone are to be told.
    pub(crate) tell_up: bool,
    pub(crate) tell_gone: bool,
    pub(crate) alive_due: bool,
    pub(crate) sweep: Option<Sweep>,
    /// Number of the sweep, different for each.
    pub(crate) sweep_number: u64,
    /// Streams whose RESUME has not been posted.
    pub(crate) naming: u32,
    /// RESUMED: ours is posted; the peer's has come.
    pub(crate) resumed: bool,
    pub(crate) peer_resumed: bool,
    /// Posts in flight, oldest first; `next_seq` is the number of the next.
    pub(crate) posts: VecDeque<Post>,
    pub(crate) next_seq: u64,
    /// A post has failed: nothing is posted until all are back and the queue is restarted.
    pub(crate) stopped: bool,
    /// The device took no more; waits for `handle_room`.
    pub(crate) blocked: bool,
    /// Streams that may have something to send.
    pub(crate) ready: List,
    /// All streams with the peer.
    pub(crate) members: List,
    /// Streams that the peer has opened.
    pub(crate) theirs: u32,
    pub(crate) offer: Option<Offer>,
    /// Connects of the peer without an answer, and ours.
    pub(crate) unanswered: u32,
    pub(crate) asking: u32,
    pub(crate) replies: VecDeque<(StreamId, Refusal)>,
    pub(crate) counters: Counters,
}

impl Session {
    pub(crate) fn new(window: u32, pending: u32, tag: u32) -> Self {
        Session {
            state: State::Greeting,
            tag,
            peer_tag: 0,
            peer_epoch: 0,
            echoed: 0,
            peer_echo: 0,
            peer_pending: 0,
            heard: 0,
            sent: 0,
            hello_at: 0,
            give_up_at: u64::MAX,
            gone: false,
            drained: true,
            tell_up: false,
            tell_gone: false,
            alive_due: false,
            sweep: None,
            sweep_number: 0,
            naming: 0,
            resumed: false,
            peer_resumed: false,
            posts: VecDeque::with_capacity(window as usize),
            next_seq: 1,
            stopped: false,
            blocked: false,
            ready: List::new(),
            members: List::new(),
            theirs: 0,
            offer: None,
            unanswered: 0,
            asking: 0,
            replies: VecDeque::with_capacity(pending as usize),
            counters: Counters::new(),
        }
    }

    /// Forgets all that belongs to the session that was lost. Its streams are not touched: they
    /// carry the tag of the session that they were named in, which is no longer ours.
    pub(crate) fn lose(&mut self, tag: u32, now: u64, give_up_at: u64) {
        self.counters.add(Count::SessionLost);
        self.state = State::Greeting;
        self.tag = tag;
        (self.peer_tag, self.echoed, self.peer_echo) = (0, 0, 0);
        self.hello_at = now;
        self.give_up_at = give_up_at;
        self.alive_due = false;
        if self.sweep != Some(Sweep::End) {
            self.sweep = None;
        }
        self.drained = self.posts.is_empty();
        self.naming = 0;
        (self.resumed, self.peer_resumed) = (false, false);
        self.offer = None;
        (self.unanswered, self.asking) = (0, 0);
        self.replies.clear();
    }

    /// A HELLO has to be sent.
    pub(crate) fn hello_due(&self, now: u64) -> bool {
        self.echoed != self.peer_tag || (self.state == State::Greeting && now >= self.hello_at)
    }

    /// Nothing of a lost session is in flight any more, and no stream of a gone peer is left to end.
    /// So a peer that reads our HELLO knows that no write of an earlier session follows.
    pub(crate) fn may_greet(&self) -> bool {
        self.drained && !self.gone
    }
}
