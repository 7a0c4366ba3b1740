//! How sessions begin, are lost, are resumed, and given up.

use super::Node;
use crate::action::EndReason;
use crate::counters::Count;
use crate::message::Refusal;
use crate::session::{State, Sweep};
use crate::stream::{Leave, Phase, tell, wire};

/// Streams that one call of `sweep` looks at.
const SWEEP_BATCH: u32 = 32;

impl Node {
    /// A HELLO has come: `echo` is our tag as the peer knows it, 0 if it does not.
    pub(super) fn on_hello(
        &mut self,
        s: usize,
        echo: u32,
        epoch: u64,
        tag: u32,
        pending: u32,
        now: u64,
    ) {
        let session = &self.sessions[s];
        let restarted = session.peer_epoch != 0 && session.peer_epoch != epoch;
        let anew = session.state != State::Greeting && session.peer_tag != tag;
        if restarted || anew {
            self.lose_if_up(s, now);
        }
        if restarted {
            self.sessions[s].counters.add(Count::PeerRestarted);
            self.give_up(s);
        }
        let session = &mut self.sessions[s];
        session.heard = now;
        (session.peer_epoch, session.peer_tag, session.peer_pending) = (epoch, tag, pending);
        session.peer_echo = echo;
        self.meet(s);
        self.activate(s);
    }

    /// Goes on from greeting when the peer has read our HELLO: our present tag went out in one of
    /// this session only.
    fn meet(&mut self, s: usize) {
        let session = &mut self.sessions[s];
        let met = session.peer_echo == session.tag && !session.gone;
        if session.state == State::Greeting && met {
            session.state = State::Resuming;
            session.give_up_at = u64::MAX;
            self.begin(s, Sweep::Name);
            self.timer = 0;
        }
    }

    fn lose_if_up(&mut self, s: usize, now: u64) {
        if self.sessions[s].state != State::Greeting {
            self.lose(s, now);
        }
    }

    /// The session is lost: its streams wait until it is resumed or given up.
    pub(super) fn lose(&mut self, s: usize, now: u64) {
        let tag = self.next_tag();
        let give_up_at = now.saturating_add(self.config.resume_timeout);
        self.sessions[s].lose(tag, now, give_up_at);
        self.timer = self.timer.min(now);
        self.activate(s);
    }

    /// All streams with the peer end.
    fn give_up(&mut self, s: usize) {
        let session = &mut self.sessions[s];
        session.gone = true;
        session.tell_gone = true;
        session.give_up_at = u64::MAX;
        self.begin(s, Sweep::End);
        self.activate(s);
    }

    pub(super) fn begin(&mut self, s: usize, sweep: Sweep) {
        self.sweeps += 1;
        self.sessions[s].sweep = Some(sweep);
        self.sessions[s].sweep_number = self.sweeps;
    }

    /// Looks at some streams of the session; what follows the last one is done here too.
    pub(super) fn sweep(&mut self, s: usize) {
        for _ in 0..SWEEP_BATCH {
            let Some(sweep) = self.sessions[s].sweep else {
                return;
            };
            let session = &mut self.sessions[s];
            let next = session.members.front();
            let Some(at) = next.filter(|at| self.table[*at].swept != session.sweep_number) else {
                return self.finish(s, sweep);
            };
            self.table[at].swept = session.sweep_number;
            self.members.remove(&mut session.members, at);
            self.members.push(&mut session.members, at);
            match sweep {
                Sweep::Name => self.name(s, at),
                Sweep::Settle => self.settle(s, at),
                Sweep::End => self.conclude(at, EndReason::NodeGone),
            }
            self.touch(at);
        }
    }

    fn finish(&mut self, s: usize, sweep: Sweep) {
        let session = &mut self.sessions[s];
        session.sweep = None;
        match sweep {
            Sweep::Name => {}
            Sweep::Settle => {
                session.state = State::Live;
                session.tell_up = true;
            }
            Sweep::End => {
                session.gone = false;
                self.meet(s);
            }
        }
    }

    /// The peer is back: what it has to be told of this stream.
    fn name(&mut self, s: usize, at: usize) {
        let session = &mut self.sessions[s];
        let stream = &mut self.table[at];
        stream.wire &= !(wire::ACCEPT | wire::RESUME);
        match stream.phase {
            // It has not got our answer, and will not name the stream: nothing is left of it.
            Phase::Offered | Phase::Refusing => self.conclude(at, EndReason::NodeGone),
            // Nor do we name what was not answered: that ends it there.
            Phase::Connecting | Phase::Abandoned => self.conclude(at, EndReason::NodeGone),
            Phase::Open if !stream.wire_over() => {
                if let Leave::Done(cause) = stream.leave {
                    // Delivered, but perhaps to a worker that died before it read it.
                    stream.leave = Leave::Wanted(cause);
                    stream.wire = wire::LEAVE;
                }
                session.naming += 1;
                stream.resuming = true;
                stream.tell |= tell::RESUME;
            }
            _ => {}
        }
    }

    /// The peer has named all streams that it knows.
    fn settle(&mut self, s: usize, at: usize) {
        let stream = &mut self.table[at];
        let known = stream.settled == self.sessions[s].tag;
        if stream.phase == Phase::Open && !known && !stream.wire_over() {
            self.conclude(at, EndReason::PeerForgot);
        }
    }

    /// The peer has nothing to do with the stream any more.
    fn conclude(&mut self, at: usize, reason: EndReason) {
        let stream = &mut self.table[at];
        match stream.phase {
            Phase::Over => return,
            Phase::Connecting => {
                self.fail_connect(at, Refusal::Lost);
                self.table[at].held = false;
            }
            _ if stream.left => {}
            _ => stream.end(reason),
        }
        self.table[at].resuming = false;
        self.table[at].tell &= !tell::RESUME;
        self.over(at);
    }

    /// Looks at the times of all sessions, and says when that has to be done next.
    pub(super) fn look_at_times(&mut self, now: u64) {
        let mut next = u64::MAX;
        for s in 0..self.sessions.len() {
            if s == self.id.index() {
                continue;
            }
            let session = &self.sessions[s];
            let up = session.state != State::Greeting;
            if up && now.saturating_sub(session.heard) >= self.config.silence {
                self.lose(s, now);
            } else if !up && now >= session.give_up_at {
                self.give_up(s);
                self.sessions[s].peer_epoch = 0;
            }
            let session = &mut self.sessions[s];
            if session.state == State::Greeting {
                if now >= session.hello_at {
                    self.activate(s);
                    next = next.min(now.saturating_add(self.config.hello_interval));
                } else {
                    next = next.min(session.hello_at);
                }
                next = next.min(self.sessions[s].give_up_at);
            } else {
                let idle_at = session.sent.saturating_add(self.config.keep_alive);
                if now >= idle_at {
                    session.alive_due = true;
                    self.activate(s);
                    next = next.min(now.saturating_add(self.config.keep_alive));
                } else {
                    next = next.min(idle_at);
                }
                next = next.min(self.sessions[s].heard.saturating_add(self.config.silence));
            }
        }
        self.timer = next;
    }
}
