//! nginx (two workers, sendfile on) with curl and wrk, and as a proxy that keeps its connections with ab.

use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;
use rdsock_tests::{
    Running, Site, between_nodes, folder, in_each_mode, place, with_the_lowest_limits,
};

const LIMIT: Duration = Duration::from_secs(120);
const BIG: usize = 100 << 20;

struct Nginx {
    running: Running,
    port: u16,
    big: PathBuf,
}

/// Two workers that serve a folder with one big and one small file; as root they become another
/// user, as nginx does by default.
fn server(site: &Site) -> Nginx {
    server_that_closes_after(site, 1_000_000)
}

/// With so many requests for each connection.
fn server_that_closes_after(site: &Site, requests: u32) -> Nginx {
    let port = place::free_port();
    let big = site.folder.write_noise("big", BIG);
    site.folder.write("small", "a small page, as most are\n");
    let here = site.folder.path().display();
    let servers = format!("server {{ listen 127.0.0.1:{port}; root {here}; }}");
    let running = start(site, requests, &servers).wait_for_port(port);
    Nginx { running, port, big }
}

/// A proxy in front of another server of the same two workers, with connections to it that are kept. Its port.
fn proxy(site: &Site) -> (Running, u16) {
    let (port, behind) = (place::free_port(), place::free_port());
    site.folder.write_noise("big", BIG);
    site.folder.write_noise("page", 20_000);
    let here = site.folder.path().display();
    let servers = format!(
        "upstream behind {{ server 127.0.0.1:{behind}; keepalive 16; }}
    server {{ listen 127.0.0.1:{behind}; root {here}; }}
    server {{
        listen 127.0.0.1:{port} reuseport;
        location / {{
            proxy_pass http://behind;
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
        }}
    }}"
    );
    let running = start(site, 1_000_000, &servers).wait_for_port(port);
    (running, port)
}

/// nginx with two workers and these servers.
fn start(site: &Site, requests: u32, servers: &str) -> Running {
    let user = if place::is_root() {
        "user nobody nogroup;"
    } else {
        ""
    };
    let here = site.folder.path().display();
    let config = format!(
        "{user}
worker_processes 2;
daemon off;
pid {here}/nginx.pid;
error_log stderr notice;
events {{ worker_connections 1000; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests {requests};
    client_body_temp_path {here}/body;
    proxy_temp_path {here}/proxy;
    fastcgi_temp_path {here}/fastcgi;
    uwsgi_temp_path {here}/uwsgi;
    scgi_temp_path {here}/scgi;
    {servers}
}}
"
    );
    let config = site.folder.write("nginx.conf", &config);
    site.server(place::command(&["nginx"]))
        .arg("-p")
        .arg(site.folder.path())
        .arg("-c")
        .arg(config)
        .arg("-e")
        .arg("stderr")
        .start()
}

fn a_proxy_with_kept_connections(site: Site) {
    let (_running, port) = proxy(&site);
    for _ in 0..3 {
        let output = site
            .client(place::command(&["ab"]))
            .args("-q -k -n 3000 -c 50")
            .arg(format!("http://127.0.0.1:{port}/page"))
            .run(LIMIT);
        let figure = |name: &str| {
            let line = output.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_whitespace().last()?.parse().ok())
        };
        assert_eq!(
            (figure("Complete requests:"), figure("Failed requests:")),
            (Some(3000), Some(0)),
            "ab says:\n{output}"
        );
    }
}

fn eight_downloads_through_a_proxy(site: Site) {
    let (_running, port) = proxy(&site);
    let big = site.folder.at("big");
    let clients: Vec<_> = (0..8)
        .map(|number| {
            let back = site.folder.at(&format!("back{number}"));
            let client = site
                .client(place::command(&["curl"]))
                .args("-sS --fail -o")
                .arg(&back)
                .arg(format!("http://127.0.0.1:{port}/big"))
                .start();
            (client, back)
        })
        .collect();
    for (client, back) in clients {
        client.finish(LIMIT);
        assert!(folder::same_bytes(&big, &back), "each download is whole");
        std::fs::remove_file(back).expect("it is ours");
    }
}

