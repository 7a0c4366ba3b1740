//! Memory of a stream that a program keeps when both ends are closed: who has filled it is not charged for it any longer.

#[macro_use]
mod tenant;

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use rdsock_shm::control::request as what;
use rdsock_shm::layout::DATA_OFFSET;
use tenant::actor::{ATTACKER, Actor, Part, is_root, listen, say};
use tenant::{Daemon, Tenant, request};

const RING: usize = 65536;

/// Connects where the test says, closes, and keeps the stream's memory.
fn play(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    let port = listen().unwrap().parse::<u16>().unwrap();
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    tenant.announce(1, 1, &stream, 1);
    let (_, fds) = tenant.promote();
    let memory = File::from(fds.into_iter().next().unwrap());
    say("promoted");
    listen();
    drop(stream);
    tenant.ask_for(&request(what::CLOSED, 1, 1));
    say("closed");
    let expected = listen().unwrap().parse::<u64>().unwrap();
    let pages = || memory.metadata().unwrap().blocks() * 512 / 4096;
    let end = Instant::now() + Duration::from_secs(10);
    while pages() != expected && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    say(&format!("keeps {}", pages()));
    listen();
}

scene!(
    who_keeps_memory_of_a_stream_keeps_no_page_of_a_stranger,
    |test| {
        let daemon = Daemon::start("ring_size = 65536\nhuge_pages = \"never\"\n");
        let mut server = Tenant::attach(&daemon);
        // The page of the header is the daemon's.
        for (generation, user, pages) in [(1, ATTACKER, 1), (2, 0, 1 + 2 * RING as u64 / 4096)] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut client = Actor::start(test, "client", &daemon.socket(), user);
            client.say(&listener.local_addr().unwrap().port().to_string());
            let (accepted, _) = listener.accept().unwrap();
            server.announce(1, generation, &accepted, 0);
            let (_, fds) = server.promote();
            let memory = File::from(fds.into_iter().next().unwrap());
            memory.write_all_at(&[1; 2 * RING], DATA_OFFSET).unwrap();
            client.hear("promoted");
            client.say("close");
            client.hear("closed");
            drop(accepted);
            server.ask_for(&request(what::CLOSED, 1, generation));
            daemon.wait_until("the stream is closed", |stat| stat["streams_now"] == 0);
            if user == 0 {
                // Who is of one user is in each other's hands anyway.
                std::thread::sleep(Duration::from_millis(100));
            }
            client.say(&pages.to_string());
            assert_eq!(client.hear_numbers("keeps"), [pages], "user {user}");
        }
    }
);
