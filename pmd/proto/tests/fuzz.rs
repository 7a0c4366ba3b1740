//! The bodies of the fuzz targets (`pmd/proto/fuzz`), with inputs that proptest makes: no nightly
//! toolchain is needed, and a failing input is made small.

#[path = "../fuzz/bodies.rs"]
mod bodies;

use proptest::prelude::*;

fn cases(release: u32) -> ProptestConfig {
    let cases = if cfg!(debug_assertions) {
        release / 10
    } else {
        release
    };
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(20_000))]

    #[test]
    fn message_of_any_bytes(data in prop::collection::vec(any::<u8>(), 0..64)) {
        bodies::message(&data);
    }

    /// Heads that are right, so that the fields are reached.
    #[test]
    fn message_of_any_fields(kind in 0..16_u8, code in 0..8_u8, mut fields in any::<[u8; 44]>(), zero in 0..44_usize) {
        fields[zero..].fill(0);
        let mut data = vec![1, kind, code, 0];
        data.extend(fields);
        bodies::message(&data);
    }
}

proptest! {
    #![proptest_config(cases(20_000))]

    #[test]
    fn node_under_any_input(data in prop::collection::vec(any::<u8>(), 0..12_000)) {
        let _ = bodies::node(&data);
    }
}

/// The inputs get somewhere: each state of importance is reached often.
#[test]
fn inputs_reach_every_state() {
    let mut sum = bodies::Reached::default();
    let mut state = 1_u64;
    for _ in 0..if cfg!(debug_assertions) { 1000 } else { 5000 } {
        let mut data = vec![0; 12_000];
        for byte in &mut data {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            *byte = (state >> 56) as u8;
        }
        let reached = bodies::node(&data);
        sum.ups += reached.ups;
        sum.incoming += reached.incoming;
        sum.established += reached.established;
        sum.writes += reached.writes;
        sum.resumes += reached.resumes;
        sum.ended += reached.ended;
        sum.released += reached.released;
    }
    let all = [
        sum.ups,
        sum.incoming,
        sum.established,
        sum.writes,
        sum.resumes,
        sum.ended,
        sum.released,
    ];
    assert!(all.iter().all(|count| *count >= 10), "{sum:?}");
    println!("{sum:?}");
}
