//! socat: half-close, relays, and programs on the connection by fork and exec.

use std::time::Duration;

use rdsock_tests::{
    Running, Site, between_nodes, folder, in_each_mode, place, with_the_lowest_limits,
};

const LIMIT: Duration = Duration::from_secs(60);

fn listen(site: &Site, action: &str) -> (Running, u16) {
    let port = place::free_port();
    let mut running = site
        .server(place::command(&["socat"]))
        .args("-d -d -t 20")
        .arg(format!(
            "TCP4-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork,backlog=64"
        ))
        .arg(action)
        .start();
    running.wait_for_output("listening on", LIMIT);
    (running, port)
}

/// Sends a file, closes only its own direction, and then gets the answer to all of it.
fn half_close(site: Site) {
    const SIZE: usize = 200 << 20;
    let (_server, port) = listen(&site, "EXEC:sha256sum");
    let file = site.folder.write_noise("file", SIZE);
    let right = site
        .plain(place::command(&["sha256sum"]))
        .input(&file)
        .run(LIMIT);
    let client = site
        .client(place::command(&["socat"]))
        .args("-t 20 -b 4096 STDIO")
        .arg(format!("TCP4:127.0.0.1:{port}"))
        .input(&file)
        .start();
    let (output, _) = site.finish(client, port, 1, LIMIT);
    assert_eq!(output, right);
}

fn echo_with_half_close(site: Site) {
    let (_server, port) = listen(&site, "EXEC:cat");
    let file = site.folder.write_noise("file", 20 << 20);
    let back = site.folder.at("back");
    for _ in 0..3 {
        site.client(place::command(&["socat"]))
            .args("-t 20")
            .arg(format!(
                "OPEN:{},rdonly!!CREATE:{}",
                file.display(),
                back.display()
            ))
            .arg(format!("TCP4:127.0.0.1:{port}"))
            .run(LIMIT);
        assert!(
            folder::same_bytes(&file, &back),
            "the echo is whole, EOF and all"
        );
    }
}

/// A program that gets the connection itself as its standard input and output.
fn program_on_the_connection(site: Site) {
    let (_server, port) = listen(&site, "EXEC:/usr/bin/tac,nofork");
    let mut lines = String::new();
    for i in 0..5000 {
        lines += &format!("line {i}\n");
    }
    let file = site.folder.write("lines", &lines);
    let mut reversed: Vec<&str> = lines.lines().collect();
    reversed.reverse();
    for _ in 0..3 {
        let output = site
            .client(place::command(&["socat"]))
            .args("-t 20 STDIO")
            .arg(format!("TCP4:127.0.0.1:{port}"))
            .input(&file)
            .run(LIMIT);
        assert!(
            output.lines().eq(reversed.iter().copied()),
            "tac answers over the connection"
        );
    }
}

/// Two hops: client to relay, relay to the program that answers.
fn relay(site: Site) {
    let (_end, port) = listen(&site, "SYSTEM:sha256sum");
    let (_relay, front) = listen(&site, &format!("TCP4:127.0.0.1:{port}"));
    let file = site.folder.write_noise("file", 50 << 20);
    let right = site
        .plain(place::command(&["sha256sum"]))
        .input(&file)
        .run(LIMIT);
    let output = site
        .client(place::command(&["socat"]))
        .args("-t 20 STDIO")
        .arg(format!("TCP4:127.0.0.1:{front}"))
        .input(&file)
        .run(LIMIT);
    assert_eq!(output, right);
}

in_each_mode!(
    half_close,
    echo_with_half_close,
    program_on_the_connection,
    relay
);

between_nodes!(half_close, echo_with_half_close, program_on_the_connection);

// Not `echo_with_half_close`: it writes 8 KiB at a time and reads meanwhile nothing, which takes a buffer for granted.
with_the_lowest_limits!(half_close, relay);
