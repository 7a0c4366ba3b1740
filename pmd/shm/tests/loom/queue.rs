//! The queue from a tenant to the daemon: in order, whole, never lost, also where it wraps.

use crate::model::check;
use loom::thread;
use rdsock_shm::control::{Request, from_bytes};
use rdsock_shm::layout::{QUEUE_SLOTS, QueueSlot};
use rdsock_shm::queue::{Putter, Taker};
use std::sync::Arc;

/// A request whose words differ all, so that a torn one shows.
fn request(number: u8) -> Request {
    from_bytes(&[number; size_of::<Request>()]).unwrap()
}

#[test]
fn requests_arrive_whole_and_in_order() {
    check(2, || {
        let slots: Arc<[QueueSlot; QUEUE_SLOTS]> =
            Arc::new(std::array::from_fn(|_| QueueSlot::default()));
        let tenant = {
            let slots = slots.clone();
            thread::spawn(move || {
                let mut putter = Putter::new();
                for number in 1..=3 {
                    while !putter.put(&slots, &request(number)) {
                        thread::yield_now();
                    }
                }
            })
        };
        let mut taker = Taker::new();
        for number in 1..=3 {
            let taken = loop {
                match taker.take(&slots) {
                    Some(taken) => break taken,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(taken, request(number));
        }
        assert_eq!(taker.take(&slots), None);
        tenant.join().unwrap();
    });
}
