//! A node that lies: it follows the protocol far enough to be taken seriously, and then twists what
//! it sends.

use super::fabric::Work;
use super::rng::Rng;
use rdsock_proto::Write;
use rdsock_proto::message::{Bytes, SIZE};

/// What the liar has sent, to send it again.
#[derive(Default)]
pub struct Lies {
    messages: Vec<(usize, Bytes)>,
}

impl Lies {
    /// What is sent in place of `work`.
    pub fn twist(&mut self, rng: &mut Rng, to: usize, work: Work) -> Work {
        match work {
            Work::Message(message) => {
                self.messages.push((to, message));
                if rng.once_in(3) {
                    Work::Message(self.other(rng, message))
                } else {
                    Work::Message(message)
                }
            }
            Work::Write(write) if rng.once_in(3) => Work::Write(twist_write(rng, write)),
            Work::Write(write) => Work::Write(write),
        }
    }

    fn other(&self, rng: &mut Rng, mut message: Bytes) -> Bytes {
        match rng.below(5) {
            // Something old, perhaps meant for another node.
            0 => self.messages[rng.below(self.messages.len() as u64) as usize].1,
            // Another kind, with the head and the ids of this one.
            1 => {
                message[1] = rng.below(16) as u8;
                message
            }
            // A position, id or limit far off or a little off.
            2 => {
                let field = 8 * (1 + rng.below(SIZE as u64 / 8 - 1) as usize);
                let mut word = u64::from_le_bytes(message[field..field + 8].try_into().unwrap());
                word = match rng.below(3) {
                    0 => rng.next(),
                    1 => word.wrapping_add(1 + rng.below(5000)),
                    _ => word.wrapping_sub(1 + rng.below(5000)),
                };
                message[field..field + 8].copy_from_slice(&word.to_le_bytes());
                message
            }
            3 => {
                message[rng.below(SIZE as u64) as usize] ^= 1 << rng.below(8);
                message
            }
            _ => std::array::from_fn(|_| rng.next() as u8),
        }
    }
}

fn twist_write(rng: &mut Rng, mut write: Write) -> Write {
    match rng.below(5) {
        0 => write.key = rng.below(60) as u32,
        1 => write.offset = rng.next() >> rng.below(64),
        2 => write.head = rng.next() >> rng.below(64),
        3 => write.word = rng.below(5000),
        _ => write.position = rng.next() >> rng.below(64),
    }
    write
}
