//! What is to be done: posts for each peer, fair between streams and between peers, and events.

use super::Node;
use crate::action::{Action, Actions, Event, Write};
use crate::id::NodeId;
use crate::message::{Body, Message, Refusal};
use crate::session::{Post, State, Sweep, What};
use crate::stream::{Leave, Phase, tell, wire};

/// Turns of streams before the next peer's turn.
const TURNS: u32 = 16;

impl Node {
    /// Puts what is to be done into `actions`, as far as they have room. `now` in ns, never less
    /// than before. True when there is more: call again after carrying these out.
    pub fn poll(&mut self, now: u64, actions: &mut Actions) -> bool {
        if now >= self.timer {
            self.look_at_times(now);
        }
        while let Some(at) = self
            .ask_list
            .front()
            .filter(|at| self.table[*at].deadline <= now)
        {
            self.fail_connect(at, Refusal::Timeout);
            self.abandon(at);
            self.touch(at);
        }
        for _ in 0..self.active_list.len() {
            let Some(s) = self.active.pop(&mut self.active_list) else {
                break;
            };
            if self.drive(s, now, actions) {
                self.activate(s);
            }
        }
        self.tell(actions);
        !self.tell_list.is_empty() || !self.active_list.is_empty()
    }

    /// When [`Node::poll`] has to be called although nothing has happened, in ns.
    pub fn deadline(&self) -> u64 {
        let connect = self
            .ask_list
            .front()
            .map_or(u64::MAX, |at| self.table[at].deadline);
        self.timer.min(connect)
    }

    /// Everything for one peer, up to a bound. True when more can be done at once.
    fn drive(&mut self, s: usize, now: u64, actions: &mut Actions) -> bool {
        let node = NodeId(s as u16);
        if actions.room() < 2 {
            return true;
        }
        let session = &mut self.sessions[s];
        if std::mem::take(&mut session.tell_gone) {
            actions.push(Action::Event(Event::NodeGone { node }));
        }
        if session.stopped && session.posts.is_empty() {
            session.stopped = false;
            actions.push(Action::Restart { node });
        }
        self.sweep(s);
        if s == self.id.index() {
            return false;
        }
        self.speak(s, now, actions);
        if self.sessions[s].state != State::Greeting {
            self.serve(s, now, actions);
        }
        let session = &self.sessions[s];
        session.sweep.is_some() || (self.room(s) >= 2 && self.has_work(s, now))
    }

    fn has_work(&self, s: usize, now: u64) -> bool {
        let session = &self.sessions[s];
        let up = session.state != State::Greeting;
        (session.hello_due(now) && session.may_greet())
            || (up && !session.ready.is_empty())
            || (up && !session.replies.is_empty())
            || (up && session.alive_due)
            || (up && !session.resumed && session.naming == 0)
            || session.tell_up
    }

    /// Posts to the peer that fit now.
    fn room(&self, s: usize) -> usize {
        let session = &self.sessions[s];
        if session.blocked || session.stopped {
            return 0;
        }
        (self.config.window as usize).saturating_sub(session.posts.len())
    }

    fn fits(&self, s: usize, posts: usize, actions: &Actions) -> bool {
        self.room(s).min(actions.room()) >= posts
    }

    /// Messages of the session itself.
    fn speak(&mut self, s: usize, now: u64, actions: &mut Actions) {
        let session = &self.sessions[s];
        if session.hello_due(now) && session.may_greet() && self.fits(s, 1, actions) {
            let body = Body::Hello {
                epoch: self.epoch,
                tag: session.tag,
                pending: self.config.pending,
            };
            let session = &mut self.sessions[s];
            session.echoed = session.peer_tag;
            session.hello_at = now.saturating_add(self.config.hello_interval);
            self.send(s, None, What::Hello, body, now, actions);
        }
        let session = &self.sessions[s];
        if session.state == State::Greeting || session.hello_due(now) {
            return;
        }
        let named = session.sweep.is_none() && session.naming == 0;
        if named && !session.resumed && self.fits(s, 1, actions) {
            self.sessions[s].resumed = true;
            self.send(s, None, What::Resumed, Body::Resumed, now, actions);
        }
        let session = &self.sessions[s];
        let settles = session.state == State::Resuming && session.sweep.is_none();
        if settles && session.resumed && session.peer_resumed {
            self.begin(s, Sweep::Settle);
        }
        if self.sessions[s].tell_up && actions.room() > 0 {
            self.sessions[s].tell_up = false;
            actions.push(Action::Event(Event::NodeUp {
                node: NodeId(s as u16),
            }));
        }
        if self.sessions[s].alive_due && self.fits(s, 1, actions) {
            self.sessions[s].alive_due = false;
            self.send(s, None, What::Alive, Body::Alive, now, actions);
        }
    }

