//! Writes programs from seeds. It follows what Linux would do just closely enough that no step of a main thread waits for
//! ever, that buffers (whose size Linux does not fix) are not exceeded but where a program fills them on purpose, and that
//! what is left to chance on Linux (who of two waiters is woken) does not occur.

mod steps;
mod waiters;

use fastrand::Rng;

use crate::program::{Program, Step, Surroundings};

/// What the generator leaves out since it is known not to work yet, by the names that `Writer::may` is asked for, with the reason.
/// Each run prints it.
pub const NOT_YET: [(&str, &str); 0] = [];

/// One side of a connection.
#[derive(Clone, Debug, Default)]
struct Side {
    /// The process that opened it.
    actor: char,
    /// Sent by this side and not received by the other.
    unread: usize,
    /// Transfers that make `unread` up.
    pieces: usize,
    /// More was sent than is counted.
    is_full: bool,
    has_shut: bool,
    has_closed: bool,
    /// Calls may wait.
    is_blocking: bool,
}

/// A connection.
#[derive(Clone, Debug)]
struct Conn {
    name: String,
    sides: [Side; 2],
    /// Reset, or shut for receiving: what the ends see is Linux's to say, but no wait is safe.
    is_odd: bool,
}

impl Conn {
    fn end(&self, side: usize) -> String {
        format!("{}{}", self.name, ["a", "b"][side])
    }

    /// Both sides are open in both directions.
    fn is_whole(&self) -> bool {
        !self.is_odd
            && self
                .sides
                .iter()
                .all(|side| !side.has_shut && !side.has_closed && !side.is_full)
    }

    /// Nothing is on its way.
    fn is_quiet(&self) -> bool {
        self.is_whole() && self.sides.iter().all(|side| side.unread == 0)
    }
}

/// An epoll instance.
#[derive(Clone, Debug)]
struct Instance {
    name: String,
    actor: char,
    /// Connection, side, and what is asked for.
    registered: Vec<(usize, usize, String)>,
    is_nested: bool,
}

struct Writer<'a> {
    rng: Rng,
    steps: Vec<Step>,
    conns: Vec<Conn>,
    instances: Vec<Instance>,
    /// Of many connections, the one with which most happens: what is wrong takes several steps of one.
    favourite: usize,
    /// Bytes that may lie in one direction unread.
    most: usize,
    copies: usize,
    children: Vec<char>,
    left_out: &'a [(&'a str, &'a str)],
}

/// The program of a seed.
pub fn generate(seed: u64, left_out: &[(&str, &str)]) -> Program {
    let mut rng = Rng::with_seed(seed);
    let ring = [4096, 65_536, 4 << 20][rng.usize(..3)];
    let surroundings = Surroundings {
        ring,
        spin: [0, 50][rng.usize(..2)],
        lowest: rng.usize(..4) == 0,
    };
    let mut writer = Writer {
        rng,
        steps: Vec::new(),
        conns: Vec::new(),
        instances: Vec::new(),
        favourite: 0,
        most: (ring as usize / 2).min(40_000),
        copies: 0,
        children: Vec::new(),
        left_out,
    };
    writer.write();
    Program {
        surroundings,
        steps: writer.steps,
        is_exact: false,
    }
}

impl Writer<'_> {
    fn may(&self, feature: &str) -> bool {
        !self.left_out.iter().any(|(name, _)| *name == feature)
    }

    fn chance(&mut self, of: usize) -> bool {
        self.rng.usize(..of) == 0
    }

    fn any<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.rng.usize(..all.len())]
    }

    fn put(&mut self, actor: char, text: impl AsRef<str>) {
        self.steps.push(Step::new(actor, text.as_ref()));
    }

    fn put_thread(&mut self, actor: char, thread: u8, text: impl AsRef<str>) {
        self.steps
            .push(Step::of_thread(actor, thread, text.as_ref()));
    }

    /// Connections, some of them on rings and some on the way there; then steps.
    fn write(&mut self) {
        let count = match self.rng.usize(..10) {
            0..4 => self.rng.usize(1..3),
            4..7 => self.rng.usize(2..9),
            7..9 => self.rng.usize(9..14),
            _ => self.rng.usize(14..65),
        };
        for _ in 0..count {
            self.connect();
        }
        self.favourite = self.rng.usize(..count);
        let instances = self.rng.usize(..4);
        for _ in 0..instances {
            self.instance();
        }
        if self.chance(4) {
            self.one_way();
        }
        let steps = self.rng.usize(15..50);
        let when = self.rng.usize(..3) * steps / 4;
        for number in 0..steps {
            if number == when {
                self.warm();
            }
            self.any_step();
        }
    }

    fn connect(&mut self) {
        let (from, to) = match self.rng.usize(..10) {
            0 if self.may("bystander") => self.any(&[('A', 'C'), ('C', 'B')]),
            1 => ('A', 'A'),
            2..4 => ('B', 'A'),
            _ => ('A', 'B'),
        };
        let name = format!("c{}", self.conns.len());
        self.put(from, format!("conn {name} {to}"));
        let side = |actor| Side {
            actor,
            is_blocking: true,
            ..Side::default()
        };
        self.conns.push(Conn {
            name,
            sides: [side(from), side(to)],
            is_odd: false,
        });
    }

    /// Round trips on all that are whole, until they are on rings.
    fn warm(&mut self) {
        let whole = self.conns.iter().filter(|conn| conn.is_whole());
        let names: Vec<String> = whole.map(|conn| conn.name.clone()).collect();
        if !names.is_empty() {
            let names = names.join(" ");
            match self.rng.usize(..4) {
                0 => {
                    let rounds = self.rng.usize(3..6);
                    self.put('A', format!("talk {rounds} {names}"));
                }
                _ => self.put('A', format!("warm {names}")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_one_program_that_can_be_kept() {
        for seed in 0..300 {
            let program = generate(seed, &[]);
            assert_eq!(program, generate(seed, &[]));
            assert_eq!(program.to_string().parse(), Ok(program));
        }
    }
}
