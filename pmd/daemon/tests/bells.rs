//! Whose bells a program is let ring: whoever has a bell board may write all of it, and so silence who sleeps on it.

#[macro_use]
mod tenant;

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rdsock_shm::control::{Lookup, Message, kind};
use tenant::actor::{ATTACKER, Actor, OTHER, Part, VICTIM, is_root, listen, say};
use tenant::{Daemon, Tenant, cookie};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

/// Descriptors of a PROMOTE without a bell board, and with one.
const WITHOUT: usize = 2;
const WITH: usize = 3;

/// Attaches, and for each port that the test names says what came with the PROMOTE. Told to become another user, attaches anew and
/// says that it is not given its last stream.
fn play(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    say("attached");
    let mut streams = Vec::new();
    while let Some(line) = listen() {
        let (word, number) = line.split_once(' ').unwrap();
        let number = number.parse().unwrap();
        let generation = streams.len() as u32 + 1;
        if word == "act" {
            // It is root still, and can be again.
            setresuid(Uid::from_raw(0), Uid::from_raw(number), Uid::from_raw(0)).unwrap();
            tenant = Tenant::attach_at(&part.socket);
            say("attached");
            continue;
        }
        if word == "listen" {
            let listener = TcpListener::bind(("127.0.0.1", number as u16)).unwrap();
            say(&format!(
                "listening {}",
                listener.local_addr().unwrap().port()
            ));
            let (stream, _) = listener.accept().unwrap();
            tenant.announce(1, generation, &stream, 0);
            streams.push(stream);
        } else if word == "become" {
            become_user(number);
            tenant = Tenant::attach_at(&part.socket);
            look_up(&tenant, streams.last().unwrap());
            tenant.not_found();
            say("refused");
            continue;
        } else {
            let stream = TcpStream::connect(("127.0.0.1", number as u16)).unwrap();
            tenant.announce(1, generation, &stream, 1);
            streams.push(stream);
        }
        let (_, fds) = tenant.promote();
        say(&format!("promoted {}", fds.len()));
    }
}

fn become_user(number: u32) {
    let (user, group) = (Uid::from_raw(number), Gid::from_raw(number));
    setgroups(&[]).unwrap();
    setresgid(group, group, group).unwrap();
    setresuid(user, user, user).unwrap();
}

fn look_up(tenant: &Tenant, stream: &TcpStream) {
    let lookup = Lookup {
        conn: 1,
        generation: 1,
        cookie: cookie(stream),
        fd: stream.as_raw_fd(),
        reserved: 0,
    };
    tenant.send(Message::new(kind::LOOKUP, &lookup).as_bytes(), &[]);
}

/// A server of the test's own, which is root.
struct Server {
    tenant: Tenant,
    listener: TcpListener,
    streams: Vec<TcpStream>,
}

impl Server {
    fn new(daemon: &Daemon) -> Self {
        Server {
            tenant: Tenant::attach(daemon),
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            streams: Vec::new(),
        }
    }

    /// A client connects. What came with the PROMOTE of either.
    fn serve(&mut self, client: &mut Actor) -> (u64, Vec<OwnedFd>) {
        let port = self.listener.local_addr().unwrap().port();
        client.say(&format!("connect {port}"));
        let (accepted, _) = self.listener.accept().unwrap();
        let generation = self.streams.len() as u32 + 1;
        self.tenant.announce(1, generation, &accepted, 0);
        self.streams.push(accepted);
        let (_, fds) = self.tenant.promote();
        (client.hear_numbers("promoted")[0], fds)
    }
}

scene!(nobody_gets_the_bells_of_another_user, |test| {
    let daemon = Daemon::start(SMALL);
    let mut server = Server::new(&daemon);
    for user in [ATTACKER, VICTIM, OTHER, 0] {
        let mut client = Actor::start(test, "client", &daemon.socket(), user);
        client.hear("attached");
        let expected = if user == 0 { WITH } else { WITHOUT };
        let (of_client, fds) = server.serve(&mut client);
        assert_eq!(of_client as usize, expected, "user {user}, of root's");
        assert_eq!(fds.len(), expected, "root, of user {user}'s");
    }
});

// What it had mapped as root it still has. It is given nothing anew.
scene!(nor_does_who_was_of_that_user, |test| {
    let daemon = Daemon::start(SMALL);
    let mut server = Server::new(&daemon);
    let mut client = Actor::start(test, "client", &daemon.socket(), 0);
    client.hear("attached");
    let (of_client, _) = server.serve(&mut client);
    assert_eq!(of_client as usize, WITH);
    client.say(&format!("become {ATTACKER}"));
    client.hear("refused");
});

// A file server that works as its user, say. It is not that user's to end.
scene!(nobody_gets_the_bells_of_who_acts_as_a_user, |test| {
    let daemon = Daemon::start(SMALL);
    let mut acting = Actor::start(test, "client", &daemon.socket(), 0);
    acting.hear("attached");
    acting.say(&format!("act {ATTACKER}"));
    acting.hear("attached");
    let mut client = Actor::start(test, "client", &daemon.socket(), ATTACKER);
    client.hear("attached");
    acting.say("listen 0");
    let port = acting.hear("listening");
    client.say(&format!("connect {port}"));
    // The user's own are no secret from who acts as that user.
    assert_eq!(acting.hear_numbers("promoted"), [WITH as u64]);
    assert_eq!(client.hear_numbers("promoted"), [WITHOUT as u64]);
});
