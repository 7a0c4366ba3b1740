//! The built tool as a user runs it. What it says of real accelerated programs is tested in the
//! workspace's `tests/`; here is what needs no shim.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A folder for sockets and scripts, and the daemon that was started there, which ends with it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Place {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn rdsock(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rdsock"));
        command
            .env("RDSOCK_SOCKET", self.at("run/rdsockd.sock"))
            .env("RDSOCK_LIB", harmless_library())
            .env_remove("LD_PRELOAD");
        command
    }

    /// `rdsock run` of a shell that does this.
    fn run(&self, script: &str) -> Output {
        self.rdsock()
            .args(["run", "--", "sh", "-c", script])
            .output()
            .unwrap()
    }

    fn daemon_pid(&self) -> Option<i32> {
        let output = self.rdsock().args(["why", "--json"]).output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        answer["daemon"]["pid"].as_i64().map(|pid| pid as i32)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(pid) = self.daemon_pid() {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        }
    }
}

/// The C library, which every program has anyway.
fn harmless_library() -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let path = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5));
    path.filter(|path| path.contains("/libc"))
        .map(PathBuf::from)
        .next()
        .unwrap()
}

/// True when the daemon's program is built, too (`cargo test --workspace` builds it).
fn has_daemon() -> bool {
    let there = Path::new(env!("CARGO_BIN_EXE_rdsock"))
        .with_file_name("rdsockd")
        .is_file();
    if !there {
        eprintln!("left out: rdsockd is not built");
    }
    there
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_exit_status_is_the_programs() {
    let place = Place::new();
    assert_eq!(place.run("exit 42").status.code(), Some(42));
    assert_eq!(place.run("kill -KILL $$").status.signal(), Some(9));
    let run = |command: &Path| place.rdsock().arg("run").arg(command).output().unwrap();
    let missing = run(Path::new("no-such-program"));
    assert_eq!(missing.status.code(), Some(127));
    assert!(text(&missing.stderr).contains("no-such-program: not found"));
    let plain = run(Path::new("/etc/passwd"));
    assert_eq!(plain.status.code(), Some(126));
    assert!(text(&plain.stderr).contains("/etc/passwd"));
}

#[test]
fn without_a_daemon_there_is_one_warning_and_the_program_runs() {
    let place = Place::new();
    let output = place
        .rdsock()
        .args(["run", "--no-daemon", "sh", "-c", "echo ${LD_PRELOAD-none}"])
        .output()
        .unwrap();
    assert_eq!(text(&output.stdout), "none\n");
    assert_eq!(text(&output.stderr).lines().count(), 1);
    assert!(text(&output.stderr).contains("no daemon runs"));
    let output = place
        .rdsock()
        .env("RDSOCK_LIB", "/nowhere")
        .args(["run", "true"])
        .output()
        .unwrap();
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("librdsock.so"));
    assert_eq!(place.daemon_pid(), None);
}

#[test]
fn a_daemon_is_started_once_and_found_again() {
    if !has_daemon() {
        return;
    }
    let place = Place::new();
    let runs: Vec<_> = (0..8)
        .map(|_| place.rdsock().args(["run", "true"]).spawn().unwrap())
        .collect();
    for mut run in runs {
        assert!(run.wait().unwrap().success());
    }
    let log = std::fs::read_to_string(place.at("run/rdsockd.log")).unwrap();
    assert_eq!(log.matches(" ready ").count(), 1, "{log}");
    let pid = place.daemon_pid().unwrap();
    place.run("true");
    assert_eq!(place.daemon_pid(), Some(pid));
    // It is nobody's child in a session of its own, and holds nothing of its caller's.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    assert_ne!(fields[1], std::process::id().to_string());
    let session = fields[3];
    let own = std::fs::read_to_string("/proc/self/stat").unwrap();
    assert_ne!(
        own.rsplit_once(") ").unwrap().1.split(' ').nth(3),
        Some(session)
    );
}

#[test]
fn the_program_finds_its_environment() {
    if !has_daemon() {
        return;
    }
    let place = Place::new();
    let output = place
        .rdsock()
        .env("LD_PRELOAD", harmless_library())
        .args(["run", "--spin-us", "7", "sh", "-c"])
        .arg("echo $LD_PRELOAD; echo $RDSOCK_SOCKET; echo $RDSOCK_SPIN_US")
        .output()
        .unwrap();
    let library = harmless_library();
    let socket = place.at("run/rdsockd.sock");
    let lines: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
    assert_eq!(
        lines[..3],
        [
            library.display().to_string(),
            socket.display().to_string(),
            "7".to_owned()
        ]
    );
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn programs_that_can_not_be_preloaded_are_named_and_run() {
    if !has_daemon() {
        return;
    }
    let place = Place::new();
    let script = place.at("script");
    std::fs::write(&script, "echo $0 $1\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = place
        .rdsock()
        .arg("run")
        .arg(&script)
        .arg("x")
        .output()
        .unwrap();
    assert_eq!(text(&output.stdout), format!("{} x\n", script.display()));
    // A program of another user's, with its set-user-id bit, is run all the same.
    if nix::unistd::geteuid().is_root() {
        let copy = place.at("true");
        std::fs::copy("/bin/true", &copy).unwrap();
        std::os::unix::fs::chown(&copy, Some(1), None).unwrap();
        std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o4755)).unwrap();
        let output = place.rdsock().arg("run").arg(&copy).output().unwrap();
        assert!(output.status.success());
        assert!(text(&output.stderr).contains("set-user-id"), "{output:?}");
    }
}

