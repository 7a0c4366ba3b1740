//! redis-server with redis-benchmark and redis-cli.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use rdsock_tests::{
    Mode, Running, Site, between_nodes, folder, in_each_mode, place, with_the_lowest_limits,
};

const LIMIT: Duration = Duration::from_secs(120);

/// A server without a configuration file and without files on disk; its port.
fn server(site: &Site) -> (Running, u16) {
    let port = place::free_port();
    let running = site
        .server(place::command(&["redis-server"]))
        .args(&format!(
            "--port {port} --bind 127.0.0.1 --protected-mode no --appendonly no"
        ))
        .args("--daemonize no --maxclients 2000 --dir")
        .arg(site.folder.path())
        .arg("--save")
        .arg("")
        .start()
        .wait_for_port(port);
    (running, port)
}

/// Runs redis-benchmark with these options; what it printed, checked for its figures.
fn benchmark(site: &Site, port: u16, options: &str, on_rings: usize) {
    let client = site
        .client(place::command(&["redis-benchmark"]))
        .args(&format!("-p {port} -q {options}"))
        .start();
    let (output, _) = site.finish(client, port, on_rings, LIMIT);
    let figures = output.matches("requests per second").count();
    assert!(
        figures > 0 && !output.contains("rror"),
        "redis-benchmark says:\n{output}"
    );
}

/// The number of requests: fewer between nodes, where two daemons share the processors with them, and where each piece is small.
fn requests(site: &Site, number: u32) -> u32 {
    match site.mode {
        Mode::Lowest => number / 10,
        _ => requests_of_small_pieces(site, number),
    }
}

/// The same where each piece is small anyway: many clients have to be there for a while until all are on rings.
fn requests_of_small_pieces(site: &Site, number: u32) -> u32 {
    match site.mode {
        Mode::Nodes => number / 10,
        _ => number,
    }
}

/// A redis-cli that reads its commands from a file.
fn cli(site: &Site, port: u16, commands: &Path) -> String {
    site.client(place::command(&["redis-cli"]))
        .args(&format!("-p {port}"))
        .input(commands)
        .run(LIMIT)
}

fn pipelines(site: Site) {
    let (_server, port) = server(&site);
    benchmark(
        &site,
        port,
        &format!(
            "-P 16 -c 20 -n {number} -t set,get,incr,lpush",
            number = requests(&site, 600000)
        ),
        20,
    );
    benchmark(
        &site,
        port,
        &format!(
            "-P 200 -c 4 -n {number} -t set,get -d 100 -r 1000",
            number = requests(&site, 2000000)
        ),
        4,
    );
}

fn one_client(site: Site) {
    let (_server, port) = server(&site);
    benchmark(
        &site,
        port,
        &format!(
            "-c 1 -n {number} -t get,set",
            number = requests(&site, 30000)
        ),
        1,
    );
}

fn client_threads(site: Site) {
    let (_server, port) = server(&site);
    benchmark(&site, port, "-c 50 --threads 2 -n 300000 -t get,set", 40);
}

fn five_hundred_clients(site: Site) {
    let (_server, port) = server(&site);
    benchmark(
        &site,
        port,
        &format!(
            "-c 500 -n {number} -t get,set",
            number = requests_of_small_pieces(&site, 200000)
        ),
        400,
    );
}

/// Many commands of one redis-cli: the answers are those of a true store.
fn answers_are_right(site: Site) {
    let (_server, port) = server(&site);
    let mut commands = String::new();
    let mut expected = String::new();
    for i in 0..3000 {
        writeln!(commands, "SET key{i} value{}", i * 7).unwrap();
        writeln!(commands, "GET key{i}").unwrap();
        writeln!(commands, "INCRBY sum {i}").unwrap();
        writeln!(expected, "OK\nvalue{}\n{}", i * 7, i * (i + 1) / 2).unwrap();
    }
    let output = cli(&site, port, &site.folder.write("commands", &commands));
    assert!(output == expected, "the answers are not those asked for");
}

fn pub_sub(site: Site) {
    const MESSAGES: usize = 20_000;
    let (_server, port) = server(&site);
    let mut subscribers: Vec<Running> = (0..3)
        .map(|_| {
            site.client(place::command(&["redis-cli"]))
                .args(&format!("-p {port} subscribe news"))
                .start()
        })
        .collect();
    for subscriber in &mut subscribers {
        subscriber.wait_for_output("subscribe\nnews\n1\n", LIMIT);
    }
    let mut commands = String::new();
    let mut expected = String::from("subscribe\nnews\n1\n");
    for i in 0..MESSAGES {
        writeln!(commands, "PUBLISH news message-{i}").unwrap();
        writeln!(expected, "message\nnews\nmessage-{i}").unwrap();
    }
    let output = cli(&site, port, &site.folder.write("publish", &commands));
    assert!(
        output.lines().all(|line| line == "3"),
        "each message has three readers"
    );
    let end = Instant::now() + LIMIT;
    for subscriber in &subscribers {
        while subscriber.output().len() < expected.len() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(
            subscriber.output() == expected,
            "all messages come, once, in order"
        );
    }
}

fn a_64_mb_value(site: Site) {
    const SIZE: usize = 64 << 20;
    let (_server, port) = server(&site);
    let value = site.folder.write_noise("value", SIZE);
    let redis_cli = place::command(&["redis-cli"]);
    let set = site
        .client(&redis_cli)
        .args(&format!("-p {port} -x set big"))
        .input(&value)
        .run(LIMIT);
    assert_eq!(set.trim(), "OK");
    let length = site
        .client(&redis_cli)
        .args(&format!("-p {port} strlen big"))
        .run(LIMIT);
    assert_eq!(length.trim(), SIZE.to_string());
    // Back through a shell, since the value is not text; redis-cli adds a line end.
    let back = site.folder.at("back");
    let script = format!(
        "{} -p {port} --raw get big | head -c {SIZE} >{}",
        redis_cli.display(),
        back.display()
    );
    site.client("/bin/sh").arg("-c").arg(script).run(LIMIT);
    assert!(
        folder::same_bytes(&value, &back),
        "the value comes back as it went"
    );
}

/// A blocked command, a transaction and a script, on connections that wait in between.
fn waiting_clients(site: Site) {
    let (_server, port) = server(&site);
    let redis_cli = place::command(&["redis-cli"]);
    let waiting: Vec<Running> = (0..4)
        .map(|_| {
            site.client(&redis_cli)
                .args(&format!("-p {port} blpop queue 60"))
                .start()
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let commands = "RPUSH queue a b c d\nMULTI\nINCR n\nINCR n\nEXEC\nEVAL \"return 7\" 0\n";
    let output = cli(&site, port, &site.folder.write("push", commands));
    assert!(
        output.starts_with('4') && output.trim_end().ends_with('7'),
        "redis-cli says:\n{output}"
    );
    let mut got: Vec<String> = waiting
        .into_iter()
        .map(|client| client.finish(LIMIT))
        .collect();
    got.sort();
    assert_eq!(
        got,
        ["queue\na\n", "queue\nb\n", "queue\nc\n", "queue\nd\n"]
    );
}

in_each_mode!(
    pipelines,
    one_client,
    client_threads,
    five_hundred_clients,
    answers_are_right,
    pub_sub,
    a_64_mb_value,
    waiting_clients,
);

between_nodes!(
    pipelines,
    one_client,
    five_hundred_clients,
    answers_are_right,
    pub_sub,
    a_64_mb_value,
    waiting_clients,
);

with_the_lowest_limits!(pipelines, five_hundred_clients, answers_are_right, pub_sub);
