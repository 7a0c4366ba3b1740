//! Once a stream is open, a poll core allocates nothing for it, whatever it carries.
#[allow(dead_code)]
mod site;

use rdsock_node::Command;
use site::program::Program;
use site::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// Threads whose allocations are counted; 0 is none.
static WATCHED: [AtomicI32; 2] = [AtomicI32::new(0), AtomicI32::new(0)];
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: hands everything to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: it takes nothing and changes nothing.
        let thread = unsafe { libc::gettid() };
        if WATCHED
            .iter()
            .any(|watched| watched.load(Ordering::Relaxed) == thread)
        {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The threads of this process that poll.
fn poll_cores() -> Vec<i32> {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let threads = threads.map(|thread| thread.unwrap().path());
    threads
        .filter(|thread| {
            std::fs::read_to_string(thread.join("comm"))
                .unwrap()
                .starts_with("rdsock-poll")
        })
        .map(|thread| {
            thread
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .collect()
}

#[test]
fn a_poll_core_allocates_nothing_for_an_open_stream() {
    let mut sites = pair();
    let connection = connect(&mut sites);
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
    let [mut a, mut b] = programs;
    a.switch();
    b.switch();
    let mut rounds = |count: usize| {
        for round in 0..count {
            let bytes = vec![round as u8; 1 + round * 37 % 40_000];
            a.send(&bytes);
            assert_eq!(b.receive_exactly(bytes.len()), bytes);
            b.send(&bytes);
            assert_eq!(a.receive_exactly(bytes.len()), bytes);
        }
    };
    rounds(300);
    let threads = poll_cores();
    assert_eq!(threads.len(), WATCHED.len());
    for (watched, thread) in WATCHED.iter().zip(threads) {
        watched.store(thread, Ordering::Relaxed);
    }
    rounds(500);
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), 0);
    // It would have been seen.
    // SAFETY: it takes nothing and changes nothing.
    WATCHED[0].store(unsafe { libc::gettid() }, Ordering::Relaxed);
    drop(std::hint::black_box(Box::new(1)));
    assert_ne!(ALLOCATIONS.load(Ordering::Relaxed), 0);
}
