//! Sends and receives 64 bytes `rounds` times, for `tests/cost.rs` to count the instructions:
//! `ring_cost bare|shim ROUNDS`.

use rdsock_benches::Stream;
use std::hint::black_box;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let how = arguments.next().unwrap_or_default();
    let rounds: u64 = arguments
        .next()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(1000);
    let stream = Stream::new(1 << 16);
    let (from, mut to) = ([7_u8; 64], [0_u8; 64]);
    for _ in 0..rounds {
        let (sent, got) = if how == "shim" {
            (
                stream.send_and_look(black_box(&from)),
                stream.receive_locked(black_box(&mut to)),
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
