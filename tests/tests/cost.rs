//! What a small message costs on rings, counted in instructions, which do not depend on the machine's load: all that the shim does
//! in `send` and `recv`, as it ships. (`benches/tests/cost.rs` counts the parts.)

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rdsock_tests::{Daemon, Folder, Program};

/// Instructions of a `send` of 64 bytes and the `recv` of them, in a program of one thread.
const MOST: u64 = 1130;
/// The same with a `recv` that has room for more.
const MOST_SHORT: u64 = 1170;

const LIMIT: Duration = Duration::from_secs(120);

/// Sends itself 64 bytes again and again. Fails where these go through the kernel, which its socket counts.
const PROGRAM: &str = r#"
#include <arpa/inet.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
static unsigned long long acked(int fd)
{
    struct tcp_info info = {0};
    socklen_t len = sizeof info;
    getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len);
    return info.tcpi_bytes_acked;
}
int main(int count, char **args)
{
    long rounds = atol(args[1]), room = atol(args[2]);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    static char b[65536];
    int l = socket(AF_INET, SOCK_STREAM, 0), c = socket(AF_INET, SOCK_STREAM, 0), s;
    if (count < 3 || bind(l, (void *)&at, sizeof at) || listen(l, 1) || getsockname(l, (void *)&at, &len) ||
        connect(c, (void *)&at, sizeof at) || (s = accept(l, 0, 0)) < 0)
        return 1;
    for (int i = 0; i < 40; i++) {
        send(c, b, 64, 0), recv(s, b, 64, 0), send(s, b, 64, 0), recv(c, b, 64, 0);
        usleep(20000);
    }
    unsigned long long before = acked(c);
    for (long i = 0; i < rounds; i++)
        if (send(c, b, 64, 0) != 64 || recv(s, b, room, 0) != 64)
            return 2;
    return acked(c) - before > 64 ? 3 : 0;
}
"#;

/// A parent and its child answer each other, and both sleep for each message. Prints how many bytes of the kernel's connection that took.
const SLEEPERS: &str = r#"
#include <arpa/inet.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
static unsigned long long acked(int fd)
{
    struct tcp_info info = {0};
    socklen_t len = sizeof info;
    getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len);
    return info.tcpi_bytes_acked;
}
int main(void)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    char b[64] = "";
    int l = socket(AF_INET, SOCK_STREAM, 0), fd;
    if (bind(l, (void *)&at, sizeof at) || listen(l, 1) || getsockname(l, (void *)&at, &len))
        return 1;
    if (fork() == 0) {
        if ((fd = accept(l, 0, 0)) < 0)
            return 1;
        while (recv(fd, b, 64, 0) == 64)
            if (usleep(100), send(fd, b, 64, 0) != 64)
                return 2;
        return 0;
    }
    fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (void *)&at, sizeof at))
        return 3;
    unsigned long long before = 0;
    for (int i = 0; i < 1100; i++) {
        if (i == 100)
            before = acked(fd);
        if (send(fd, b, 64, 0) != 64 || recv(fd, b, 64, 0) != 64)
            return 4;
        usleep(100);
    }
    printf("%llu\n", acked(fd) - before);
    close(fd);
    int status;
    return wait(&status) < 0 || status;
}
"#;

/// With as much time for a nap as a busy machine may take from it.
#[test]
fn a_message_to_a_sleeper_takes_no_byte_of_the_kernels() {
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    let program = build(&folder, SLEEPERS);
    let bytes = |nap: &str| -> u64 {
        let said = Program::new(&program, folder.path())
            .preloaded(&daemon.socket())
            .env("RDSOCK_SPIN_US", "0")
            .env("RDSOCK_TEST_LIMITS", nap)
            .run(LIMIT);
        said.trim().parse().expect("a number")
    };
    let (with, without) = (bytes("nap_us=1000000"), bytes("nap_us=0"));
    println!("{with} bytes for 1 000 messages to a program that naps, {without} where none does");
    assert!(with < 20, "{with} bytes");
    assert!((900..=1100).contains(&without), "{without} bytes");
}

fn build(folder: &Folder, program: &str) -> PathBuf {
    let source = folder.write("cost.c", program);
    let program = source.with_extension("");
    let status = Command::new("gcc")
        .args(["-O1", "-o"])
        .arg(&program)
        .arg(&source)
        .status()
        .expect("gcc is installed: see tests/setup.sh");
    assert!(status.success(), "the program does not build");
    program
}

/// Instructions in `send` and `recv` of so many rounds.
fn collected(folder: &Folder, daemon: &Daemon, rounds: u64, room: u64) -> u64 {
    let report = Program::new("valgrind", folder.path())
        .args("--tool=callgrind --callgrind-out-file=/dev/null")
        .args("--toggle-collect=send --toggle-collect=recv --error-exitcode=9")
        .arg(build(folder, PROGRAM))
        .args(&format!("{rounds} {room}"))
        .preloaded(&daemon.socket())
        .run(LIMIT);
    report
        .lines()
        .find_map(|line| line.split("Collected :").nth(1)?.trim().parse().ok())
        .unwrap_or_else(|| panic!("callgrind counts nothing: {report}"))
}

#[test]
fn a_small_message_on_rings_costs_few_instructions() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("SKIPPED, NOTHING WAS CHECKED: valgrind is not installed");
        eprintln!("SKIPPED, NOTHING WAS CHECKED: valgrind is not installed");
        return;
    }
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    for (room, most) in [(64, MOST), (4096, MOST_SHORT)] {
        let few = collected(&folder, &daemon, 1_000, room);
        let many = collected(&folder, &daemon, 11_000, room);
        let cost = (many - few) / 10_000;
        println!("{cost} instructions for 64 bytes sent and received into {room}, at most {most}");
        assert!(cost <= most, "{cost} instructions, more than {most}");
    }
}
