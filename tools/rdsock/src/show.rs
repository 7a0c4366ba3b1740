//! How the tool prints tables and sizes.

use comfy_table::{ContentArrangement, Table, presets};

/// An empty table with a heading, as wide as the terminal.
pub fn table<const N: usize>(heading: [&str; N]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(heading);
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
    #[test]
    fn sizes_have_a_unit() {
        assert_eq!(super::bytes(0), "0 B");
        assert_eq!(super::bytes(1023), "1023 B");
        assert_eq!(super::bytes(8 << 20), "8.0 MiB");
        assert_eq!(super::bytes(u64::MAX), "16777216.0 TiB");
    }
}
