//! The command line: programs from seeds for long, one seed, or a program from a file.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use rdsock_differential::generator::{NOT_YET, generate};
use rdsock_differential::judge::{Account, Judge, Verdict};
use rdsock_differential::program::Program;
use rdsock_differential::shrink::shrink;

/// Runs programs of socket calls on plain Linux and under the shim, and compares what the calls answer.
#[derive(Debug, Parser)]
struct Options {
    /// Programs kept in files, in place of those from seeds.
    files: Vec<PathBuf>,
    /// The first seed; by default one from the clock.
    #[arg(long)]
    seed: Option<u64>,
    /// Programs to run.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Ends after so many minutes, whatever the count.
    #[arg(long)]
    minutes: Option<u64>,
    /// Ends after so many failures.
    #[arg(long, default_value_t = 1)]
    failures: usize,
    /// Runs each program so often.
    #[arg(long, default_value_t = 1)]
    times: u32,
    /// Lets the generator use what is known not to work yet.
    #[arg(long)]
    all_features: bool,
    /// Prints programs, and with `--log` what each step answered.
    #[arg(long)]
    print: bool,
    /// Prints what each step answered on plain Linux and under the shim.
    #[arg(long)]
    log: bool,
    /// Does not shrink a program that fails.
    #[arg(long)]
    no_shrink: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let actor = std::env::current_exe().expect("this program has a name");
    let mut run = Run {
        judge: Judge::new(actor.with_file_name("rdsock-differential-actor")),
        began: Instant::now(),
        programs: 0,
        failures: 0,
        undetermined: 0,
        options,
    };
    let files = run.options.files.clone();
    for file in &files {
        let text = std::fs::read_to_string(file);
        match text
            .map_err(|error| error.to_string())
            .and_then(|text| text.parse())
        {
            Ok(program) => run.one(&program, &file.display().to_string()),
            Err(error) => {
                println!("{}: {error}", file.display());
                run.failures += 1;
            }
        }
    }
    if files.is_empty() {
        run.seeds();
    }
    run.report();
    match run.failures {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

struct Run {
    judge: Judge,
    began: Instant,
    programs: u64,
    failures: usize,
    undetermined: u64,
    options: Options,
}

impl Run {
    fn seeds(&mut self) {
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let fresh = clock.map_or(0, |time| time.as_secs() * 1_000_000);
        let first = self.options.seed.unwrap_or(fresh);
        let left_out: &[(&str, &str)] = if self.options.all_features {
            &[]
        } else {
            &NOT_YET
        };
        for (name, why) in left_out {
            println!("NOT YET: {name}: {why}");
        }
        let limit = self
            .options
            .minutes
            .map(|minutes| Duration::from_secs(minutes * 60));
        for seed in first..first.saturating_add(self.options.count) {
            let late = limit.is_some_and(|limit| self.began.elapsed() > limit);
            if late || self.failures >= self.options.failures {
                break;
            }
            let program = generate(seed, left_out);
            self.one(&program, &format!("--seed {seed}"));
        }
    }

    fn one(&mut self, program: &Program, name: &str) {
        if self.options.print {
            println!("# {name}\n{program}");
        }
        for _ in 0..self.options.times {
            self.programs += 1;
            if self.options.log {
                self.show(program);
                continue;
            }
            match self.judge.judge(program) {
                Verdict::Same => {}
                Verdict::Undetermined(why) => {
                    self.undetermined += 1;
                    println!("UNDETERMINED {name}: {why}");
                }
                Verdict::Differs {
                    difference,
                    times,
                    of,
                } => {
                    self.failures += 1;
                    println!("\nFAILED {name}: {times} of {of} runs differ");
                    println!("again: rdsock-differential {name} --times 20");
                    if self.options.no_shrink {
                        println!("{}", Account(program, &difference));
                        return;
                    }
                    let tries = (3 * of / times).max(2);
                    let limit = Duration::from_secs(90);
                    let (small, difference) =
                        shrink(&mut self.judge, program, difference, tries, limit);
                    println!(
                        "shrunk to {} steps:\n{}",
                        small.steps.len(),
                        Account(&small, &difference)
                    );
                    return;
                }
            }
        }
    }

    fn show(&mut self, program: &Program) {
        let [plain, preloaded] = self.judge.both(program);
        let length = plain.lines.len().max(preloaded.lines.len());
        for at in 0..length {
            let step = program
                .steps
                .get(at)
                .map(ToString::to_string)
                .unwrap_or_default();
            let line = |lines: &[String]| lines.get(at).cloned().unwrap_or_default();
            let (plain, preloaded) = (line(&plain.lines), line(&preloaded.lines));
            match plain == preloaded {
                true => println!("{at:3} {step:40} {plain}"),
                false => println!("{at:3} {step:40} {plain}    UNDER THE SHIM: {preloaded}"),
            }
        }
    }

    fn report(&self) {
        let Judge {
            wanted, reached, ..
        } = self.judge;
        println!(
            "{} programs in {:.1} s, {} failed, {} undetermined; {reached} of {wanted} connections that should be on rings were",
            self.programs,
            self.began.elapsed().as_secs_f64(),
            self.failures,
            self.undetermined,
        );
    }
}
