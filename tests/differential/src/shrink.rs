//! Makes a failing program small: leaves out connections, runs of steps and single steps, and lowers numbers, while it
//! still fails. A step that makes no sense any more answers the same everywhere, so any part of a program is a program.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::judge::{Difference, Judge};
use crate::program::{Program, Step};

/// The smallest that was found within a time limit, with its difference. `tries` is how often a candidate is run before
/// it is held to be right: more for a failure that is seldom seen.
pub fn shrink(
    judge: &mut Judge,
    program: &Program,
    difference: Difference,
    tries: u32,
    limit: Duration,
) -> (Program, Difference) {
    let mut best = Shrinking {
        judge,
        program: program.clone(),
        difference,
        tries,
        end: Instant::now() + limit,
    };
    let behind = best.difference.at + 1;
    best.without(|at, _| at >= behind);
    loop {
        let before = best.program.clone();
        best.leave_out_connections();
        let mut size = best.program.steps.len() / 2;
        while size > 0 {
            best.leave_out_runs(size);
            size /= 2;
        }
        best.lower_numbers();
        if best.program == before || Instant::now() > best.end {
            return (best.program, best.difference);
        }
    }
}

/// The call that differs.
fn kind(program: &Program, difference: &Difference) -> String {
    let step = program.steps.get(difference.at);
    step.map_or(String::new(), |step| step.word(0).to_owned())
}

struct Shrinking<'a> {
    judge: &'a mut Judge,
    program: Program,
    difference: Difference,
    tries: u32,
    end: Instant,
}

impl Shrinking<'_> {
    fn try_steps(&mut self, steps: Vec<Step>) -> bool {
        let surroundings = self.program.surroundings;
        let candidate = Program {
            surroundings,
            is_exact: self.program.is_exact,
            steps,
        };
        if candidate == self.program || Instant::now() > self.end {
            return false;
        }
        let kind = kind(&self.program, &self.difference);
        match self.judge.fails(&candidate, self.tries) {
            None => false,
            // Another fault is for another time.
            Some(difference) if self::kind(&candidate, &difference) != kind => false,
            Some(difference) => {
                (self.program, self.difference) = (candidate, difference);
                true
            }
        }
    }

    fn without(&mut self, left_out: impl Fn(usize, &Step) -> bool) -> bool {
        let steps = self.program.steps.iter().enumerate();
        let kept = steps.filter(|(at, step)| !left_out(*at, step));
        let kept: Vec<Step> = kept.map(|(_, step)| step.clone()).collect();
        kept.len() < self.program.steps.len() && self.try_steps(kept)
    }

    fn leave_out_connections(&mut self) {
        let made = self
            .program
            .steps
            .iter()
            .filter(|step| step.word(0) == "conn");
        let names: BTreeSet<String> = made.map(|step| step.word(1).to_owned()).collect();
        for name in names {
            // Steps of several connections lose the one; steps of it alone go.
            let cut = |step: &Step| -> Option<Step> {
                let others = |word: &&String| !Step::new('A', &format!("x {word}")).names(&name);
                let list = matches!(step.word(0), "warm" | "talk" | "poll" | "ppoll" | "select");
                match (step.names(&name), list) {
                    (false, _) => Some(step.clone()),
                    (true, false) => None,
                    (true, true) => Some(Step {
                        words: step.words.iter().filter(others).cloned().collect(),
                        ..step.clone()
                    }),
                }
            };
            let steps = self.program.steps.iter().filter_map(cut).collect();
            self.try_steps(steps);
        }
    }

    fn leave_out_runs(&mut self, size: usize) {
        let mut end = self.program.steps.len();
        while end > 0 {
            let start = end.saturating_sub(size);
            self.without(|at, _| (start..end).contains(&at));
            end = start.min(self.program.steps.len());
        }
    }

    fn lower_numbers(&mut self) {
        for at in 0..self.program.steps.len() {
            for place in 1..4 {
                let word = self
                    .program
                    .steps
                    .get(at)
                    .map_or("", |step| step.word(place));
                let Ok(number) = word.parse::<u64>() else {
                    continue;
                };
                for lower in [1, 10, 100, number / 4, number / 2] {
                    let mut steps = self.program.steps.clone();
                    let word = steps.get_mut(at).and_then(|step| step.words.get_mut(place));
                    if 0 < lower
                        && lower < number
                        && let Some(word) = word
                    {
                        *word = lower.to_string();
                        if self.try_steps(steps) {
                            break;
                        }
                    }
                }
            }
        }
    }
}
