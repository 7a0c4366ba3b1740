//! Ratios between rows: each row against kernel TCP, UNIX sockets and the floors.

use super::rows::{Row, Rows};
use crate::plan::{Mode, Path, Wait};
use serde::Serialize;

/// One row against another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ratio {
    /// Path of the row.
    pub path: Path,
    /// Mode of both rows.
    pub mode: Mode,
    /// Wait of the row.
    pub wait: Wait,
    /// Message size of the row.
    pub size: u64,
    /// Path that it is compared with.
    pub against: Path,
    /// Wait of that.
    pub against_wait: Wait,
    /// Which figure is compared: `p50_ns` in mode rtt, `mb_s` in mode bw, else `per_s`.
    pub figure: &'static str,
    /// Figure of the row divided by figure of the other.
    pub value: f64,
    /// The same, turned so that more than 1 means that the row is better.
    pub times_better: f64,
}

/// All ratios that have a meaning.
pub fn all(rows: &Rows) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for row in &rows.rows {
        for (path, wait) in references(row) {
            ratios.extend(against(rows, row, path, wait));
        }
    }
    ratios
}

/// What a row is compared with.
fn references(row: &Row) -> Vec<(Path, Wait)> {
    let mut references = vec![(Path::TcpLoopback, row.wait)];
    if row.wait == Wait::Spin {
        references.push((Path::TcpLoopback, Wait::Block));
    }
    references.extend([
        (Path::Unix, row.wait),
        (Path::FloorCacheline, Wait::Spin),
        (Path::FloorRing, Wait::Spin),
    ]);
    if row.path == Path::RdsockNodes {
        references.push((Path::TcpVeth, row.wait));
        if row.wait == Wait::Spin {
            references.push((Path::TcpVeth, Wait::Block));
        }
        references.push((Path::FloorEngine, Wait::Spin));
    }
    references
}

/// The ratio of `row` against the row of `path` and `wait`, where there is such another row.
pub fn against(rows: &Rows, row: &Row, path: Path, wait: Wait) -> Option<Ratio> {
    let is_size = |other: &Row| other.size == row.size || path == Path::FloorCacheline;
    let other = rows.rows.iter().find(|other| {
        (other.path, other.wait, other.mode) == (path, wait, row.mode) && is_size(other)
    })?;
    if std::ptr::eq(other, row) {
        return None;
    }
    let value = figure(row)? / figure(other)?;
    let times_better = if row.mode == Mode::Rtt {
        1.0 / value
    } else {
        value
    };
    (value.is_finite() && value > 0.0).then_some(Ratio {
        path: row.path,
        mode: row.mode,
        wait: row.wait,
        size: row.size,
        against: path,
        against_wait: wait,
        figure: figure_name(row.mode),
        value,
        times_better,
    })
}

/// The figure that is compared in a mode.
fn figure(row: &Row) -> Option<f64> {
    match row.mode {
        Mode::Rtt => row.p50_ns(),
        Mode::Bw => row.mb_s(),
        Mode::Rate | Mode::Cps => row.per_s(),
    }
}

/// Its name.
fn figure_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Rtt => "p50_ns",
        Mode::Bw => "mb_s",
        Mode::Rate | Mode::Cps => "per_s",
    }
}

#[cfg(test)]
mod tests {
    use super::super::rows::tests::rows;
    use super::*;

    #[test]
    fn less_latency_is_better() {
        let rows = rows(&[
            (
                Path::FloorCacheline,
                Mode::Rtt,
                Wait::Spin,
                64,
                Some(100),
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
            (Path::RdsockLocal, Mode::Rtt, Wait::Spin, 64, Some(250), 1.0),
        ]);
        let ours = &rows.rows[2];
        let tcp = against(&rows, ours, Path::TcpLoopback, Wait::Spin).unwrap();
        assert_eq!(
            (tcp.figure, tcp.value, tcp.times_better),
            ("p50_ns", 0.025, 40.0)
        );
        let line = against(&rows, ours, Path::FloorCacheline, Wait::Spin).unwrap();
        assert_eq!((line.value, line.times_better), (2.5, 0.4));
        assert_eq!(against(&rows, ours, Path::Unix, Wait::Spin), None);
    }

    #[test]
    fn more_throughput_is_better() {
        let rows = rows(&[
            (Path::FloorRing, Mode::Bw, Wait::Spin, 65536, None, 4000.0),
            (Path::TcpLoopback, Mode::Bw, Wait::Block, 65536, None, 500.0),
            (Path::RdsockLocal, Mode::Bw, Wait::Spin, 65536, None, 3000.0),
        ]);
        let all = all(&rows);
        let find = |against| {
            all.iter()
                .find(|ratio| ratio.path == Path::RdsockLocal && ratio.against == against)
        };
        assert_eq!(find(Path::FloorRing).unwrap().times_better, 0.75);
        let tcp = find(Path::TcpLoopback).unwrap();
        assert_eq!(
            (tcp.against_wait, tcp.times_better, tcp.figure),
            (Wait::Block, 6.0, "mb_s")
        );
    }

    #[test]
    fn the_line_serves_every_size_and_other_figures_only_their_own() {
        let rows = rows(&[
            (
                Path::FloorCacheline,
                Mode::Rtt,
                Wait::Spin,
                64,
                Some(100),
                1.0,
            ),
            (Path::Unix, Mode::Rtt, Wait::Spin, 64, Some(1000), 1.0),
            (
                Path::RdsockLocal,
                Mode::Rtt,
                Wait::Spin,
                1024,
                Some(500),
                1.0,
            ),
        ]);
        assert!(against(&rows, &rows.rows[2], Path::FloorCacheline, Wait::Spin).is_some());
        assert!(against(&rows, &rows.rows[2], Path::Unix, Wait::Spin).is_none());
    }

    #[test]
    fn nodes_are_compared_with_ethernet_and_with_the_engine() {
        let rtt = |path, wait, ns| (path, Mode::Rtt, wait, 64, Some(ns), 1.0);
        let rows = rows(&[
            rtt(Path::FloorEngine, Wait::Spin, 2000),
            rtt(Path::TcpVeth, Wait::Block, 60_000),
            rtt(Path::TcpVeth, Wait::Spin, 12_000),
            rtt(Path::RdsockNodes, Wait::Spin, 4000),
            rtt(Path::Unix, Wait::Spin, 3000),
        ]);
        let all = all(&rows);
        let better = |against, wait| {
            let found = all.iter().find(|ratio| {
                (ratio.path, ratio.against, ratio.against_wait)
                    == (Path::RdsockNodes, against, wait)
            });
            found.unwrap().times_better
        };
        assert_eq!(better(Path::TcpVeth, Wait::Block), 15.0);
        assert_eq!(better(Path::TcpVeth, Wait::Spin), 3.0);
        assert_eq!(better(Path::FloorEngine, Wait::Spin), 0.5);
        assert!(
            !all.iter()
                .any(|ratio| ratio.path == Path::Unix && ratio.against == Path::TcpVeth)
        );
    }

    #[test]
    fn no_row_is_compared_with_itself_or_with_nothing() {
        let rows = rows(&[
            (Path::TcpLoopback, Mode::Cps, Wait::Block, 0, Some(5), 100.0),
            (Path::RdsockLocal, Mode::Cps, Wait::Block, 0, Some(5), 0.0),
        ]);
        assert!(all(&rows).is_empty());
    }
}
