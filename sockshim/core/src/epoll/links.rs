//! The lists of registrations: of each connection, and of each instance nested in others.

use super::*;
use std::sync::atomic::fence;

/// Registrations of one connection, as a rule.
const FEW: usize = 64;
/// Registrations of one connection that are followed.
const MANY: usize = 4096;

/// The lists of registrations, held. Nothing else is locked inside.
struct Links(Taken);

impl Links {
    fn take() -> Self {
        Links(take_word(&LINK))
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        lock::release(&LINK, self.0);
    }
}

fn next_of(reference: u32) -> Option<&'static AtomicU32> {
    let (epoll, _, bit) = of_reference(reference)?;
    epoll.table.link(bit)
}

pub(super) fn list_of(target: Kind) -> Option<&'static AtomicU32> {
    match target {
        Kind::Conn(index) => conn::at(index).map(|conn| &conn.registrations),
        Kind::Epoll(index) => at(index).map(|epoll| &epoll.registrations),
        _ => None,
    }
}

pub(super) fn link(target: Kind, reference: u32) {
    let _links = Links::take();
    if let (Some(list), Some(next)) = (list_of(target), next_of(reference)) {
        next.store(list.load(Relaxed), Relaxed);
        list.store(reference, Release);
        // See `news::changed`.
        fence(SeqCst);
    }
}

pub(super) fn unlink(target: Kind, gone: u32) {
    let _links = Links::take();
    let (Some(mut place), Some(after)) = (list_of(target), next_of(gone)) else {
        return;
    };
    for _ in 0..MANY {
        let here = place.load(Relaxed);
        if here == gone {
            place.store(after.load(Relaxed), Release);
            return;
        }
        let Some(next) = next_of(here) else { return };
        place = next;
    }
}

/// Calls `found` with each registration in a list, as it stood at the start: instance, its number,
/// slot. What is found there may be another registration by now.
pub(super) fn each(list: &AtomicU32, mut found: impl FnMut(&'static Epoll, usize, usize)) {
    if list.load(Acquire) == 0 {
        return;
    }
    let mut few = [0; FEW];
    if copy(list, &mut few) {
        few.into_iter()
            .map_while(of_reference)
            .for_each(|(epoll, index, bit)| found(epoll, index, bit));
    } else {
        each_of_many(list, &mut found);
    }
}

/// Many take more of the stack than a signal handler may have.
#[cold]
#[inline(never)]
fn each_of_many(list: &AtomicU32, found: &mut dyn FnMut(&'static Epoll, usize, usize)) {
    let mut many = [0; MANY];
    copy(list, &mut many);
    many.into_iter()
        .map_while(of_reference)
        .for_each(|(epoll, index, bit)| found(epoll, index, bit));
}

/// Copies a list, which ends at a 0. False when there is more of it.
fn copy(list: &AtomicU32, to: &mut [u32]) -> bool {
    let _links = Links::take();
    let mut next = list.load(Relaxed);
    for place in to {
        *place = next;
        next = next_of(next).map_or(0, |next| next.load(Relaxed));
    }
    next == 0
}
