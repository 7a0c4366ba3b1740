//! sockperf over TCP: ping-pong and throughput.

use std::time::Duration;

use rdsock_tests::{Running, Site, between_nodes, in_each_mode, place};

const LIMIT: Duration = Duration::from_secs(60);

fn server(site: &Site, options: &str) -> (Running, u16) {
    let port = place::free_port();
    let mut running = site
        .server(place::command(&["sockperf"]))
        .args(&format!(
            "server --tcp --ip 127.0.0.1 --port {port} {options}"
        ))
        .start();
    running.wait_for_output("to block on socket", LIMIT);
    (running, port)
}

fn run(site: &Site, port: u16, mode: &str) -> String {
    let client = site
        .client(place::command(&["sockperf"]))
        .args(&format!(
            "{mode} --tcp --ip 127.0.0.1 --port {port} --time 2"
        ))
        .start();
    let (output, _) = site.finish(client, port, 1, LIMIT);
    output
}

fn ping_pong(site: Site) {
    let (_server, port) = server(&site, "");
    let output = run(&site, port, "ping-pong --msg-size 64");
    assert!(
        output.contains("percentile 50.000")
            && output.contains("# dropped messages = 0; # duplicated messages = 0"),
        "sockperf says:\n{output}"
    );
    let output = run(&site, port, "ping-pong --msg-size 20000 --nonblocked");
    assert!(
        output.contains("# dropped messages = 0; # duplicated messages = 0"),
        "sockperf says:\n{output}"
    );
}

fn throughput(site: Site) {
    let (_server, port) = server(&site, "");
    for size in [64, 16_000] {
        let output = run(&site, port, &format!("throughput --msg-size {size}"));
        assert!(
            output.contains("Summary: Message Rate is"),
            "sockperf says:\n{output}"
        );
    }
}

fn under_load(site: Site) {
    let (_server, port) = server(&site, "");
    let output = run(
        &site,
        port,
        "under-load --msg-size 100 --mps 20000 --reply-every 10",
    );
    assert!(
        output.contains("# dropped messages = 0"),
        "sockperf says:\n{output}"
    );
}

in_each_mode!(ping_pong, throughput, under_load);

between_nodes!(ping_pong, under_load);
