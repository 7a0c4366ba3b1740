//! Whatever a device writes into registers and queues, at any time, the driver does not panic, and reports
//! nothing that it has not posted more than once.
//!
//! The device here is plain memory that the test writes what it likes to.

use proptest::prelude::*;
use rdsock_rde::*;
use rdsock_vfio::{Access, BusError, Device, EventFd, RegionInfo, Registers, Space};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// Registers that hold what was stored, but where the liar has other ideas.
#[derive(Debug, Default)]
struct Liar {
    registers: [Mutex<BTreeMap<u64, u64>>; 2],
    /// Host address and length by I/O virtual address.
    mapped: Mutex<BTreeMap<u64, (usize, usize)>>,
}

#[derive(Debug)]
struct Bar(Arc<Liar>, usize);

impl Registers for Bar {
    fn read32(&self, offset: u64) -> u32 {
        self.read64(offset) as u32
    }
    fn read64(&self, offset: u64) -> u64 {
        let registers = self.0.registers[self.1].lock().unwrap();
        // SET_STATE follows ENABLE.
        let offset = if self.1 == 1 && offset % 4096 == 4 {
            offset - 4
        } else {
            offset
        };
        registers.get(&offset).copied().unwrap_or(0)
    }
    fn write32(&self, offset: u64, value: u32) {
        self.write64(offset, value.into());
    }
    fn write64(&self, offset: u64, value: u64) {
        self.0.registers[self.1]
            .lock()
            .unwrap()
            .insert(offset, value);
    }
}

#[derive(Debug)]
struct LyingDevice(Arc<Liar>);

impl Device for LyingDevice {
    fn name(&self) -> String {
        "liar".into()
    }
    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        vec![0..=u64::MAX]
    }
    unsafe fn map(
        &self,
        iova: u64,
        host: NonNull<u8>,
        len: usize,
        _: Access,
    ) -> Result<(), BusError> {
        let at = host.as_ptr().expose_provenance();
        self.0.mapped.lock().unwrap().insert(iova, (at, len));
        Ok(())
    }
    fn unmap(&self, iova: u64, _: usize) -> Result<(), BusError> {
        self.0.mapped.lock().unwrap().remove(&iova);
        Ok(())
    }
    fn region(&self, _: u32) -> Result<RegionInfo, BusError> {
        let (size, mappable) = (1 << 20, false);
        Ok(RegionInfo { size, mappable })
    }
    fn registers(&self, index: u32) -> Result<Arc<dyn Registers>, BusError> {
        Ok(Arc::new(Bar(self.0.clone(), usize::from(index == 2))))
    }
    fn vectors(&self) -> u32 {
        2
    }
    fn set_interrupt(&self, _: u32, _: Option<Arc<EventFd>>) -> Result<(), BusError> {
        Ok(())
    }
    fn reset(&self) -> Result<(), BusError> {
        Ok(())
    }
}

impl Liar {
    /// Stores a word into host memory, as a device does.
    fn store(&self, iova: u64, value: u64) {
        let mapped = self.mapped.lock().unwrap();
        let (start, (host, len)) = mapped.range(..=iova).next_back().unwrap();
        let at = (iova - start) as usize;
        assert!(at + 8 <= *len);
        let word = std::ptr::with_exposed_provenance_mut(host + at);
        // SAFETY: mapped until `unmap`, which takes the same lock; the driver's words are atomics.
        unsafe { AtomicU64::from_ptr(word) }.store(value, Relaxed);
    }

    fn queue(&self, register: u64) -> u64 {
        self.registers[1].lock().unwrap()[&register]
    }
}

const SMALL: Sizes = Sizes {
    work: 6,
    completions: 6,
    messages: 6,
};

/// Sane capabilities: offsets and values of the management page.
const SANE: [(u64, u64); 9] = [
    (0x000, u64::from_le_bytes(*b"rdsockRD")),
    (0x008, 0x10000),
    (0x010, 7),
    (0x018, 1),
    (0x01c, 16),
    (0x020, 4),
    (0x024, 6),
    (0x028, 4096),
    (0x02c, 16),
];

fn liar() -> (Arc<Liar>, Space) {
    let liar = Arc::new(Liar::default());
    let bar = Bar(liar.clone(), 0);
    for (offset, value) in SANE.into_iter().chain([(0x030, 8), (0x034, 128)]) {
        bar.write64(offset, value);
    }
    let space = Space::new(Arc::new(LyingDevice(liar.clone())));
    (liar, space)
}

#[derive(Clone, Debug)]
enum Act {
    Post {
        target: u16,
        report: bool,
    },
    Send(u16),
    Poll,
    /// Completion entry: place, and how it differs from a right one.
    Completion {
        place: u8,
        word0: u64,
        word1: u64,
    },
    /// A right completion of some cookie and index.
    Plausible {
        place: u8,
        cookie: u32,
        index: u32,
        target: u16,
    },
    Message {
        place: u8,
        word0: u64,
        word1: u64,
    },
    Status {
        word: u8,
        value: u64,
    },
    Register {
        offset: u64,
        value: u64,
    },
    Check,
}

