//! Programs whose ends are on rings: their bytes lie where the engine reads and writes them.
#[allow(dead_code)]
mod site;

use rdsock_model::Fault;
use rdsock_node::{Command, Notice};
use rdsock_shm::layout::mark;
use site::program::Program;
use site::*;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect()
}

fn programs(sites: &mut [Site; 2]) -> ([Program; 2], Connection) {
    let connection = connect(sites);
    let mut end = 0;
    let programs = connection.programs.each_ref().map(|anchor| {
        let program = Program::new(&connection.files[end], end, anchor.try_clone().unwrap());
        end += 1;
        program
    });
    for (site, stream) in sites.iter_mut().zip(&connection.streams) {
        let stream = stream.clone();
        site.poller.command(Command::Ready { stream });
    }
    (programs, connection)
}

fn are_over(sites: &mut [Site; 2], connection: &Connection) {
    for (site, stream) in sites.iter_mut().zip(&connection.streams) {
        let ticket = stream.ticket;
        site.until(|notice| *notice == Notice::Released { ticket });
    }
}

#[test]
fn questions_and_answers_cross_on_rings() {
    let mut sites = pair();
    let ([mut a, mut b], connection) = programs(&mut sites);
    a.send_on_anchor(b"first on the anchor");
    a.switch();
    b.switch();
    assert_eq!(b.receive_exactly(19), b"first on the anchor");
    for round in 0..2000u64 {
        let question = pattern(1 + (round * 37 % 900) as usize, round);
        a.send(&question);
        assert_eq!(b.receive_exactly(question.len()), question);
        let answer = pattern(1 + (round * 11 % 300) as usize, round + 1);
        b.send(&answer);
        assert_eq!(a.receive_exactly(answer.len()), answer);
    }
    a.shut();
    assert_eq!(b.receive(10), b"");
    b.shut();
    assert_eq!(a.receive(10), b"");
    drop((a, b));
    let Connection { programs, .. } = &connection;
    for program in programs {
        program.shutdown(std::net::Shutdown::Both).unwrap();
    }
    are_over(&mut sites, &connection);
}

#[test]
fn both_directions_are_full_at_once() {
    let mut sites = pair();
    let ([a, b], _connection) = programs(&mut sites);
    let both = [(a, 1), (b, 2)].map(|(mut program, seed)| {
        std::thread::spawn(move || {
            program.switch();
            let (bytes, expected) = (pattern(3_000_000, seed), pattern(3_000_000, 3 - seed));
            let mut at = 0;
            let mut got = Vec::new();
            // In turns, so that neither ring is ever waited for by both.
            while at < bytes.len() {
                let next = (at + 20_000).min(bytes.len());
                program.send(&bytes[at..next]);
                got.extend(program.receive_exactly(next - at));
                at = next;
            }
            assert!(got == expected);
        })
    });
    for thread in both {
        thread.join().unwrap();
    }
}

#[test]
fn a_program_may_leave_its_rings() {
    let mut sites = pair();
    let ([mut a, mut b], _connection) = programs(&mut sites);
    a.switch();
    b.switch();
    a.send(b"on the ring, ");
    a.leave();
    a.send_on_anchor(b"then on the anchor");
    assert_eq!(b.receive_exactly(31), b"on the ring, then on the anchor");
    // B goes altogether, with bytes unread in its ring.
    a.send_on_anchor(&pattern(5000, 9));
    b.receive_exactly(1000);
    b.abandon();
    assert_eq!(b.receive_on_anchor(4000), pattern(5000, 9)[1000..]);
    b.send_on_anchor(b"and back");
    assert_eq!(a.receive_exactly(8), b"and back");
}

#[test]
fn a_killed_program_leaves_its_last_bytes() {
    let mut sites = pair();
    let ([mut a, mut b], mut connection) = programs(&mut sites);
    a.switch();
    b.switch();
    a.send(&pattern(40_000, 4));
    let Connection { programs, .. } = &mut connection;
    let gone = std::mem::replace(&mut programs[0], sockets().0);
    drop((a, gone));
    assert_eq!(b.receive_exactly(40_000), pattern(40_000, 4));
    assert_eq!(b.receive(1), b"");
}

/// Also where the poll core looks into the ring itself, and nobody tells the protocol of what has come.
#[test]
fn a_program_that_goes_with_bytes_unread_breaks_its_stream() {
    for rounds in [0, 200] {
        let mut sites = pair();
        let ([mut a, mut b], mut connection) = programs(&mut sites);
        a.switch();
        b.switch();
        for _ in 0..rounds {
            b.send(b"question");
            assert_eq!(a.receive_awake(8), b"question");
            a.send(b"answer");
            assert_eq!(b.receive_awake(6), b"answer");
        }
        b.send(b"never read");
        let read = a.incoming().consumer.tail.load(Acquire);
        while a.incoming().producer.head.load(Acquire) == read {
            std::thread::yield_now();
        }
        a.send(b"last words");
        let Connection { programs, .. } = &mut connection;
        let gone = std::mem::replace(&mut programs[0], sockets().0);
        drop((a, gone));
        // They are there before the break is told. (To take them off would tell an anchor that is reset by now.)
        let marks = || b.incoming().producer.mark.load(Acquire);
        while marks() == 0 {
            std::thread::yield_now();
        }
        assert_eq!(marks(), mark::RESET, "after {rounds} rounds");
        let last = b.incoming().producer.head.load(Acquire);
        let read = b.incoming().consumer.tail.load(Acquire);
        assert_eq!(last - read, b"last words".len() as u64);
    }
}

