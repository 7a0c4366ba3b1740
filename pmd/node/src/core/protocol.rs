//! What the protocol decides, done: descriptors posted, other threads told.

use super::{ACTIONS, Core, index};
use crate::stages::Stage;
use crate::stream::todo;
use crate::{Asked, Notice};
use rdsock_proto::{Action, Event, NodeId, StreamId, Write as Transfer};
use rdsock_rde::spec::Key;
use rdsock_rde::{Data, DeviceFailed, NotPosted, Notify, Operation, Remote, Rights, Work};
use std::sync::atomic::Ordering;

impl Core {
    /// Lets the protocol act.
    pub(super) fn drive<const TIMED: bool>(&mut self) -> Result<bool, DeviceFailed> {
        let mut worked = false;
        // Events must find room.
        while self.notices.room() > ACTIONS {
            let more = self.node.poll(self.now, &mut self.actions);
            self.lap::<TIMED>(Stage::Protocol);
            if self.actions.is_empty() {
                break;
            }
            worked = true;
            self.batch.clear();
            self.batch.extend(self.actions.drain());
            self.counts.actions += self.batch.len() as u64;
            self.carry_out()?;
            self.lap::<TIMED>(Stage::Posts);
            if !more {
                break;
            }
        }
        if worked {
            self.set.ring();
            self.lap::<TIMED>(Stage::Posts);
            // The model executes at once what was posted.
            self.step();
            self.lap::<TIMED>(Stage::Device);
        }
        Ok(worked)
    }

    pub(super) fn carry_out(&mut self) -> Result<(), DeviceFailed> {
        let batch = std::mem::take(&mut self.batch);
        let blocked_before = self.blocked.len();
        let mut at_fault = Vec::new();
        for (at, action) in batch.iter().enumerate() {
            let posted = match action {
                Action::Event(event) => {
                    self.on_event(*event);
                    continue;
                }
                Action::Restart { node } => {
                    let resume = Work {
                        target: node.0,
                        operation: Operation::Resume,
                        tag: 0,
                        report: false,
                    };
                    // When it does not fit, the lane stays failed, and the next post shows that.
                    let _ = self.set.post(&resume);
                    continue;
                }
                Action::Send { node, seq, .. } | Action::Write { node, seq, .. } => {
                    if self.blocked[blocked_before..].contains(&node.0) {
                        continue;
                    }
                    let report = is_last(&batch[at + 1..], *node);
                    (*node, *seq, self.post(action, report))
                }
            };
            let (node, seq, result) = posted;
            match result {
                Ok(()) => {}
                Err(NotPosted::Failed(failed)) => return Err(failed),
                Err(error) => {
                    self.node.handle_rejected(node, seq);
                    self.blocked.push(node.0);
                    if let (NotPosted::Invalid(why), Action::Write { write, .. }) = (error, action)
                    {
                        at_fault.push((write.stream, why));
                    }
                }
            }
        }
        if self.set.outstanding() == 0 || !at_fault.is_empty() {
            // No completion would tell of room: there is some.
            self.make_room();
        }
        for (stream, why) in at_fault {
            self.give_up(stream, why);
        }
        self.batch = batch;
        Ok(())
    }

    /// What waited for room may be posted again.
    pub(super) fn make_room(&mut self) {
        for blocked in self.blocked.drain(..) {
            self.node.handle_room(NodeId(blocked));
        }
    }

    /// The device can't do what a stream's write takes, and no room helps: that stream is at fault, and all others go on.
    #[cold]
    fn give_up(&mut self, stream: StreamId, why: &str) {
        tracing::debug!(?stream, why, "broken, since it can't be sent");
        self.with(stream, |live, node| live.break_it(node));
        self.end(stream);
    }

