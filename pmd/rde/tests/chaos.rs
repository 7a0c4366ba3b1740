//! Fabrics where everything goes wrong by chance: each message and each byte arrives once, in the order
//! of its lane, or its loss is reported; and a seed gives the same run each time.
#[allow(dead_code)]
mod nodes;

use nodes::*;
use rdsock_model::{Chaos, Counters};
use rdsock_rde::spec::status;
use rdsock_rde::*;
use std::collections::VecDeque;

const NODES: u16 = 4;
const ROUNDS: u64 = 300;
const SLOTS: u64 = 64;

fn chaos(seed: u64) -> Chaos {
    Chaos {
        seed,
        delay_ns: 20 * TICK,
        reorder_lanes: true,
        refuse_ppm: 20_000,
        full_ppm: 100_000,
        link_ppm: 2_000,
        link_down_ns: 50 * TICK,
    }
}

/// What node `from` has sent to node `to`, and of that what has neither come nor failed.
struct Pair {
    next: u64,
    due: VecDeque<u64>,
}

/// Runs a fabric with a seed; what the devices counted.
fn run(seed: u64) -> Vec<Counters> {
    let mut nodes = Nodes::new(NODES, chaos(seed), SMALL);
    let mut rng = fastrand::Rng::with_seed(seed);
    let pair = |_| Pair {
        next: 0,
        due: VecDeque::new(),
    };
    let mut pairs: Vec<Pair> = (0..NODES * NODES).map(pair).collect();
    let index = |from: u16, to: u16| usize::from((from - 1) * NODES + to - 1);
    let mut reported = 0;
    let mut posted = 0;
    let mut quiet = 0;
    for round in 0.. {
        for from in 1..=NODES {
            for _ in 0..rng.u8(..4) {
                let to = rng.u16(1..=NODES);
                if round >= ROUNDS {
                    break;
                }
                let pair = &mut pairs[index(from, to)];
                let number = pair.next;
                let remote = nodes.nodes[usize::from(to) - 1].remote(place(from, number));
                let data = number.to_le_bytes();
                let operation = Operation::Write {
                    to: remote,
                    data: Data::Inline(&data),
                    word: None,
                    notify: Some(Notify {
                        set: 0,
                        payload: &data,
                    }),
                };
                let node = &mut nodes.nodes[usize::from(from) - 1];
                let tag = u64::from(to) << 32 | number;
                if node.set.post(&work(to, tag, operation)).is_ok() {
                    posted += 1;
                    pair.next += 1;
                    pair.due.push_back(number);
                }
            }
            nodes.nodes[usize::from(from) - 1].set.ring();
        }
        nodes.now += TICK;
        quiet = if nodes.fabric.step(nodes.now) {
            0
        } else {
            quiet + 1
        };
        for me in 1..=NODES {
            // Completions first: a failure says that the message does not come.
            let node = &mut nodes.nodes[usize::from(me) - 1];
            for done in node.completions() {
                reported += 1;
                let (to, number) = ((done.tag >> 32) as u16, done.tag & 0xffff_ffff);
                assert_eq!(done.target, to);
                if !done.status.is_ok() {
                    assert_eq!(done.status.0, status::REFUSED_KEY, "seed {seed}");
                    let due = &mut pairs[index(me, to)].due;
                    let at = due.iter().position(|due| *due == number);
                    due.remove(at.unwrap_or_else(|| panic!("seed {seed}: {number} came")));
                }
            }
        }
        for me in 1..=NODES {
            let node = &mut nodes.nodes[usize::from(me) - 1];
            for message in node.messages() {
                let number = u64::from_le_bytes(message.payload[..8].try_into().unwrap());
                let due = &mut pairs[index(message.source, me)].due;
                assert_eq!(due.pop_front(), Some(number), "seed {seed}: order");
                let at = place(message.source, number) as usize;
                let data = u64::from_le_bytes(node.region_bytes(at, 8).try_into().unwrap());
                // A later write to the same place may have come, an earlier one may not.
                assert!(
                    data >= number && data % SLOTS == number % SLOTS,
                    "seed {seed}: data"
                );
            }
        }
        if round >= ROUNDS && quiet > 200 {
            break;
        }
        assert!(round < 100 * ROUNDS, "seed {seed}: no end");
    }
    assert_eq!(reported, posted, "seed {seed}");
    assert!(pairs.iter().all(|pair| pair.due.is_empty()), "seed {seed}");
    assert!(nodes.nodes.iter().all(|node| node.set.outstanding() == 0));
    nodes.nodes.iter().map(Node::counters).collect()
}

/// Where a node writes its numbered data.
fn place(from: u16, number: u64) -> u64 {
    (u64::from(from) * SLOTS + number % SLOTS) * 8
}

#[test]
fn everything_arrives_once_and_in_order_or_is_reported() {
    let mut total = Counters::default();
    for seed in 0..200 {
        for counters in run(seed) {
            total.refused_here += counters.refused_here;
            total.held += counters.held;
            total.notifications_in += counters.notifications_in;
        }
    }
    // The faults did happen.
    assert!(total.refused_here > 1000 && total.held > 1000, "{total:?}");
    assert!(total.notifications_in > 100_000, "{total:?}");
}

#[test]
fn a_seed_gives_the_same_run() {
    assert_eq!(run(12345), run(12345));
    assert_ne!(run(12345), run(12346));
}
