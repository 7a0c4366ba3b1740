//! Holes in the memory of a stream of huge pages: either end can make them, and who finds no page to fill one ends by SIGBUS.

#[macro_use]
mod tenant;

use std::net::{TcpListener, TcpStream};

use nix::fcntl::{FallocateFlags, fallocate};
use tenant::actor::{ATTACKER, Actor, Part, is_root, listen, say, skipped};
use tenant::{Daemon, Tenant};

const HUGE_PAGE: i64 = 2 << 20;

/// Connects where the test says, and tries to make holes in all of the stream's memory.
fn play(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    let port = listen().unwrap().parse::<u16>().unwrap();
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    tenant.announce(1, 1, &stream, 1);
    let (promote, fds) = tenant.promote();
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let made = fallocate(&fds[0], how, 0, HUGE_PAGE).is_ok();
    say(&format!("promoted {} {}", promote.huge, u32::from(made)));
    listen();
}

fn free_huge_pages() -> u64 {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mut lines = memory.lines();
    let free = lines.find_map(|line| line.strip_prefix("HugePages_Free:"));
    free.and_then(|free| free.trim().parse().ok()).unwrap_or(0)
}

scene!(only_ends_of_one_user_get_huge_pages, |test| {
    if free_huge_pages() < 3 {
        return skipped(
            "this machine has no huge pages (sysctl vm.nr_hugepages=4): whoever has none has no holes",
        );
    }
    let daemon = Daemon::start("ring_size = 65536\nhuge_pages = \"auto\"\n");
    let mut server = Tenant::attach(&daemon);
    for (generation, user) in [(1, ATTACKER), (2, 0)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = Actor::start(test, "client", &daemon.socket(), user);
        client.say(&listener.local_addr().unwrap().port().to_string());
        let (accepted, _) = listener.accept().unwrap();
        server.announce(1, generation, &accepted, 0);
        server.promote();
        let huge = u64::from(user == 0);
        // In others nobody makes holes.
        assert_eq!(client.hear_numbers("promoted"), [huge, huge], "user {user}");
    }
});
