//! Server and client over TCP and UNIX sockets, in each mode, for a moment. No absolute time is asserted.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_rdsock-perf");

/// A server that is killed when dropped.
struct Server {
    process: Child,
    /// Arguments with which a client finds it.
    target: Vec<String>,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(PROGRAM);
        command
            .args(["server", "--json"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(event["event"], "listening");
        let address = event["address"].as_str().unwrap();
        let target = match address.strip_prefix("unix:") {
            Some(name) => vec!["--unix".into(), name.into()],
            None => vec![address.into()],
        };
        Self { process, target }
    }

    fn client(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .args(["client", "--json", "--timeout", "60"])
            .args(&self.target)
            .args(arguments);
        command
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn result_of(output: &Output) -> Value {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What must hold of any result.
fn check(result: &Value, mode: &str, wait: &str, size: u64) {
    assert_eq!(
        (result["mode"].as_str(), result["wait"].as_str()),
        (Some(mode), Some(wait))
    );
    assert_eq!(result["size"].as_u64(), Some(size));
    assert!(result["count"].as_u64().unwrap() > 0, "{result}");
    assert!(result["per_s"].as_f64().unwrap() > 0.0, "{result}");
    assert!(result["clock"]["cost_ns"].as_f64().unwrap() > 0.0);
    let percentiles: Vec<_> = ["p50_ns", "p99_ns", "p999_ns", "max_ns"]
        .map(|name| result[name].as_u64())
        .to_vec();
    if matches!(mode, "rtt" | "cps") {
        assert!(percentiles[0].unwrap() > 0);
        assert!(
            percentiles.windows(2).all(|pair| pair[0] <= pair[1]),
            "{result}"
        );
        let samples: u64 = result["histogram"]
            .as_array()
            .unwrap()
            .iter()
            .map(|pair| pair[1].as_u64().unwrap())
            .sum();
        assert_eq!(samples, result["count"].as_u64().unwrap());
    } else {
        assert!(percentiles.iter().all(Option::is_none));
        let mb_s = result["per_s"].as_f64().unwrap() * size as f64 / 1e6;
        assert!((result["mb_s"].as_f64().unwrap() / mb_s - 1.0).abs() < 1e-6);
    }
}

fn each_mode_over(server: &[&str]) {
    for (mode, size) in [
        ("rtt", 64),
        ("rtt", 100_000),
        ("rate", 64),
        ("bw", 65536),
        ("cps", 0),
    ] {
        for wait in ["block", "spin"] {
            let mut server = Server::start(&[server, &["--once"]].concat());
            let size_text = size.max(1).to_string();
            let flags = [
                "--mode",
                mode,
                "--wait",
                wait,
                "--size",
                &size_text,
                "--seconds",
                "0.05",
                "--verify",
            ];
            check(
                &result_of(&server.client(&flags).output().unwrap()),
                mode,
                wait,
                size,
            );
            assert!(server.process.wait().unwrap().success(), "{mode} {wait}");
        }
    }
}

#[test]
fn each_mode_over_tcp() {
    each_mode_over(&["--port", "0"]);
}

#[test]
fn each_mode_over_tcp_version_6() {
    if std::net::TcpListener::bind("[::1]:0").is_ok() {
        each_mode_over(&["--port", "0", "--bind", "::1"]);
    }
}

#[test]
fn each_mode_over_unix_sockets() {
    let path = std::env::temp_dir().join(format!("rdsock-perf-test-{}.sock", std::process::id()));
    each_mode_over(&["--unix", path.to_str().unwrap()]);
    assert!(!path.exists(), "the server removes its socket");
}

#[test]
fn a_name_in_the_abstract_name_space() {
    let server = Server::start(&[
        "--unix",
        &format!("@rdsock-perf-test-{}", std::process::id()),
    ]);
    check(
        &result_of(&server.client(&["--seconds", "0.05"]).output().unwrap()),
        "rtt",
        "block",
        64,
    );
}

#[test]
fn many_clients_at_once() {
    let server = Server::start(&["--port", "0"]);
    let clients: Vec<_> = ["rtt", "rate", "bw", "cps", "rtt", "cps"]
        .map(|mode| {
            server
                .client(&["--mode", mode, "--seconds", "0.1", "--verify"])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .into_iter()
        .collect();
    for client in clients {
        result_of(&client.wait_with_output().unwrap());
    }
}

#[test]
fn a_stranger_does_not_disturb_the_server() {
    let server = Server::start(&["--port", "0"]);
    let mut stranger = TcpStream::connect(&server.target[0]).unwrap();
    stranger.write_all(&[b'x'; 64]).unwrap();
    let mut rest = Vec::new();
    // The server closes; that may show as a reset.
    let _ = stranger.read_to_end(&mut rest);
    assert!(rest.is_empty());
    result_of(&server.client(&["--seconds", "0.05"]).output().unwrap());
}

#[test]
fn the_open_loop_keeps_to_its_timetable() {
    for wait in ["block", "spin"] {
        let server = Server::start(&["--port", "0"]);
        let flags = [
            "--wait",
            wait,
            "--rate-limit",
            "2000",
            "--seconds",
            "0.2",
            "--warmup",
            "0.1",
            "--verify",
        ];
        let result = result_of(&server.client(&flags).output().unwrap());
        check(&result, "rtt", wait, 64);
        // The step is a whole number of ticks, so that one more may fit into the time.
        let count = result["count"].as_u64().unwrap();
        assert!(
            (400..=401).contains(&count),
            "the timetable has 400: {count}, {wait}"
        );
    }
}

#[test]
fn the_open_loop_charges_a_stall_to_all_whom_it_delays() {
    let server = Server::start(&["--port", "0"]);
    let flags = [
        "--wait",
        "block",
        "--rate-limit",
        "1000",
        "--seconds",
        "1",
        "--warmup",
        "0.01",
    ];
    let client = server
        .client(&flags)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = server.process.id().to_string();
    let signal = |name: &str| {
        assert!(
            Command::new("kill")
                .args([name, &pid])
                .status()
                .unwrap()
                .success()
        )
    };
    std::thread::sleep(Duration::from_millis(300));
    signal("-STOP");
    std::thread::sleep(Duration::from_millis(300));
    signal("-CONT");
    let result = result_of(&client.wait_with_output().unwrap());
    // Some 300 of 1000 messages were due while the server stood still; a closed loop would have one slow sample.
    let slow: u64 = result["histogram"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|pair| pair[0].as_u64().unwrap() > 10_000_000)
        .map(|pair| pair[1].as_u64().unwrap())
        .sum();
    assert!(slow > 150, "only {slow} slow samples: {result}");
}

#[test]
fn the_sender_keeps_to_a_limit() {
    for wait in ["block", "spin"] {
        let server = Server::start(&["--port", "0"]);
        let flags = [
            "--mode",
            "rate",
            "--wait",
            wait,
            "--rate-limit",
            "1000",
            "--seconds",
            "0.3",
        ];
        let per_s = result_of(&server.client(&flags).output().unwrap())["per_s"]
            .as_f64()
            .unwrap();
        assert!(
            per_s < 1100.0 && per_s > 100.0,
            "{per_s} messages a second, {wait}"
        );
    }
}

#[test]
fn a_server_that_dies_is_an_error_and_no_hang() {
    for (mode, wait) in [
        ("rtt", "spin"),
        ("rtt", "block"),
        ("bw", "spin"),
        ("bw", "block"),
        ("cps", "spin"),
    ] {
        let server = Server::start(&["--port", "0"]);
        let mut client = server.client(&["--mode", mode, "--wait", wait, "--seconds", "30"]);
        let client = client
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(150));
        drop(server);
        let output = client.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{mode} {wait}: {output:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn nobody_listening_is_an_error() {
    let output = Command::new(PROGRAM)
        .args(["client", "--unix", "@rdsock-perf-nobody"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("connect to unix:@rdsock-perf-nobody")
    );
}

#[test]
fn texts_for_people() {
    let output = |arguments: &[&str]| {
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(output(&["man"]).contains(".TH rdsock-perf"));
    assert!(output(&["completions", "bash"]).contains("complete -F"));
    let server = Server::start(&["--port", "0"]);
    let client = Command::new(PROGRAM)
        .args(["client", &server.target[0], "--seconds", "0.05"])
        .output()
        .unwrap();
    let text = String::from_utf8(client.stdout).unwrap();
    assert!(text.contains("p99.9") && text.contains("clock"), "{text}");
}
