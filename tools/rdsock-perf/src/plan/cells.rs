//! Which message sizes are measured in which mode.

use super::Mode;
use crate::error::{Error, Result};
use crate::wire::LARGEST;

/// One mode with one message size; 0 in mode cps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    pub mode: Mode,
    pub size: u64,
}

/// Modes and sizes in the order of the table; the sizes that suit each mode, or its default.
pub fn cells(modes: &[Mode], sizes: &[u64]) -> Vec<Cell> {
    const MIDDLE: u64 = 4096;
    let mut modes = modes.to_vec();
    modes.sort_unstable();
    modes.dedup();
    let mut cells = Vec::new();
    for mode in modes {
        let suits = |size: &u64| match mode {
            Mode::Rtt => true,
            Mode::Rate => *size <= MIDDLE,
            Mode::Bw => *size >= MIDDLE,
            Mode::Cps => false,
        };
        let default = match mode {
            Mode::Rtt | Mode::Rate => 64,
            Mode::Bw => 65536,
            Mode::Cps => 0,
        };
        let mut chosen: Vec<u64> = sizes.iter().copied().filter(suits).collect();
        chosen.sort_unstable();
        chosen.dedup();
        if chosen.is_empty() {
            chosen.push(default);
        }
        cells.extend(chosen.into_iter().map(|size| Cell { mode, size }));
    }
    cells
}

/// A size in bytes: a number, then perhaps k or M (powers of two), with or without iB.
pub fn parse_size(text: &str) -> Result<u64> {
    let refused = || {
        Error::Usage(format!(
            "{text:?} is not a size: expected bytes, as 64, 64k or 1M, from 1 to 256M"
        ))
    };
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match &lower[digits.len()..] {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        _ => return Err(refused()),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit))
        .filter(|size| (1..=LARGEST).contains(size))
        .ok_or_else(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("64").unwrap(), 64);
        assert_eq!(parse_size("64k").unwrap(), 65536);
        assert_eq!(parse_size("1MiB").unwrap(), 1 << 20);
        for wrong in ["", "0", "k", "-1", "1.5k", "64q", "1000000000M", "257M"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_mode_takes_the_sizes_that_suit_it() {
        let all = [Mode::Rtt, Mode::Rate, Mode::Bw, Mode::Cps];
        let pairs = |sizes: &[u64]| {
            cells(&all, sizes)
                .iter()
                .map(|cell| (cell.mode, cell.size))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            pairs(&[]),
            [
                (Mode::Rtt, 64),
                (Mode::Rate, 64),
                (Mode::Bw, 65536),
                (Mode::Cps, 0)
            ]
        );
        assert_eq!(
            pairs(&[1 << 20, 16]),
            [
                (Mode::Rtt, 16),
                (Mode::Rtt, 1 << 20),
                (Mode::Rate, 16),
                (Mode::Bw, 1 << 20),
                (Mode::Cps, 0)
            ]
        );
    }
}
