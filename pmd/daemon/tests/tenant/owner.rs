//! A process that attaches, forks and becomes another, and its child, which still has the control socket and the
//! queue. The child does with them what a test says; it judges nothing.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::unistd::{ForkResult, Gid, Uid, fork, setgroups, setresgid, setresuid};
use rdsock_shm::control::{Lookup, Message, Request, kind, request as what};

use super::actor::{OTHER, Part, VICTIM, listen, say};
use super::victim::{claim, say_connected};
use super::{Answer, Tenant, hello_message, request};

/// A user who has nothing of root but the capability to change the user.
pub const CAPABLE: u32 = OTHER;

/// A program of another user that is a tenant of its own, and has a stream.
pub fn be_tenant(part: &Part) {
    let port = std::env::var("TENANT_PORT").unwrap().parse().unwrap();
    let mut tenant = Tenant::attach_at(&part.socket);
    let stream = connect_to(port);
    tenant.announce(1, 1, &stream, 1);
    let (promote, _memory) = tenant.promote();
    say_connected(&stream, promote.stream_id);
    sleep();
}

/// Connects to the port that stands in place of the daemon's socket, and waits.
pub fn be_connected(part: &Part) {
    connect_and_sleep(part.socket.to_str().unwrap());
}

/// Attaches and forks; the child obeys the test, and the process itself becomes another.
pub fn be_owner(part: &Part) {
    let plan = listen().unwrap();
    let mut words: Vec<&str> = plan.split_whitespace().collect();
    let unread = words[0] == "unread";
    let mut tenant = if words[0] == "late" {
        words.remove(0);
        let mut tenant = Tenant::at(&part.socket).unwrap();
        tenant.hello();
        let attached = take_memory(&mut tenant);
        say("greeted");
        listen();
        // The daemon reads it when this process is another.
        tenant.send(attached.as_bytes(), &[]);
        tenant
    } else if unread {
        words.remove(0);
        // Likewise HELLO, which is sent before the call is taken.
        let tenant = Tenant::at(&part.socket).unwrap();
        tenant.send(hello_message().as_bytes(), &[]);
        tenant
    } else {
        Tenant::attach_at(&part.socket)
    };
    // SAFETY: this process has no thread beside this one and the harness's, which waits for it.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            if unread {
                // The child says what the process should have said.
                let attached = take_memory(&mut tenant);
                tenant.send(attached.as_bytes(), &[]);
            }
            obey(tenant);
            std::process::abort();
        }
        ForkResult::Parent { .. } => become_another(&words),
    }
}

/// Maps the memory that comes with WELCOME. What to say of it.
fn take_memory(tenant: &mut Tenant) -> Message {
    match tenant.receive_only() {
        Answer::Message(kind::WELCOME, _, mut fds) => tenant.memory.take(fds.remove(0)),
        other => panic!("not welcome: {other:?}"),
    }
}

fn become_another(plan: &[&str]) {
    match plan {
        ["exec", program, more @ ..] => {
            let error = Command::new(program).args(more).exec();
            panic!("{program}: {error}");
        }
        ["again", port] => {
            let error = Command::new("/proc/self/exe")
                .args(std::env::args_os().skip(1))
                .env("TENANT_PART", "connect")
                .env("TENANT_SOCKET", port)
                .exec();
            panic!("{error}");
        }
        ["become", port] => {
            let user = Uid::from_raw(VICTIM);
            setresuid(user, user, user).unwrap();
            let error = Command::new("/proc/self/exe")
                .args(std::env::args_os().skip(1))
                .env("TENANT_PART", "tenant")
                .env("TENANT_PORT", port)
                .exec();
            panic!("{error}");
        }
        ["hide", port] => {
            nix::sys::prctl::set_dumpable(false).unwrap();
            connect_and_sleep(port);
        }
        ["setuid", port] => {
            let user = Uid::from_raw(VICTIM);
            setresuid(user, user, user).unwrap();
            connect_and_sleep(port);
        }
        ["wait"] => {
            say("attached");
            sleep();
        }
        other => panic!("no such plan: {other:?}"),
    }
}

