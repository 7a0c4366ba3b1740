//! iperf3: several streams, reverse, both directions at once.

use std::time::Duration;

use rdsock_tests::{Running, Site, between_nodes, in_each_mode, place};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

fn server(site: &Site) -> (Running, u16) {
    let port = place::free_port();
    let mut running = site
        .server(place::command(&["iperf3"]))
        .args(&format!("--server --forceflush --port {port}"))
        .start();
    // It takes a connection for a test, so its own word is waited for.
    running.wait_for_output("Server listening", LIMIT);
    (running, port)
}

/// Runs a client with these options; gigabytes that were received, by each field of the summary.
fn run(site: &Site, port: u16, options: &str, streams: usize) -> Value {
    run_to(site, "127.0.0.1", port, options, streams)
}

/// The same, to this address.
fn run_to(site: &Site, address: &str, port: u16, options: &str, streams: usize) -> Value {
    let client = site
        .client(place::command(&["iperf3"]))
        .args(&format!(
            "--client {address} --port {port} --time 2 --json {options}"
        ))
        .start();
    let (output, _) = site.finish(client, port, streams, LIMIT);
    let report: Value = serde_json::from_str(&output)
        .unwrap_or_else(|error| panic!("iperf3 says ({error}):\n{output}"));
    assert!(report.get("error").is_none(), "iperf3 says:\n{output}");
    report["end"].clone()
}

fn received(end: &Value, field: &str) -> f64 {
    end[field]["bytes"]
        .as_f64()
        .unwrap_or_else(|| panic!("no {field} in {}", end["sum_received"]))
}

fn four_streams(site: Site) {
    let (_server, port) = server(&site);
    let end = run(&site, port, "-P 4", 4);
    assert_eq!(end["streams"].as_array().map(Vec::len), Some(4));
    assert!(
        received(&end, "sum_received") > 1e8,
        "{}",
        end["sum_received"]
    );
}

fn reverse(site: Site) {
    let (_server, port) = server(&site);
    let end = run(&site, port, "-R", 1);
    assert!(
        received(&end, "sum_received") > 1e8,
        "{}",
        end["sum_received"]
    );
}

fn both_directions(site: Site) {
    let (_server, port) = server(&site);
    let end = run(&site, port, "--bidir", 2);
    assert!(
        received(&end, "sum_received") > 1e7,
        "{}",
        end["sum_received"]
    );
    assert!(
        received(&end, "sum_received_bidir_reverse") > 1e7,
        "{}",
        end["sum_received"]
    );
}

fn over_ipv6(site: Site) {
    let (_server, port) = server(&site);
    let end = run_to(&site, "::1", port, "-P 2 --bidir", 4);
    assert!(
        received(&end, "sum_received") > 1e7,
        "{}",
        end["sum_received"]
    );
}

/// One server for a few tests, one of them zero-copy (sendfile), one with small blocks.
fn one_after_another(site: Site) {
    let (mut server, port) = server(&site);
    for (number, options) in ["", "--zerocopy", "--length 1000 --no-delay", "-R -P 2"]
        .iter()
        .enumerate()
    {
        let end = run(&site, port, options, 1);
        assert!(
            received(&end, "sum_received") > 1e6,
            "{options}: {}",
            end["sum_received"]
        );
        let wanted = format!("(test #{})", number + 2);
        server.wait_for_output(&wanted, LIMIT);
    }
}

in_each_mode!(four_streams, reverse, both_directions, one_after_another);

between_nodes!(four_streams, reverse, both_directions, over_ipv6);
