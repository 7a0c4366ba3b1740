//! The numbers of the driver and of the model are those of `docs/device.md`.

use std::collections::BTreeMap;

type Tables = &'static [(&'static str, &'static [(&'static str, u64)])];

/// Section and name of each numbered row of the document's tables, and its number.
fn document() -> BTreeMap<(String, String), u64> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/device.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut section = String::new();
    let mut rows = BTreeMap::new();
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix("##") {
            let number = heading.trim_start_matches('#').split_whitespace().next();
            section = number.unwrap_or_default().trim_end_matches('.').to_owned();
        }
        let Some(row) = line.strip_prefix("| ") else {
            continue;
        };
        let cells: Vec<&str> = row
            .split(" | ")
            .map(|cell| cell.trim_matches('`'))
            .collect();
        // "number | NAME | …", or "register | bit | NAME | …".
        let numbered = |at: usize| Some((number(cells.get(at)?)?, *cells.get(at + 1)?));
        if let Some((value, name)) = numbered(0).or_else(|| numbered(1))
            && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
        {
            let old = rows.insert((section.clone(), name.to_owned()), value);
            assert!(old.is_none(), "{section} has {name} twice");
        }
    }
    rows
}

fn number(cell: &str) -> Option<u64> {
    match cell.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => cell.parse().ok(),
    }
}

fn compare(tables: Tables) {
    let mut document = document();
    for (section, rows) in tables {
        for (name, value) in *rows {
            let key = (section.to_string(), name.to_string());
            assert_eq!(document.remove(&key), Some(*value), "{section} {name}");
        }
    }
    assert_eq!(
        document,
        BTreeMap::new(),
        "in the document and not in the code"
    );
}

#[test]
fn the_driver_has_the_numbers_of_the_data_sheet() {
    compare(rdsock_rde::spec::TABLES);
}

#[test]
fn the_model_has_the_numbers_of_the_data_sheet() {
    compare(rdsock_model::sheet::TABLES);
}
