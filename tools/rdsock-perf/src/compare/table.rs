//! The table of a comparison, for a person.

use super::ratio::against;
use super::rows::{Row, Rows};
use crate::plan::{Mode, Path, Wait};
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table, TableComponent};

const HEADINGS: [&str; 14] = [
    "mode",
    "size",
    "path",
    "wait",
    "p50",
    "p99",
    "p99.9",
    "per s",
    "MB/s",
    "× tcp",
    "× tcp block",
    "× unix",
    "p50/line",
    "of ring",
];

/// One line for each row, with ratios, and what the ratios mean.
pub fn draw(rows: &Rows) -> String {
    let mut table = Table::new();
    table
        .load_preset(NOTHING)
        .set_style(TableComponent::HeaderLines, '─')
        .set_header(HEADINGS);
    for (index, column) in table.column_iter_mut().enumerate() {
        if !matches!(HEADINGS[index], "mode" | "path" | "wait") {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut mode = rows.rows.first().map(|row| row.mode);
    for row in &rows.rows {
        if mode.replace(row.mode) != Some(row.mode) {
            table.add_row([""]);
        }
        table.add_row(line(rows, row));
    }
    let between = between_nodes(rows);
    format!(
        "{table}\n\n\
         {between}\
         × tcp, × unix: times better than that path in the same way of waiting (p50 in rtt, MB/s in bw, else per s)\n\
         p50/line: round trip in cache-line round trips; of ring: p50 (rtt) or throughput as a part of a bare ring's"
    )
}

/// A paragraph on each row of rdsock-nodes beside the typical Ethernet and the bare engine; nothing without such rows.
fn between_nodes(rows: &Rows) -> String {
    let mut table = Table::new();
    table.load_preset(NOTHING).set_header([
        "rdsock-nodes",
        "size",
        "wait",
        "× tcp-veth",
        "× tcp-veth block",
        "× floor-engine",
    ]);
    let ours = (rows.rows.iter()).filter(|row| row.path == Path::RdsockNodes);
    for row in ours {
        let better = |path, wait| {
            against(rows, row, path, wait)
                .map(|ratio| format!("{}×", significant(ratio.times_better)))
                .unwrap_or_default()
        };
        table.add_row([
            row.mode.to_string(),
            size(row),
            row.wait.to_string(),
            better(Path::TcpVeth, row.wait),
            better(Path::TcpVeth, Wait::Block),
            better(Path::FloorEngine, Wait::Spin),
        ]);
    }
    match table.is_empty() {
        true => String::new(),
        false => format!("{table}\n\n"),
    }
}

/// A core taken away so often in a second makes a row doubtful.
const DOUBTFUL_PER_S: f64 = 20.0;

/// A line that names the rows during which something else ran on the two cores, if there are any.
pub fn disturbances(rows: &Rows) -> Option<String> {
    let often = rows.rows.iter().filter_map(|row| {
        let per_s = row
            .preempted_per_s()
            .filter(|&per_s| per_s > DOUBTFUL_PER_S)?;
        Some(format!("{} {} {} {per_s:.0}", row.mode, row.path, row.wait))
    });
    let named = often.collect::<Vec<_>>().join(", ");
    (!named.is_empty()).then(|| {
        format!("disturbed, as something else ran on the two cores, so often a second: {named}")
    })
}

/// The fields of one row.
fn line(rows: &Rows, row: &Row) -> [String; 14] {
    let better = |path, wait| {
        against(rows, row, path, wait)
            .map(|ratio| format!("{}×", significant(ratio.times_better)))
            .unwrap_or_default()
    };
    let of_floor = |path| {
        against(rows, row, path, Wait::Spin)
            .map(|ratio| significant(ratio.value))
            .unwrap_or_default()
    };
    let is_spin = row.wait == Wait::Spin;
    [
        row.mode.to_string(),
        size(row),
        row.path.to_string(),
        row.wait.to_string(),
        row.p50_ns().map(time).unwrap_or_default(),
        row.p99_ns().map(time).unwrap_or_default(),
        row.p999_ns().map(time).unwrap_or_default(),
        row.per_s().map(count).unwrap_or_default(),
        row.mb_s()
            .map(|mb_s| format!("{mb_s:.0}"))
            .unwrap_or_default(),
        better(Path::TcpLoopback, row.wait),
        if is_spin {
            better(Path::TcpLoopback, Wait::Block)
        } else {
            String::new()
        },
        better(Path::Unix, row.wait),
        of_floor(Path::FloorCacheline),
        of_floor(Path::FloorRing),
    ]
}

/// A message size.
fn size(row: &Row) -> String {
    match row.size {
        _ if row.mode == Mode::Cps => String::new(),
        bytes if bytes >= 1 << 20 && bytes % (1 << 20) == 0 => format!("{}M", bytes >> 20),
        bytes if bytes >= 1 << 10 && bytes % (1 << 10) == 0 => format!("{}k", bytes >> 10),
        bytes => bytes.to_string(),
    }
}

/// A time given in nanoseconds.
fn time(ns: f64) -> String {
    match ns {
        ns if ns < 1e4 => format!("{ns:.0} ns"),
        ns if ns < 1e7 => format!("{:.1} µs", ns / 1e3),
        ns => format!("{:.1} ms", ns / 1e6),
    }
}

/// A number of things each second.
fn count(per_s: f64) -> String {
    match per_s {
        n if n < 1e4 => format!("{n:.0}"),
        n if n < 1e6 => format!("{:.1}k", n / 1e3),
        n => format!("{:.2}M", n / 1e6),
    }
}

/// Three digits or so.
fn significant(value: f64) -> String {
    match value {
        v if v >= 99.5 => format!("{v:.0}"),
        v if v >= 9.95 => format!("{v:.1}"),
        v if v >= 0.0995 => format!("{v:.2}"),
        v => format!("{v:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::rows::tests::rows;
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(time(142.4), "142 ns");
        assert_eq!(time(69_420.0), "69.4 µs");
        assert_eq!(count(12_345_678.0), "12.35M");
        assert_eq!(significant(123.4), "123");
        assert_eq!(significant(2.5), "2.50");
        assert_eq!(significant(0.0123), "0.0123");
    }

    #[test]
    fn disturbed_rows_are_named() {
        let mut rows = rows(&[
            (Path::Unix, Mode::Rtt, Wait::Spin, 64, Some(1), 1.0),
            (Path::TcpLoopback, Mode::Rtt, Wait::Block, 64, Some(1), 1.0),
        ]);
        assert_eq!(disturbances(&rows), None);
        rows.rows[0].runs[0].preempted = Some(19);
        rows.rows[1].runs[0].preempted = Some(300);
        let text = disturbances(&rows).unwrap();
        assert!(text.ends_with(": rtt tcp-loopback block 300"), "{text}");
    }

    #[test]
    fn the_table_has_a_line_for_each_row_and_its_ratios() {
        let rows = rows(&[
            (
                Path::TcpLoopback,
                Mode::Rtt,
                Wait::Block,
                64,
                Some(70_000),
                1.0,
            ),
            (
                Path::TcpLoopback,
                Mode::Rtt,
                Wait::Spin,
                64,
                Some(10_000),
                1.0,
            ),
            (Path::RdsockLocal, Mode::Rtt, Wait::Spin, 64, Some(500), 1.0),
            (Path::RdsockLocal, Mode::Bw, Wait::Spin, 65536, None, 1e5),
        ]);
        let text = draw(&rows);
        assert!(!text.contains("floor-engine"), "{text}");
        let ours = text
            .lines()
            .find(|line| line.contains("rdsock-local"))
            .unwrap();
        assert!(ours.contains("20.0×") && ours.contains("140×"), "{ours}");
        assert!(text.contains("64k") && text.contains("6554"), "{text}");
    }

    #[test]
    fn nodes_stand_beside_ethernet() {
        let rtt = |path, wait, ns| (path, Mode::Rtt, wait, 64, Some(ns), 1.0);
        let rows = rows(&[
            rtt(Path::TcpVeth, Wait::Block, 60_000),
            rtt(Path::TcpVeth, Wait::Spin, 12_000),
            rtt(Path::RdsockNodes, Wait::Spin, 4000),
        ]);
        let text = draw(&rows);
        let line = text.lines().find(|line| line.contains("15.0×"));
        assert!(line.is_some_and(|line| line.contains("3.00×")), "{text}");
    }
}
