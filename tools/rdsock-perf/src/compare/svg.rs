//! The latency distributions as a drawing: one panel for each message size, one curve for each path and wait.
//!
//! Both axes are logarithmic: across, how rare a sample is (1, 1 in 10, 1 in 100, … are slower), up, its latency.

use super::rows::{Row, Rows};
use crate::error::{Error, Result};
use crate::plan::{Mode, Path, Wait};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::error::Error as StdError;

/// Width and height of one panel, in pixels.
const PANEL: (u32, u32) = (960, 540);
/// Room for the legend at the right of a panel, in pixels.
const LEGEND: u32 = 190;
/// Points of a curve for each power of ten.
const STEPS: u32 = 24;

type Drawn = std::result::Result<(), Box<dyn StdError>>;

/// Draws all rows that have latencies; round trips first, else connections.
pub fn draw(file: &std::path::Path, rows: &Rows) -> Result<()> {
    let panels = panels(rows);
    let height = PANEL.1 * panels.len().max(1) as u32;
    let area = SVGBackend::new(file, (PANEL.0, height)).into_drawing_area();
    draw_panels(&area, &panels)
        .map_err(|error| Error::Peer(format!("draw {}: {error}", file.display())))
}

/// The rows of each panel.
fn panels(rows: &Rows) -> Vec<Vec<&Row>> {
    let mut panels: Vec<Vec<&Row>> = Vec::new();
    for row in rows.rows.iter().filter(|row| row.p50_ns().is_some()) {
        match panels
            .iter_mut()
            .find(|panel| (panel[0].mode, panel[0].size) == (row.mode, row.size))
        {
            Some(panel) => panel.push(row),
            None => panels.push(vec![row]),
        }
    }
    panels
}

fn draw_panels(area: &DrawingArea<SVGBackend<'_>, Shift>, panels: &[Vec<&Row>]) -> Drawn {
    area.fill(&WHITE)?;
    for (panel, part) in panels
        .iter()
        .zip(area.split_evenly((panels.len().max(1), 1)))
    {
        draw_panel(&part, panel)?;
    }
    area.present()?;
    Ok(())
}

fn draw_panel(area: &DrawingArea<SVGBackend<'_>, Shift>, panel: &[&Row]) -> Drawn {
    let (left, right) = area.split_horizontally(PANEL.0 - LEGEND);
    draw_curves(&left, panel)?;
    draw_legend(&right, panel)
}