    /// Refusals, and turns of the streams that have something to send.
    fn serve(&mut self, s: usize, now: u64, actions: &mut Actions) {
        if self.sessions[s].hello_due(now) {
            return;
        }
        while self.fits(s, 1, actions) {
            let session = &mut self.sessions[s];
            let Some((to, refusal)) = session.replies.pop_front() else {
                break;
            };
            session.unanswered = session.unanswered.saturating_sub(1);
            let body = Body::Refuse { to, refusal };
            self.send(s, None, What::Reply(to, refusal), body, now, actions);
        }
        for _ in 0..self.sessions[s].ready.len().min(TURNS) {
            if !self.fits(s, 2, actions) {
                break;
            }
            let Some(at) = self.ready.pop(&mut self.sessions[s].ready) else {
                break;
            };
            if self.turn(s, at, now, actions) {
                self.ready.push(&mut self.sessions[s].ready, at);
            }
        }
    }

    /// One stream's turn: its messages and a quantum of its bytes. True when more remains.
    fn turn(&mut self, s: usize, at: usize, now: u64, actions: &mut Actions) -> bool {
        let session = &self.sessions[s];
        if session.sweep == Some(Sweep::Name) && self.table[at].swept != session.sweep_number {
            return false; // What it has to say is of a lost session: `name` looks at it first.
        }
        match self.table[at].phase {
            Phase::Connecting => {
                self.ask(s, at, now, actions);
                return false;
            }
            Phase::Refusing => {
                let to = self.table[at].peer;
                let refusal = self.table[at].refusal.unwrap_or(Refusal::NoListener);
                if let (Some(to), true) = (to, self.table[at].wire & wire::REFUSE != 0) {
                    self.answered(s);
                    self.say(
                        s,
                        at,
                        wire::REFUSE,
                        Body::Refuse { to, refusal },
                        now,
                        actions,
                    );
                }
                return false;
            }
            Phase::Open => {}
            _ => return false,
        }
        if self.table[at].wire & (wire::ACCEPT | wire::RESUME) != 0 {
            self.introduce(s, at, now, actions);
        }
        let tag = self.sessions[s].tag;
        if self.table[at].named != tag || self.table[at].settled != tag {
            return false;
        }
        let more = self.write(s, at, now, actions);
        more | self.chat(s, at, now, actions)
    }

    /// OFFER and CONNECT.
    fn ask(&mut self, s: usize, at: usize, now: u64, actions: &mut Actions) {
        let session = &self.sessions[s];
        if self.table[at].wire & wire::CONNECT == 0 {
            return;
        }
        if session.state != State::Live || self.table[at].named != session.tag {
            return; // The session was lost: `name` ends this.
        }
        let from = self.table.id(at);
        let stream = &mut self.table[at];
        let Some(place) = stream.local else {
            return;
        };
        stream.asked = true;
        let addresses = stream.addresses;
        let offer = Body::Offer {
            from,
            place,
            source_port: addresses.source_port,
            destination_port: addresses.destination_port,
        };
        let connect = Body::Connect {
            from,
            source: addresses.source,
            destination: addresses.destination,
        };
        self.send(s, Some(at), What::Offer, offer, now, actions);
        self.say(s, at, wire::CONNECT, connect, now, actions);
    }

    /// ACCEPT or RESUME: what comes before all else of a stream.
    fn introduce(&mut self, s: usize, at: usize, now: u64, actions: &mut Actions) {
        let from = self.table.id(at);
        let stream = &mut self.table[at];
        let (Some(to), Some(place)) = (stream.peer, stream.local) else {
            return;
        };
        if stream.wire & wire::ACCEPT != 0 {
            self.answered(s);
            self.say(
                s,
                at,
                wire::ACCEPT,
                Body::Accept { to, from, place },
                now,
                actions,
            );
        } else {
            let rx = &mut stream.rx;
            rx.credited = rx.consumed;
            let resume = Body::Resume {
                to,
                from,
                arrived: rx.head.max(rx.consumed),
                consumed: rx.consumed,
                notify: rx.notify,
            };
            self.sessions[s].naming -= 1;
            stream.named = self.sessions[s].tag;
            self.say(s, at, wire::RESUME, resume, now, actions);
        }
    }

    fn answered(&mut self, s: usize) {
        let session = &mut self.sessions[s];
        session.unanswered = session.unanswered.saturating_sub(1);
    }