#[test]
fn why_tells_of_a_program_that_is_not_preloaded() {
    use std::net::{TcpListener, TcpStream};
    let place = Place::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let _stream = TcpStream::connect(address).unwrap();
    let _accepted = listener.accept().unwrap();
    let pid = std::process::id().to_string();
    let output = place
        .rdsock()
        .args(["why", &pid, "--json"])
        .output()
        .unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(answer["daemon"].is_null());
    let process = &answer["processes"][0];
    assert_eq!(process["attached"], false);
    assert!(
        process["reason"]
            .as_str()
            .unwrap()
            .contains("not preloaded"),
        "{process}"
    );
    let connections = answer["connections"].as_array().unwrap();
    let ours: Vec<&Value> = connections
        .iter()
        .filter(|line| line["local"] == address.to_string() || line["peer"] == address.to_string())
        .collect();
    assert_eq!(ours.len(), 2);
    for line in ours {
        assert_eq!(line["accelerated"], false);
        assert_eq!(line["state"], "kernel");
        assert!(line["reason"].is_string() && line["stream"].is_null());
    }
    let table = place.rdsock().args(["why", &pid]).output().unwrap();
    assert!(text(&table.stdout).contains(&address.to_string()));
    let nobody = place.rdsock().args(["why", "999999999"]).output().unwrap();
    assert!(!nobody.status.success());
    assert!(text(&nobody.stderr).contains("no process 999999999"));
    let nothing = place.rdsock().arg("stat").output().unwrap();
    assert!(text(&nothing.stderr).contains("no daemon answers"));
}

#[test]
fn doctor_tells_what_to_do() {
    let place = Place::new();
    let output = place.rdsock().args(["doctor", "--json"]).output().unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["usable"], output.status.success());
    for finding in answer["findings"].as_array().unwrap() {
        let good = finding["health"] == "good";
        assert_eq!(good, finding["advice"].is_null(), "{finding}");
    }
    let output = place
        .rdsock()
        .env("RDSOCK_LIB", "/nowhere")
        .arg("doctor")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("RDSOCK_LIB"));
}

#[test]
fn doctor_looks_at_what_other_nodes_need() {
    let place = Place::new();
    let (fabric, config) = (place.at("fabric"), place.at("rdsockd.toml"));
    std::fs::create_dir(&fabric).unwrap();
    let look = |mode: u32, cores: &str| -> (Value, Value) {
        std::fs::set_permissions(&fabric, PermissionsExt::from_mode(mode)).unwrap();
        let text = format!(
            "[fabric]\nnode = 3\ndevice = \"model:{}\"\npoll_cores = {cores}\n\
             nodes = [{{ id = 3, addresses = [\"10.0.0.3\"] }}]\n",
            fabric.display()
        );
        std::fs::write(&config, text).unwrap();
        let output = place
            .rdsock()
            .args(["doctor", "--json", "--config"])
            .arg(&config)
            .output()
            .unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        let find = |what: &str| {
            let findings = answer["findings"].as_array().unwrap();
            let found = findings.iter().find(|finding| finding["what"] == what);
            found
                .unwrap_or_else(|| panic!("no {what}: {answer:#}"))
                .clone()
        };
        assert!(
            find("other nodes")["found"]
                .as_str()
                .unwrap()
                .contains("node 3")
        );
        (find("device"), find("poll cores"))
    };
    let (device, cores) = look(0o700, "[]");
    assert_eq!(
        (&device["health"], &cores["health"]),
        (&"good".into(), &"good".into())
    );
    let (device, cores) = look(0o777, "[100000]");
    assert!(
        device["found"].as_str().unwrap().contains("777"),
        "{device}"
    );
    assert!(
        device["advice"].as_str().unwrap().contains("mkdir -m 700"),
        "{device}"
    );
    assert!(
        cores["advice"].as_str().unwrap().contains("no core 100000"),
        "{cores}"
    );
    std::fs::write(&config, "[fabric]\nnode = \"three\"\n").unwrap();
    let output = place
        .rdsock()
        .args(["doctor", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    assert!(
        text(&output.stdout).contains("--check-config"),
        "{output:?}"
    );
}

#[test]
fn manual_pages_and_completions_are_written() {
    let place = Place::new();
    let dir = place.at("man");
    assert!(
        place
            .rdsock()
            .arg("man")
            .arg(&dir)
            .status()
            .unwrap()
            .success()
    );
    for page in [
        "rdsock.1",
        "rdsock-run.1",
        "rdsock-why.1",
        "rdsock-stat.1",
        "rdsock-doctor.1",
        "rdsock-devices.1",
        "rdsock-bind.1",
        "rdsock-unbind.1",
    ] {
        assert!(
            std::fs::read_to_string(dir.join(page))
                .unwrap()
                .contains(".TH"),
            "{page}"
        );
    }
    let output = place
        .rdsock()
        .args(["completions", "bash"])
        .output()
        .unwrap();
    assert!(text(&output.stdout).contains("complete"));
}
