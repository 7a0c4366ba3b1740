//! The inbound message queue (`docs/device.md`, 5.6).

use crate::error::DeviceFailed;
use crate::spec::{MessageHead, MessageTail, PAYLOAD, SLOT_WORDS};
use rdsock_vfio::{Words, barrier};

/// How a message was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Through a send window.
    Window,
    /// By a work descriptor, after its data.
    Notification,
}

/// A message of another node. Source and kind are the device's word; the payload is the other node's, and is
/// not to be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Node id of the source, 1 to the greatest that the device knows.
    pub source: u16,
    /// Queue set of the source.
    pub source_set: u16,
    /// How it was sent.
    pub kind: Kind,
    /// Bytes that the notification's write moved.
    pub length: u32,
    /// Payload, zeroes after its end.
    pub payload: [u8; PAYLOAD],
}

/// The driver's end of a message queue.
#[derive(Debug)]
pub(crate) struct Inbound {
    words: Words,
    mask: u32,
    max_node: u16,
    head: u32,
    told: u32,
}

impl Inbound {
    pub fn new(words: Words, log2: u8, max_node: u16) -> Self {
        Inbound {
            words,
            mask: (1 << log2) - 1,
            max_node,
            head: 0,
            told: 0,
        }
    }

    /// The next message, checked.
    #[inline]
    pub fn next(&mut self) -> Result<Option<Message>, DeviceFailed> {
        let at = (self.head & self.mask) as usize * SLOT_WORDS;
        let head = MessageHead(self.words.load(at));
        if head.phase() != (self.head & (self.mask + 1) == 0) {
            return Ok(None);
        }
        barrier::after_phase();
        let tail = MessageTail(self.words.load(at + 1));
        let kind = match head.kind() {
            1 => Some(Kind::Window),
            2 => Some(Kind::Notification),
            _ => None,
        };
        let possible = (1..=self.max_node).contains(&head.source());
        let Some(kind) = kind.filter(|_| possible && tail.index() == self.head) else {
            return Err(DeviceFailed::BadMessage {
                index: tail.index(),
                expected: self.head,
            });
        };
        let mut payload = [0; PAYLOAD];
        for (i, eight) in payload.chunks_exact_mut(8).enumerate() {
            eight.copy_from_slice(&self.words.load(at + 2 + i).to_le_bytes());
        }
        self.head = self.head.wrapping_add(1);
        Ok(Some(Message {
            source: head.source(),
            source_set: head.source_set(),
            kind,
            length: tail.length(),
            payload,
        }))
    }

    /// As [`crate::completions::CompletionQueue::due_head`].
    pub fn due_head(&mut self, exact: bool) -> Option<u32> {
        let behind = self.head.wrapping_sub(self.told);
        let due = behind > self.mask / 4 || (exact && behind != 0);
        due.then(|| {
            self.told = self.head;
            self.head
        })
    }
}