    /// Up to a quantum of bytes. Only the last write of the turn notifies.
    fn write(&mut self, s: usize, at: usize, now: u64, actions: &mut Actions) -> bool {
        let (bulk, small_writes) = (self.config.bulk, self.config.small_writes);
        let mut quantum = self.config.quantum;
        let id = self.table.id(at);
        let mut next = self.table[at].next_write(quantum, bulk, small_writes);
        while let Some((position, len)) = next {
            if !self.fits(s, 1, actions) || quantum == 0 {
                return true;
            }
            quantum -= len;
            let stream = &mut self.table[at];
            let (Some(remote), Some(to)) = (stream.remote, stream.peer) else {
                return false;
            };
            let head = position + len;
            stream.tx.posted = head;
            stream.tx.high = stream.tx.high.max(head);
            stream.tx.writes += 1;
            next = stream.next_write(quantum, bulk, small_writes);
            let notify = stream.tx.notify;
            let last = next.is_none() || quantum == 0 || !self.fits(s, 2, actions);
            let message = Message {
                session: self.sessions[s].peer_tag,
                body: Body::Data { to, head },
            };
            if notify && last {
                self.table[at].wire &= !wire::DATA;
            }
            let write = Write {
                stream: id,
                position,
                len: len as u32,
                key: remote.key,
                offset: remote.ring + position % remote.size(),
                word: remote.word,
                head,
                notify: (notify && last).then(|| message.encode()),
            };
            let seq = self.post(
                s,
                Some(at),
                What::Write {
                    from: position,
                    to: head,
                },
                now,
            );
            actions.push(Action::Write {
                node: NodeId(s as u16),
                seq,
                write,
            });
        }
        false
    }

    /// DATA, CREDIT, SHUT, CLOSE, RESET. True when one of them found no room.
    fn chat(&mut self, s: usize, at: usize, now: u64, actions: &mut Actions) -> bool {
        let Some(to) = self.table[at].peer else {
            return false;
        };
        for said in [wire::DATA, wire::CREDIT, wire::SHUT, wire::LEAVE] {
            let stream = &self.table[at];
            let possible = stream.wire & said != 0
                && match said {
                    wire::SHUT => stream.may_shut(),
                    wire::LEAVE => stream.may_leave(),
                    _ => stream.listens(),
                };
            if !possible {
                continue;
            }
            if !self.fits(s, 1, actions) {
                return true;
            }
            let stream = &mut self.table[at];
            let (end, consumed) = (stream.tx.posted, stream.rx.consumed);
            let body = match said {
                wire::DATA => Body::Data { to, head: end },
                wire::CREDIT => {
                    stream.rx.credited = consumed;
                    let (seen, notify) = (stream.rx.seen, stream.rx.notify);
                    Body::Credit {
                        to,
                        consumed,
                        seen,
                        notify,
                    }
                }
                wire::SHUT => Body::Shut { to, end },
                _ => {
                    let Leave::Wanted(cause) = stream.leave else {
                        continue;
                    };
                    stream.leave = Leave::Posted(cause);
                    match cause {
                        None => Body::Close { to, end, consumed },
                        Some(cause) => Body::Reset { to, cause },
                    }
                }
            };
            self.say(s, at, said, body, now, actions);
        }
        false
    }

    /// Sends the message of a `wire` flag.
    fn say(&mut self, s: usize, at: usize, said: u16, body: Body, now: u64, actions: &mut Actions) {
        self.table[at].wire &= !said;
        self.send(s, Some(at), What::Said(said), body, now, actions);
    }

    fn send(
        &mut self,
        s: usize,
        stream: Option<usize>,
        what: What,
        body: Body,
        now: u64,
        actions: &mut Actions,
    ) {
        let message = Message {
            session: self.sessions[s].peer_tag,
            body,
        }
        .encode();
        let seq = self.post(s, stream, what, now);
        actions.push(Action::Send {
            node: NodeId(s as u16),
            seq,
            message,
        });
    }

    fn post(&mut self, s: usize, stream: Option<usize>, what: What, now: u64) -> u64 {
        if let Some(at) = stream {
            self.table[at].in_flight += 1;
        }
        let session = &mut self.sessions[s];
        session.sent = now;
        session.posts.push_back(Post { stream, what });
        session.next_seq += 1;
        session.next_seq - 1
    }

    /// Events of streams, in the order of [`tell`].
    fn tell(&mut self, actions: &mut Actions) {
        while let Some(at) = self.tell_list.front() {
            let id = self.table.id(at);
            while self.table[at].tell != 0 {
                if actions.room() == 0 {
                    return;
                }
                let stream = &mut self.table[at];
                let flag = 1 << stream.tell.trailing_zeros();
                stream.tell &= !flag;
                if let Some(event) = stream.event(id, flag) {
                    actions.push(Action::Event(event));
                }
                if flag == tell::RELEASED {
                    break;
                }
            }
            self.telling.remove(&mut self.tell_list, at);
            if self.table[at].phase == Phase::Over {
                self.table.remove(at);
            }
        }
    }
}