    pub(super) fn post(&mut self, action: &Action, report: bool) -> Result<(), NotPosted> {
        match action {
            Action::Send { node, seq, message } => self.set.post(&Work {
                target: node.0,
                operation: Operation::Message(Notify {
                    set: self.number,
                    payload: message,
                }),
                tag: *seq,
                report,
            }),
            Action::Write { node, seq, write } => {
                let Transfer {
                    stream,
                    position,
                    len,
                    ..
                } = *write;
                let live = self.streams.get(index(stream)).and_then(Option::as_ref);
                let found = live.is_some_and(|live| live.pieces(position, len, &mut self.pieces));
                if !found {
                    return Err(NotPosted::Invalid("no memory for a write"));
                }
                self.sent += u64::from(len);
                let set = self.number;
                let notify = write.notify.as_ref().map(|payload| Notify { set, payload });
                self.set.post(&Work {
                    target: node.0,
                    operation: Operation::Write {
                        to: Remote {
                            key: Key(write.key),
                            offset: write.offset,
                        },
                        data: Data::Pieces(&self.pieces),
                        word: Some((write.word, write.head)),
                        notify,
                    },
                    tag: *seq,
                    report,
                })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn on_event(&mut self, event: Event) {
        match event {
            Event::Incoming {
                stream,
                node,
                addresses,
            } => self.tell(Notice::Incoming {
                id: Asked {
                    core: self.number,
                    id: stream,
                },
                node: node.0,
                addresses,
            }),
            Event::Established { stream } => {
                let now = self.now;
                let ticket = self.live(stream).map(|live| {
                    (live.open, live.moved) = (true, now);
                    live.stream.ticket
                });
                if let Some(ticket) = ticket {
                    self.tell(Notice::Established { ticket });
                    self.heat(stream);
                }
            }
            Event::Refused { stream, refusal } => {
                if let Some(live) = self.live(stream) {
                    live.gone = true;
                    let ticket = live.stream.ticket;
                    let why = refusal;
                    self.tell(Notice::Refused { ticket, why });
                }
            }
            Event::PeerHead { stream, head } => self.arrived(stream, head),
            Event::Credit { stream, to } => {
                if let Some(live) = self.live(stream) {
                    let what = live.credit(to);
                    let behind = live.is_behind();
                    if what != 0 {
                        let stream = live.stream.clone();
                        stream.ask(what);
                    }
                    if behind {
                        self.look_at(stream);
                    }
                }
            }
            Event::PeerShut { stream, end } => {
                if let Some(live) = self.live(stream) {
                    let what = live.peer_ended(end);
                    if what != 0 {
                        let stream = live.stream.clone();
                        stream.ask(what);
                    }
                }
            }
            Event::Ended { stream, reason } => {
                tracing::debug!(?reason, "a stream to another node ended");
                self.end(stream);
            }
            Event::Resume { stream } => {
                let head = self.live(stream).map(|live| {
                    let producer = &live.stream.incoming().producer;
                    producer.head.load(Ordering::Acquire)
                });
                if self.node.resume(stream, head.unwrap_or(0)).is_err() {
                    self.end(stream);
                }
            }
            Event::Released { stream } => {
                let at = index(stream);
                let released = self.live(stream).map(|live| live.stream.clone());
                if let Some(released) = released {
                    self.streams[at] = None;
                    self.hot.retain(|place| *place as usize != at);
                    released.id.store(0, Ordering::Relaxed);
                    released.ask(todo::OVER);
                    let ticket = released.ticket;
                    self.tell(Notice::Released { ticket });
                }
            }
            Event::NodeUp { node } => {
                self.inbox.totals.show_nodes(&self.node);
                self.tell(Notice::NodeUp { node: node.0 });
            }
            Event::NodeGone { node } => {
                self.renew(node.0);
                self.inbox.totals.show_nodes(&self.node);
                self.tell(Notice::NodeGone { node: node.0 });
            }
        }
    }

    /// Bytes have arrived.
    #[inline]
    pub(super) fn arrived(&mut self, id: StreamId, head: u64) {
        let now = self.now;
        let (Some(live), node) = (
            self.streams.get_mut(index(id)).and_then(Option::as_mut),
            &mut self.node,
        ) else {
            return;
        };
        if live.id != id {
            return;
        }
        live.moved = now;
        let hot = live.hot;
        let what = live.notified(head, node);
        if what != 0 {
            let stream = live.stream.clone();
            stream.ask(what);
        }
        if !hot {
            self.heat(id);
        }
    }

    /// A stream is broken: its program sees ECONNRESET.
    pub(super) fn end(&mut self, id: StreamId) {
        // It may be over already.
        let _ = self.node.close(id);
        if let Some(live) = self.live(id) {
            live.gone = true;
            live.take_rest();
            let stream = live.stream.clone();
            stream.ask(todo::BROKEN);
        }
    }

    /// Withdraws the key that a node had, and makes another.
    pub(super) fn renew(&mut self, node: u16) {
        if let Some(reach) = self.reach.get_mut(&node) {
            reach.region = None;
            match self
                .rde
                .register_window(&reach.window, Rights::Write, Some(node))
            {
                Ok(region) => reach.region = Some(region),
                Err(error) => tracing::error!(node, "no region for a node: {error}"),
            }
        }
    }
}

/// No further post to that node follows in the batch.
fn is_last(rest: &[Action], node: NodeId) -> bool {
    !rest.iter().any(|action| match action {
        Action::Send { node: other, .. } | Action::Write { node: other, .. } => *other == node,
        _ => false,
    })
}
