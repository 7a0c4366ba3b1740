//! A signal handler that uses the same half as the code it interrupts, at every instruction: the
//! processor's single-step flag stops after each one, and the handler of the N-th stop sends or
//! receives. "Every critical section is written so that a nested one may run at any of its
//! instructions" ([`rdsock_shm::ring`]); here it is so.
#![cfg(all(target_arch = "x86_64", target_os = "linux", not(loom), not(miri)))]

use rdsock_shm::layout::{Direction, RxState, TxState};
use rdsock_shm::lock::{self, Owner, Taken};
use rdsock_shm::ring::{Receiver, RingMemory, Sender};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering::Relaxed};

const RING: usize = 4096;
const ME: Owner = Owner::new(1, 16);
/// Without optimisation there are ten times as many instructions: every so many is interrupted.
const STRIDE: usize = if cfg!(debug_assertions) { 13 } else { 1 };

/// One direction, with both halves in one process.
struct Stream {
    tx: TxState,
    rx: RxState,
    wire: Direction,
    memory: [u64; RING / 8],
    /// What the handler's receive has got.
    got: [u8; 8],
    got_len: usize,
}

impl Stream {
    fn new() -> Box<Self> {
        // SAFETY: made of integers and their atomics, for which zeroes are a value.
        let stream: Box<Stream> = Box::new(unsafe { std::mem::zeroed() });
        stream.sender(false).switch(0);
        stream.receiver(false).switch(0);
        stream
    }

    fn ring(&self) -> RingMemory {
        let start = std::ptr::from_ref(&self.memory).cast_mut().cast();
        // SAFETY: the array lives in a box that outlives the use, and only the ring touches it.
        unsafe { RingMemory::new(start, RING as u64) }
    }

    fn sender(&self, nested: bool) -> Sender<'_> {
        Sender::new(&self.tx, &self.wire, self.ring(), nested)
    }

    fn receiver(&self, nested: bool) -> Receiver<'_> {
        Receiver::new(&self.rx, &self.wire, self.ring(), nested)
    }

    /// As the shim sends: the guard publishes what a nested sender left behind.
    fn send(&self, bytes: &[u8]) -> bool {
        let Ok(taken) = lock::try_take_alone(&self.tx.lock, ME) else {
            return false;
        };
        let sender = self.sender(taken == Taken::Nested);
        let sent = match sender.reserve(bytes.len() as u64) {
            Ok(Some(space)) if space.len == bytes.len() as u64 => {
                // SAFETY: the slice is as long as the reservation.
                unsafe { sender.fill(space, 0, bytes.as_ptr(), bytes.len()) };
                sender.publish();
                true
            }
            _ => false,
        };
        if taken == Taken::Outer {
            self.leave(&self.tx.lock, || sender.is_behind(), || sender.publish());
        }
        sent
    }

    /// `TxGuard::drop` and `RxGuard::drop`: publishes what a nested user left behind, also one that
    /// came between the last look and the release.
    fn leave(&self, lock: &AtomicU64, is_behind: impl Fn() -> bool, publish: impl Fn()) {
        loop {
            if is_behind() {
                publish();
            }
            lock::release(lock, Taken::Outer);
            // Once the lock is free, a handler publishes itself; what one did before shows here.
            // Whoever has taken the lock meanwhile publishes it.
            if !is_behind() || lock::try_take_alone(lock, ME) != Ok(Taken::Outer) {
                return;
            }
        }
    }

    /// As the shim receives: again from the start when a nested receiver took the bytes.
    fn receive(&self, bytes: &mut [u8]) -> usize {
        let Ok(taken) = lock::try_take_alone(&self.rx.lock, ME) else {
            return 0;
        };
        let receiver = self.receiver(taken == Taken::Nested);
        let got = loop {
            let Ok(Some(available)) = receiver.available() else {
                break 0;
            };
            let len = bytes.len().min(available.len as usize);
            // SAFETY: the slice has `len` bytes.
            unsafe { receiver.copy(available, 0, bytes.as_mut_ptr(), len) };
            if receiver.consume(available, len as u64) {
                break len;
            }
        };
        receiver.publish();
        if taken == Taken::Outer {
            let publish = || {
                receiver.publish();
            };
            self.leave(&self.rx.lock, || receiver.is_behind(), publish);
        }
        got
    }
}

/// The stop at which the handler acts, and the stops so far.
static AT: AtomicU64 = AtomicU64::new(0);
static STOPS: AtomicU64 = AtomicU64::new(0);
static STREAM: AtomicPtr<Stream> = AtomicPtr::new(std::ptr::null_mut());
static SENDS: AtomicU64 = AtomicU64::new(0);

