//! What goes wrong around the tool: output that is full, a daemon that is stopped, scripts without an interpreter, paths
//! that name something else. Each has to be said clearly, in bounded time, and without harm.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const RDSOCK: &str = env!("CARGO_BIN_EXE_rdsock");

/// A folder, and the daemon that was started there, which ends with it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Place(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env("RDSOCK_SOCKET", self.at("run/rdsockd.sock"))
            .env("RDSOCK_LIB", "/nowhere")
            .env_remove("LD_PRELOAD");
        command
    }

    fn rdsock(&self) -> Command {
        self.command(Path::new(RDSOCK))
    }

    /// Starts a daemon; its process.
    fn daemon(&self) -> Daemon {
        fs::create_dir_all(self.at("run")).unwrap();
        let mut command = self.command(&beside("rdsockd").unwrap());
        let log = File::create(self.at("log")).unwrap();
        command.arg("--socket").arg(self.at("run/rdsockd.sock"));
        let daemon = Daemon(command.stderr(log).spawn().unwrap());
        while !self.rdsock().arg("stat").output().unwrap().status.success() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        daemon
    }

    fn script(&self, name: &str, text: &[u8], mode: u32) -> PathBuf {
        let path = self.at(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }
}

/// A daemon of this test.
struct Daemon(std::process::Child);

