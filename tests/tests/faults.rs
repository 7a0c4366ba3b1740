//! Bad input and faults, with real processes: programs and the daemon killed in the middle,
//! garbage on the control socket and in shared memory, limits.

use std::fs::OpenOptions;
use std::io::IoSlice;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::resource::Resource;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, send, sendmsg};
use rdsock_shm::control::{bytes_of, head, kind};
use rdsock_shm::layout::{Consumer, Direction, Producer, StreamHeader};
use rdsock_tests::why::{self, Connection};
use rdsock_tests::{Daemon, Folder, Program, Running, place, program};

const LIMIT: Duration = Duration::from_secs(60);
const PUMP: &str = env!("CARGO_BIN_EXE_rdsock-test-pump");

/// A daemon, and programs under its shim.
struct Ground {
    daemon: Daemon,
    folder: Folder,
    /// Descriptors of the daemon when nobody was attached.
    descriptors: usize,
}

impl Ground {
    fn new(config: &str) -> Self {
        let mut daemon = Daemon::start(&format!("log_level = \"debug\"\n{config}"));
        daemon.stat();
        let descriptors = daemon.descriptors();
        Ground {
            daemon,
            folder: Folder::new(),
            descriptors,
        }
    }

    fn pump(&self, args: &str) -> Program {
        Program::new(PUMP, self.folder.path())
            .args(args)
            .preloaded(&self.daemon.socket())
    }

    fn serve(&self) -> (Running, u16) {
        self.serve_by(|program| program)
    }

    fn serve_by(&self, prepare: impl FnOnce(Program) -> Program) -> (Running, u16) {
        let port = place::free_port();
        let mut running = prepare(self.pump(&format!("serve {port}"))).start();
        running.wait_for_output("listening", LIMIT);
        (running, port)
    }

    fn send(&self, port: u16, megabytes: u64, rate: u64) -> Running {
        self.pump(&format!("send {port} {megabytes} {rate}"))
            .start()
    }

    /// A transfer that is well on its way on rings.
    fn begin(&self, port: u16, megabytes: u64, rate: u64) -> Running {
        let mut client = self.send(port, megabytes, rate);
        client.wait_for_output("begun", LIMIT);
        self.wait_for_rings(&client, 1);
        client
    }

    fn connections(&self, running: &Running) -> Vec<Connection> {
        why::ask(&self.daemon.socket(), Some(running.pid())).connections
    }

