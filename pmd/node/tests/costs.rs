//! What bytes cost on their way between programs that are awake, counted by the models of both nodes: doorbells,
//! descriptors, accesses to memory, notifications, register reads.
#[allow(dead_code)]
mod site;

use rdsock_model::Counters;
use rdsock_node::Command;
use site::program::Program;
use site::*;
use std::time::Instant;

/// Programs on their rings in both directions, with nothing sent yet.
fn programs(sites: &mut [Site; 2]) -> ([Program; 2], Connection) {
    let connection = connect(sites);
    let [a, b] = [0, 1].map(|end| {
        let anchor = connection.programs[end].try_clone().unwrap();
        let mut program = Program::new(&connection.files[end], end, anchor);
        program.switch();
        let stream = connection.streams[end].clone();
        sites[end].poller.command(Command::Ready { stream });
        program
    });
    ([a, b], connection)
}

/// Nodes whose poll cores do not go to sleep while a test runs.
fn awake(ring: u64, streams: usize) -> [Site; 2] {
    pair_with(&Setup {
        ring,
        streams,
        spin: LIMIT,
        ..Setup::default()
    })
}

/// What happened since.
struct Since {
    before: [Counters; 2],
    start: Instant,
}

impl Since {
    fn now(sites: &[Site; 2]) -> Self {
        Since {
            before: sites.each_ref().map(Site::counters),
            start: Instant::now(),
        }
    }

    /// A counter's increase at either node.
    fn more(&self, sites: &[Site; 2], of: impl Fn(&Counters) -> u64) -> [u64; 2] {
        let now = sites.each_ref().map(Site::counters);
        [0, 1].map(|at| of(&now[at]) - of(&self.before[at]))
    }

    /// Times that anything happens that a timer asks for, and no message: looks whether the device is alive, ten in
    /// a second, and signs of life to the other node.
    fn ticks(&self) -> u64 {
        2 + self.start.elapsed().as_millis() as u64 / 90
    }
}

const MESSAGE: usize = 64;

#[test]
fn a_message_between_programs_that_are_awake() {
    const ROUNDS: u64 = 2000;
    let mut sites = awake(RING, 16);
    let ([mut a, mut b], _connection) = programs(&mut sites);
    let mut round_trip = |number: u64| {
        a.send(&[number as u8; MESSAGE]);
        assert_eq!(b.receive_awake(MESSAGE), [number as u8; MESSAGE]);
        b.send(&[!number as u8; MESSAGE]);
        assert_eq!(a.receive_awake(MESSAGE), [!number as u8; MESSAGE]);
    };
    for number in 0..100 {
        round_trip(number);
    }
    let since = Since::now(&sites);
    for number in 0..ROUNDS {
        round_trip(number);
    }
    // Each node has sent as many messages as it has received.
    let ticks = since.ticks();
    let more = |of: fn(&Counters) -> u64| since.more(&sites, of);
    println!("{ROUNDS} messages each way, {ticks} ticks");
    println!("doorbells {:?}", more(|c| c.doorbells));
    println!("descriptors {:?}", more(|c| c.descriptors));
    println!("notifications {:?}", more(|c| c.notifications_in));
    println!("register reads {:?}", more(|c| c.register_reads));
    println!("completions {:?}", more(|c| c.completions));
    println!("interrupts {:?}", more(|c| c.interrupts));
    // A message to say how far was read for each quarter of a ring.
    let credits = ROUNDS * MESSAGE as u64 / (RING / 4) + 1;
    for at in [0, 1] {
        assert_eq!(more(|c| c.payload_reads)[at], ROUNDS, "payload reads");
        assert_eq!(more(|c| c.payload_writes)[at], ROUNDS, "payload writes");
        let doorbells = more(|c| c.doorbells)[at];
        assert!(doorbells <= ROUNDS + credits + ticks, "{doorbells} bells");
        let notified = more(|c| c.notifications_in)[at];
        assert!(notified <= ROUNDS + credits + ticks, "{notified} notified");
        // Two for each look whether the device is alive, and none for messages.
        let reads = more(|c| c.register_reads)[at];
        assert!(reads <= 2 * ticks, "{reads} register reads");
    }
}

#[test]
fn many_streams_share_doorbells() {
    const STREAMS: usize = 1000;
    const ROUNDS: usize = 50;
    raise_limits();
    let mut sites = awake(RING, 1024);
    let mut all: Vec<_> = (0..STREAMS).map(|_| programs(&mut sites)).collect();
    let mut round = |number: usize| {
        for ([a, _], _) in &mut all {
            a.send(&[number as u8; MESSAGE]);
        }
        for ([_, b], _) in &mut all {
            assert_eq!(b.receive_awake(MESSAGE), [number as u8; MESSAGE]);
        }
    };
    round(0);
    let since = Since::now(&sites);
    for number in 0..ROUNDS {
        round(number);
    }
    let messages = (STREAMS * ROUNDS) as f64;
    let each = |of: fn(&Counters) -> u64| since.more(&sites, of).map(|n| n as f64 / messages);
    println!("doorbells for each message: {:.3?}", each(|c| c.doorbells));
    println!("descriptors: {:.3?}", each(|c| c.descriptors));
    println!("payload reads: {:.3?}", each(|c| c.payload_reads));
    println!("completions: {:.3?}", each(|c| c.completions));
    assert!(each(|c| c.doorbells)[0] <= 0.1, "at the source");
    assert!(each(|c| c.doorbells)[1] <= 0.1, "at the target");
}

#[test]
fn bulk_takes_few_descriptors() {
    const RING: u64 = 256 << 10;
    const BYTES: u64 = 64 << 20;
    const BLOCK: usize = 64 << 10;
    let mut sites = awake(RING, 16);
    let ([mut a, mut b], _connection) = programs(&mut sites);
    let since = Since::now(&sites);
    let sending = std::thread::spawn(move || {
        for number in 0..BYTES / BLOCK as u64 {
            a.send(&[number as u8; BLOCK]);
        }
        a
    });
    for number in 0..BYTES / BLOCK as u64 {
        let right = [number as u8; BLOCK];
        assert!(b.receive_exactly(BLOCK) == right, "block {number}");
    }
    sending.join().unwrap();
    let pieces = (BYTES >> 14) as f64;
    let each = |of: fn(&Counters) -> u64| since.more(&sites, of).map(|n| n as f64 / pieces);
    println!(
        "for each 16 KiB: descriptors {:.3?}",
        each(|c| c.descriptors)
    );
    println!("doorbells {:.3?}", each(|c| c.doorbells));
    println!("notifications {:.3?}", each(|c| c.notifications_in));
    // The target's own are those that say how far it has read.
    let [source, target] = each(|c| c.descriptors);
    assert!(source + target <= 1.0, "{source} + {target}");
}
