//! What is printed.

use crate::cli::Test;
use crate::measure::Outcome;
use crate::plan::Plan;
use clap::ValueEnum;
use rdsock_model::Counters;
use rdsock_output::{OutputError, line};
use serde::Serialize;

/// One test, as it is printed. Times are nanoseconds one way, costs are for one operation, both nodes
/// together.
#[derive(Debug, Serialize)]
struct Line {
    test: String,
    bytes: u32,
    operations: u64,
    min: u64,
    p50: u64,
    p90: u64,
    p99: u64,
    p999: u64,
    max: u64,
    mean: f64,
    seconds: f64,
    /// Bytes in one direction, in 10^6 each second.
    mb_s: f64,
    register_reads: f64,
    doorbells: f64,
    payload_reads: f64,
    payload_writes: f64,
    messages: f64,
    /// All samples: nanoseconds, and how many.
    histogram: Vec<(u64, u64)>,
}

/// Prints all outcomes.
pub fn print(plan: &Plan, outcomes: &[Outcome]) -> Result<(), OutputError> {
    if !plan.json {
        line!(
            "{} bytes, devices: {:?}; nanoseconds one way; costs of one operation",
            plan.size,
            plan.devices
        )?;
        line!(
            "{:<13}{:>8}{:>8}{:>8}{:>8}{:>9}{:>8}{:>11}{:>10}{:>10}{:>10}{:>9}",
            "",
            "min",
            "p50",
            "p99",
            "p99.9",
            "max",
            "MB/s",
            "reg reads",
            "doorbells",
            "payload r",
            "payload w",
            "messages"
        )?;
    }
    for outcome in outcomes {
        let line = Line::new(plan, outcome);
        if plan.json {
            rdsock_output::json(serde_json::json!(line))?;
        } else {
            line!(
                "{:<13}{:>8}{:>8}{:>8}{:>8}{:>9}{:>8.0}{:>11.3}{:>10.3}{:>10.3}{:>10.3}{:>9.3}",
                line.test,
                line.min,
                line.p50,
                line.p99,
                line.p999,
                line.max,
                line.mb_s,
                line.register_reads,
                line.doorbells,
                line.payload_reads,
                line.payload_writes,
                line.messages
            )?;
        }
    }
    Ok(())
}

impl Line {
    fn new(plan: &Plan, outcome: &Outcome) -> Self {
        let latency = &outcome.latency;
        let each = |of: fn(&Counters) -> u64| {
            let sum = |counters: &[Counters; 2]| counters.iter().map(of).sum::<u64>();
            (sum(&outcome.after) - sum(&outcome.before)) as f64 / outcome.operations as f64
        };
        let bytes = if outcome.test == Test::Mailbox {
            48
        } else {
            plan.size
        };
        let name = outcome.test.to_possible_value();
        let one_way = latency.len() * u64::from(bytes);
        Line {
            test: name.map_or(String::new(), |name| name.get_name().into()),
            bytes,
            operations: outcome.operations,
            min: latency.min(),
            p50: latency.value_at_quantile(0.5),
            p90: latency.value_at_quantile(0.9),
            p99: latency.value_at_quantile(0.99),
            p999: latency.value_at_quantile(0.999),
            max: latency.max(),
            mean: latency.mean(),
            seconds: outcome.seconds,
            mb_s: one_way as f64 / outcome.seconds / 1e6,
            register_reads: each(|counters| counters.register_reads),
            doorbells: each(|counters| counters.doorbells),
            payload_reads: each(|counters| counters.payload_reads),
            payload_writes: each(|counters| counters.payload_writes),
            messages: each(|counters| counters.messages_in + counters.notifications_in),
            histogram: latency
                .iter_recorded()
                .map(|value| (value.value_iterated_to(), value.count_at_value()))
                .collect(),
        }
    }
}
