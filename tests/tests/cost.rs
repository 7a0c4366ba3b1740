//! What a small message costs on rings, counted in instructions, which do not depend on the machine's load: all that the shim does
//! in `send` and `recv`, and in `epoll_wait` and `poll` before it, as it ships. (`benches/tests/cost.rs` counts the parts.)

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rdsock_tests::{Daemon, Folder, Program};

/// Instructions of a `send` of 64 bytes and the `recv` of them, in a program of one thread.
const MOST: u64 = 1130;
/// The same with a `recv` that has room for more.
const MOST_SHORT: u64 = 1170;

/// A wait that finds something: the call, connections that it waits for, how many of them have 64 bytes, and its instructions. The
/// kernel is not asked meanwhile.
const WAITS: [(&str, u32, u32, u64); 4] = [
    ("epoll_wait", 1, 1, 950),
    ("epoll_wait", 50, 20, 9_600),
    ("poll", 1, 1, 815),
    ("poll", 8, 1, 2_930),
];

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

/// Sends itself 64 bytes on some of many connections, and receives them where `epoll_wait` or `poll` says.
const WAITER: &str = r#"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int count, char **args)
{
    if (count < 5)
        return 1;
    int polls = args[1][0] == 'p', pairs = atoi(args[2]), ready = atoi(args[3]), rounds = atoi(args[4]);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    char b[64] = "";
    struct pollfd to_poll[64];
    struct epoll_event found[64];
    int l = socket(AF_INET, SOCK_STREAM, 0), c[64], s[64], instance = epoll_create1(0);
    if (bind(l, (void *)&at, sizeof at) || listen(l, 64) || getsockname(l, (void *)&at, &len))
        return 2;
    for (int i = 0; i < pairs; i++) {
        c[i] = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(c[i], (void *)&at, sizeof at) || (s[i] = accept(l, 0, 0)) < 0)
            return 3;
        to_poll[i] = (struct pollfd){.fd = s[i], .events = POLLIN};
        struct epoll_event event = {.events = EPOLLIN, .data.fd = s[i]};
        if (epoll_ctl(instance, EPOLL_CTL_ADD, s[i], &event))
            return 4;
    }
    for (int i = 0; i < 40; i++) {
        for (int k = 0; k < pairs; k++)
            send(c[k], b, 64, 0), recv(s[k], b, 64, 0), send(s[k], b, 64, 0), recv(c[k], b, 64, 0);
        usleep(20000);
    }
    for (int i = 0; i < rounds; i++) {
        for (int k = 0; k < ready; k++)
            if (send(c[(i + k) % pairs], b, 64, 0) != 64)
                return 5;
        if ((polls ? poll(to_poll, pairs, 1000) : epoll_wait(instance, found, 64, 1000)) != ready)
            return 6;
        for (int k = 0; k < (polls ? pairs : ready); k++)
            if ((!polls || to_poll[k].revents) && recv(polls ? s[k] : found[k].data.fd, b, 64, 0) != 64)
                return 7;
    }
    return 0;
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

/// Instructions of a program in the named calls.
fn collected(folder: &Folder, daemon: &Daemon, source: &str, args: &str, calls: &[&str]) -> u64 {
    let calls = calls.iter().map(|call| format!(" --toggle-collect={call}"));
    let report = Program::new("valgrind", folder.path())
        .args("--tool=callgrind --callgrind-out-file=/dev/null --error-exitcode=9")
        .args(&calls.collect::<String>())
        .arg(build(folder, source))
        .args(args)
        .preloaded(&daemon.socket())
        .env(
            "RDSOCK_TEST_LIMITS",
            "ask_kernel_us=1000000,look_every_us=1000000",
        )
        .run(LIMIT);
    report
        .lines()
        .find_map(|line| line.split("Collected :").nth(1)?.trim().parse().ok())
        .unwrap_or_else(|| panic!("callgrind counts nothing: {report}"))
}

fn counts_nothing() -> bool {
    let missing = Command::new("valgrind").arg("--version").output().is_err();
    if missing {
        println!("SKIPPED, NOTHING WAS CHECKED: valgrind is not installed");
        eprintln!("SKIPPED, NOTHING WAS CHECKED: valgrind is not installed");
    }
    missing
}

#[test]
fn a_small_message_on_rings_costs_few_instructions() {
    if counts_nothing() {
        return;
    }
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    for (room, most) in [(64, MOST), (4096, MOST_SHORT)] {
        let of = |rounds: u64| {
            let args = format!("{rounds} {room}");
            collected(&folder, &daemon, PROGRAM, &args, &["send", "recv"])
        };
        let cost = (of(11_000) - of(1_000)) / 10_000;
        println!("{cost} instructions for 64 bytes sent and received into {room}, at most {most}");
        assert!(cost <= most, "{cost} instructions, more than {most}");
    }
}

#[test]
fn a_wait_that_finds_something_costs_few_instructions() {
    if counts_nothing() {
        return;
    }
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    for (call, all, ready, most) in WAITS {
        let of = |rounds: u64| {
            let args = format!("{call} {all} {ready} {rounds}");
            collected(&folder, &daemon, WAITER, &args, &[call])
        };
        let cost = (of(1_200) - of(200)) / 1_000;
        println!("{cost} instructions for {call} with {ready} of {all}, at most {most}");
        assert!(cost <= most, "{cost} instructions, more than {most}");
    }
}
