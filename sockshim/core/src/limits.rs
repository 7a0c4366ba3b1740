//! The shim's thresholds, each of which a test may set: most faults hide on the side of a threshold where tests with a few
//! bytes and a few connections never come. `process.rs` reads `RDSOCK_TEST_LIMITS` once, before the program runs; all others
//! only ask, which costs one load. A threshold decides when something is done and how much at a time, never what is right, so
//! no value of its range may break a program.

use crate::sys;
use rdsock_shm::end::Limits;
use rdsock_shm::layout::BELL_BITS;
use std::cell::UnsafeCell;
use std::ffi::CStr;
use std::ops::RangeInclusive;

/// A threshold of any number.
#[derive(Debug)]
pub struct Number(UnsafeCell<u64>);

// SAFETY: written by `start` alone, before the process has a second thread. Not an atomic, so that a comparison is one
// instruction with it.
unsafe impl Sync for Number {}

impl Number {
    const KIND: &str = "a number";

    const fn new(default: u64) -> Self {
        Number(UnsafeCell::new(default))
    }

    const fn set(&'static self, value: u64) -> Option<Set> {
        Some(Set { place: self, value })
    }

    /// What it is.
    #[inline(always)]
    pub fn get(&self) -> u64 {
        // SAFETY: as of `Sync`.
        unsafe { *self.0.get() }
    }
}

/// A threshold that is a power of two; holds one less.
#[derive(Debug)]
pub struct Power(Number);

impl Power {
    const KIND: &str = "a power of two";

    const fn new(default: u64) -> Self {
        Power(Number::new(default - 1))
    }

    const fn set(&'static self, value: u64) -> Option<Set> {
        if !value.is_power_of_two() {
            return None;
        }
        let place = &self.0;
        Some(Set {
            place,
            value: value - 1,
        })
    }

    /// The bits that are 0 in its multiples.
    #[inline(always)]
    pub fn mask(&self) -> u32 {
        self.0.get() as u32
    }

    /// True for each so many-th count.
    #[inline(always)]
    pub fn divides(&self, count: u32) -> bool {
        count & self.mask() == 0
    }
}

/// What is to be written where.
struct Set {
    place: &'static Number,
    value: u64,
}

/// A threshold, as the variable names it.
struct Limit {
    name: &'static str,
    kind: &'static str,
    default: u64,
    range: RangeInclusive<u64>,
    set: fn(u64) -> Option<Set>,
}

