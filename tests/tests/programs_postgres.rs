//! postgres with pgbench and psql: a server that runs as a user of its own and forks for each
//! connection.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::User;
use rdsock_tests::{
    Program, Running, Site, between_nodes, folder, in_each_mode, place, with_the_lowest_limits,
};

const LIMIT: Duration = Duration::from_secs(120);

/// A command of postgres: Debian keeps them apart, by version, and what is on the path is a script
/// in front.
fn command(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql");
    let mut found: Vec<PathBuf> = versions
        .into_iter()
        .flatten()
        .filter_map(|version| Some(version.ok()?.path().join("bin").join(name)))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| place::command(&[name]))
}

struct Postgres {
    running: Running,
    port: u16,
}

impl Drop for Postgres {
    /// Its own way to end at once: its processes are in groups of their own, and it has shared
    /// memory to remove.
    fn drop(&mut self) {
        if self.running.ended().is_none() {
            self.running.signal(Signal::SIGQUIT);
            self.running.wait(Duration::from_secs(20));
        }
    }
}

/// As root, the program is run as the user postgres: it refuses to be root.
fn as_postgres(program: impl Fn(&Path) -> Program, name: &str) -> Program {
    let name = command(name);
    if !place::is_root() {
        return program(&name);
    }
    program(&place::command(&["setpriv"]))
        .args("--reuid=postgres --regid=postgres --init-groups --")
        .arg(name)
}

/// A server with an empty database.
fn server(site: &Site) -> Postgres {
    let port = place::free_port();
    let data = site.folder.at("data");
    std::fs::create_dir(&data).expect("the folder is new");
    std::fs::set_permissions(&data, PermissionsExt::from_mode(0o700)).expect("it is ours");
    if place::is_root() {
        let user = User::from_name("postgres")
            .expect("users can be looked up")
            .expect("postgres has its user: run tests/setup.sh first");
        chown(&data, Some(user.uid.as_raw()), Some(user.gid.as_raw())).expect("root gives it away");
    }
    as_postgres(|name| site.plain(name), "initdb")
        .args("--no-sync --auth=trust --username=postgres --encoding=UTF8 --locale=C -D")
        .arg(&data)
        .run(LIMIT);
    // A client on another node has another address than the server.
    let mut hosts = OpenOptions::new()
        .append(true)
        .open(data.join("pg_hba.conf"))
        .expect("initdb has made it");
    writeln!(hosts, "host all all 127.0.0.0/8 trust").expect("it can be written to");
    // The shim is loaded once more after the change of user: from where that user can read it.
    let shim = site.folder.at("librdsock.so");
    std::fs::copy(place::binary("librdsock.so"), &shim).expect("it is a file");
    let mut running = as_postgres(|name| site.server(name), "postgres")
        .env("RDSOCK_LIB", shim)
        .arg("-D")
        .arg(&data)
        .args(&format!(
            "-p {port} -c listen_addresses=127.0.0.1 -c fsync=off"
        ))
        .args("-c unix_socket_directories= -c max_connections=50 -c shared_buffers=64MB")
        .start();
    running.wait_for_output("ready to accept connections", LIMIT);
    Postgres { running, port }
}

/// `psql` or `pgbench`, told where the server is.
fn client(site: &Site, postgres: &Postgres, name: &str) -> Program {
    site.client(command(name))
        .args(&format!("-h 127.0.0.1 -p {} -U postgres", postgres.port))
        .env("PGDATABASE", "postgres")
        .env("PGCONNECT_TIMEOUT", "30")
}

/// What psql answers to these commands, bare.
fn psql(site: &Site, postgres: &Postgres, commands: &[&str]) -> Program {
    let mut psql = client(site, postgres, "psql").args("-X -A -t -q -v ON_ERROR_STOP=1");
    for command in commands {
        psql = psql.arg("-c").arg(command);
    }
    psql
}

fn ask(site: &Site, postgres: &Postgres, command: &str) -> String {
    let answer = psql(site, postgres, &[command]).run(LIMIT);
    answer.trim().to_owned()
}

/// Runs pgbench with these options; its figures are for the reader of the test.
fn pgbench(site: &Site, postgres: &Postgres, options: &str, on_rings: usize) {
    let running = client(site, postgres, "pgbench")
        .args("-n")
        .args(options)
        .start();
    let (output, _) = site.finish(running, postgres.port, on_rings, LIMIT);
    let figures: Vec<&str> = output
        .lines()
        .filter(|line| line.starts_with("latency average") || line.starts_with("tps"))
        .collect();
    println!("{:?}: pgbench {options}: {}", site.mode, figures.join(", "));
    assert!(
        figures.len() == 2
            && output.contains("failed transactions: 0 ")
            && !output.contains("error"),
        "pgbench says:\n{output}"
    );
}

/// Reads, and transactions whose sums must be the same afterwards wherever they are kept.
fn benchmark(site: Site) {
    let postgres = server(&site);
    let made = client(&site, &postgres, "pgbench")
        .args("-i -s 5")
        .run(LIMIT);
    assert!(made.contains("done in"), "pgbench -i says:\n{made}");
    pgbench(&site, &postgres, "-c 8 -j 2 -S -T 4", 8);
    pgbench(&site, &postgres, "-c 1 -S -T 2", 1);
    pgbench(&site, &postgres, "-c 8 -S -M prepared -T 2", 8);
    pgbench(&site, &postgres, "-c 4 -T 2", 4);
    let sums = ask(
        &site,
        &postgres,
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = sum(delta) \
         AND (SELECT sum(tbalance) FROM pgbench_tellers) = sum(delta) FROM pgbench_history",
    );
    assert_eq!(sums, "t", "no transaction is lost or done twice");
}

