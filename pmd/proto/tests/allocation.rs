//! After set-up, nothing is allocated: neither by data, nor by connects, nor by hostile messages.

mod pair;

use pair::{A, ADDRESSES, B, Wires, place};
use rdsock_proto::{Action, Actions, NodeId, Status};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: hands everything to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
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

/// Polls node `from` and delivers what it posts; returns how many actions there were.
fn round(wires: &mut Wires, actions: &mut Actions, from: NodeId) -> usize {
    let mut count = 0;
    loop {
        let now = wires.now;
        let more = wires.nodes[usize::from(from.0)].poll(now, actions);
        for action in actions.drain() {
            count += 1;
            let (to, seq, message) = match action {
                Action::Send { node, seq, message } => (node, seq, Some(message)),
                Action::Write { node, seq, write } => (node, seq, write.notify),
                _ => continue,
            };
            if let Some(message) = message {
                wires.nodes[usize::from(to.0)].handle_message(from, &message, now);
            }
            wires.nodes[usize::from(from.0)].handle_completion(to, seq, Status::Success, now);
        }
        if !more {
            return count;
        }
    }
}

#[test]
fn nothing_is_allocated_after_set_up() {
    let mut wires = Wires::new(2, |_| {});
    let (here, there) = wires.connect(A, B, 16);
    let mut actions = Actions::new(64);
    let before = ALLOCATIONS.get();
    let mut moved = 0;
    for n in 1..=10_000 {
        wires.now += 1000;
        wires.node(A).advance_head(here, n * 64).unwrap();
        moved += round(&mut wires, &mut actions, A);
        wires.node(B).advance_consumed(there, n * 64).unwrap();
        moved += round(&mut wires, &mut actions, B);
    }
    assert!(moved > 20_000, "{moved} actions");
    for n in 0..50_000_u64 {
        let mut message = [n as u8; 48];
        (message[0], message[1]) = (1, (n % 16) as u8);
        let now = wires.now;
        wires.node(B).handle_message(A, &message, now);
    }
    for _ in 0..100 {
        let now = wires.now;
        let _ = wires.node(A).connect(B, ADDRESSES, place(12), now);
        round(&mut wires, &mut actions, A);
    }
    round(&mut wires, &mut actions, B);
    assert_eq!(ALLOCATIONS.get() - before, 0);
}
