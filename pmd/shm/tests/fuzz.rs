//! The bodies of the fuzz targets (`pmd/shm/fuzz`), with inputs that proptest makes: no fuzzer is needed,
//! and a failing input is made small.
#![cfg(not(loom))]

#[path = "../fuzz/bodies.rs"]
mod bodies;

use proptest::prelude::*;
use rdsock_shm::control::{bytes_of, head};

proptest! {
    #[test]
    fn control_of_any_bytes(data in prop::collection::vec(any::<u8>(), 0..200)) {
        bodies::control(&data);
    }

    /// Heads that are right but for a byte, so that the bodies are reached.
    #[test]
    fn control_of_any_body(
        kind in 0..20_u16,
        size in prop::sample::select(vec![0, 8, 16, 24, 56, 88, 120]),
        odd in -1..2_i32,
        wrong in prop::option::of((0..8_usize, any::<u8>())),
        fill in any::<u8>(),
    ) {
        let mut data = bytes_of(&head(kind)).to_vec();
        if let Some((at, byte)) = wrong {
            data[at] = byte;
        }
        data.resize((8 + size + odd).max(0) as usize, fill);
        bodies::control(&data);
    }

    #[test]
    fn queue_of_any_stores(data in prop::collection::vec(any::<u8>(), 0..4000)) {
        bodies::queue(&data);
    }
}
