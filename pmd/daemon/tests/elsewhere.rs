//! Connections in a network namespace of one's own: any addresses can be had there, also those of somebody else's connection.

#[macro_use]
mod tenant;

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use rdsock_shm::control::{Request, kind};
use rdsock_shm::reason::Reason;
use tenant::actor::{ATTACKER, Actor, Part, is_root, listen, say};
use tenant::nodes::{Bound, Client, Nodes, Server};
use tenant::{Answer, Tenant, announcement, netns_of};

/// Time for a word to come to the other node, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

fn play(part: &Part) {
    match part.name.as_str() {
        "twin" => be_twin(part),
        "asker" => be_asker(part),
        other => panic!("no such part: {other}"),
    }
}

/// Announces a connection as another one's anchor, which has the same addresses.
fn be_twin(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    say("ready");
    let numbers = listen().unwrap();
    let numbers = numbers.split(' ').map(|n| n.parse().unwrap());
    let [ticket, port, anchor] = numbers.collect::<Vec<u64>>().try_into().unwrap();
    let _listener = TcpListener::bind(("127.0.0.1", anchor as u16)).unwrap();
    let twin = Bound::new(port as u16).unwrap();
    let twin = twin.connect(anchor as u32).unwrap();
    tenant.ask_for(&Request {
        stream_id: ticket,
        ..announcement(1, 1, &twin, 1)
    });
    say(match tenant.receive() {
        Answer::Message(kind::PROMOTE, ..) => "got the stream",
        Answer::Message(kind::VERDICT, ..) => "got nothing",
        _ => "got something else",
    });
    listen();
}

/// Asks for another node, from a port of its own that is another one's here.
fn be_asker(part: &Part) {
    let mut client = Client::at(&part.socket);
    say("ready");
    let numbers = listen().unwrap();
    let numbers = numbers.split(' ').map(|n| n.parse().unwrap());
    let [port, to, here] = numbers.collect::<Vec<u64>>().try_into().unwrap();
    let bound = Bound::new(port as u16).unwrap();
    let to = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), to as u16);
    // Where the daemon is, and nowhere.
    for netns in [here, 0] {
        client.netns = netns;
        let reached = client.reach(&bound, to);
        say(&format!("reached {} {}", reached.ticket, reached.reason));
    }
    listen();
}

/// Moves this process to a network namespace of its own, as any user may.
fn move_elsewhere() -> std::io::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: a request made of integers, with the name of the interface; zeroes are a value.
    let result = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
        request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request)
    };
    nix::errno::Errno::result(result)?;
    Ok(())
}

/// An actor who has moved there.
fn elsewhere(test: &str, part: &str, socket: &Path) -> Actor {
    Actor::start_with(test, part, socket, |command| {
        command.uid(ATTACKER).gid(ATTACKER);
        // SAFETY: system calls only, between fork and exec.
        unsafe { command.pre_exec(move_elsewhere) };
    })
}

scene!(
    a_twin_of_an_anchor_in_another_namespace_gets_no_stream,
    |test| {
        let nodes = Nodes::start(["", ""]);
        let server = Server::start(nodes.server());
        let path = nodes.client().socket();
        let mut attacker = elsewhere(test, "twin", &path);
        attacker.hear("ready");
        let mut client = Client::at(&path);
        let (bound, reached) = client.reach_at_last(server.address());
        let port = bound.port;
        // Its program has not announced it yet.
        let mut stream = bound.connect(reached.anchor_port).unwrap();
        stream.write_all(b"early").unwrap();
        assert!(server.receives("early", PATIENCE));
        let (ticket, anchor) = (reached.ticket, reached.anchor_port);
        attacker.say(&format!("{ticket} {port} {anchor}"));
        assert_eq!(attacker.hear("got"), "nothing");
        // It is its program's still.
        client.tenant.ask_for(&Request {
            stream_id: ticket,
            ..announcement(1, 1, &stream, 1)
        });
        let (promote, _) = client.tenant.promote();
        assert_eq!(promote.stream_id, ticket);
    }
);

scene!(nobody_asks_from_a_port_in_another_namespace, |test| {
    let nodes = Nodes::start(["", ""]);
    let server = Server::start(nodes.server());
    let path = nodes.client().socket();
    let mut attacker = elsewhere(test, "asker", &path);
    attacker.hear("ready");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let (to, here) = (server.address().port(), netns_of(&taken));
    attacker.say(&format!("{port} {to} {here}"));
    for _ in 0..2 {
        let answer = attacker.hear_numbers("reached");
        assert_eq!(answer, [0, Reason::Unverified as u64]);
    }
});
