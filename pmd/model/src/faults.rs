//! Faults that the model plays: seeded ones that come by chance, and single ones on request.

/// What happens by chance. The same seed, driver and steps give the same run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chaos {
    /// Seed of all that follows.
    pub seed: u64,
    /// An item waits in its lane for up to this many nanoseconds.
    pub delay_ns: u64,
    /// Lanes are served in a random order, and sometimes not at all in a step.
    pub reorder_lanes: bool,
    /// Of a million operations on a region, so many are refused with REFUSED_KEY.
    pub refuse_ppm: u32,
    /// Of a million looks at a target's message queue, so many find it full.
    pub full_ppm: u32,
    /// Of a million steps and nodes, so many take the link down, for up to `link_down_ns`.
    pub link_ppm: u32,
    /// See `link_ppm`.
    pub link_down_ns: u64,
}

/// How a completion is made wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Corruption {
    /// The entry's phase is the other one, so it looks as if it were not there.
    Phase,
    /// The cookie is one that no descriptor has.
    Cookie,
    /// The index is not the descriptor's.
    Index,
    /// The target is another node.
    Target,
    /// The status is not in the data sheet.
    Status,
    /// The completion comes twice.
    Twice,
}

/// A single fault at one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The link goes down (true) or up.
    LinkDown(bool),
    /// The queue set takes and executes nothing (true), or goes on.
    Stuck(u32, bool),
    /// The queue set's message queue looks full to others (true), or as it is.
    Full(u32, bool),
    /// The next completion is wrong.
    Corrupt(Corruption),
    /// An entry with a right phase comes for nothing on the queue set.
    CompletionForNothing(u32),
    /// An inbound message with an impossible index comes on the queue set.
    MessageOutOfPlace(u32),
    /// The node's next write moves half of its data, and then the function is reset.
    ResetInFlight,
    /// The device is gone: registers read all ones, nothing is accessed any more.
    Remove,
}

/// The fabric's dice.
#[derive(Debug)]
pub(crate) struct Dice {
    pub chaos: Chaos,
    rng: fastrand::Rng,
}

impl Dice {
    pub fn new(chaos: Chaos) -> Self {
        Dice {
            rng: fastrand::Rng::with_seed(chaos.seed),
            chaos,
        }
    }

    #[inline]
    fn hits(&mut self, ppm: u32) -> bool {
        ppm != 0 && self.rng.u32(..1_000_000) < ppm
    }

    pub fn refuses(&mut self) -> bool {
        self.hits(self.chaos.refuse_ppm)
    }

    pub fn finds_full(&mut self) -> bool {
        self.hits(self.chaos.full_ppm)
    }

    /// Nanoseconds for which a link goes down now.
    pub fn link_down(&mut self) -> Option<u64> {
        let hit = self.hits(self.chaos.link_ppm);
        hit.then(|| self.rng.u64(..=self.chaos.link_down_ns))
    }

    #[inline]
    pub fn delay(&mut self) -> u64 {
        if self.chaos.delay_ns == 0 {
            return 0;
        }
        self.rng.u64(..=self.chaos.delay_ns)
    }

    /// Puts the lanes into the order in which a step serves them, leaving some out.
    pub fn order(&mut self, lanes: &mut Vec<u16>) {
        if self.chaos.reorder_lanes {
            self.rng.shuffle(lanes);
            let keep = self.rng.usize(..=lanes.len());
            lanes.truncate(keep);
        }
    }
}
