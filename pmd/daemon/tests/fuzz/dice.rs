//! Where the fuzzer's choices come from: a seed, so that a run can be tried again.

/// Choices made from a seed.
pub struct Dice(fastrand::Rng);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Dice(fastrand::Rng::with_seed(seed))
    }

    /// Below `count`, which is not 0.
    pub fn below(&mut self, count: usize) -> usize {
        self.0.usize(..count)
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// One of these, unless there are none.
    pub fn one_of<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        (!of.is_empty()).then(|| &of[self.below(of.len())])
    }

    /// Any word.
    pub fn word(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// Any bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill(bytes);
    }

    /// Overwrites a field with a lie: nothing, everything, one off, a bit off, what is `known` of
    /// others, or anything.
    pub fn lie(&mut self, field: &mut [u8], known: &[u64]) {
        let mut word = [0; 8];
        let len = field.len().min(8);
        word[..len].copy_from_slice(&field[..len]);
        let old = u64::from_ne_bytes(word);
        let new = match self.below(8) {
            0 => return field.fill(0),
            1 => return field.fill(0xff),
            2 => old.wrapping_add(1),
            3 => old.wrapping_sub(1),
            4 => old ^ 1 << self.below(8 * len),
            5 => self.word() >> self.below(64),
            6 => return self.fill(field),
            _ => self.one_of(known).copied().unwrap_or(0),
        };
        field[..len].copy_from_slice(&new.to_ne_bytes()[..len]);
    }
}