fn draw_curves(area: &DrawingArea<SVGBackend<'_>, Shift>, panel: &[&Row]) -> Drawn {
    let curves: Vec<Vec<(f64, f64)>> = panel.iter().map(|row| curve(row)).collect();
    let all = || curves.iter().flatten();
    let rarest = all().map(|point| point.0).fold(100.0, f64::max);
    let lowest = all().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let highest = all().map(|point| point.1).fold(lowest * 10.0, f64::max);
    let title = match panel[0].mode {
        Mode::Rtt => format!("round trip of {} bytes", panel[0].size),
        _ => "connect, accept, close".into(),
    };
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(76)
        .build_cartesian_2d(
            (1.0..rarest).log_scale(),
            (lowest * 0.7..highest * 1.4).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("percentile")
        .y_desc("latency")
        .x_label_formatter(&|rarity| percentile_label(*rarity))
        .y_label_formatter(&|ns| time_label(*ns))
        .draw()?;
    for (row, points) in panel.iter().zip(curves) {
        chart.draw_series(LineSeries::new(points, style(row)))?;
    }
    Ok(())
}

/// One line for each curve.
fn draw_legend(area: &DrawingArea<SVGBackend<'_>, Shift>, panel: &[&Row]) -> Drawn {
    let font = ("sans-serif", 13).into_font().color(&BLACK);
    for (index, row) in panel.iter().enumerate() {
        let y = 44 + 20 * index as i32;
        area.draw(&PathElement::new([(4, y), (28, y)], style(row)))?;
        area.draw_text(&format!("{} {}", row.path, row.wait), &font, (34, y - 7))?;
    }
    Ok(())
}

/// One colour for each path; thin where calls block.
fn style(row: &Row) -> ShapeStyle {
    let color = match row.path {
        Path::FloorCacheline => RGBColor(0x99, 0x99, 0x99),
        Path::FloorRing => RGBColor(0x44, 0x44, 0x44),
        Path::FloorEngine => RGBColor(0x7a, 0x5c, 0x3e),
        Path::TcpLoopback => RGBColor(0xd5, 0x5e, 0x00),
        Path::TcpVeth => RGBColor(0xcc, 0x79, 0xa7),
        Path::Unix => RGBColor(0x00, 0x72, 0xb2),
        Path::RdsockLocal => RGBColor(0x00, 0x9e, 0x73),
        Path::RdsockAdaptive => RGBColor(0x56, 0xb4, 0xe9),
        Path::RdsockNodes => RGBColor(0xe6, 0x9f, 0x00),
    };
    color.stroke_width(if row.wait == Wait::Spin { 3 } else { 1 })
}

/// Points (one sample in so many is slower, latency in nanoseconds), as far as the samples carry.
fn curve(row: &Row) -> Vec<(f64, f64)> {
    let latencies = row.latencies();
    let rarest = latencies.count() as f64;
    (0..)
        .map(|step| 10f64.powf(f64::from(step) / f64::from(STEPS)))
        .take_while(|&rarity| rarity <= rarest)
        .map(|rarity| (rarity, latencies.at(1.0 - 1.0 / rarity).max(1) as f64))
        .collect()
}

/// 10 → "90 %", 1000 → "99.9 %".
fn percentile_label(rarity: f64) -> String {
    let digits = (rarity.log10() - 2.0).round().max(0.0) as usize;
    format!("{:.digits$} %", 100.0 - 100.0 / rarity)
}

/// A time given in nanoseconds.
fn time_label(ns: f64) -> String {
    match ns {
        ns if ns < 1e3 => format!("{ns:.0} ns"),
        ns if ns < 1e6 => format!("{:.0} µs", ns / 1e3),
        ns => format!("{:.0} ms", ns / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::super::rows::tests::rows;
    use super::*;

    #[test]
    fn labels() {
        assert_eq!(percentile_label(1.0), "0 %");
        assert_eq!(percentile_label(10.0), "90 %");
        assert_eq!(percentile_label(1000.0), "99.9 %");
        assert_eq!(time_label(20_000.0), "20 µs");
    }

    #[test]
    fn a_curve_rises_and_ends_where_the_samples_end() {
        let rows = rows(&[(Path::Unix, Mode::Rtt, Wait::Spin, 64, Some(100), 1.0)]);
        let points = curve(&rows.rows[0]);
        assert!(points.windows(2).all(|pair| pair[0].1 <= pair[1].1));
        assert!(points.last().unwrap().0 <= 15.0);
    }

    #[test]
    fn the_drawing_names_its_paths() {
        let rows = rows(&[
            (Path::Unix, Mode::Rtt, Wait::Spin, 64, Some(100), 1.0),
            (
                Path::TcpLoopback,
                Mode::Rtt,
                Wait::Spin,
                64,
                Some(1000),
                1.0,
            ),
            (
                Path::TcpLoopback,
                Mode::Rtt,
                Wait::Spin,
                4096,
                Some(2000),
                1.0,
            ),
            (Path::Unix, Mode::Bw, Wait::Spin, 65536, None, 1.0),
        ]);
        assert_eq!(panels(&rows).len(), 2);
        let file = std::env::temp_dir().join(format!("rdsock-perf-{}.svg", std::process::id()));
        draw(&file, &rows).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert!(
            text.contains("unix spin")
                && text.contains("tcp-loopback spin")
                && text.contains("4096")
        );
    }
}