fn act() -> impl Strategy<Value = Act> {
    let small = prop_oneof![0..4u64, Just(u64::MAX), any::<u64>()];
    prop_oneof![
        4 => (1..4u16, any::<bool>()).prop_map(|(target, report)| Act::Post { target, report }),
        2 => (0..20u16).prop_map(Act::Send),
        6 => Just(Act::Poll),
        1 => (any::<u8>(), any::<u64>(), any::<u64>())
            .prop_map(|(place, word0, word1)| Act::Completion { place, word0, word1 }),
        4 => (0..3u8, 0..8u32, 0..12u32, 1..4u16).prop_map(|(place, low, index, target)| {
            Act::Plausible { place, cookie: 1 << 16 | low, index, target }
        }),
        2 => (0..3u8, any::<u16>(), 0..4u64, 0..4u64, any::<bool>()).prop_map(
            |(place, source, kind, index, phase)| Act::Message {
                place,
                word0: u64::from(source % 20) | kind << 32 | u64::from(phase) << 63,
                word1: index << 32,
            }
        ),
        1 => (0..4u8, small.clone()).prop_map(|(word, value)| Act::Status { word, value }),
        1 => (prop_oneof![Just(0u64), Just(4), Just(0x180), Just(0xc)], small)
            .prop_map(|(offset, value)| Act::Register { offset, value }),
        1 => Just(Act::Check),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_lying_device_harms_nobody(acts in proptest::collection::vec(act(), 0..60)) {
        let (liar, space) = liar();
        let rde = Rde::open(space).unwrap();
        let mut set = rde.queue_set(0, SMALL).unwrap();
        let (completions, messages, status) = (liar.queue(0x18), liar.queue(0x20), liar.queue(0x28));
        let (mut tag, mut reported) = (0, Vec::new());
        let mut dead = None;
        for act in acts {
            let outcome = match act {
                Act::Post { target, report } => {
                    tag += 1;
                    let operation = Operation::Flush;
                    match set.post(&Work { target, operation, tag, report }) {
                        Err(NotPosted::Failed(failed)) => Err(failed),
                        _ => Ok(()),
                    }
                }
                Act::Send(target) => match set.send(target, 0, b"x") {
                    Err(NotPosted::Failed(failed)) => Err(failed),
                    _ => Ok(()),
                },
                Act::Poll => {
                    set.ring();
                    let done = set.poll_completions(8, |c| reported.push((c.window, c.tag)));
                    done.and_then(|_| set.poll_messages(8, |m| assert!(m.source <= 16))).map(|_| ())
                }
                Act::Completion { place, word0, word1 } => {
                    liar.store(completions + u64::from(place % 64) * 16 + 8, word1);
                    liar.store(completions + u64::from(place % 64) * 16, word0);
                    continue;
                }
                Act::Plausible { place, cookie, index, target } => {
                    let at = completions + u64::from(place) * 16;
                    liar.store(at + 8, u64::from(cookie) | u64::from(index) << 32);
                    liar.store(at, u64::from(target) << 32 | 4 << 56 | 1 << 63);
                    continue;
                }
                Act::Message { place, word0, word1 } => {
                    liar.store(messages + u64::from(place) * 64 + 8, word1);
                    liar.store(messages + u64::from(place) * 64, word0);
                    continue;
                }
                Act::Status { word, value } => {
                    liar.store(status + u64::from(word) * 8, value);
                    continue;
                }
                Act::Register { offset, value } => {
                    liar.registers[1].lock().unwrap().insert(offset, value);
                    continue;
                }
                Act::Check => set.check(),
            };
            // Once failed, it stays so, with the same reason.
            match (dead, outcome) {
                (Some(dead), outcome) => prop_assert_eq!(outcome, Err(dead)),
                (None, Err(failed)) => dead = Some(failed),
                (None, Ok(())) => {}
            }
        }
        let mut work: Vec<u64> = reported.iter().filter(|r| !r.0).map(|r| r.1).collect();
        prop_assert!(work.iter().all(|reported| (1..=tag).contains(reported)));
        let count = work.len();
        work.sort_unstable();
        work.dedup();
        prop_assert_eq!(work.len(), count, "reported twice");
        // Let it stop.
        Bar(liar, 1).write64(0, 0);
    }

    #[test]
    fn impossible_capabilities_are_refused(at in 0..SANE.len(), value in any::<u64>()) {
        let (liar, space) = liar();
        let (offset, sane) = SANE[at];
        Bar(liar, 0).write64(offset, value);
        match Rde::open(space) {
            Ok(rde) => {
                let caps = rde.capabilities();
                prop_assert!((1..=256).contains(&caps.queue_sets) && caps.max_node < 1024);
                prop_assert!((6..=16).contains(&caps.max_queue) && caps.lane_depth <= 1 << 16);
            }
            Err(_) => prop_assert_ne!(value, sane),
        }
    }
}