impl Daemon {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Another program of the workspace, where it is built.
fn beside(name: &str) -> Option<PathBuf> {
    let path = Path::new(RDSOCK).with_file_name(name);
    if !path.is_file() {
        eprintln!("SKIPPED, NOTHING WAS CHECKED: {name} is not built (cargo build --workspace)");
        return None;
    }
    Some(path)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

/// Output that is full, then closed, then not read any more, then full together with the complaints.
fn has_nowhere_to_write(make: &dyn Fn() -> Command) {
    let what = format!("{:?}", make());
    for closed in [false, true] {
        let mut command = make();
        if closed {
            let inner = make();
            command = Command::new("sh");
            command
                .args(["-c", "exec \"$0\" \"$@\" >&-"])
                .arg(inner.get_program());
            command.args(inner.get_args());
            for (name, value) in inner.get_envs() {
                value.map(|value| command.env(name, value));
            }
            command.stderr(Stdio::piped());
        } else {
            command.stdout(full());
        }
        let output = command
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
            .wait_with_output()
            .unwrap();
        let said = text(&output.stderr);
        assert!(
            output.status.code().is_some_and(|code| code != 0),
            "{what}: {output:?}"
        );
        assert!(
            said.contains("can't write to standard output"),
            "{what}: {said}"
        );
        assert!(!said.contains("panicked"), "{what}: {said}");
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = make();
    let output = command
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let output = output.wait_with_output().unwrap();
    assert!(!output.status.success(), "{what}");
    assert_eq!(text(&output.stderr), "", "{what}");
    let status = make().stdout(full()).stderr(full()).status().unwrap();
    assert!(
        status.code().is_some_and(|code| code != 0),
        "{what}: {status}"
    );
}

#[test]
fn output_that_can_not_be_written_is_said_and_never_a_panic() {
    let place = Place::new();
    let _daemon = beside("rdsockd").map(|_| place.daemon());
    let own = std::process::id().to_string();
    let mut commands: Vec<(PathBuf, Vec<&str>)> = Vec::new();
    for words in [
        vec!["--help"],
        vec!["doctor"],
        vec!["doctor", "--json"],
        vec!["devices"],
        vec!["devices", "--json"],
        vec!["why", &own],
        vec!["why", "--json"],
        vec!["completions", "bash"],
    ] {
        commands.push((RDSOCK.into(), words));
    }
    if let Some(rdsockd) = beside("rdsockd") {
        commands.push((RDSOCK.into(), vec!["stat"]));
        commands.push((RDSOCK.into(), vec!["stat", "--json"]));
        for word in ["--help", "--print-man", "--check-config"] {
            commands.push((rdsockd.clone(), vec![word]));
        }
    }
    if let Some(perf) = beside("rdsock-perf") {
        commands.push((perf.clone(), vec!["--help"]));
        commands.push((perf.clone(), vec!["man"]));
        commands.push((perf.clone(), vec!["completions", "bash"]));
        commands.push((perf, vec!["server", "--port", "0", "--once"]));
    }
    if let Some(perf) = beside("rdsock-engine-perf") {
        commands.push((perf, vec!["--count", "10"]));
    }
    if let Some(model) = beside("rdsock-model") {
        commands.push((model, vec!["--help"]));
    }
    for (program, words) in commands {
        has_nowhere_to_write(&|| {
            let mut command = place.command(&program);
            command.args(&words);
            command
        });
    }
}

#[test]
fn a_daemon_goes_on_where_its_log_is_full() {
    let Some(rdsockd) = beside("rdsockd") else {
        return;
    };
    let place = Place::new();
    let mut command = place.command(&rdsockd);
    command
        .arg("--socket")
        .arg(place.at("run/rdsockd.sock"))
        .args(["--log-level", "trace"]);
    let mut daemon = Daemon(command.stderr(full()).spawn().unwrap());
    loop {
        assert_eq!(daemon.0.try_wait().unwrap(), None);
        if place
            .rdsock()
            .arg("stat")
            .output()
            .unwrap()
            .status
            .success()
        {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.0.wait().unwrap().success());
}

#[test]
fn a_stopped_daemon_is_named_with_what_to_do() {
    if beside("rdsockd").is_none() {
        return;
    }
    let place = Place::new();
    let daemon = place.daemon();
    daemon.signal(Signal::SIGSTOP);
    let own = std::process::id().to_string();
    let calls = [
        vec!["stat"],
        vec!["stat", "--json"],
        vec!["why", "--all"],
        vec!["why", &own],
        vec!["doctor"],
        vec!["run", "--", "echo", "it ran"],
    ];
    let running = calls.clone().map(|words| {
        let mut command = place.rdsock();
        if words[0] == "run" {
            // Any library will do.
            command.env("RDSOCK_LIB", harmless_library());
        }
        command
            .args(words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    });
    let outputs: Vec<Output> = running.map(|run| run.wait_with_output().unwrap()).into();
    daemon.signal(Signal::SIGCONT);
    let (pid, path) = (daemon.0.id(), place.at("run/rdsockd.sock"));
    for (words, output) in calls.iter().zip(outputs) {
        let said = text(&output.stdout) + &text(&output.stderr);
        let expected = format!("rdsockd (pid {pid}, {})", path.display());
        assert!(said.contains(&expected), "{words:?}: {said}");
        assert!(said.contains("does not answer"), "{words:?}: {said}");
        assert!(
            said.contains(&format!("kill -CONT {pid}")),
            "{words:?}: {said}"
        );
        assert!(!said.contains("EAGAIN"), "{words:?}: {said}");
        let runs = words[0] == "run";
        assert_eq!(output.status.success(), runs, "{words:?}: {said}");
        assert_eq!(
            text(&output.stdout) == "it ran\n",
            runs,
            "{words:?}: {said}"
        );
    }
    assert!(
        place
            .rdsock()
            .arg("stat")
            .output()
            .unwrap()
            .status
            .success()
    );
}

#[test]
fn a_daemon_that_takes_no_caller_is_named_in_bounded_time() {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
    use nix::sys::socket::{bind, connect, listen, socket};
    use std::os::fd::AsRawFd;
    let place = Place::new();
    fs::create_dir(place.at("run")).unwrap();
    let path = place.at("run/rdsockd.sock");
    let open = || {
        socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_NONBLOCK,
            None,
        )
        .unwrap()
    };
    let address = UnixAddr::new(&path).unwrap();
    let listener = open();
    bind(listener.as_raw_fd(), &address).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    // As many as it takes.
    let mut callers = Vec::new();
    loop {
        let caller = open();
        if connect(caller.as_raw_fd(), &address).is_err() {
            break;
        }
        callers.push(caller);
    }
    let output = place.rdsock().arg("stat").output().unwrap();
    let said = text(&output.stderr);
    assert!(
        said.contains(&format!("rdsockd at {} does not answer", path.display())),
        "{said}"
    );
}

/// One that root has named may be a stranger's.
#[test]
fn an_answer_without_end_is_ended() {
    use nix::sys::socket::{AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr};
    use nix::sys::socket::{accept, bind, listen, recv, send, socket};
    use rdsock_shm::control::{bytes_of, head, kind};
    use std::os::fd::AsRawFd;
    let place = Place::new();
    fs::create_dir(place.at("run")).unwrap();
    let address = UnixAddr::new(&place.at("run/rdsockd.sock")).unwrap();
    let (family, seqpacket) = (AddressFamily::Unix, SockType::SeqPacket);
    let listener = socket(family, seqpacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &address).unwrap();
    listen(&listener, Backlog::new(1).unwrap()).unwrap();
    let daemon = std::thread::spawn(move || {
        let caller = accept(listener.as_raw_fd()).unwrap();
        recv(caller, &mut [0; 64], MsgFlags::empty()).unwrap();
        let piece = [bytes_of(&head(kind::ANSWER)), &[b' '; 60_000]].concat();
        let pieces = (0..).take_while(|_| send(caller, &piece, MsgFlags::MSG_NOSIGNAL).is_ok());
        pieces.count() * 60_000
    });
    let output = place.rdsock().arg("stat").output().unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("longer than 64 MB"), "{said}");
    let sent = daemon.join().unwrap();
    assert!(sent < 80 << 20, "{sent} bytes");
}

/// The C library, which every program has anyway.
fn harmless_library() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mut paths = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5));
    paths.find(|path| path.contains("/libc")).unwrap().into()
}