fn wrk_load_on_a_proxy(site: Site) {
    let (_running, port) = proxy(&site);
    let output = site
        .client(place::command(&["wrk"]))
        .args(&format!("-t 2 -c 40 -d 3s http://127.0.0.1:{port}/page"))
        .run(LIMIT);
    let (errors, requests) = wrk_figures(&output);
    assert!(errors == 0 && requests > 500, "wrk says:\n{output}");
}

fn big_file_by_checksum(site: Site) {
    let nginx = server(&site);
    let url = format!("http://127.0.0.1:{}/big", nginx.port);
    // Slowed down a little, so that `rdsock why` can be asked while it runs.
    let back = site.folder.at("slow");
    let client = site
        .client(place::command(&["curl"]))
        .args("-sS --fail --limit-rate 120M -o")
        .arg(&back)
        .arg(&url)
        .start();
    site.finish(client, nginx.port, 1, LIMIT);
    assert!(
        folder::same_bytes(&nginx.big, &back),
        "the file comes as it is"
    );
    let back = site.folder.at("fast");
    for _ in 0..3 {
        site.client(place::command(&["curl"]))
            .args("-sS --fail -o")
            .arg(&back)
            .arg(&url)
            .run(LIMIT);
        assert!(
            folder::same_bytes(&nginx.big, &back),
            "the file comes as it is"
        );
    }
}

fn parallel_downloads_and_ranges(site: Site) {
    let nginx = server(&site);
    let url = format!("http://127.0.0.1:{}/big", nginx.port);
    let mut curl = site
        .client(place::command(&["curl"]))
        .args("-sS --fail --parallel --parallel-immediate");
    for part in 0..4 {
        curl = curl
            .arg("-o")
            .arg(site.folder.at(&format!("part{part}")))
            .arg(&url);
    }
    curl.run(LIMIT);
    for part in 0..4 {
        let back = site.folder.at(&format!("part{part}"));
        assert!(
            folder::same_bytes(&nginx.big, &back),
            "each download is whole"
        );
    }
    // One connection, many requests: half of the file in 50 pieces.
    let mut curl = site.client(place::command(&["curl"])).args("-sS --fail");
    for piece in 0..50 {
        curl = curl
            .arg("-r")
            .arg(format!("{}-{}", piece << 20, ((piece + 1) << 20) - 1))
            .arg("-o")
            .arg(site.folder.at(&format!("piece{piece:02}")))
            .arg(&url)
            .arg("--next")
            .args("-sS --fail");
    }
    curl.arg("-o").arg("/dev/null").arg(&url).run(LIMIT);
    let whole = std::fs::read(&nginx.big).unwrap();
    for piece in 0..50usize {
        let back = std::fs::read(site.folder.at(&format!("piece{piece:02}"))).unwrap();
        assert!(
            back == whole[piece << 20..(piece + 1) << 20],
            "piece {piece} is right"
        );
    }
}

/// Sum of wrk's socket errors, and its requests.
fn wrk_figures(output: &str) -> (u64, u64) {
    let numbers = |line: &str| -> Vec<u64> {
        line.split(|c: char| !c.is_ascii_digit())
            .filter_map(|word| word.parse().ok())
            .collect()
    };
    let errors = output
        .lines()
        .find(|line| line.contains("Socket errors"))
        .map_or(0, |line| numbers(line).iter().sum());
    let requests = output
        .lines()
        .find(|line| line.contains("requests in"))
        .and_then(|line| numbers(line).first().copied());
    assert!(!output.contains("Non-2xx"), "wrk says:\n{output}");
    (
        errors,
        requests.unwrap_or_else(|| panic!("wrk says:\n{output}")),
    )
}

