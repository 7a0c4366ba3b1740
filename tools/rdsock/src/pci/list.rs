//! `rdsock devices`: what can carry connections to other nodes, and what keeps it from doing so.

use std::process::ExitCode;

use rdsock_output::{OutputError, line};

use super::function::{Function, Node};
use super::kernel::{KernelFiles, MODULE};
use crate::cli::DevicesArgs;
use crate::show::table;

/// Prints the devices.
pub fn devices(args: &DevicesArgs) -> Result<ExitCode, OutputError> {
    let files = KernelFiles::below(&args.root);
    let functions: Vec<Function> = Function::all(&files)
        .into_iter()
        .filter(|function| function.is_rde || (args.all && function.has_vfio()))
        .collect();
    if args.json {
        let loaded = files.has_driver(MODULE);
        let found = serde_json::json!({ "module_loaded": loaded, "devices": functions });
        rdsock_output::json(found)?;
        return Ok(ExitCode::SUCCESS);
    }
    if functions.is_empty() {
        line!("no RDMA device (docs/device.md) is in this machine")?;
        if !args.all {
            line!("--all also shows other devices that a VFIO driver has")?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    print(&functions)?;
    Ok(ExitCode::SUCCESS)
}

fn print(functions: &[Function]) -> Result<(), OutputError> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let mut table = table([
        "ADDRESS", "ID", "DRIVER", "GROUP", "WITH", "NUMA", "FILE", "STATE",
    ]);
    for function in functions {
        let others = function.shares_group_with.iter();
        let others: Vec<&str> = others.map(|member| member.address.as_str()).collect();
        let obstacles = function.obstacles.iter().map(ToString::to_string);
        let obstacles: Vec<String> = obstacles.collect();
        table.add_row([
            function.address.to_string(),
            function.id.clone(),
            or_dash(function.driver.clone()),
            or_dash(function.iommu_group.clone()),
            or_dash((!others.is_empty()).then(|| others.join(" "))),
            or_dash(function.numa_node.map(|node| node.to_string())),
            or_dash(function.node.as_ref().map(file)),
            state(function, &obstacles),
        ]);
    }
    line!("{table}")?;
    for function in functions {
        for obstacle in &function.obstacles {
            let advice = obstacle.advice();
            line!("{}: {obstacle}\n    -> {advice}", function.address)?;
        }
    }
    Ok(())
}

fn state(function: &Function, obstacles: &[String]) -> String {
    if !obstacles.is_empty() {
        return obstacles.join("; ");
    }
    match function.is_rde && function.driver.as_deref() != Some(MODULE) {
        true => "ready, but nothing protects its management page".into(),
        false => "ready".into(),
    }
}

/// A file with who may open it.
pub fn file(node: &Node) -> String {
    let (path, mode) = (node.path.display(), &node.mode);
    format!("{path} {}:{} {mode}", node.owner, node.group)
}
