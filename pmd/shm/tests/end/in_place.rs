//! The daemon's end of a stream to another node: something else writes its outgoing ring, and reads its incoming one.

use crate::pair::{Gave, Program, RING, Side, Wire, with_buffers};
use rdsock_shm::end::{Anchor, End, Got, How, Patience, Process, Shut, Take, Until};
use rdsock_shm::layout::{AGAIN, Counter, anchor, mark, phase, want};
use rdsock_shm::lock::{self, Owner};
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::Relaxed;

/// A side whose rings an engine has.
#[derive(Clone, Copy, Debug)]
struct InPlace<'a>(&'a Side<'a>, &'a rdsock_shm::end::Shared);

impl Anchor for InPlace<'_> {
    unsafe fn send(&self, from: *const u8, len: usize) -> Got {
        // SAFETY: the caller vouches for it.
        unsafe { (&self.0).send(from, len) }
    }
    fn peek(&self) -> Got {
        (&self.0).peek()
    }
    unsafe fn take(&self, to: *mut u8, len: usize, how: Take) -> Got {
        // SAFETY: the caller vouches for it.
        unsafe { (&self.0).take(to, len, how) }
    }
    fn unread(&self) -> Option<u64> {
        (&self.0).unread()
    }
    fn sent(&self) -> Option<u64> {
        Some(self.1.tx().again.load(Relaxed) & !AGAIN)
    }
    fn received(&self) -> Option<u64> {
        (&self.0).received()
    }
    fn is_open(&self) -> bool {
        (&self.0).is_open()
    }
    fn shut(&self, which: Shut) {
        (&self.0).shut(which);
    }
    fn break_at_close(&self) {}
    fn break_now(&self) {
        (&self.0).break_now();
    }
    fn wait(&self, _: Until, _: u32) -> bool {
        false
    }
    fn wait_fd(&self) -> i32 {
        -1
    }
}

impl Process for InPlace<'_> {
    const IN_PLACE: bool = true;

    fn me(&self) -> Owner {
        (&self.0).me()
    }
    fn is_sending(&self) -> bool {
        false
    }
    fn give_way(&self) {}
    fn rest(&self) {}
    fn milliseconds(&self) -> u64 {
        0
    }
    fn patience(&self) -> Patience<'_> {
        Patience {
            spent: None,
            most: 0,
            every: 1,
        }
    }
    fn is_running(&self, _: u32) -> bool {
        true
    }
    fn name(&self) -> u64 {
        1
    }
    fn is_awake(&self, _: u64) -> bool {
        true
    }
    fn barrier(&self) {}
    fn has_barriers(&self) -> bool {
        false
    }
    fn count(&self, _: Counter) {}
    fn look_later(&self) {}
    fn broken(&self, reason: Reason) {
        (&self.0).broken(reason);
    }
    fn left(&self, _: Reason) {}
}

const PLAIN: How = How {
    peek: false,
    discard: false,
    whole: false,
};

fn bytes(range: std::ops::Range<usize>) -> Vec<u8> {
    range.map(|at| (at % 251) as u8).collect()
}

fn gave(range: std::ops::Range<usize>) -> Gave {
    Gave::Bytes(bytes(range))
}

/// The daemon's end, and its engine.
struct Daemon<'a> {
    program: Program<'a>,
    wire: &'a Wire,
}

/// Another thread than that of the anchor.
const WATCHER: Owner = Owner::new(9, 16);

impl<'a> Daemon<'a> {
    fn end(&self) -> End<'_, InPlace<'_>> {
        let (side, shared) = (self.program.side, &self.program.shared);
        End {
            shared,
            socket: InPlace(side, shared),
        }
    }

    /// The engine writes what comes next, and the thread that watches the ring sees it.
    fn write(&self, count: usize) {
        let at = self.program.shared.tx().head.load(Relaxed) as usize;
        let ring = self.wire.ring(0);
        for at in at..at + count {
            ring[at % RING].set((at % 251) as u8);
        }
        let head = (at + count) as u64;
        self.program.shared.out().producer.head.store(head, Relaxed);
        self.program.shared.tx().head.store(head, Relaxed);
    }

    /// Gives the program what it reads on its anchor.
    fn send(&self) {
        while self.end().send_in_place(1) {}
    }

    fn receive(&self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; most];
        let before = self.program.shared.rx().tail.load(Relaxed);
        with_buffers(bytes.as_mut_ptr(), most, |to| self.end().receive_anchor(to));
        let got = self.program.shared.rx().tail.load(Relaxed) - before;
        bytes.truncate(got as usize);
        bytes
    }

    fn settle(&self) -> bool {
        self.program.shared.try_settle_switch(WATCHER)
    }
}

/// A daemon's end, which is end 0, and a program, which has not mapped the stream.
fn with(test: impl FnOnce(&Daemon<'_>, &Program<'_>)) {
    let wire = Wire::new();
    let [one, other] = wire.sides();
    let (program, wire) = (Program::new(&one), &wire);
    let daemon = Daemon { program, wire };
    assert!(daemon.end().promote(true));
    test(&daemon, &Program::new(&other));
}