#[test]
fn what_keeps_a_program_from_running_is_named() {
    let place = Place::new();
    let fails = |path: &Path, status: i32, words: &[&str]| {
        let output = place
            .rdsock()
            .args(["run", "--no-daemon", "--"])
            .arg(path)
            .output()
            .unwrap();
        let said = text(&output.stderr);
        let said = said.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(status), "{said}");
        for word in words.iter().chain([&path.to_str().unwrap()]) {
            assert!(said.contains(word), "{word}: {said}");
        }
    };
    let missing = place.script("missing", b"#! /no/such/interpreter -x\n", 0o755);
    fails(
        &missing,
        127,
        &["its interpreter, /no/such/interpreter, is not there"],
    );
    let line = format!("#!{}\n", missing.display());
    let chain = place.script("chain", line.as_bytes(), 0o755);
    fails(
        &chain,
        127,
        &["its interpreter of", "/no/such/interpreter, is not there"],
    );
    let windows = place.script("windows", b"#!/bin/sh\r\necho\r\n", 0o755);
    fails(&windows, 127, &["carriage return"]);
    let plain = place.script("plain", b"echo\n", 0o644);
    fails(&plain, 126, &["not executable", "chmod +x"]);
    let line = format!("#!{}\n", plain.display());
    let through = place.script("through", line.as_bytes(), 0o755);
    fails(
        &through,
        126,
        &["its interpreter", "plain", "not executable"],
    );
    let folder = place.script("folder", b"#!/tmp\n", 0o755);
    fails(&folder, 126, &["its interpreter, /tmp, is a directory"]);
    fails(place.0.path(), 126, &["is a directory"]);
    let binary = place.script("binary", b"\x7fELF\0\0\0\0", 0o755);
    fails(&binary, 126, &["format that this machine can't run"]);
    fails(&place.at("nowhere"), 127, &["not found"]);
    let mut elf = fs::read("/bin/true").unwrap();
    let loader = b"/lib64/ld-linux-x86-64.so.2";
    match elf.windows(loader.len()).position(|bytes| bytes == loader) {
        Some(at) => {
            elf[at + 1] = b'L';
            let elf = place.script("elf", &elf, 0o755);
            fails(
                &elf,
                127,
                &["the loader that it needs, /Lib64/ld", "is not there"],
            );
        }
        None => eprintln!("SKIPPED, NOTHING WAS CHECKED: /bin/true has another loader"),
    }
    // As a shell does it.
    let env = place.script("env", b"#!/usr/bin/env no-such-program-here\n", 0o755);
    let output = place
        .rdsock()
        .args(["run", "--no-daemon", "--"])
        .arg(env)
        .output()
        .unwrap();
    assert!(
        text(&output.stderr).contains("no-such-program-here"),
        "{output:?}"
    );
    assert_eq!(output.status.code(), Some(127));
    let bare = place.script("bare", b"echo bare $1\n", 0o755);
    let output = place
        .rdsock()
        .args(["run", "--no-daemon", "--"])
        .arg(bare)
        .arg("x")
        .output()
        .unwrap();
    assert_eq!(text(&output.stdout), "bare x\n");
}

