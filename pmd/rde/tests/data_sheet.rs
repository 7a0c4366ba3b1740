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

#[test]
fn the_kernel_module_has_the_numbers_of_the_data_sheet() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../kmod-minimal/rde.h");
    let header = std::fs::read_to_string(path).unwrap();
    let defined: BTreeMap<&str, u64> = header
        .lines()
        .filter_map(|line| line.strip_prefix("#define RDE_"))
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next()?;
            Some((name, number(words.next()?.trim_end_matches("ULL"))?))
        })
        .collect();
    let (_, registers) = rdsock_rde::spec::management::TABLE;
    for (name, value) in registers {
        // The module needs only some.
        if let Some(defined) = defined.get(name) {
            assert_eq!(defined, value, "{name}");
        }
    }
    for name in ["PEERS", "NODE_ID", "CONTROL", "KEPT", "FEATURES"] {
        assert!(defined.contains_key(name), "{name}");
    }
    use rdsock_rde::spec::{MAGIC, MAJOR, REGION_TABLE, state};
    assert_eq!(defined["MAGIC_VALUE"], MAGIC);
    assert_eq!(defined["MAJOR"], u64::from(MAJOR));
    assert_eq!(defined["CONTROL_FABRIC"], 1 << state::FABRIC);
    assert_eq!(defined["REGION_TABLE"], REGION_TABLE);
    assert_eq!(defined["BAR0_SIZE"], rdsock_model::sheet::BAR0_SIZE);
}