#[test]
fn bytes_of_the_anchor_come_before_those_of_the_ring() {
    with(|daemon, b| {
        assert_eq!(b.send(&bytes(0..10)), Some(10));
        b.map();
        assert_eq!(b.send(&bytes(10..30)), Some(20));
        assert!(!daemon.settle(), "bytes come first");
        assert_eq!(daemon.receive(4), bytes(0..4));
        assert_eq!(daemon.receive(100), bytes(4..10));
        assert!(daemon.settle());
        let rx = daemon.program.shared.rx();
        assert_eq!(rx.phase.load(Relaxed), phase::RING);
        // The range of the ring begins here.
        assert_eq!(rx.published.load(Relaxed), 10);
        assert_eq!(daemon.receive(100), b"");
        // It ends, and the engine has come to that end.
        b.end().leave();
        assert_eq!(b.send(&bytes(30..40)), Some(10));
        daemon.end().look();
        daemon.end().settle_incoming();
        assert_eq!(rx.phase.load(Relaxed), phase::RING, "20 bytes are there");
        rx.tail.store(30, Relaxed);
        daemon.end().settle_incoming();
        assert_eq!(rx.phase.load(Relaxed), phase::DEMOTED);
        assert_eq!(rx.seen_head.load(Relaxed), 30);
        assert_eq!(daemon.receive(100), bytes(30..40));
        assert_eq!(rx.tail.load(Relaxed), 40);
    });
}

#[test]
fn a_half_that_is_held_is_left_alone() {
    with(|daemon, b| {
        b.map();
        assert_eq!(b.send(&bytes(0..20)), Some(20));
        let rx = daemon.program.shared.rx();
        let taken = lock::try_take(&rx.lock, daemon.end().socket.me()).unwrap();
        assert!(!daemon.settle());
        assert_eq!(rx.phase.load(Relaxed), phase::SWITCHING);
        lock::release(&rx.lock, taken);
        assert!(daemon.settle());
    });
}

#[test]
fn what_the_engine_writes_is_given_to_a_program_on_its_anchor() {
    with(|daemon, b| {
        daemon.write(100);
        daemon.send();
        assert_eq!(b.receive(40, PLAIN), gave(0..40));
        b.map();
        daemon.write(50);
        daemon.send();
        assert_eq!(daemon.program.sends_by(), phase::RING);
        assert_eq!(b.receive(200, PLAIN), gave(40..150));
        daemon.write(RING / 2);
        assert_eq!(b.receive(RING, PLAIN), gave(150..150 + RING / 2));
        // It leaves with bytes unread, and more come.
        daemon.write(500);
        assert_eq!(b.receive(100, PLAIN), gave(150 + RING / 2..250 + RING / 2));
        assert_eq!(b.end().abandon(), Ok(()));
        daemon.send();
        assert_eq!(daemon.program.sends_by(), phase::LEAVING);
        let mut at = 250 + RING / 2;
        assert_eq!(b.receive(1000, PLAIN), gave(at..at + 400));
        at += 400;
        daemon.write(RING);
        daemon.send();
        let head = daemon.program.shared.tx().head.load(Relaxed) as usize;
        while at < head {
            let Gave::Bytes(got) = b.receive(RING, PLAIN) else {
                panic!("nothing at {at}");
            };
            assert_eq!(got, bytes(at..at + got.len()));
            at += got.len();
            daemon.send();
        }
        // Its end goes behind all of it.
        assert!(!daemon.program.side.has_shut());
        daemon.end().note_shut_sending();
        daemon.send();
        assert_eq!(daemon.program.sends_by(), phase::DEMOTED);
        assert!(daemon.program.side.has_shut());
    });
}

#[test]
fn a_program_that_left_where_it_cannot_have_been_is_broken() {
    with(|daemon, b| {
        b.map();
        daemon.send();
        daemon.write(100);
        b.shared.incoming().consumer.stop.store(101, Relaxed);
        b.shared
            .incoming()
            .bytes
            .want
            .fetch_or(want::DEMOTED, Relaxed);
        daemon.send();
        assert_eq!(daemon.program.side.broken(), Some(Reason::Violation));
        assert!(daemon.program.side.is_cut());
    });
}

/// Who breaks its stream tells of it by a token, also on an anchor that it has not left: that is no byte.
#[test]
fn a_break_before_the_switch_is_no_byte() {
    with(|daemon, b| {
        b.map();
        assert_eq!(b.send_on_anchor(&bytes(0..10)), 10);
        b.end().reset(Reason::Violation);
        assert_eq!(daemon.receive(100), bytes(0..10));
        assert_eq!(daemon.receive(100), b"");
        assert_eq!(daemon.program.side.broken(), Some(Reason::PeerReset));
    });
}

/// The kernel's error, of which nobody else on this side hears, breaks a stream that reads its anchor.
#[test]
fn an_end_is_judged_by_who_reads_what() {
    with(|daemon, b| {
        b.map();
        assert_eq!(b.send(&bytes(0..10)), Some(10));
        assert!(daemon.settle());
        (&b.side).shut(Shut::Sending);
        daemon.end().look();
        let told = daemon.program.shared.rx().anchor.load(Relaxed);
        assert_eq!(told, anchor::EOF);
        daemon.program.shared.rx().anchor.store(0, Relaxed);
        daemon.end().note_end(true);
        let told = daemon.program.shared.rx().anchor.load(Relaxed);
        assert_ne!(told & anchor::BROKEN, 0);
    });
}

#[test]
fn an_end_in_the_ring_is_marked() {
    with(|daemon, b| {
        b.map();
        daemon.send();
        daemon.write(10);
        daemon.program.shared.end_in_place();
        let marks = b.shared.incoming().producer.mark.load(Relaxed);
        assert_eq!(marks, mark::FIN);
        assert_eq!(b.receive(100, PLAIN), gave(0..10));
        assert_eq!(b.receive(100, PLAIN), Gave::Bytes(Vec::new()));
    });
}
