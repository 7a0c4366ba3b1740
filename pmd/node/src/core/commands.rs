//! What the control thread has a poll core do.

use super::{ACTIONS, BATCH, Core, index};
use crate::live::Live;
use crate::memory::StreamMemory;
use crate::stream::{NodeStream, todo};
use crate::{Asked, Command, Notice};
use rdsock_proto::{NodeId, Place, Refusal, StreamId};
use rdsock_rde::DeviceFailed;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Core {
    pub(super) fn commands(&mut self) -> bool {
        let mut worked = false;
        for _ in 0..BATCH {
            // A command leads to two notices at most, which must find room.
            if self.notices.room() <= ACTIONS {
                break;
            }
            let Some(command) = self.inbox.commands.take() else {
                break;
            };
            worked = true;
            self.counts.commands += 1;
            self.obey(command);
        }
        worked
    }

    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Connect { stream, addresses } => {
                let place = self.place(&stream);
                let asked = match (place, self.failed) {
                    (Some(place), None) => {
                        let node = NodeId(stream.node);
                        self.node.connect(node, addresses, place, self.now)
                    }
                    _ => Err(Refusal::Lost),
                };
                match asked {
                    Ok(id) => self.enter(stream, id),
                    Err(why) => {
                        let ticket = stream.ticket;
                        self.tell(Notice::Refused { ticket, why });
                        self.tell(Notice::Released { ticket });
                    }
                }
            }
            Command::Accept {
                id: Asked { id, .. },
                stream,
            } => {
                let accepted = self
                    .place(&stream)
                    .is_some_and(|place| self.node.accept(id, place).is_ok());
                if !accepted {
                    // It has ended meanwhile, or does here.
                    let _ = self.node.refuse(id, Refusal::Limit);
                    let ticket = stream.ticket;
                    stream.ask(todo::BROKEN);
                    return self.tell(Notice::Released { ticket });
                }
                self.enter(stream, id);
                if let Some(live) = self.live(id) {
                    live.open = true;
                }
                self.heat(id);
            }
            Command::Refuse { id, why } => {
                // It has ended meanwhile, if that fails.
                let _ = self.node.refuse(id.id, why);
            }
            Command::Gone { stream } => {
                if let Some(id) = StreamId::from_u64(stream.id.load(Ordering::Relaxed)) {
                    self.with(id, |live, node| {
                        if !live.gone {
                            live.break_it(node);
                        }
                    });
                }
            }
            Command::Ready { stream } => stream.ask(todo::READY),
            Command::GiveBack if self.failed.is_none() => {
                self.fail(DeviceFailed::WantedBack);
            }
            Command::GiveBack => {}
        }
    }

    /// Where another node may write for a stream.
    pub(super) fn place(&self, stream: &NodeStream) -> Option<Place> {
        let region = self.reach.get(&stream.node)?.region.as_ref()?;
        let incoming = 1 - stream.end;
        let memory: &StreamMemory = &stream.memory;
        Some(Place {
            key: region.key().0,
            ring: memory.ring_in_region(incoming),
            word: memory.head_in_region(incoming),
            log2: memory.ring_size().trailing_zeros() as u8,
        })
    }

    pub(super) fn enter(&mut self, stream: Arc<NodeStream>, id: StreamId) {
        stream.id.store(id.to_u64(), Ordering::Relaxed);
        let at = index(id);
        if let Some(place) = self.streams.get_mut(at) {
            *place = Some(Live::new(stream, id, self.now));
        }
    }
}