    fn wait_for_rings(&self, running: &Running, count: usize) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let connections = self.connections(running);
            let on_rings = connections.iter().filter(|c| c.accelerated).count();
            if on_rings >= count {
                return;
            }
            assert!(
                Instant::now() < end,
                "{on_rings} of {count} connections are on rings: {connections:#?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Waits until a server has said what became of so many connections; what it said of them.
fn endings(server: &Running, count: usize, limit: Duration) -> Vec<String> {
    let end = Instant::now() + limit;
    loop {
        let output = server.output();
        let lines: Vec<String> = output
            .lines()
            .filter(|line| line.starts_with("ended") || line.starts_with("broke"))
            .map(str::to_owned)
            .collect();
        if lines.len() >= count {
            return lines;
        }
        let seen = lines.len();
        assert!(
            Instant::now() < end,
            "the server has seen {seen} of {count} endings within {limit:?}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The tool of these tests, on plain Linux.
#[test]
fn a_plain_transfer() {
    let folder = Folder::new();
    let port = place::free_port();
    let pump = |args: &str| Program::new(PUMP, folder.path()).args(args);
    let mut server = pump(&format!("serve {port}")).start();
    server.wait_for_output("listening", LIMIT);
    let output = pump(&format!("send {port} 1000 2000")).run(LIMIT);
    assert!(output.contains("done 1048576000"), "{output}");
    let output = pump(&format!("hold {port} 50 0")).run(LIMIT);
    assert!(output.contains("done 50"), "{output}");
}

#[test]
fn a_killed_client_is_seen_at_once_and_leaves_nothing() {
    let mut ground = Ground::new("");
    let (mut server, port) = ground.serve();
    for round in 1..=10 {
        let mut client = ground.begin(port, 10_000, 2_000);
        client.kill();
        let lines = endings(&server, round, Duration::from_secs(2));
        let last = lines.last().cloned().unwrap_or_default();
        let known = ["ended", ": ConnectionReset", ": BrokenPipe"];
        assert!(known.iter().any(|word| last.contains(word)), "{last}");
    }
    server.kill();
    let descriptors = ground.descriptors;
    ground.daemon.wait_until_empty(descriptors);
}

#[test]
fn a_killed_server_is_seen_at_once_and_leaves_nothing() {
    let mut ground = Ground::new("");
    for _ in 0..10 {
        let (mut server, port) = ground.serve();
        let mut client = ground.begin(port, 10_000, 2_000);
        server.kill();
        let status = client.wait(Duration::from_secs(2));
        let output = client.output();
        assert_eq!(status.code(), Some(3), "{output}");
        assert!(
            output.contains("ConnectionReset") || output.contains("UnexpectedEof"),
            "{output}"
        );
    }
    let descriptors = ground.descriptors;
    ground.daemon.wait_until_empty(descriptors);
}

#[test]
fn a_stopped_program_is_not_taken_for_dead() {
    let ground = Ground::new("");
    let (server, port) = ground.serve();
    let client = ground.begin(port, 400, 200);
    for _ in 0..3 {
        server.signal(Signal::SIGSTOP);
        std::thread::sleep(Duration::from_millis(300));
        server.signal(Signal::SIGCONT);
        std::thread::sleep(Duration::from_millis(100));
    }
    let output = client.finish(LIMIT);
    assert!(output.contains("done"), "{output}");
}

#[test]
fn streams_outlive_a_killed_daemon_and_a_new_one_accelerates_again() {
    let mut ground = Ground::new("");
    let (mut server, port) = ground.serve();
    let running = ground.begin(port, 1_500, 400);
    let fast = ground.begin(port, 6_000, 2_000);
    ground.daemon.kill();

    // Without a daemon: what was promoted goes on, what is new goes through the kernel.
    let new = ground.send(port, 100, 1_000);
    assert!(new.finish(LIMIT).contains("done 104857600"));
    let (late_server, late_port) = ground.serve();
    let new = ground.send(late_port, 100, 1_000);
    assert!(new.finish(LIMIT).contains("done 104857600"));
    drop(late_server);

    ground.daemon.restart();
    let (_next_server, next_port) = ground.serve();
    ground.begin(next_port, 2_000, 1_000).kill();
    // Programs that were there before find the new daemon too.
    let again = ground.begin(port, 600, 200);
    assert!(again.finish(LIMIT).contains("done 629145600"));

    assert!(running.finish(LIMIT).contains("done 1572864000"));
    assert!(fast.finish(LIMIT).contains("done 6291456000"));
    assert!(server.ended().is_none());
    let lines = endings(&server, 4, LIMIT);
    assert!(
        lines.iter().all(|line| line.starts_with("ended")),
        "{lines:?}"
    );
}

#[test]
fn a_daemon_killed_again_and_again_breaks_nothing() {
    let mut ground = Ground::new("");
    let (server, port) = ground.serve();
    let long = ground.begin(port, 2_000, 400);
    for round in 0..6 {
        let clients: Vec<Running> = (0..3).map(|_| ground.send(port, 40, 200)).collect();
        std::thread::sleep(Duration::from_millis(60 * round));
        ground.daemon.kill();
        std::thread::sleep(Duration::from_millis(50));
        ground.daemon.restart();
        for client in clients {
            let output = client.finish(LIMIT);
            assert!(output.contains("done 41943040"), "{output}");
        }
    }
    assert!(long.finish(LIMIT).contains("done 2097152000"));
    let lines = endings(&server, 19, LIMIT);
    assert!(
        lines.iter().all(|line| line.starts_with("ended")),
        "{lines:?}"
    );
}

#[test]
fn a_stopped_daemon_delays_nobody() {
    let mut ground = Ground::new("");
    let (_server, port) = ground.serve();
    let running = ground.begin(port, 600, 300);
    ground.daemon.running().signal(Signal::SIGSTOP);
    let started = Instant::now();
    let (_late_server, late_port) = ground.serve();
    for port in [port, late_port] {
        let new = ground.send(port, 50, 1_000);
        assert!(new.finish(LIMIT).contains("done 52428800"));
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(5), "it took {took:?}");
    ground.daemon.running().signal(Signal::SIGCONT);
    assert!(running.finish(LIMIT).contains("done 629145600"));
    ground.begin(port, 2_000, 1_000).kill();
}

#[test]
fn without_a_daemon_everything_works_over_the_kernel() {
    let folder = Folder::new();
    let nowhere = folder.at("nobody.sock");
    let port = place::free_port();
    let pump = |args: &str| {
        Program::new(PUMP, folder.path())
            .args(args)
            .preloaded(&nowhere)
    };
    let mut server = pump(&format!("serve {port}")).start();
    server.wait_for_output("listening", LIMIT);
    let output = pump(&format!("send {port} 200 2000")).run(LIMIT);
    assert!(output.contains("done 209715200"), "{output}");
}

#[test]
fn garbage_on_the_control_socket_hurts_only_its_sender() {
    let mut ground = Ground::new("");
    let (_server, port) = ground.serve();
    let client = ground.begin(port, 1_000, 300);
    let before = ground.daemon.number("/counters/malformed");
    let null = OpenOptions::new().read(true).open("/dev/null").unwrap();
    let mut state = 12_345_u64;
    for round in 0..300_u64 {
        let stranger = ground.daemon.stranger();
        let mut bytes: Vec<u8> = (0..round % 200)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            })
            .collect();
        if round % 2 == 0 {
            // A true head, then rubbish; all kinds, known and not.
            let mut start = bytes_of(&head((round / 2 % 16) as u16)).to_vec();
            start.extend(&bytes);
            bytes = start;
        }
        let fds = vec![null.as_raw_fd(); (round % 254) as usize];
        let _ = sendmsg::<()>(
            stranger.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
    }
    // And some that say nothing, and stay.
    let silent: Vec<_> = (0..50).map(|_| ground.daemon.stranger()).collect();
    let query = bytes_of(&head(kind::QUERY)).to_vec();
    for stranger in &silent {
        let _ = send(stranger.as_raw_fd(), &query, MsgFlags::MSG_NOSIGNAL);
    }
    assert!(ground.daemon.number("/counters/malformed") > before);
    ground.begin(port, 2_000, 1_000).kill();
    let output = client.finish(LIMIT);
    assert!(output.contains("done"), "{output}");
    drop(silent);
    drop(_server);
    let descriptors = ground.descriptors;
    ground.daemon.wait_until_empty(descriptors);
}

/// Where each stream's memory starts in a process.
fn stream_memory(pid: u32) -> Vec<u64> {
    let path = format!("/proc/{pid}/maps");
    let maps = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    maps.lines()
        .filter(|line| line.contains("rdsock-stream"))
        .filter_map(|line| {
            let (start, rest) = line.split_once('-')?;
            // The mapping of the header, not of a ring behind it.
            rest.contains(" 00000000 ")
                .then(|| u64::from_str_radix(start, 16).ok())?
        })
        .collect()
}

/// Two transfers; in the server of one of them rubbish is written over the words that its stream
/// shares with the client, again and again while data flows, as a broken or hostile program
/// would. That client's end of it is given to `check`; everybody else must not notice.
fn with_rubbish(places: &[usize], rubbish: &[u8], check: impl Fn(&mut Running, &mut Running)) {
    let mut ground = Ground::new("");
    let (mut bystander_server, bystander_port) = ground.serve();
    let mut bystander = ground.begin(bystander_port, 300, 200);
    let (mut server, port) = ground.serve();
    let mut honest = ground.begin(port, 100_000, 2_000);
    let memory = stream_memory(server.pid());
    assert!(!memory.is_empty(), "a stream is mapped");
    let file = OpenOptions::new()
        .write(true)
        .open(format!("/proc/{}/mem", server.pid()))
        .expect("a child's memory can be written");
    let end = Instant::now() + Duration::from_secs(10);
    while honest.ended().is_none() && server.ended().is_none() && Instant::now() < end {
        for start in &memory {
            for place in places {
                let _ = file.write_all_at(rubbish, start + *place as u64);
            }
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    assert!(server.ended().is_none(), "a broken stream kills nobody");
    check(&mut honest, &mut server);
    assert!(bystander.wait(LIMIT).success(), "{}", bystander.output());
    if server.ended().is_none() {
        // The program whose stream broke can have another one.
        ground.begin(port, 10_000, 1_000).kill();
        server.kill();
    }
    bystander_server.kill();
    drop((honest, bystander));
    let descriptors = ground.descriptors;
    ground.daemon.wait_until_empty(descriptors);
}

/// Offsets of a word in both directions of a stream.
fn in_both_directions(word: usize) -> [usize; 2] {
    [0, 1].map(|d| offset_of!(StreamHeader, directions) + d * size_of::<Direction>() + word)
}

#[test]
fn impossible_positions_in_shared_memory_reset_the_other_end() {
    for word in [
        offset_of!(Direction, producer) + offset_of!(Producer, head),
        offset_of!(Direction, consumer) + offset_of!(Consumer, tail),
    ] {
        for rubbish in [[0xff; 8], [0x80; 8], [0x11; 8]] {
            with_rubbish(&in_both_directions(word), &rubbish, |honest, _| {
                let status = honest.wait(Duration::from_secs(10));
                let output = honest.output();
                assert_eq!(status.code(), Some(3), "{output}");
                assert!(output.contains("ConnectionReset"), "{output}");
            });
        }
    }
}

#[test]
fn rubbish_in_all_shared_words_hurts_nobody_else() {
    let start = offset_of!(StreamHeader, directions);
    for round in 0..6_u64 {
        let noise: Vec<u8> = (0..2 * size_of::<Direction>() as u64)
            .map(|i| match round {
                0 => 0,
                1 => 0xff,
                _ => ((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 + round) >> 40) as u8,
            })
            .collect();
        with_rubbish(&[start], &noise, |honest, server| {
            // What a hostile end sends is its own affair, or whether it says anything: each end may wait for the other
            // where their requests were wiped away. But with the other one there must be an end.
            let end = Instant::now() + Duration::from_secs(2);
            while honest.ended().is_none() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            if honest.ended().is_none() {
                server.kill();
            }
            let status = honest.wait(Duration::from_secs(10));
            let known = [Some(3), Some(4)].contains(&status.code());
            assert!(known, "{status}: {}", honest.output());
        });
    }
}

/// A transfer between programs that were started with less than usual: it arrives, on rings or
/// not, and nothing floods the output.
fn transfer_with(prepare: impl Fn(Program) -> Program, config: &str) -> (String, String) {
    let ground = Ground::new(config);
    let (server, port) = ground.serve_by(&prepare);
    let output = prepare(ground.pump(&format!("send {port} 60 1000"))).run(LIMIT);
    assert!(output.contains("done 62914560"), "{output}");
    let said = server.output();
    for text in [&output, &said] {
        let warnings = text.lines().filter(|line| line.contains("rdsock")).count();
        assert!(warnings <= 1, "more than one warning:\n{text}");
    }
    (output, said)
}

#[test]
fn few_descriptors() {
    for limit in [8, 10, 12, 16, 24] {
        transfer_with(|program| program.limit(Resource::RLIMIT_NOFILE, limit), "");
    }
}

#[test]
fn no_locked_memory() {
    transfer_with(|program| program.limit(Resource::RLIMIT_MEMLOCK, 0), "");
}

#[test]
fn no_file_may_grow() {
    transfer_with(|program| program.limit(Resource::RLIMIT_FSIZE, 1 << 16), "");
}

#[test]
fn little_address_space() {
    transfer_with(|program| program.limit(Resource::RLIMIT_AS, 400 << 20), "");
}

#[test]
fn full_dev_shm() {
    if !place::is_root() {
        eprintln!("left out: needs root for a mount namespace");
        return;
    }
    let script = "mount -t tmpfs -o size=64k tmpfs /dev/shm && \
                  head -c 200000 /dev/zero >/dev/shm/full 2>/dev/null; exec \"$0\" \"$@\"";
    let ground = Ground::new("");
    let port = place::free_port();
    let pump = |args: &str| {
        Program::new("unshare", ground.folder.path())
            .args("--mount --")
            .arg("/bin/sh")
            .arg("-c")
            .arg(script)
            .arg(place::binary("rdsock"))
            .args("run --no-daemon --")
            .arg(PUMP)
            .args(args)
            .env("RDSOCK_SOCKET", ground.daemon.socket())
    };
    let mut server = pump(&format!("serve {port}")).start();
    server.wait_for_output("listening", LIMIT);
    let output = pump(&format!("send {port} 60 1000")).run(LIMIT);
    assert!(output.contains("done 62914560"), "{output}");
}

#[test]
fn no_huge_pages_is_one_warning() {
    let free = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap_or_default();
    if free.trim() != "0" {
        eprintln!("left out: this machine has huge pages");
        return;
    }
    let mut ground = Ground::new("huge_pages = \"auto\"\n");
    let (_server, port) = ground.serve();
    for _ in 0..3 {
        ground.begin(port, 2_000, 1_000).kill();
    }
    let log = ground.daemon.log().to_lowercase();
    let warnings = log
        .lines()
        .filter(|line| line.contains("warn") && line.contains("huge"))
        .count();
    assert_eq!(warnings, 1, "{log}");
}

#[test]
fn the_limit_of_streams_is_kept_and_told() {
    let ground = Ground::new("max_streams_per_user = 3\n");
    let (_server, port) = ground.serve();
    let mut client = ground.pump(&format!("hold {port} 8 2")).start();
    client.wait_for_output("held", LIMIT);
    ground.wait_for_rings(&client, 3);
    std::thread::sleep(Duration::from_millis(300));
    let connections = ground.connections(&client);
    let on_rings = connections.iter().filter(|c| c.accelerated).count();
    assert_eq!(on_rings, 3, "{connections:#?}");
    let told = connections
        .iter()
        .filter(|c| !c.accelerated)
        .all(|c| c.reason.as_deref().is_some_and(|r| r.contains("limit")));
    assert!(told, "{connections:#?}");
    assert!(client.finish(LIMIT).contains("done 8"));
}

/// KiB of a process's mappings of this name that are in memory.
fn resident(pid: u32, name: &str) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut named = false;
    let mut sum = 0;
    for line in maps.lines() {
        if let Some(kib) = line.strip_prefix("Rss:") {
            let kib = kib.trim().trim_end_matches(" kB");
            sum += if named { kib.parse().unwrap() } else { 0 };
        } else if line.split_whitespace().count() >= 5 && !line.contains("kB") {
            named = line.contains(name);
        }
    }
    sum
}

#[test]
fn idle_connections_use_no_processor_and_little_memory() {
    // In huge pages a stream has its rings whole.
    let mut ground = Ground::new("huge_pages = \"never\"\n");
    let (server, port) = ground.serve();
    let mut client = ground.pump(&format!("hold {port} 100 5")).start();
    client.wait_for_output("held", LIMIT);
    ground.wait_for_rings(&client, 100);
    std::thread::sleep(Duration::from_millis(500));
    let of_ends = [client.pid(), server.pid()].map(|pid| resident(pid, "/memfd:rdsock-end"));
    let of_streams = resident(client.pid(), "/memfd:rdsock-stream");
    let each = (of_ends.iter().sum::<u64>() + of_streams) as f64 / 100.0;
    assert!(
        (8.0..=16.0).contains(&each),
        "{each} KiB for each connection: ends {of_ends:?}, streams {of_streams}"
    );
    let pids = [client.pid(), server.pid(), ground.daemon.running().pid()];
    let before = pids.map(program::cpu_seconds);
    std::thread::sleep(Duration::from_secs(2));
    let used: Vec<f64> = pids
        .iter()
        .zip(before)
        .map(|(pid, before)| program::cpu_seconds(*pid) - before)
        .collect();
    assert!(
        used.iter().all(|seconds| *seconds <= 0.02),
        "client, server and daemon used {used:?} s of 2 s"
    );
    assert!(client.finish(LIMIT).contains("done 100"));
}

#[test]
fn another_network_namespace_is_told_apart() {
    if !place::is_root() {
        eprintln!("left out: needs root for a network namespace");
        return;
    }
    // The same addresses and ports in two namespaces at once.
    let ground = Ground::new("");
    let port = place::free_port();
    let script = format!(
        "ip link set lo up && (\"$0\" run --no-daemon -- {PUMP} serve {port} & \
         sleep 0.5; \"$0\" run --no-daemon -- {PUMP} send {port} 200 300; kill $!)"
    );
    let inside: Vec<Running> = (0..2)
        .map(|_| {
            Program::new("unshare", ground.folder.path())
                .args("--net -- /bin/sh -c")
                .arg(&script)
                .arg(place::binary("rdsock"))
                .env("RDSOCK_SOCKET", ground.daemon.socket())
                .start()
        })
        .collect();
    for running in inside {
        let mut running = running;
        running.wait(LIMIT);
        let output = running.output();
        assert!(output.contains("done 209715200"), "{output}");
    }
}

#[test]
fn the_control_socket_is_where_it_was_asked_for() {
    let ground = Ground::new("");
    let socket = ground.daemon.socket();
    assert!(Path::new(&socket).exists());
    let answer = why::ask(&socket, None);
    let daemon = answer.daemon.expect("a daemon answers");
    assert_eq!(Path::new(&daemon.socket), socket);
}
