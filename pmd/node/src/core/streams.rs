//! Which streams are polled, and when they are not any more.

use super::{BATCH, Core, index};
use rdsock_proto::StreamId;
use rdsock_shm::layout::want;
use rdsock_shm::wake;
use std::sync::atomic::Ordering;

/// Streams that are polled however long nothing has happened on them.
const ALWAYS_HOT: usize = 64;
/// Nanoseconds without an event after which a stream is polled no more, when there are many.
const COOLS_AFTER: u64 = 2_000_000;

impl Core {
    /// What the anchors' thread wants to be looked at.
    pub(super) fn looks(&mut self) -> bool {
        let mut worked = false;
        for _ in 0..BATCH {
            let Some(stream) = self.inbox.look.take() else {
                break;
            };
            worked = true;
            self.counts.looks += 1;
            let Some(id) = StreamId::from_u64(stream.id.load(Ordering::Relaxed)) else {
                continue;
            };
            self.look_at(id);
            self.heat(id);
        }
        worked
    }

    pub(super) fn look_at(&mut self, id: StreamId) -> bool {
        let now = self.now;
        let Some(live) = self.streams.get_mut(index(id)).and_then(Option::as_mut) else {
            return false;
        };
        if live.id != id || !live.look(&mut self.node) {
            return false;
        }
        live.moved = now;
        let what = std::mem::take(&mut live.ask);
        if what != 0 {
            live.stream.ask(what);
        }
        true
    }

    /// Has a stream polled.
    pub(super) fn heat(&mut self, id: StreamId) {
        let at = index(id);
        let now = self.now;
        if let Some(live) = self.live(id)
            && live.open
            && !live.gone
        {
            live.moved = now;
            if !live.hot {
                live.hot = true;
                self.hot.push(at as u32);
            }
        }
    }

    pub(super) fn poll_hot(&mut self) -> bool {
        self.counts.polled += self.hot.len() as u64;
        let mut worked = false;
        let mut at = 0;
        while let Some(&place) = self.hot.get(at) {
            let Some(live) = self
                .streams
                .get_mut(place as usize)
                .and_then(Option::as_mut)
            else {
                self.hot.swap_remove(at);
                continue;
            };
            live.tell_core(self.core);
            let (id, gone) = (live.id, live.gone);
            let looked = self.look_at(id);
            worked |= looked;
            let many = self.hot.len() > ALWAYS_HOT;
            if gone || (!looked && many && self.is_cold(id)) && self.cool(id) {
                if let Some(live) = self.live(id) {
                    live.hot = false;
                }
                self.hot.swap_remove(at);
            } else {
                at += 1;
            }
        }
        worked
    }

    pub(super) fn is_cold(&mut self, id: StreamId) -> bool {
        let now = self.now;
        self.live(id)
            .is_none_or(|live| now.wrapping_sub(live.moved) > COOLS_AFTER)
    }

    /// Asks a program for a sign of what it does next, so that it need not be polled. False when it
    /// has done something meanwhile.
    pub(super) fn cool(&mut self, id: StreamId) -> bool {
        self.with(id, |live, node| live.stop_watching(node));
        let Some(live) = self.live(id) else {
            return true;
        };
        let stream = &live.stream;
        wake::ask(&stream.out().bytes.want, want::WAKE);
        wake::ask(&stream.incoming().space.want, want::WAKE);
        !stream.is_deaf() && !self.look_at(id)
    }
}