// `.ci/docs` makes a table of them in tests/README.md.
macro_rules! limits {
    ($($(#[doc = $doc:literal])+ $name:ident: $kind:ident = $default:expr, $range:expr;)*) => {
        $(
            $(#[doc = $doc])+
            pub static $name: $kind = $kind::new($default);
        )*

        const ALL: &[Limit] = &[$(
            Limit {
                name: stringify!($name),
                kind: $kind::KIND,
                default: $default,
                range: $range,
                set: |value| $name.set(value),
            }
        ),*];
    };
}

limits! {
    /// Bytes taken off a ring before that is published, so that the other end writes while this one reads.
    PIECE: Number = Limits::DEFAULT.piece, 1..=1 << 30;
    /// Bytes put into a ring before they are published, so that the other end reads while this one writes.
    CHUNK: Number = Limits::DEFAULT.chunk, 1..=1 << 30;
    /// Receives without a sleep after which a receiver is hot: its senders send no fence, and its next sleep costs a barrier.
    HOT_AFTER: Power = Limits::DEFAULT.hot_mask as u64 + 1, 1..=1 << 20;
    /// Streams of an epoll instance that are simply looked at; with more, their peers ring its bell.
    FEW: Number = 8, 0..=4096;
    /// Registrations of an epoll instance that have a place on its bell; those behind are told of by a byte.
    BELLED: Number = BELL_BITS as u64, 0..=BELL_BITS as u64;
    /// Wake bytes on an anchor that only epoll waits for, after which they are taken off.
    TOKENS: Number = 8, 1..=64;
    /// Entries of `poll` and `select` that are kept on the stack.
    ON_STACK: Number = 64, 0..=64;
    /// Microseconds of spinning after which the kernel is asked for the descriptors that are not on rings.
    ASK_KERNEL_US: Number = 10, 0..=1_000_000;
    /// Calls on a connection before it is announced to the daemon.
    CALLS: Number = 4, 1..=1_000_000;
    /// Bytes in one call that show as well that a connection is worth it.
    BYTES: Number = 32 * 1024, 1..=1 << 30;
    /// Microseconds between two looks at the anchor of a connection whose ring is found empty by calls that do not wait.
    LOOK_EVERY_US: Number = 20, 0..=1_000_000;
    /// Microseconds between two looks at the anchor of a sender whose peer takes nothing.
    PEER_CHECK_US: Number = 1000, 0..=1_000_000;
    /// Bytes of a file that are read into the ring before they are published.
    FILE_PIECE: Number = 64 * 1024, 1..=1 << 30;
    /// Bytes that go from the ring into a pipe at a time, which takes them without blocking once it is writable.
    PIPE_PIECE: Number = 4096, 1..=4096;
    /// Turns for which a receiver gives way to an offer, unless bytes come.
    GIVE_WAY_TURNS: Number = 20, 0..=1000;
    /// Milliseconds of one such turn.
    GIVE_WAY_MS: Number = 5, 0..=1000;
    /// Microseconds of a nap, a sleep in which the anchor is not heard; 0 for none.
    NAP_US: Number = 1000, 0..=1_000_000;
    /// Milliseconds that a sender of a process with threads sleeps at a time.
    SLICE_MS: Number = 50, 1..=10_000;
    /// Milliseconds of one wait where the process may have no more descriptors.
    STEP_MS: Number = 5, 1..=1000;
    /// Milliseconds that the process may wait in all, at closes and where a connection must be the kernel's at once, for what other
    /// ends owe it: then the connection is reset.
    PATIENCE_MS: Number = 100, 1..=60_000;
    /// In how many milliseconds it may wait for so long.
    PATIENCE_EVERY_MS: Number = 10_000, 1..=3_600_000;
    /// Of the waits of a connection whose spinning does not pay, one in so many tries it again.
    PROBE_EVERY: Power = 16, 1..=1 << 20;
    /// Microseconds of spinning before the core is yielded in between.
    YIELD_AFTER_US: Number = 4, 0..=1_000_000;
    /// Microseconds after which a yield gave the core to somebody else.
    LOST_US: Number = 20, 0..=1_000_000;
    /// Receives in a row that found nothing and did not wait, after which a poll core on the same core gets a turn.
    MISSES: Power = 256, 1..=1 << 20;
    /// Receives in a row, without a send between them, after which a receiver lets messages gather.
    ONE_WAY_AFTER: Number = 64, 0..=1 << 20;
    /// Steps of looking away while they gather, at most.
    GATHER_STEPS: Number = 6, 0..=1000;
    /// Of the receives for which that does not pay, one in so many tries it again.
    GATHER_PROBE: Power = 64, 1..=1 << 20;
    /// Bytes that are enough without.
    GATHERED: Number = 4096, 0..=1 << 30;
}

/// The variable, as a message names it.
const VARIABLE: &str = "RDSOCK_TEST_LIMITS";

/// Sets what the variable says: `few=0,piece=4096`. What is wrong in it is told, and changes nothing.
///
/// # Safety
/// The process has one thread.
pub unsafe fn start(value: Option<&CStr>) {
    let Some(value) = value.filter(|value| !value.is_empty()) else {
        return;
    };
    let Ok(text) = value.to_str() else {
        return sys::warn_with(&[VARIABLE, " is not text, and was ignored"]);
    };
    for item in text.split(',').filter(|item| !item.is_empty()) {
        if let Some(set) = read(item) {
            // SAFETY: nobody else reads or writes it, as the caller says.
            unsafe { *set.place.0.get() = set.value };
        }
    }
}

/// What one item asks for; `None`, and a warning, where that can't be.
fn read(item: &str) -> Option<Set> {
    let (name, value) = item.split_once('=').unwrap_or((item, ""));
    let Some(limit) = ALL
        .iter()
        .find(|limit| limit.name.eq_ignore_ascii_case(name))
    else {
        sys::warn_with(&[
            VARIABLE,
            " names \"",
            name,
            "\", which is no limit: tests/README.md lists them",
        ]);
        return None;
    };
    let number: Option<u64> = value.parse().ok();
    let fitting = number.filter(|number| limit.range.contains(number));
    let set = fitting.and_then(limit.set);
    if set.is_none() {
        let [mut least, mut most, mut default] = [[0; 10]; 3];
        sys::warn_with(&[
            VARIABLE,
            " sets ",
            name,
            " to \"",
            value,
            "\", which must be ",
            limit.kind,
            " from ",
            sys::decimal(*limit.range.start() as u32, &mut least),
            " to ",
            sys::decimal(*limit.range.end() as u32, &mut most),
            " (",
            sys::decimal(limit.default as u32, &mut default),
            " by default)",
        ]);
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_names_a_limit_and_a_number_that_it_can_be() {
        let asked = |item| read(item).map(|set| (std::ptr::from_ref(set.place), set.value));
        assert_eq!(asked("few=0"), Some((&raw const FEW, 0)));
        assert_eq!(asked("FEW=4096"), Some((&raw const FEW, 4096)));
        // Held as the bits of a remainder.
        assert_eq!(asked("misses=8"), Some((&raw const MISSES.0, 7)));
        for wrong in [
            "few", "few=", "few=4097", "few=-1", "few=0x1", "misses=3", "misses=0", "fewer=1", "",
        ] {
            assert_eq!(asked(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn each_default_is_in_its_range() {
        for limit in ALL {
            let name = limit.name;
            for value in [limit.default, *limit.range.start(), *limit.range.end()] {
                assert!(limit.range.contains(&value), "{name}");
                assert!((limit.set)(value).is_some(), "{name}");
            }
            let names = ALL.iter().filter(|other| other.name == name);
            assert_eq!(names.count(), 1, "{name}");
        }
    }

    #[test]
    fn a_power_divides_as_a_division_does() {
        static POWER: Power = Power::new(8);
        for count in [0, 1, 7, 8, 12, 16, u32::MAX] {
            assert_eq!(POWER.divides(count), count.is_multiple_of(8), "{count}");
        }
    }
}
