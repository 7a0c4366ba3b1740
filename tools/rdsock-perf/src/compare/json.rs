//! The comparison as JSON. `docs/rdsock-perf.md` describes the format.

use super::LeftOut;
use super::machine::Machine;
use super::ratio::{self, Ratio};
use super::rows::{Probe, Row, Rows};
use crate::clock::Facts;
use crate::plan::{ComparePlan, Mode, Path, Wait};
use serde::Serialize;

#[derive(Serialize)]
struct Document<'a> {
    format: u32,
    program: &'static str,
    machine: Machine,
    clock: Facts,
    settings: Settings,
    rows: Vec<JsonRow>,
    ratios: Vec<Ratio>,
    left_out: &'a [LeftOut],
    line_probes: &'a [Probe],
}

#[derive(Serialize)]
struct Settings {
    seconds: f64,
    rounds: u32,
    server_core: usize,
    client_core: usize,
    verify: bool,
    nagle: bool,
}

#[derive(Serialize)]
struct JsonRow {
    path: Path,
    mode: Mode,
    wait: Wait,
    size: u64,
    p50_ns: Option<f64>,
    p99_ns: Option<f64>,
    p999_ns: Option<f64>,
    per_s: Option<f64>,
    mb_s: Option<f64>,
    runs: usize,
    each: Vec<Each>,
}

#[derive(Serialize)]
struct Each {
    count: u64,
    seconds: f64,
    p50_ns: Option<u64>,
    p99_ns: Option<u64>,
    p999_ns: Option<u64>,
    max_ns: Option<u64>,
    per_s: f64,
    mb_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ring_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    preempted: Option<u64>,
}

/// The text of the file.
pub fn text(plan: &ComparePlan, rows: &Rows, left_out: &[LeftOut], clock: Facts) -> String {
    let document = Document {
        format: 1,
        program: concat!("rdsock-perf ", env!("CARGO_PKG_VERSION")),
        machine: Machine::look(),
        clock,
        settings: Settings {
            seconds: plan.seconds,
            rounds: plan.rounds,
            server_core: plan.cores.server,
            client_core: plan.cores.client,
            verify: plan.verify,
            nagle: plan.nagle,
        },
        rows: rows.rows.iter().map(json_row).collect(),
        ratios: ratio::all(rows),
        left_out,
        line_probes: &rows.probes,
    };
    let mut text = serde_json::to_string_pretty(&document).expect("a document of plain values");
    text.push('\n');
    text
}

fn json_row(row: &Row) -> JsonRow {
    let each = row.runs.iter().map(|run| Each {
        count: run.count,
        seconds: run.seconds,
        p50_ns: run.p50_ns,
        p99_ns: run.p99_ns,
        p999_ns: run.p999_ns,
        max_ns: run.max_ns,
        per_s: run.per_s,
        mb_s: run.mb_s,
        ring_bytes: run.ring_bytes,
        preempted: run.preempted,
    });
    JsonRow {
        path: row.path,
        mode: row.mode,
        wait: row.wait,
        size: row.size,
        p50_ns: row.p50_ns(),
        p99_ns: row.p99_ns(),
        p999_ns: row.p999_ns(),
        per_s: row.per_s(),
        mb_s: row.mb_s(),
        runs: row.runs.len(),
        each: each.collect(),
    }
}
