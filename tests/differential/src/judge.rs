//! Has a program carried out on plain Linux and under the shim, and compares.

use std::collections::HashMap;
use std::fmt::{Display, Formatter, Result as Formatted};
use std::path::PathBuf;

use crate::conductor::{Log, conduct};
use crate::program::{Program, Surroundings};
use crate::stage::Stage;

/// The first line in which two logs differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The number of the step, or of what is said after the last.
    pub at: usize,
    /// On plain Linux.
    pub plain: String,
    /// Under the shim.
    pub preloaded: String,
}

impl Difference {
    fn between(plain: &Log, preloaded: &Log) -> Option<Self> {
        let length = plain.lines.len().max(preloaded.lines.len());
        let line = |log: &Log, at: usize| log.lines.get(at).cloned().unwrap_or_default();
        (0..length)
            .map(|at| Difference {
                at,
                plain: line(plain, at),
                preloaded: line(preloaded, at),
            })
            .find(|difference| difference.plain != difference.preloaded)
    }
}

/// What a program shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The shim does what Linux does.
    Same,
    /// It does something else.
    Differs {
        /// The first difference.
        difference: Difference,
        /// Runs under the shim that differed.
        times: u32,
        /// Of so many.
        of: u32,
    },
    /// Linux itself is not always the same, or the program hangs there: the program says nothing.
    Undetermined(String),
}

/// Processes for every surroundings that were asked for; on plain Linux there are none.
#[derive(Debug)]
pub struct Judge {
    actor: PathBuf,
    stages: HashMap<Option<Surroundings>, Stage>,
    /// Connections that were to be on rings.
    pub wanted: usize,
    /// Of these, those that were.
    pub reached: usize,
}

impl Judge {
    /// With the program of the processes.
    pub fn new(actor: PathBuf) -> Self {
        Judge {
            actor,
            stages: HashMap::new(),
            wanted: 0,
            reached: 0,
        }
    }

    fn stage(&mut self, program: &Program, preloaded: bool) -> Stage {
        let surroundings = preloaded.then_some(program.surroundings);
        let kept = self.stages.remove(&surroundings);
        kept.unwrap_or_else(|| Stage::new(&self.actor, surroundings))
    }

    fn keep(&mut self, program: &Program, preloaded: bool, stage: Stage, log: &Log) {
        if !log.is_broken {
            let surroundings = preloaded.then_some(program.surroundings);
            self.stages.insert(surroundings, stage);
        }
        self.wanted += log.wanted;
        self.reached += log.reached;
    }

    /// One run.
    pub fn run(&mut self, program: &Program, preloaded: bool) -> Log {
        let mut stage = self.stage(program, preloaded);
        let log = conduct(&mut stage, program);
        self.keep(program, preloaded, stage, &log);
        log
    }

    /// One run of each kind, side by side.
    pub fn both(&mut self, program: &Program) -> [Log; 2] {
        let mut stages = [false, true].map(|preloaded| self.stage(program, preloaded));
        let [plain, preloaded] = &mut stages;
        let logs = std::thread::scope(|scope| {
            let plain = scope.spawn(|| conduct(plain, program));
            let preloaded = conduct(preloaded, program);
            [plain.join().unwrap_or_default(), preloaded]
        });
        for ((stage, log), preloaded) in stages.into_iter().zip(&logs).zip([false, true]) {
            self.keep(program, preloaded, stage, log);
        }
        logs
    }

    /// Whether a program shows a difference in one of so many tries: for shrinking.
    pub fn fails(&mut self, program: &Program, tries: u32) -> Option<Difference> {
        for _ in 0..tries {
            let [plain, preloaded] = self.both(program);
            if plain.is_broken {
                return None;
            }
            if let Some(difference) = Difference::between(&plain, &preloaded) {
                let again = self.run(program, false);
                return (again == plain).then_some(difference);
            }
        }
        None
    }

    /// Judges a program. A difference is looked at again, so that nobody blames the shim for what Linux leaves open.
    pub fn judge(&mut self, program: &Program) -> Verdict {
        let [plain, preloaded] = self.both(program);
        let unknown = plain
            .lines
            .iter()
            .find(|line| line.contains("UNKNOWN STEP"));
        if let Some(line) = unknown {
            return Verdict::Undetermined(line.clone());
        }
        if plain.is_broken {
            let last = plain.lines.last().cloned().unwrap_or_default();
            return Verdict::Undetermined(format!("on plain Linux: {last}"));
        }
        let Some(difference) = Difference::between(&plain, &preloaded) else {
            return Verdict::Same;
        };
        for _ in 0..4 {
            let again = self.run(program, false);
            if let Some(own) = Difference::between(&plain, &again) {
                let Difference {
                    at,
                    plain,
                    preloaded,
                } = own;
                return Verdict::Undetermined(format!(
                    "step {at} on plain Linux: {plain}, and: {preloaded}"
                ));
            }
        }
        let mut times = 1;
        for _ in 0..4 {
            let again = self.run(program, true);
            times += u32::from(Difference::between(&plain, &again).is_some());
        }
        Verdict::Differs {
            difference,
            times,
            of: 5,
        }
    }
}

/// A program and how it differs, for people: the steps up to the one that differs, and what it answered.
#[derive(Debug)]
pub struct Account<'a>(pub &'a Program, pub &'a Difference);

impl Display for Account<'_> {
    fn fmt(&self, out: &mut Formatter) -> Formatted {
        let Account(program, difference) = self;
        let text = program.to_string();
        for (number, line) in text.lines().enumerate() {
            writeln!(out, "{line}")?;
            if number == difference.at + program.lines_before() {
                writeln!(
                    out,
                    "# plain Linux: {}\n# under the shim: {}",
                    difference.plain, difference.preloaded
                )?;
            }
        }
        if difference.at >= program.steps.len() {
            writeln!(
                out,
                "# at the end, on plain Linux: {}\n# under the shim: {}",
                difference.plain, difference.preloaded
            )?;
        }
        Ok(())
    }
}
