use super::*;
use crate::memory::{Slot, stream_bytes};
use crate::stream::Berth;
use nix::sys::memfd::{MFdFlags, memfd_create};
use rdsock_model::Chaos;
use rdsock_shm::layout::{NOT_SWITCHED, mark};
use rdsock_vfio::{Space, model::ModelDevice};
use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;

const RING: u64 = 64 << 10;

/// A stream of nobody else, and its program.
fn anchor() -> (Anchor, TcpStream) {
    let device = ModelDevice::new(&rdsock_model::Fabric::new(Chaos::default()), 1);
    let space = Space::new(Arc::new(device));
    let window = space.window(stream_bytes(RING)).unwrap();
    let file = File::from(memfd_create(c"stream", MFdFlags::empty()).unwrap());
    file.set_len(stream_bytes(RING)).unwrap();
    let slot = Slot::take(&Arc::new(Mutex::new(vec![0]))).unwrap();
    let memory = crate::memory::StreamMemory::new(&file, RING, 0, &window, slot).unwrap();
    let (_, seat) = Desk::new(1, Box::new(())).unwrap();
    let (core, load) = (0, Arc::new(()));
    let berth = Berth { core, load, seat };
    let stream = Arc::new(NodeStream::new(1, 2, 0, berth, memory, Box::new(())));
    for direction in [stream.out(), stream.incoming()] {
        let switch_at = &direction.producer.switch_at;
        switch_at.store(NOT_SWITCHED, Ordering::Relaxed);
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let program = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (socket, _) = listener.accept().unwrap();
    let anchor = Anchor::new(stream, socket.into());
    assert!(anchor.end().promote(true));
    (anchor, program)
}

impl Anchor {
    fn received(&self) -> u64 {
        self.stream.shared().rx().tail.load(Ordering::Relaxed)
    }
}

/// As much as the kernel takes.
fn fill(mut program: &TcpStream) -> u64 {
    program.set_nonblocking(true).unwrap();
    let (bytes, mut sent) = (vec![7; 256 << 10], 0);
    while let Ok(more) = program.write(&bytes) {
        sent += more as u64;
    }
    sent
}

#[test]
fn an_anchor_is_read_up_to_a_bound_however_much_there_is() {
    let (mut anchor, program) = anchor();
    // Whatever is read, there is room for more.
    anchor.stream.freed.store(u64::MAX >> 1, Ordering::Relaxed);
    let sent = fill(&program);
    let most = ROUNDS as u64 * STAGING;
    assert!(sent > most, "the kernel takes {sent} bytes only");
    while anchor.received() != sent {
        let before = anchor.received();
        anchor.read();
        let at_once = anchor.received() - before;
        assert!(at_once <= most && !anchor.is_broken(), "{at_once} at once");
    }
}

#[test]
fn an_anchor_is_written_up_to_a_bound_however_much_there_is() {
    let (mut anchor, _program) = anchor();
    // A ring's end is near, so that what is there takes two sends.
    let near = 1 << 40;
    let stream = anchor.stream.clone();
    let tx = stream.shared().tx();
    tx.again.store(near - 1, Ordering::Relaxed);
    tx.head.store(near + 5, Ordering::Relaxed);
    assert!(anchor.end().send_in_place(1), "more may go");
    assert_eq!(stream.given(), near);
    assert_eq!(anchor.write(), Rest::Nothing);
    assert_eq!(stream.given(), near + 5);
    assert!(!anchor.is_broken());
}

#[test]
fn a_program_that_has_gone_is_read_to_its_end_before_that_counts() {
    let (mut anchor, program) = anchor();
    anchor.stream.freed.store(u64::MAX >> 1, Ordering::Relaxed);
    let sent = fill(&program);
    drop(program);
    while !anchor.stream.has_told() {
        assert!(anchor.received() <= sent && !anchor.is_broken());
        anchor.read();
    }
    assert_eq!(anchor.received(), sent);
    let marks = anchor
        .stream
        .incoming()
        .producer
        .mark
        .load(Ordering::Relaxed);
    assert_eq!(marks & mark::RESET, 0);
}
