//! What client and server say to each other around a measurement: fixed records of 64 bytes, little-endian.
//!
//! A connection carries any number of phases. A phase starts with an [`Order`] from the client; then come the
//! phase's own bytes, of which the last one of the client is [`crate::pattern::END`]; a phase that is counted at the
//! server ends with a [`Tally`] from the server. An end of file in place of an order ends the connection.
//!
//! | offset | order | tally |
//! | --- | --- | --- |
//! | 0 | magic `RDPERFO1` | magic `RDPERFT1` |
//! | 8 | message size, bytes | bytes in the window |
//! | 16 | warm-up before the window, ns | length of the window, ns |
//! | 24 | size of one receive call, bytes | connections accepted |
//! | 32 | mode: 0 rtt, 1 rate, 2 bw, 3 cps | wrong bytes in the whole stream |
//! | 33 | wait: 0 block, 1 spin | |
//! | 34 | 1 to check the payload | |
//! | 40 | | port to connect to in mode cps |

use crate::error::{Error, Result};
use crate::plan::{Mode, Wait};

/// Bytes of an [`Order`] and of a [`Tally`].
pub const RECORD: usize = 64;
/// Largest message and largest receive call, in bytes.
pub const LARGEST: u64 = 256 << 20;

const ORDER: &[u8; 8] = b"RDPERFO1";
const TALLY: &[u8; 8] = b"RDPERFT1";

/// What the client asks of the server for one phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// What is measured.
    pub mode: Mode,
    /// How the server waits.
    pub wait: Wait,
    /// Whether the server checks each byte.
    pub verify: bool,
    /// Bytes of a message.
    pub size: u64,
    /// Time from the first byte on that does not count, in nanoseconds.
    pub warmup_ns: u64,
    /// Bytes that one receive call asks for, in the one-way modes.
    pub recv_bytes: u64,
}

/// What the server counted in one phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Bytes received in the window.
    pub bytes: u64,
    /// Length of the window in nanoseconds.
    pub ns: u64,
    /// Connections accepted.
    pub accepted: u64,
    /// Bytes that were not as they should be.
    pub wrong: u64,
    /// TCP port for the connections of mode cps; 0 for UNIX sockets.
    pub port: u64,
}

impl Order {
    /// The record on the wire.
    pub fn encode(&self) -> [u8; RECORD] {
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(ORDER);
        put(&mut record, 8, self.size);
        put(&mut record, 16, self.warmup_ns);
        put(&mut record, 24, self.recv_bytes);
        record[32] = self.mode as u8;
        record[33] = self.wait as u8;
        record[34] = u8::from(self.verify);
        record
    }

    /// Reads and checks a record.
    pub fn decode(record: &[u8; RECORD]) -> Result<Self> {
        if &record[..8] != ORDER {
            return Err(Error::Peer(
                "the other end does not speak as rdsock-perf does".into(),
            ));
        }
        let order = Self {
            mode: [Mode::Rtt, Mode::Rate, Mode::Bw, Mode::Cps]
                .into_iter()
                .find(|&mode| mode as u8 == record[32])
                .ok_or_else(|| Error::Peer(format!("unknown mode {} in an order", record[32])))?,
            wait: if record[33] == Wait::Spin as u8 {
                Wait::Spin
            } else {
                Wait::Block
            },
            verify: record[34] != 0,
            size: get(record, 8),
            warmup_ns: get(record, 16),
            recv_bytes: get(record, 24),
        };
        for bytes in [order.size, order.recv_bytes] {
            if !(1..=LARGEST).contains(&bytes) {
                return Err(Error::Peer(format!(
                    "a size of {bytes} bytes in an order; allowed are 1 to {LARGEST}"
                )));
            }
        }
        Ok(order)
    }
}

impl Tally {
    /// The record on the wire.
    pub fn encode(&self) -> [u8; RECORD] {
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(TALLY);
        for (index, value) in [self.bytes, self.ns, self.accepted, self.wrong, self.port]
            .into_iter()
            .enumerate()
        {
            put(&mut record, 8 + 8 * index, value);
        }
        record
    }

    /// Reads and checks a record.
    pub fn decode(record: &[u8; RECORD]) -> Result<Self> {
        if &record[..8] != TALLY {
            return Err(Error::Peer(
                "expected the server's tally and got something else".into(),
            ));
        }
        Ok(Self {
            bytes: get(record, 8),
            ns: get(record, 16),
            accepted: get(record, 24),
            wrong: get(record, 32),
            port: get(record, 40),
        })
    }
}

fn put(record: &mut [u8; RECORD], offset: usize, value: u64) {
    record[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

fn get(record: &[u8; RECORD], offset: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|index| record[offset + index]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: Order = Order {
        mode: Mode::Bw,
        wait: Wait::Spin,
        verify: true,
        size: 65536,
        warmup_ns: 7,
        recv_bytes: 131072,
    };

    #[test]
    fn records_come_back_as_they_were() {
        assert_eq!(Order::decode(&SAMPLE.encode()).unwrap(), SAMPLE);
        let tally = Tally {
            bytes: 1,
            ns: 2,
            accepted: 3,
            wrong: 4,
            port: 5,
        };
        assert_eq!(Tally::decode(&tally.encode()).unwrap(), tally);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Order::decode(&[0; RECORD]).is_err());
        assert!(Tally::decode(&SAMPLE.encode()).is_err());
        assert!(Order::decode(&Order { size: 0, ..SAMPLE }.encode()).is_err());
        assert!(
            Order::decode(
                &Order {
                    recv_bytes: LARGEST + 1,
                    ..SAMPLE
                }
                .encode()
            )
            .is_err()
        );
        let mut record = SAMPLE.encode();
        record[32] = 9;
        assert!(Order::decode(&record).is_err());
    }
}
