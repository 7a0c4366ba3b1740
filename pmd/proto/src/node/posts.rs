//! What is in flight: completions, failures, and posts that the device did not take.

use super::Node;
use crate::action::EndReason;
use crate::counters::Count;
use crate::id::{NodeId, StreamId};
use crate::message::Cause;
use crate::session::{Post, State, What};
use crate::stream::{Leave, Phase, tell, wire};

/// How a post ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done: the bytes are visible, the message is in the mailbox.
    Success,
    /// The other node's protection refused it.
    Refused,
    /// It may or may not have been carried out: link, reset, time-out.
    Failed,
    /// It was certainly not carried out, since one before it was refused or failed.
    Flushed,
}

impl Node {
    /// Post `seq` to `node` has completed. Success includes all posts before it.
    pub fn handle_completion(&mut self, node: NodeId, seq: u64, status: Status, now: u64) {
        let s = node.index();
        let Some(session) = self.sessions.get_mut(s) else {
            return;
        };
        let oldest = session.next_seq - session.posts.len() as u64;
        if !(oldest..session.next_seq).contains(&seq) {
            session.counters.add(Count::StrayCompletion);
            return;
        }
        for _ in oldest..seq {
            self.complete(s, Status::Success, now);
        }
        self.complete(s, status, now);
        let session = &mut self.sessions[s];
        session.drained |= session.posts.is_empty();
        self.activate(s);
    }

    /// The device has not taken post `seq` to `node`, nor any after it. Nothing is posted to that
    /// node until [`Node::handle_room`].
    pub fn handle_rejected(&mut self, node: NodeId, seq: u64) {
        let s = node.index();
        let Some(session) = self.sessions.get_mut(s) else {
            return;
        };
        session.blocked = true;
        while self.sessions[s].next_seq > seq {
            let Some(post) = self.sessions[s].posts.pop_back() else {
                break;
            };
            self.sessions[s].next_seq -= 1;
            self.undo(s, post, true);
        }
        let session = &mut self.sessions[s];
        session.drained |= session.posts.is_empty();
    }

    /// The device takes posts to `node` again.
    pub fn handle_room(&mut self, node: NodeId) {
        if let Some(session) = self.sessions.get_mut(node.index()) {
            session.blocked = false;
            self.activate(node.index());
        }
    }

    /// The oldest post has completed.
    fn complete(&mut self, s: usize, status: Status, now: u64) {
        let Some(post) = self.sessions[s].posts.pop_front() else {
            return;
        };
        let is_write = matches!(post.what, What::Write { .. });
        if status == Status::Success {
            return self.succeed(post);
        }
        self.sessions[s].stopped = true;
        let lost = status == Status::Failed || (status == Status::Refused && !is_write);
        if lost && self.sessions[s].state != State::Greeting {
            self.lose(s, now);
        }
        self.undo(s, post, status == Status::Flushed);
        if let (Status::Refused, true, Some(at)) = (status, is_write, post.stream) {
            self.sessions[s].counters.add(Count::AccessRefused);
            let stream = &mut self.table[at];
            stream.end(EndReason::AccessRefused);
            stream.want_leave(Some(Cause::Access));
            self.touch(at);
        }
    }

    fn succeed(&mut self, post: Post) {
        let Some(at) = post.stream else { return };
        let stream = &mut self.table[at];
        stream.in_flight -= 1;
        match post.what {
            What::Write { to, .. } => {
                stream.tx.writes -= 1;
                if to > stream.tx.done {
                    stream.tx.done = to;
                    if stream.held && stream.ended.is_none() {
                        stream.tell |= tell::CREDIT;
                    }
                }
            }
            What::Said(wire::LEAVE) => {
                if let Leave::Posted(cause) = stream.leave {
                    stream.leave = Leave::Done(cause);
                }
            }
            What::Said(wire::REFUSE) => self.over(at),
            _ => {}
        }
        self.touch(at);
    }

    /// A post has not been carried out (`certain`), or perhaps not: what it said is to be said
    /// again. If the session is lost, its streams are resumed first.
    fn undo(&mut self, s: usize, post: Post, certain: bool) {
        let session = &mut self.sessions[s];
        let same = session.state != State::Greeting;
        let Some(at) = post.stream else {
            match post.what {
                What::Hello => session.echoed = 0,
                What::Resumed if same => session.resumed = false,
                What::Alive => session.alive_due = same,
                What::Reply(to, refusal) if same => {
                    session.unanswered += 1;
                    session.replies.push_front((to, refusal));
                }
                _ => {}
            }
            return;
        };
        let stream = &mut self.table[at];
        stream.in_flight -= 1;
        match post.what {
            What::Write { from, .. } => {
                stream.tx.writes -= 1;
                stream.tx.posted = stream.tx.posted.min(from);
            }
            What::Said(wire::LEAVE) => {
                if let Leave::Posted(cause) = stream.leave {
                    stream.leave = Leave::Wanted(cause);
                    stream.wire |= wire::LEAVE;
                }
            }
            What::Said(wire::CONNECT) if certain => {
                stream.asked = false;
                match stream.phase {
                    Phase::Connecting => stream.wire |= wire::CONNECT,
                    Phase::Abandoned => self.abandon(at),
                    _ => {}
                }
            }
            What::Said(wire::REFUSE) if !same => self.over(at),
            What::Said(said @ (wire::ACCEPT | wire::REFUSE)) if same => {
                session.unanswered += 1;
                stream.wire |= said;
            }
            What::Said(wire::RESUME) if same => {
                session.naming += 1;
                stream.named = 0;
                stream.wire |= wire::RESUME;
            }
            What::Said(said @ (wire::DATA | wire::CREDIT | wire::SHUT)) => stream.wire |= said,
            _ => {}
        }
        self.touch(at);
    }

    /// Positions and flight of a stream, for tests and for `rdsock why`: bytes posted, bytes known
    /// to be visible, posts in flight. `None` for an unknown id.
    pub fn progress(&self, id: StreamId) -> Option<(u64, u64, u32)> {
        let stream = &self.table[self.table.find(id)?];
        Some((stream.tx.posted, stream.tx.done, stream.in_flight))
    }
}