#[test]
fn a_path_that_names_something_else_is_left_alone() {
    if beside("rdsockd").is_none() {
        return;
    }
    let place = Place::new();
    let file = place.at("precious");
    fs::write(&file, "precious").unwrap();
    let run = |socket: &Path| {
        let mut command = place.rdsock();
        command
            .env("RDSOCK_SOCKET", socket)
            .env("RDSOCK_LIB", harmless_library());
        let output = command
            .args(["run", "--", "echo", "it ran"])
            .output()
            .unwrap();
        assert_eq!(text(&output.stdout), "it ran\n", "{output:?}");
        text(&output.stderr)
    };
    let said = run(&file);
    assert!(said.contains("precious is a regular file"), "{said}");
    let names = |dir: &Path| fs::read_dir(dir).unwrap().count();
    assert_eq!(names(place.0.path()), 1);
    for (name, log) in [("a", "rdsockd.log"), ("b", "s.sock.start")] {
        let dir = place.at(name);
        fs::create_dir(&dir).unwrap();
        symlink(&file, dir.join(log)).unwrap();
        let said = run(&dir.join("s.sock"));
        assert!(
            said.contains(log) && said.contains("is a symbolic link"),
            "{said}"
        );
        fs::remove_file(dir.join(log)).unwrap();
        nix::unistd::mkfifo(&dir.join(log), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let said = run(&dir.join("s.sock"));
        assert!(said.contains(log) && said.contains("is a FIFO"), "{said}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let output = Command::new(beside("rdsockd").unwrap())
        .arg("--socket")
        .arg(&file)
        .output()
        .unwrap();
    assert!(
        text(&output.stderr).contains("precious is a regular file"),
        "{output:?}"
    );
    assert_eq!(output.status.signal(), None);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

#[test]
fn nothing_is_made_behind_somebody_elses_link() {
    if beside("rdsockd").is_none() {
        return;
    }
    let place = Place::new();
    let (target, link) = (place.at("target"), place.at("link"));
    fs::create_dir(&target).unwrap();
    symlink(&target, &link).unwrap();
    if std::os::unix::fs::lchown(&link, Some(64001), None).is_err() {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root can make another user's link");
    }
    let socket = link.join("new/run/s.sock");
    let mut run = place.rdsock();
    run.env("RDSOCK_SOCKET", &socket)
        .env("RDSOCK_LIB", harmless_library())
        .args(["run", "--", "echo", "it ran"]);
    let output = run.output().unwrap();
    assert_eq!(text(&output.stdout), "it ran\n", "{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains("belongs to user 64001"), "{said}");
    let mut pages = place.rdsock();
    let output = pages.arg("man").arg(link.join("pages")).output().unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("belongs to user 64001"), "{said}");
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
}
