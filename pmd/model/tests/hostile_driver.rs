//! Whatever a driver writes into registers and queues, the model does not panic, touches no memory
//! that was not mapped, and goes on serving the other node.

use proptest::prelude::*;
use rdsock_model::{Bar, Chaos, Dma, DmaFault, Fabric, Function};
use std::sync::{Arc, Mutex};

/// Host memory from address 0 on, of a few pages.
#[derive(Default)]
struct Memory(Mutex<Vec<u64>>);

const WORDS: usize = 8192;
const WORK: u64 = 0x1000;
const COMPLETIONS: u64 = 0x4000;
const MESSAGES: u64 = 0x8000;
const STATUS: u64 = 0xc000;

impl Memory {
    fn range(&self, iova: u64, words: usize) -> Result<std::ops::Range<usize>, DmaFault> {
        let start = usize::try_from(iova / 8).map_err(|_| DmaFault)?;
        let end = start
            .checked_add(words)
            .filter(|end| *end <= WORDS)
            .ok_or(DmaFault)?;
        Ok(start..end)
    }
    fn words(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        let mut words = self.0.lock().unwrap();
        words.resize(WORDS, 0);
        words
    }
}

impl Dma for Memory {
    fn read(&self, iova: u64, to: &mut [u8]) -> Result<(), DmaFault> {
        // Payload is not looked at here; only its bounds matter.
        self.range(iova, to.len().div_ceil(8)).map(|_| to.fill(0))
    }
    fn write(&self, iova: u64, from: &[u8]) -> Result<(), DmaFault> {
        self.range(iova, from.len().div_ceil(8)).map(|_| ())
    }
    fn load(&self, iova: u64, to: &mut [u64]) -> Result<(), DmaFault> {
        let range = self.range(iova, to.len())?;
        to.copy_from_slice(&self.words()[range]);
        Ok(())
    }
    fn store(&self, iova: u64, from: &[u64]) -> Result<(), DmaFault> {
        let range = self.range(iova, from.len())?;
        self.words()[range].copy_from_slice(from);
        Ok(())
    }
}

struct Host {
    function: Function,
    memory: Arc<Memory>,
}

impl Host {
    fn new(fabric: &Fabric, id: u64) -> Self {
        let memory = Arc::new(Memory::default());
        let function = fabric.add(memory.clone(), 1);
        let host = Host { function, memory };
        host.join(id);
        host.start();
        assert_eq!(host.function.read(Bar::Pages, 0x004, 4), 1, "not started");
        host
    }

    fn join(&self, id: u64) {
        let management =
            |offset, width, value| self.function.write(Bar::Management, offset, width, value);
        management(0x100, 8, 0b1110);
        management(0x040, 4, id);
        management(0x048, 4, 2);
        management(0x10004, 4, 1);
        management(0x10010, 8, 0x100);
        management(0x10000, 4, 7);
    }

    fn start(&self) {
        let page = |offset, width, value| self.function.write(Bar::Pages, offset, width, value);
        page(0x000, 4, 0);
        self.function.read(Bar::Pages, 0x004, 4);
        self.memory.words().fill(0);
        for register in [0x080, 0x0c0, 0x100, 0x140] {
            page(register, 4, 0);
        }
        for slot in 0..32 {
            page(0x800 + slot * 64, 8, 0);
        }
        page(0x008, 4, 0x060606);
        page(0x010, 8, WORK);
        page(0x018, 8, COMPLETIONS);
        page(0x020, 8, MESSAGES);
        page(0x028, 8, STATUS);
        page(0x000, 4, 1);
    }
}

#[derive(Clone, Debug)]
enum Act {
    Page {
        offset: u64,
        wide: bool,
        value: u64,
    },
    Management {
        offset: u64,
        wide: bool,
        value: u64,
    },
    /// A slot of the work queue, with a header that is nearly right.
    Slot {
        at: u64,
        header: u64,
        rest: [u64; 7],
    },
    Memory {
        at: usize,
        value: u64,
    },
    Doorbell(u64),
    Restart,
    Step(u64),
}