extern "C" fn stopped(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    if STOPS.fetch_add(1, Relaxed) + 1 != AT.load(Relaxed) {
        return;
    }
    // The rest runs without stops.
    // SAFETY: the kernel gave a context.
    unsafe { (*context).uc_mcontext.gregs[libc::REG_EFL as usize] &= !0x100 };
    let stream = STREAM.load(Relaxed);
    // SAFETY: set by `step` for as long as it runs, on this thread.
    unsafe {
        if SENDS.load(Relaxed) != 0 {
            assert!((*stream).send(b"in"));
        } else {
            let got = &raw mut (*stream).got;
            let len = (*stream).receive((&mut *got).get_mut(..2).unwrap_or_default());
            (*stream).got_len = len;
        }
    }
}

/// Runs `call`, with the handler's action after its `at`-th instruction. False: it has fewer.
fn step(stream: *mut Stream, at: u64, call: impl FnOnce()) -> bool {
    STREAM.store(stream, Relaxed);
    STOPS.store(0, Relaxed);
    AT.store(at, Relaxed);
    // SAFETY: sets the trap flag, so that SIGTRAP comes after each instruction from here on; the
    // handler is installed. The flags are pushed above the red zone.
    unsafe {
        std::arch::asm!(
            "sub rsp, 128",
            "pushfq",
            "or qword ptr [rsp], 0x100",
            "popfq",
            "add rsp, 128"
        );
    }
    call();
    // SAFETY: clears it again.
    unsafe {
        std::arch::asm!(
            "sub rsp, 128",
            "pushfq",
            "and qword ptr [rsp], 0xfffffffffffffeff",
            "popfq",
            "add rsp, 128"
        );
    }
    STOPS.load(Relaxed) >= at
}

fn install() {
    // SAFETY: the handler touches atomics and the stream only.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = stopped as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(
            libc::sigaction(libc::SIGTRAP, &action, std::ptr::null_mut()),
            0
        );
    }
}

/// All that a stream has, two bytes at a time.
fn rest(stream: &Stream) -> Vec<[u8; 2]> {
    let mut all = Vec::new();
    let mut bytes = [0; 2];
    while stream.receive(&mut bytes) == 2 {
        all.push(bytes);
    }
    all
}

/// One test, since the handler is the process's.
#[test]
fn a_handler_may_run_at_every_instruction() {
    install();
    sends(|_| {});
    // The same on a ring that is empty and far from its start, so that the sender rewinds.
    sends(|stream| {
        for _ in 0..RING / 2 {
            assert!(stream.send(b".."));
            assert_eq!(stream.receive(&mut [0; 2]), 2);
        }
    });
    receives();
}

fn sends(prepare: impl Fn(&Stream)) {
    SENDS.store(1, Relaxed);
    let mut points = 0;
    for at in (1..).step_by(STRIDE) {
        let mut stream = Stream::new();
        prepare(&stream);
        let stream = &raw mut *stream;
        // SAFETY: the box lives until the end of the round; handler and call take turns.
        let stream_ref = unsafe { &*stream };
        let mut sent = false;
        if !step(stream, at, || sent = stream_ref.send(b"ou")) {
            break;
        }
        assert!(sent, "at instruction {at}");
        let mut got = rest(stream_ref);
        got.sort_unstable();
        assert_eq!(got, [*b"in", *b"ou"], "at instruction {at}");
        assert_eq!(stream_ref.tx.lock.load(Relaxed), 0);
        points = at;
    }
    println!("sending: {points} instructions, each {STRIDE}. interrupted");
    assert!(points > 50);
}

fn receives() {
    SENDS.store(0, Relaxed);
    let mut points = 0;
    for at in (1..).step_by(STRIDE) {
        let mut stream = Stream::new();
        assert!(stream.send(b"12") && stream.send(b"34") && stream.send(b"56"));
        let stream = &raw mut *stream;
        // SAFETY: as above.
        let stream_ref = unsafe { &*stream };
        let (mut bytes, mut len) = ([0; 2], 0);
        if !step(stream, at, || len = stream_ref.receive(&mut bytes)) {
            break;
        }
        assert_eq!((len, stream_ref.got_len), (2, 2), "at instruction {at}");
        let mut all = rest(stream_ref);
        all.extend([bytes, [stream_ref.got[0], stream_ref.got[1]]]);
        all.sort_unstable();
        assert_eq!(all, [*b"12", *b"34", *b"56"], "at instruction {at}");
        assert_eq!(stream_ref.rx.lock.load(Relaxed), 0);
        points = at;
    }
    println!("receiving: {points} instructions, each {STRIDE}. interrupted");
    assert!(points > 50);
}