fn wrk_load(site: Site) {
    let nginx = server(&site);
    let client = site
        .client(place::command(&["wrk"]))
        .args(&format!(
            "-t 2 -c 40 -d 3s http://127.0.0.1:{}/small",
            nginx.port
        ))
        .start();
    let (output, _) = site.finish(client, nginx.port, 30, LIMIT);
    let (errors, requests) = wrk_figures(&output);
    assert!(errors == 0 && requests > 1000, "wrk says:\n{output}");
}

/// Each connection is promoted and ends soon after: too soon to be sure to see it on rings. wrk counts each event as an
/// error that brings nothing.
fn wrk_load_on_ever_new_connections(site: Site) {
    let nginx = server_that_closes_after(&site, 100);
    let client = site
        .client(place::command(&["wrk"]))
        .args(&format!(
            "-t 2 -c 40 -d 3s http://127.0.0.1:{}/small",
            nginx.port
        ))
        .start();
    let (output, _) = site.finish(client, nginx.port, 0, LIMIT);
    let (errors, requests) = wrk_figures(&output);
    assert!(errors == 0 && requests > 1000, "wrk says:\n{output}");
}

fn reload_under_load(site: Site) {
    const CONNECTIONS: u64 = 20;
    const RELOADS: u64 = 4;
    let nginx = server(&site);
    let client = site
        .client(place::command(&["wrk"]))
        .args(&format!(
            "-t 2 -c {CONNECTIONS} -d 4s http://127.0.0.1:{}/small",
            nginx.port
        ))
        .start();
    site.wait_for_rings(nginx.port, 10);
    let back = site.folder.at("during");
    for _ in 0..RELOADS {
        std::thread::sleep(Duration::from_millis(300));
        nginx.running.signal(Signal::SIGHUP);
        // New connections are served by old and new workers alike, and long answers are finished.
        site.client(place::command(&["curl"]))
            .args("-sS --fail -o")
            .arg(&back)
            .arg(format!("http://127.0.0.1:{}/big", nginx.port))
            .run(LIMIT);
        assert!(
            folder::same_bytes(&nginx.big, &back),
            "the file comes as it is"
        );
    }
    let (output, _) = site.finish(client, nginx.port, 0, LIMIT);
    let (errors, requests) = wrk_figures(&output);
    // A worker that retires closes idle connections: wrk counts each that it was about to use.
    assert!(
        errors <= CONNECTIONS * RELOADS && requests > 1000,
        "wrk says:\n{output}"
    );
    assert!(
        !nginx.running.output().contains("exited on signal"),
        "no worker crashes"
    );
}

fn graceful_end(site: Site) {
    let mut nginx = server(&site);
    let back = site.folder.at("last");
    let client = site
        .client(place::command(&["curl"]))
        .args("-sS --fail --limit-rate 60M -o")
        .arg(&back)
        .arg(format!("http://127.0.0.1:{}/big", nginx.port))
        .start();
    std::thread::sleep(Duration::from_millis(400));
    nginx.running.signal(Signal::SIGQUIT);
    client.finish(LIMIT);
    assert!(
        folder::same_bytes(&nginx.big, &back),
        "what was begun is finished"
    );
    assert!(nginx.running.wait(LIMIT).success());
}

in_each_mode!(
    big_file_by_checksum,
    parallel_downloads_and_ranges,
    wrk_load,
    wrk_load_on_ever_new_connections,
    reload_under_load,
    graceful_end,
    a_proxy_with_kept_connections,
    eight_downloads_through_a_proxy,
    wrk_load_on_a_proxy,
);

between_nodes!(
    big_file_by_checksum,
    parallel_downloads_and_ranges,
    wrk_load,
    wrk_load_on_ever_new_connections,
    reload_under_load,
    graceful_end,
);

with_the_lowest_limits!(big_file_by_checksum, wrk_load, graceful_end);