fn act() -> impl Strategy<Value = Act> {
    let value = prop_oneof![0..9u64, 0..70_000u64, any::<u64>()];
    let register = prop_oneof![
        (0..0x40u64).prop_map(|o| o * 4),
        (0..2048u64).prop_map(|o| o * 2),
        any::<u64>()
    ];
    let rest = (value.clone(), 0..70_000u64, any::<u64>())
        .prop_map(|(a, b, c)| [1 << 16 | (a & 0xff) << 32, b, c, a, b & 0xff, c, b]);
    prop_oneof![
        2 => (register.clone(), any::<bool>(), value.clone())
            .prop_map(|(offset, wide, value)| Act::Page { offset, wide, value }),
        1 => (register, any::<bool>(), value.clone())
            .prop_map(|(offset, wide, value)| Act::Management { offset, wide, value }),
        6 => (0..64u64, 0..8u64, 0..16u64, 0..5u64, 0..6u64, 0..10u64, 0..5u64, 0..140u64, rest).prop_map(
            |(at, opcode, flags, target, slots, pieces, units, inline, rest)| {
                let header = opcode | flags << 8 | target << 16 | slots << 32 | pieces << 40
                    | units << 48 | inline << 56;
                Act::Slot { at, header, rest }
            }
        ),
        1 => (0..WORDS, value.clone()).prop_map(|(at, value)| Act::Memory { at, value }),
        4 => (0..6u64).prop_map(Act::Doorbell),
        1 => Just(Act::Restart),
        4 => (0..3_000_000u64).prop_map(Act::Step),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn a_hostile_driver_harms_nobody(acts in proptest::collection::vec(act(), 0..80)) {
        let fabric = Fabric::new(Chaos::default());
        let hostile = Host::new(&fabric, 1);
        let honest = Host::new(&fabric, 2);
        let witness = Host::new(&fabric, 3);
        let mut now = 0;
        let mut tail = 0;
        for act in acts {
            let function = &hostile.function;
            let width = |wide| if wide { 8 } else { 4 };
            match act {
                Act::Page { offset, wide, value } => {
                    function.write(Bar::Pages, offset, width(wide), value);
                    function.read(Bar::Pages, offset, width(!wide));
                }
                Act::Management { offset, wide, value } => {
                    function.write(Bar::Management, offset, width(wide), value);
                    function.read(Bar::Management, offset, width(wide));
                }
                Act::Slot { at, header, rest } => {
                    let start = (WORK + at * 64) as usize / 8;
                    let mut words = hostile.memory.words();
                    words[start] = header;
                    words[start + 1..start + 8].copy_from_slice(&rest);
                }
                Act::Memory { at, value } => hostile.memory.words()[at] = value,
                Act::Doorbell(by) => {
                    tail += by;
                    function.write(Bar::Pages, 0x080, 4, tail);
                }
                Act::Restart => {
                    hostile.join(1);
                    hostile.start();
                    tail = 0;
                }
                Act::Step(by) => {
                    now += by;
                    fabric.step(now);
                }
            }
        }
        // The others reach each other as before. (The hostile node may have taken an id of theirs only
        // if it was free, which it was not.)
        let before = witness.function.counters().messages_in;
        honest.function.write(Bar::Pages, 0x810, 8, 0xfeed);
        honest.function.write(Bar::Pages, 0x800, 8, 3 | 1 << 32);
        for _ in 0..100 {
            now += 1;
            fabric.step(now);
        }
        let counters = witness.function.counters();
        prop_assert!(counters.messages_in == before + 1 || counters.notifications_in >= 64);
        prop_assert_eq!(counters.sets_failed, 0);
        prop_assert_eq!(honest.function.counters().sets_failed, 0);
    }
}
