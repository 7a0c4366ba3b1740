//! Sends and receives 64 bytes `rounds` times, for `tests/cost.rs` to count the instructions:
//! `ring_cost bare|ends ROUNDS`.

use rdsock_benches::{Ends, Stream};
use std::hint::black_box;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let how = arguments.next().unwrap_or_default();
    let rounds: u64 = arguments
        .next()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(1000);
    let (stream, ends) = (Stream::new(1 << 16), Ends::new(1 << 16));
    let (from, mut to) = ([7_u8; 64], [0_u8; 64]);
    for _ in 0..rounds {
        let (sent, got) = if how == "ends" {
            (
                ends.send(black_box(&from)),
                ends.receive(black_box(&mut to)),
            )
        } else {
            (
                stream.send(black_box(&from)),
                stream.receive(black_box(&mut to)),
            )
        };
        assert!(sent == 64 && got == 64);
    }
}