#[test]
fn a_full_ring_behind_a_full_staging_area_waits_for_credit() {
    let mut sites = pair();
    let ([mut a, mut b], connection) = programs(&mut sites);
    let device = sites[0].device.clone();
    let stuck = |is| device.function().inject(Fault::Stuck(0, is));
    // Nothing gets through, so nothing is credited.
    stuck(true);
    let bytes = pattern(50_000 + RING as usize, 5);
    a.send_on_anchor(&bytes[..50_000]);
    a.switch();
    b.switch();
    a.send(&bytes[50_000..]);
    a.shut();
    std::thread::sleep(Duration::from_millis(100));
    stuck(false);
    assert!(b.receive_exactly(bytes.len()) == bytes);
    assert_eq!(b.receive(1), b"");
    b.shut();
    assert_eq!(a.receive(1), b"");
    drop((a, b));
    for program in &connection.programs {
        program.shutdown(std::net::Shutdown::Both).unwrap();
    }
    are_over(&mut sites, &connection);
}

/// A program that breaks its stream before it has switched says so with a mark and a token, and the token is no byte of its.
#[test]
fn a_break_before_the_switch_is_no_byte() {
    let mut sites = pair();
    let ([mut a, mut b], _connection) = programs(&mut sites);
    b.switch();
    a.send_on_anchor(b"data");
    assert_eq!(b.receive_exactly(4), b"data");
    a.out().producer.mark.fetch_or(mark::RESET, AcqRel);
    a.wake();
    wait_for_marks(&b, mark::RESET);
    assert_eq!(b.incoming().producer.head.load(Acquire), 4);
}

/// Waits until these marks stand in the ring of a program that reads there.
fn wait_for_marks(program: &Program, wanted: u32) {
    let marks = || program.incoming().producer.mark.load(Acquire);
    let end = Instant::now() + LIMIT;
    while marks() & wanted != wanted {
        assert!(Instant::now() < end, "marks {}", marks());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Its kernel tells of that, where what comes in never went to its ring.
#[test]
fn a_program_that_goes_with_bytes_unread_on_its_anchor_breaks_its_stream() {
    let mut sites = pair();
    let mut connection = connect(&mut sites);
    let [first, second] = connection
        .programs
        .each_ref()
        .map(|anchor| anchor.try_clone().unwrap());
    let mut a = Program::unready(&connection.files[0], 0, first);
    let mut b = Program::new(&connection.files[1], 1, second);
    let stream = connection.streams[1].clone();
    sites[1].poller.command(Command::Ready { stream });
    a.switch();
    b.switch();
    a.send(b"question");
    assert_eq!(b.receive_exactly(8), b"question");
    b.send(b"never read");
    a.anchor.peek(&mut [0]).unwrap();
    let gone = std::mem::replace(&mut connection.programs[0], sockets().0);
    drop((a, gone));
    wait_for_marks(&b, mark::RESET);
}

/// As by TCP, where nothing is left of a connection that could break.
#[test]
fn nobody_is_told_of_a_break_behind_both_ends() {
    let mut sites = pair();
    let ([mut a, mut b], mut connection) = programs(&mut sites);
    a.switch();
    b.switch();
    a.send(b"never read");
    a.shut();
    b.shut();
    assert_eq!(a.receive(1), b"");
    wait_for_marks(&b, mark::FIN);
    let gone = std::mem::replace(&mut connection.programs[1], sockets().0);
    drop((b, gone));
    let ticket = connection.streams[0].ticket;
    sites[0].until(|notice| *notice == Notice::Released { ticket });
    // Beside the end, a break means nothing.
    let marks = a.incoming().producer.mark.load(Acquire);
    assert_ne!(marks & mark::FIN, 0, "marks {marks}");
}

/// Where bytes lie in the ring its program says. One that says something else each time that the poll core looks makes pieces
/// without end of what is to be sent at once, more than a device moves: that is no lack of room, for which all streams to the node
/// would wait.
#[test]
fn a_program_that_moves_its_origin_meanwhile_harms_its_own_stream_alone() {
    let mut sites = pair();
    let ([mut liar, mut reader], _connection) = programs(&mut sites);
    let ([mut a, mut b], _other) = programs(&mut sites);
    for program in [&mut liar, &mut reader, &mut a, &mut b] {
        program.switch();
    }
    let origin = &raw const liar.out().producer.origin as usize;
    let lies = Arc::new(AtomicBool::new(true));
    let still = lies.clone();
    let liars = std::thread::spawn(move || {
        while still.load(Relaxed) {
            // SAFETY: the word lies in the mapping of `liar`, which is leaked.
            unsafe { (*(origin as *const AtomicU64)).fetch_add(3, Relaxed) };
        }
    });
    // Both are in the way of their own nonsense, and may wait for ever.
    std::thread::spawn(move || {
        let mut liar = ManuallyDrop::new(liar);
        loop {
            liar.send(&[1; 20_000]);
        }
    });
    std::thread::spawn(move || while !reader.receive(1 << 20).is_empty() {});
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        a.send(b"question");
        assert_eq!(b.receive_awake(8), b"question");
        b.send(b"answer");
        assert_eq!(a.receive_awake(6), b"answer");
    }
    lies.store(false, Relaxed);
    liars.join().unwrap();
}