/// Gives up root, but for the capability to change the user, which it keeps over exec.
pub fn keep_only_change_of_user() -> std::io::Result<()> {
    const SETUID: u32 = 7;
    nix::sys::prctl::set_keepcaps(true)?;
    setgroups(&[])?;
    let (group, user) = (Gid::from_raw(CAPABLE), Uid::from_raw(CAPABLE));
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    let header = [0x2008_0522_u32, 0];
    let sets = [1_u32 << SETUID, 1 << SETUID, 1 << SETUID, 0, 0, 0];
    // SAFETY: `struct __user_cap_header_struct` of the third version, and two of
    // `struct __user_cap_data_struct`: made of integers. Then a call with integers alone.
    let result = unsafe {
        libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr());
        let raise = libc::PR_CAP_AMBIENT_RAISE;
        libc::prctl(libc::PR_CAP_AMBIENT, raise, SETUID, 0, 0)
    };
    nix::errno::Errno::result(result)?;
    Ok(())
}

fn connect_to(port: u16) -> TcpStream {
    TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).unwrap()
}

fn connect_and_sleep(port: &str) {
    let stream = connect_to(port.parse().unwrap());
    say_connected(&stream, 0);
    sleep();
}

fn sleep() {
    std::thread::sleep(Duration::from_secs(60));
    std::process::exit(1);
}

/// The child does with its parent's socket and queue what the test says.
fn obey(mut tenant: Tenant) {
    while let Some(line) = listen() {
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let numbers = rest
            .split_whitespace()
            .map(|number| number.parse().unwrap());
        let numbers: Vec<u64> = numbers.collect();
        match word {
            "kick" => {
                tenant.kick();
                say("kicked");
                continue;
            }
            "lookup" => look_up(&tenant, &numbers),
            "adopt" => {
                let adopted = adopt(&tenant);
                say(&format!("answer {}", answers(&mut tenant, adopted)));
                continue;
            }
            _ => {
                let made = queued(word, &numbers);
                assert!(tenant.memory.put(&made), "the queue is full");
                tenant.kick();
            }
        }
        if word == "announce" {
            say("announced");
        }
        say(&format!("answer {}", answers(&mut tenant, None)));
    }
}

fn queued(word: &str, numbers: &[u64]) -> Request {
    let of_connection = |what| Request {
        what,
        ..claim(numbers)
    };
    match word {
        "announce" => claim(numbers),
        "holds" => Request {
            stream_id: numbers[7],
            // The end that has connected.
            active: 0,
            ..of_connection(what::HOLDS)
        },
        "mapped" => request(what::MAPPED, 7, 1),
        "declined" => request(what::DECLINED, 7, 1),
        "closed" => request(what::CLOSED, 7, 1),
        "listens" => Request {
            conn: 0,
            generation: 0,
            ..of_connection(what::LISTENS)
        },
        other => panic!("no such request: {other}"),
    }
}

fn look_up(tenant: &Tenant, numbers: &[u64]) {
    let lookup = Lookup {
        conn: 8,
        generation: 1,
        cookie: numbers[1],
        fd: numbers[0] as i32,
        reserved: 0,
    };
    tenant.send(Message::new(kind::LOOKUP, &lookup).as_bytes(), &[]);
}

/// Asks over its parent's socket for a control connection, and says HELLO there.
fn adopt(tenant: &Tenant) -> Option<Tenant> {
    let (mut adopted, _) = Tenant::adopted(tenant);
    adopted.hello();
    Some(adopted)
}

/// What comes, in one line.
fn answers(tenant: &mut Tenant, adopted: Option<Tenant>) -> String {
    let mut all = Vec::new();
    listen_to(tenant, &mut all);
    if let Some(mut adopted) = adopted {
        listen_to(&mut adopted, &mut all);
    }
    all.join(",")
}

fn listen_to(tenant: &mut Tenant, all: &mut Vec<String>) {
    let patience = Duration::from_millis(1500);
    loop {
        let word = match tenant.receive_within(patience) {
            Some(Answer::Message(kind::PROMOTE, ..)) => "PROMOTE".to_owned(),
            Some(Answer::Message(kind::VERDICT, ..)) => "VERDICT".to_owned(),
            Some(Answer::Message(kind, ..)) => format!("message {kind}"),
            Some(Answer::Closed) => return all.push("CLOSED".to_owned()),
            None => return all.push("nothing more".to_owned()),
        };
        all.push(word);
    }
}
