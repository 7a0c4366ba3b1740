//! How the tool prints tables and sizes.

use std::fmt::{self, Display, Formatter};

use comfy_table::{ContentArrangement, Table, presets};
use rdsock_output::in_line;

/// A table, which shows of its cells what does nothing to a terminal.
#[derive(Debug)]
pub struct Rows(Table);

impl Rows {
    /// One more row.
    pub fn add_row<const N: usize>(&mut self, cells: [String; N]) {
        self.0.add_row(cells.each_ref().map(|cell| in_line(cell)));
    }
}

impl Display for Rows {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An empty table with a heading, as wide as the terminal.
pub fn table<const N: usize>(heading: [&str; N]) -> Rows {
    let table = Table::new();
    let width = table.width();
    Rows(laid_out(table, width, heading))
}

/// Columns of a terminal that has not said how many it has: that of a serial console says 0.
const NARROWEST: u16 = 20;

fn laid_out<const N: usize>(mut table: Table, width: Option<u16>, heading: [&str; N]) -> Table {
    if width.is_some_and(|columns| columns >= NARROWEST) {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    table.load_preset(presets::NOTHING).set_header(heading);
    table
}

/// Bytes for people.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = (bytes.max(1).ilog2() / 10).min(4);
    match power {
        0 => format!("{bytes} B"),
        _ => format!(
            "{:.1} {}",
            bytes as f64 / (1u64 << (10 * power)) as f64,
            UNITS.get(power as usize).unwrap_or(&"B")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_without_a_width_gets_whole_words() {
        let show = |width: u16| {
            let mut table = Table::new();
            table.set_width(width).force_no_tty();
            let mut table = laid_out(table, Some(width), ["ADDRESS", "DRIVER"]);
            table.add_row(["0000:03:00.0", "rdsock-vfio"]);
            table.to_string()
        };
        for width in [0, 100] {
            assert!(show(width).contains("0000:03:00.0"), "{}", show(width));
        }
        assert!(!show(22).contains("0000:03:00.0"), "{}", show(22));
    }

    #[test]
    fn a_name_makes_no_row_of_its_own() {
        let mut rows = table(["PROGRAM", "FD"]);
        let name = "\x1b]0;title\x07\x1b[2J\nforged  3";
        rows.add_row([name.to_owned(), "4".to_owned()]);
        let shown = rows.to_string();
        assert_eq!(shown.lines().count(), 2, "{shown:?}");
        assert!(!shown.contains(|letter: char| letter.is_control() && letter != '\n'));
    }

    #[test]
    fn sizes_have_a_unit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(8 << 20), "8.0 MiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
    }
}
