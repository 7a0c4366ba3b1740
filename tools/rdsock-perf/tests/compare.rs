//! `compare` on the paths that need nothing, and with a `rdsock` that is played by a script: above all, that it
//! refuses to show figures where nothing was accelerated.

use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_rdsock-perf");
const FAKE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake-rdsock");

/// Comparisons pin themselves to the same cores, so they run one after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A folder that is removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("rdsock-perf-test-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A comparison needs two cores; on one, these tests have nothing to say.
fn has_two_cores() -> bool {
    std::thread::available_parallelism().is_ok_and(|cores| cores.get() >= 2)
}

/// A comparison of short runs.
fn compare(arguments: &[&str]) -> Command {
    compare_for("0.05", arguments)
}

/// A comparison whose single runs take `seconds`.
fn compare_for(seconds: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .args(["compare", "--seconds", seconds])
        .args(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Some shared object under the shim's name: a process that has it loaded passes for a preloaded one.
fn fake_shim(folder: &Folder) -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let is_harmless = |path: &&str| path.contains("/libgcc_s.so") || path.contains("/libm.so");
    let library = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .find(is_harmless);
    let shim = folder.file("librdsock.so");
    fs::copy(
        library.expect("a Rust test has libgcc_s or libm loaded"),
        &shim,
    )
    .unwrap();
    shim
}

/// A comparison of rdsock as the script plays it.
fn with_fake(folder: &Folder, verdict: &str, shim: &Path, arguments: &[&str]) -> Output {
    compare(&[
        "--rdsock",
        FAKE,
        "--rounds",
        "1",
        "--paths",
        "rdsock-local,rdsock-adaptive",
    ])
    .args(arguments)
    .env("FAKE_VERDICT", verdict)
    .env("FAKE_SHIM", shim)
    .env("FAKE_LOG", folder.file("log"))
    .output()
    .unwrap()
}

/// That a comparison failed because nothing was accelerated, and showed no figure.
fn assert_refused(output: &Output, reason: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(
        stderr.contains("NOT ACCELERATED") && stderr.contains(reason),
        "{stderr}"
    );
    assert!(
        output.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

#[test]
fn measures_draws_and_writes() {
    let _guard = ONE_AT_A_TIME.lock();
    if !has_two_cores() {
        return;
    }
    let folder = Folder::new("plain");
    let (json, svg) = (folder.file("out.json"), folder.file("out.svg"));
    let output = compare(&[
        "--rounds",
        "2",
        "--verify",
        "--paths",
        "floor-cacheline,floor-ring,tcp-loopback,unix",
    ])
    .args([Path::new("--json"), &json, Path::new("--svg"), &svg])
    .output()
    .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(
        stderr.contains("cache line") && stderr.contains("one reading costs"),
        "{stderr}"
    );
    assert!(String::from_utf8_lossy(&output.stdout).contains("floor-cacheline"));
    assert!(
        fs::read_to_string(svg)
            .unwrap()
            .contains("tcp-loopback spin")
    );

    let document: Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    let rows = document["rows"].as_array().unwrap();
    // rtt: line, ring, 2 × 2; rate and bw: ring, 2 × 2; cps: 2 × 2.
    assert_eq!(rows.len(), 6 + 5 + 5 + 4);
    for row in rows {
        assert_eq!(row["runs"], 2);
        assert!(row["per_s"].as_f64().unwrap() > 0.0);
        assert_eq!(row["mode"] == "cps", row["size"] == 0);
        assert!(!row["path"].as_str().unwrap().starts_with("floor") || row["wait"] == "spin");
        let has_latency = row["mode"] == "rtt" || row["mode"] == "cps";
        assert_eq!(row["p50_ns"].is_f64(), has_latency, "{row}");
        assert_eq!(row["mb_s"].is_f64(), !has_latency, "{row}");
    }
    assert!(!document["ratios"].as_array().unwrap().is_empty());
    assert_eq!(document["line_probes"].as_array().unwrap().len(), 8);
    assert!(document["machine"]["cpus"].as_u64().unwrap() >= 2);
}

#[test]
fn two_namespaces_are_made_and_removed_or_left_out_with_a_reason() {
    let _guard = ONE_AT_A_TIME.lock();
    if !has_two_cores() {
        return;
    }
    let process = compare(&["--only", "rtt", "--rounds", "1", "--paths", "tcp-veth"])
        .spawn()
        .unwrap();
    let name = format!("rdsock-perf-{}-", process.id());
    let output = process.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => assert!(String::from_utf8_lossy(&output.stdout).contains("tcp-veth")),
        code => assert!(
            code == Some(2) && stderr.contains("tcp-veth can't be measured: "),
            "{stderr}"
        ),
    }
    let is_ours = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with(&name);
    assert!(
        !fs::read_dir("/run/netns")
            .is_ok_and(|folder| folder.flatten().any(|entry| is_ours(&entry)))
    );
}

#[test]
fn a_connection_on_the_kernel_is_refused_with_the_reason() {
    let _guard = ONE_AT_A_TIME.lock();
    if !has_two_cores() {
        return;
    }
    let folder = Folder::new("kernel");
    let shim = fake_shim(&folder);
    assert_refused(
        &with_fake(&folder, "kernel", &shim, &["--only", "rtt"]),
        "peer not preloaded (fake)",
    );
}

#[test]
fn rings_that_carry_nothing_are_refused() {
    let _guard = ONE_AT_A_TIME.lock();
    if !has_two_cores() {
        return;
    }
    let folder = Folder::new("still");
    let shim = fake_shim(&folder);
    assert_refused(
        &with_fake(&folder, "still", &shim, &["--only", "bw"]),
        "only 0 of ",
    );
}

#[test]
fn a_process_without_the_shim_is_refused_whatever_why_says() {
    let _guard = ONE_AT_A_TIME.lock();
    if !has_two_cores() {
        return;
    }
    let folder = Folder::new("bare");
    assert_refused(
        &with_fake(&folder, "rings", Path::new(""), &["--only", "rtt"]),
        "without librdsock",
    );
}

#[test]
fn short_connections_need_attached_processes() {
    let _guard = ONE_AT_A_TIME.lock();
    if !has_two_cores() {
        return;
    }
    let folder = Folder::new("detached");
    let shim = fake_shim(&folder);
    assert_refused(
        &with_fake(&folder, "detached", &shim, &["--only", "cps"]),
        "no daemon (fake)",
    );
}

#[test]
fn what_is_on_rings_is_measured_and_blocking_rows_may_not_spin() {
    let _guard = ONE_AT_A_TIME.lock();
    if !has_two_cores() {
        return;
    }
    let folder = Folder::new("rings");
    let shim = fake_shim(&folder);
    let output = with_fake(&folder, "rings", &shim, &["--only", "rtt,cps"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("rdsock-local") && text.contains("rdsock-adaptive"),
        "{text}"
    );
    let log = fs::read_to_string(folder.file("log")).unwrap();
    // Server and client each: rtt and cps of local block, local spin, adaptive.
    let a_mode = ["0", "0", "unset", "unset", "unset", "unset"];
    assert_eq!(log.lines().collect::<Vec<_>>(), [a_mode, a_mode].concat());
}

/// A comparison of two nodes as scripts play them; `node` is what `rdsock why` says of the other end.
fn two_nodes(folder: &Folder, node: &str) -> Output {
    let daemon = folder.file("rdsockd");
    let script = "#!/bin/sh\ntrap 'exit 0' TERM\nwhile :; do sleep 0.05; done\n";
    fs::write(&daemon, script).unwrap();
    fs::set_permissions(&daemon, fs::Permissions::from_mode(0o755)).unwrap();
    let rdsock = folder.file("rdsock");
    std::os::unix::fs::symlink(FAKE, &rdsock).unwrap();
    compare(&["--rounds", "1", "--paths", "rdsock-nodes", "--only", "rtt"])
        .arg("--rdsock")
        .arg(rdsock)
        .env("FAKE_VERDICT", "rings")
        .env("FAKE_NODE", node)
        .env("FAKE_SHIM", fake_shim(folder))
        .env("FAKE_LOG", folder.file("log"))
        .output()
        .unwrap()
}

#[test]
fn two_nodes_are_measured_when_each_says_that_the_other_end_is_elsewhere() {
    let _guard = ONE_AT_A_TIME.lock();
    if !has_two_cores() {
        return;
    }
    let folder = Folder::new("nodes");
    let output = two_nodes(&folder, "2");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("rdsock-nodes"), "{text}");
    // Server and client each: block, then spin.
    let log = fs::read_to_string(folder.file("log")).unwrap();
    let budgets: Vec<&str> = log.lines().collect();
    assert_eq!(budgets, ["0", "0", "unset", "unset"]);
}

#[test]
fn two_ends_on_one_node_are_refused() {
    let _guard = ONE_AT_A_TIME.lock();
    if !has_two_cores() {
        return;
    }
    let folder = Folder::new("one-node");
    assert_refused(&two_nodes(&folder, ""), "its other end is on the same node");
}

#[test]
fn nodes_without_a_daemon_are_an_error() {
    if !has_two_cores() {
        return;
    }
    let output = compare(&["--paths", "rdsock-nodes", "--rdsock", FAKE])
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("no program rdsockd beside"), "{stderr}");
}

#[test]
fn the_engine_is_another_program() {
    let _guard = ONE_AT_A_TIME.lock();
    if !has_two_cores() {
        return;
    }
    let folder = Folder::new("engine");
    // One that was built stands beside `rdsock-perf`, and comes first.
    let engine = folder.file("rdsock-engine-perf");
    let script = r#"#!/bin/sh
echo '{"operations":3,"seconds":1.0,"mb_s":9.0,"histogram":[[100,3]]}'
"#;
    fs::write(&engine, script).unwrap();
    fs::set_permissions(&engine, fs::Permissions::from_mode(0o755)).unwrap();
    let json = folder.file("out.json");
    let path = format!("{}:{}", folder.0.display(), std::env::var("PATH").unwrap());
    let output = compare(&["--rounds", "1", "--paths", "floor-engine", "--json"])
        .arg(&json)
        .env("PATH", path)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let document: Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    let rows = document["rows"].as_array().unwrap();
    let modes: Vec<&str> = rows.iter().filter_map(|row| row["mode"].as_str()).collect();
    assert_eq!(modes, ["rtt", "bw"]);
    assert!(rows[0]["p50_ns"].as_f64().unwrap() > 0.0 && rows[0]["mb_s"].is_null());
    assert!(rows[1]["mb_s"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_named_path_that_is_impossible_is_an_error() {
    if !has_two_cores() {
        return;
    }
    let output = compare(&["--paths", "rdsock-local", "--rdsock", "/nonexistent/rdsock"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("rdsock-local can't be measured"));
}

/// Pids of the children of `pid`.
fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn no_child_outlives_a_comparison_that_is_stopped() {
    let _guard = ONE_AT_A_TIME.lock();
    if !has_two_cores() || !Path::new("/proc/self/task").exists() {
        return;
    }
    // "-" before the pid means the whole process group, as Ctrl-C on a terminal does.
    for (signal, group, code) in [
        ("-TERM", "", Some(130)),
        ("-INT", "", Some(130)),
        ("-INT", "-", Some(130)),
        ("-KILL", "", None),
    ] {
        let mut command = compare_for("30", &["--paths", "tcp-loopback", "--only", "rtt"]);
        command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        let mut process = command.spawn().unwrap();
        wait_for("two children", || children(process.id()).len() == 2);
        let alive = children(process.id());
        let target = format!("{group}{}", process.id());
        assert!(
            Command::new("kill")
                .args([signal, "--", &target])
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(process.wait().unwrap().code(), code, "{signal} {target}");
        wait_for("the children to be gone", || {
            let is_gone = |pid: &u32| {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                stat.is_empty() || stat.contains(") Z ")
            };
            alive.iter().all(is_gone)
        });
    }
}
