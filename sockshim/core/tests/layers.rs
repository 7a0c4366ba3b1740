//! Arrows between the shim's modules point down the layers that `docs/architecture.md` names. The lowest one alone names all: it puts the
//! process together.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

const SHIM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Names in backquotes.
fn quoted(text: &str) -> Vec<String> {
    let names = text.split('`').skip(1).step_by(2);
    names.map(str::to_owned).collect()
}

/// The modules of each row of the table, the uppermost first.
fn layers() -> Vec<Vec<String>> {
    let text = fs::read_to_string(format!("{SHIM}/../docs/architecture.md")).unwrap();
    let (_, table) = text.split_once("| layer | modules |\n").unwrap();
    let rows = table
        .lines()
        .skip(1)
        .take_while(|line| line.starts_with('|'));
    rows.map(|row| quoted(row.split('|').nth(2).unwrap()))
        .collect()
}

/// Modules that a text without its tests names as `crate::…`.
fn used_by(text: &str) -> BTreeSet<String> {
    let text = text
        .split("#[cfg(test)]\nmod tests")
        .next()
        .unwrap_or_default();
    let code: Vec<&str> = (text.lines())
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect();
    let text = code.join("\n");
    let mut used = BTreeSet::new();
    for rest in text.split("crate::").skip(1) {
        let word = |text: &str| -> String {
            let letters = text.trim_start().chars();
            letters
                .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                .collect()
        };
        match rest.strip_prefix('{') {
            // At the first depth.
            Some(list) => {
                let mut depth = 0;
                let mut item = String::new();
                for letter in list.chars() {
                    match letter {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => {
                            used.insert(word(&item));
                            item.clear();
                        }
                        _ => item.push(letter),
                    }
                }
                used.insert(word(&item));
            }
            None => {
                used.insert(word(rest));
            }
        }
    }
    used
}

/// What each module uses, with all files below it.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    fn add(path: &Path, module: Option<&str>, arrows: &mut BTreeMap<String, BTreeSet<String>>) {
        for entry in fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            let own = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let module = module.unwrap_or(&own);
            if path.is_dir() {
                add(&path, Some(module), arrows);
            } else {
                let used = used_by(&fs::read_to_string(&path).unwrap());
                arrows.entry(module.to_owned()).or_default().extend(used);
            }
        }
    }
    let mut arrows = BTreeMap::new();
    for folder in ["src", "core/src"] {
        add(&Path::new(SHIM).join(folder), None, &mut arrows);
    }
    // They declare the modules, and end the process.
    arrows.retain(|module, _| module != "lib" && module != "panic");
    arrows
}

#[test]
fn arrows_point_down_the_layers() {
    let (layers, arrows) = (layers(), arrows());
    let place =
        |module: &str| (layers.iter()).position(|layer| layer.iter().any(|of| of == module));
    let mut faults = Vec::new();
    for (module, used) in &arrows {
        let Some(from) = place(module) else {
            faults.push(format!("{module} is in no layer"));
            continue;
        };
        if from + 1 == layers.len() {
            continue;
        }
        let above = (used.iter()).filter(|other| place(other).is_some_and(|to| to < from));
        faults.extend(
            above.map(|other| format!("{module} uses {other}, which is in a layer above it")),
        );
    }
    let gone = (layers.iter().flatten()).filter(|module| !arrows.contains_key(*module));
    faults.extend(gone.map(|module| format!("there is no module {module}")));
    assert!(
        arrows.len() > 30 && layers.len() > 8 && faults.is_empty(),
        "{}",
        faults.join("\n")
    );
}
