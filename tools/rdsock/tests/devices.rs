//! `rdsock devices`, `bind` and `unbind` as a user runs them, on a made-up machine. What the kernel makes of a change is in
//! the unit tests of `src/pci/bind.rs`: here nobody answers what is written.

mod tree;

use std::process::{Command, Output};

use serde_json::Value;
use tree::Tree;

const A: &str = "0000:03:00.0";
const B: &str = "0000:04:00.0";

fn rdsock(tree: &Tree, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rdsock"));
    command.args(words).arg("--root").arg(tree.root());
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn devices_are_listed_with_what_is_in_the_way() {
    let tree = Tree::new();
    let nothing = rdsock(&tree, &["devices"]);
    assert!(nothing.status.success());
    assert!(text(&nothing.stdout).contains("no RDMA device"));

    tree.rde(A);
    tree.group(7, &[A]);
    tree.bind(A, "rdsock-vfio");
    tree.write(&format!("sys/bus/pci/devices/{A}/node_id"), "3\n");
    tree.write("dev/vfio/7", "");
    tree.rde(B);
    tree.function("0000:05:00.0", "0x8086", "0x10c9");
    tree.bind("0000:05:00.0", "vfio-pci");
    tree.function("0000:06:00.0", "0x8086", "0x10c9");

    let list = |words: &[&str]| -> Value {
        let output = rdsock(&tree, words);
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let answer = list(&["devices", "--json"]);
    assert_eq!(answer["module_loaded"], true);
    let devices = answer["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 2, "{answer:#}");
    let ready = &devices[0];
    assert_eq!(ready["address"], A);
    assert_eq!(ready["driver"], "rdsock-vfio");
    assert_eq!(ready["iommu_group"], "7");
    assert_eq!(
        (&ready["numa_node"], &ready["node_id"]),
        (&0.into(), &3.into())
    );
    assert!(
        ready["node"]["path"]
            .as_str()
            .unwrap()
            .ends_with("dev/vfio/7")
    );
    assert_eq!(ready["node"]["mode"].as_str().unwrap().len(), 4);
    assert_eq!(ready["obstacles"].as_array().unwrap().len(), 0, "{ready:#}");
    let bare = devices[1]["obstacles"].as_array().unwrap();
    assert!(
        bare[0]["what"].as_str().unwrap().contains("no IOMMU"),
        "{bare:?}"
    );
    assert!(
        bare[1]["advice"].as_str().unwrap().contains("rdsock bind"),
        "{bare:?}"
    );

    let all = list(&["devices", "--all", "--json"]);
    assert_eq!(all["devices"].as_array().unwrap().len(), 3);
    let table = text(&rdsock(&tree, &["devices"]).stdout);
    for word in [A, "ready", "dev/vfio/7", B, "no IOMMU", "intel_iommu=on"] {
        assert!(table.contains(word), "no {word}: {table}");
    }
}

#[test]
fn a_change_that_can_not_be_made_is_refused_with_its_cause() {
    let tree = Tree::new();
    tree.rde(A);
    let said = |words: &[&str]| {
        let output = rdsock(&tree, words);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        text(&output.stderr)
    };
    assert!(said(&["bind", A]).contains("no IOMMU stands before it"));
    tree.group(7, &[A]);
    assert!(said(&["bind", A]).contains("modprobe rdsock-vfio"));
    assert!(said(&["bind", B]).contains("no PCI device"));
    assert!(said(&["unbind", A]).contains("no driver has it"));
    let usage = rdsock(&tree, &["bind", "3"]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(text(&usage.stderr).contains("0000:03:00.0"));

    // A driver that does not take it: it is asked, and what was asked is taken back.
    tree.driver("rdsock-vfio");
    let error = said(&["bind", A]);
    assert!(
        error.contains("did not take it") && error.contains("dmesg"),
        "{error}"
    );
    assert_eq!(tree.driver_override(A), "");
    let probe = std::fs::read_to_string(tree.root().join("sys/bus/pci/drivers_probe")).unwrap();
    assert!(probe.contains(A), "{probe}");
}

#[test]
fn a_device_that_is_bound_comes_with_a_warning_and_the_way_back() {
    let tree = Tree::new();
    tree.rde(A);
    tree.group(7, &[A]);
    tree.bind(A, "vfio-pci");
    tree.write("dev/vfio/7", "");
    let output = rdsock(&tree, &["bind", A, "--driver", "vfio-pci"]);
    assert!(output.status.success(), "{output:?}");
    let report = text(&output.stdout);
    assert!(report.contains("bound to vfio-pci before"), "{report}");
    assert!(report.contains(&format!("rdsock unbind {A}")), "{report}");
    assert!(
        text(&output.stderr).contains("nothing protects"),
        "{output:?}"
    );
    let table = text(&rdsock(&tree, &["devices"]).stdout);
    assert!(table.contains("nothing protects"), "{table}");
    tree.process(42, "rdsockd", "dev/vfio/7");
    let busy = rdsock(&tree, &["unbind", A]);
    assert_eq!(busy.status.code(), Some(1));
    assert!(text(&busy.stderr).contains("rdsockd (42)"), "{busy:?}");
    // In a made-up machine nothing comes of it, but what it wrote is there.
    std::fs::remove_dir_all(tree.root().join("proc/42")).unwrap();
    assert!(rdsock(&tree, &["unbind", A]).status.success());
    assert_eq!(tree.driver_override(A), "");
}