/// A connection for each transaction: most end before they could go on rings.
fn new_connections(site: Site) {
    let postgres = server(&site);
    client(&site, &postgres, "pgbench")
        .args("-i -q -s 1")
        .run(LIMIT);
    pgbench(&site, &postgres, "-C -c 8 -S -T 3", 0);
}

/// Rows go in and come out as they were, by one connection and by several at once.
fn copy_by_checksum(site: Site) {
    const ROWS: u32 = 300_000;
    let postgres = server(&site);
    let mut rows = String::new();
    let mut state = 1_u64;
    for i in 0..ROWS {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let word = "rdsock-".repeat((state >> 60) as usize);
        writeln!(rows, "{i}\t{state}\t{word}").unwrap();
    }
    let rows = site.folder.write("rows", &rows);
    let there = format!("\\copy t from '{}'", rows.display());
    let made = "CREATE UNLOGGED TABLE t (id int, n numeric, word text)";
    let client = psql(&site, &postgres, &[made, &there]).start();
    site.finish(client, postgres.port, 1, LIMIT);
    assert_eq!(
        ask(&site, &postgres, "SELECT count(*) FROM t"),
        ROWS.to_string()
    );
    let clients: Vec<(PathBuf, Running)> = (0..4)
        .map(|i| {
            let back = site.folder.at(&format!("back{i}"));
            let copy = format!(
                "\\copy (SELECT * FROM t ORDER BY id) to '{}'",
                back.display()
            );
            (back, psql(&site, &postgres, &[&copy]).start())
        })
        .collect();
    for (back, client) in clients {
        client.finish(LIMIT);
        assert!(
            folder::same_bytes(&rows, &back),
            "all rows come as they went"
        );
    }
    // One answer of 60 MB, and many small ones on one connection.
    let long = "SELECT md5(repeat('rdsock', 10000000)), length(repeat('rdsock', 10000000))";
    let md5 = ask(&site, &postgres, long);
    let big = psql(&site, &postgres, &["SELECT repeat('rdsock', 10000000)"]).run(LIMIT);
    assert_eq!(
        big.trim_end().len(),
        60_000_000,
        "the answer is whole: {md5}"
    );
    assert!(
        big.trim_end()
            .as_bytes()
            .chunks(6)
            .all(|word| word == b"rdsock")
    );
}

/// Signals that reach a backend which waits: time limits, a cancelled command, an end from outside,
/// a change of settings for all; and at last the end of the server with clients connected.
fn signals(site: Site) {
    let mut postgres = server(&site);
    client(&site, &postgres, "pgbench")
        .args("-i -q -s 1")
        .run(LIMIT);
    let script = "SET statement_timeout = 100;
SELECT pg_sleep(30);
SET statement_timeout = 0;
SELECT count(*) FROM pgbench_accounts;
"
    .repeat(5);
    let script = site.folder.write("limits.sql", &script);
    let output = client(&site, &postgres, "psql")
        .args("-X -A -t -q -f")
        .arg(script)
        .run(LIMIT);
    assert_eq!(
        output.matches("due to statement timeout").count(),
        5,
        "{output}"
    );
    assert_eq!(output.matches("100000\n").count(), 5, "{output}");

    let load = |name: &str| {
        client(&site, &postgres, "pgbench")
            .env("PGAPPNAME", name)
            .args("-n -S -c 4 -T 60")
            .start()
    };
    let mut cut = load("cut");
    let last = load("last");
    site.wait_for_rings(postgres.port, 8);
    std::thread::sleep(Duration::from_millis(300));
    // Everybody reads the configuration again, in the middle of it all.
    postgres.running.signal(Signal::SIGHUP);
    let mut sleeper = psql(&site, &postgres, &["SELECT pg_sleep(60)"]).start();
    // A request to cancel that comes between two commands cancels nothing.
    let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    let end = Instant::now() + LIMIT;
    while ask(&site, &postgres, sleeping) != "1" {
        assert!(Instant::now() < end, "the sleep never began");
        std::thread::sleep(Duration::from_millis(20));
    }
    // It sends its own request to cancel, on a connection made for that.
    sleeper.signal(Signal::SIGINT);
    assert!(!sleeper.wait(LIMIT).success());
    assert!(
        sleeper.output().contains("due to user request"),
        "{}",
        sleeper.output()
    );
    let ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                 WHERE application_name = 'cut'";
    assert_eq!(ask(&site, &postgres, ended), "4");
    assert!(!cut.wait(LIMIT).success());
    assert_eq!(
        cut.output().matches("due to administrator command").count(),
        4,
        "{}",
        cut.output()
    );
    // What it calls a fast shutdown: the other clients are told, and it ends cleanly.
    postgres.running.signal(Signal::SIGINT);
    assert!(postgres.running.wait(LIMIT).success());
    let mut last = last;
    assert!(!last.wait(LIMIT).success());
    assert_eq!(
        last.output()
            .matches("due to administrator command")
            .count(),
        4,
        "{}",
        last.output()
    );
    let log = postgres.running.output();
    for word in [
        "PANIC",
        "terminated by signal",
        "unexpected EOF",
        "protocol",
    ] {
        assert!(!log.contains(word), "postgres says {word}:\n{log}");
    }
}

in_each_mode!(benchmark, new_connections, copy_by_checksum, signals);

between_nodes!(benchmark, new_connections, copy_by_checksum, signals);

with_the_lowest_limits!(benchmark, copy_by_checksum);
