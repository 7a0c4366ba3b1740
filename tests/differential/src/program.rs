//! A program of socket calls, as text: one step a line. The generator writes it, people read it, the conductor has it
//! carried out. `docs/differential.md` lists the steps.

use std::fmt::{Display, Formatter, Result as Formatted};
use std::str::FromStr;

/// One step: a call of one thread of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The process: `A`, `B`, … (`C` is never under the shim).
    pub actor: char,
    /// The thread: 0 is the main one, which nothing but the conductor keeps waiting.
    pub thread: u8,
    /// What it does, and with what.
    pub words: Vec<String>,
}

impl Step {
    /// A step of the main thread.
    pub fn new(actor: char, text: &str) -> Self {
        Self::of_thread(actor, 0, text)
    }

    /// A step of any thread.
    pub fn of_thread(actor: char, thread: u8, text: &str) -> Self {
        let words = text.split_whitespace().map(str::to_owned).collect();
        Step {
            actor,
            thread,
            words,
        }
    }

    /// A word, or nothing.
    pub fn word(&self, at: usize) -> &str {
        self.words.get(at).map_or("", String::as_str)
    }

    /// A word that is a number, or 0.
    pub fn number(&self, at: usize) -> u64 {
        self.word(at).parse().unwrap_or(0)
    }

    /// The words from one on.
    pub fn rest(&self, from: usize) -> &[String] {
        self.words.get(from..).unwrap_or(&[])
    }

    /// Whether it names this connection, or one of its ends or their copies.
    pub fn names(&self, conn: &str) -> bool {
        self.rest(1).iter().any(|word| {
            let name = word.split(':').next().unwrap_or_default();
            name == conn
                || name
                    .strip_prefix(conn)
                    .is_some_and(|end| end.starts_with(['a', 'b']))
        })
    }
}

impl Display for Step {
    fn fmt(&self, out: &mut Formatter) -> Formatted {
        match self.thread {
            0 => write!(out, "{} {}", self.actor, self.words.join(" ")),
            thread => write!(out, "{}/{thread} {}", self.actor, self.words.join(" ")),
        }
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let wrong = || format!("not a step (PROCESS[/THREAD] WORDS): {line}");
        let (who, text) = line.trim().split_once(' ').ok_or_else(wrong)?;
        let (actor, thread) = who.split_once('/').unwrap_or((who, "0"));
        let mut letters = actor.chars();
        match (letters.next(), letters.next(), thread.parse()) {
            (Some(actor @ 'A'..='Z'), None, Ok(thread)) => Ok(Step::of_thread(actor, thread, text)),
            _ => Err(wrong()),
        }
    }
}

/// What the processes are started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Surroundings {
    /// Bytes of each ring (`ring_size` of the daemon).
    pub ring: u32,
    /// `RDSOCK_SPIN_US`.
    pub spin: u32,
    /// The shim has the lowest thresholds, so that few bytes and connections are many.
    pub lowest: bool,
}

/// A program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// What the processes are started with.
    pub surroundings: Surroundings,
    /// The steps, one after the other.
    pub steps: Vec<Step>,
    /// No edge may be told again, for a case about that.
    pub is_exact: bool,
}

impl Program {
    /// Lines of its text before the steps.
    pub fn lines_before(&self) -> usize {
        2 + usize::from(self.surroundings.lowest) + usize::from(self.is_exact)
    }
}

impl Display for Program {
    fn fmt(&self, out: &mut Formatter) -> Formatted {
        let Surroundings { ring, spin, lowest } = self.surroundings;
        writeln!(out, "ring {ring}\nspin {spin}")?;
        if lowest {
            writeln!(out, "lowest")?;
        }
        if self.is_exact {
            writeln!(out, "exact")?;
        }
        self.steps
            .iter()
            .try_for_each(|step| writeln!(out, "{step}"))
    }
}

impl FromStr for Program {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut program = Program {
            surroundings: Surroundings {
                ring: 4 << 20,
                spin: 50,
                lowest: false,
            },
            steps: Vec::new(),
            is_exact: false,
        };
        for line in text.lines().map(str::trim) {
            let number = |text: &str| {
                text.trim()
                    .parse()
                    .map_err(|_| format!("no number: {line}"))
            };
            if line.is_empty() || line.starts_with('#') {
                continue;
            } else if line == "exact" {
                program.is_exact = true;
            } else if line == "lowest" {
                program.surroundings.lowest = true;
            } else if let Some(ring) = line.strip_prefix("ring ") {
                program.surroundings.ring = number(ring)?;
            } else if let Some(spin) = line.strip_prefix("spin ") {
                program.surroundings.spin = number(spin)?;
            } else {
                program.steps.push(line.parse()?);
            }
        }
        Ok(program)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_comes_back() {
        let text = "ring 4096\nspin 0\nlowest\nexact\nA conn c0 B\nB/1 start recv c0b 10 waitall\nB/1 join\n";
        let program: Program = text.parse().unwrap();
        assert_eq!(program.to_string(), text);
        assert_eq!(program.steps[1].thread, 1);
        assert!("a conn".parse::<Step>().is_err());
    }

    #[test]
    fn a_step_names_its_connections() {
        let step: Step = "A poll 0 c1a:in c12b:out".parse().unwrap();
        assert!(step.names("c1") && step.names("c12") && !step.names("c2"));
    }
}
