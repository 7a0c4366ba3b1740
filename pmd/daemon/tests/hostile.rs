//! Hostile tenants: each gets a clear answer and is counted; nobody else notices.

mod tenant;

use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::signal::Signal;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rdsock_shm::control::{
    Hello, MAGIC, Message, bytes_of, head, kind, question, refusal, request as what,
};
use rdsock_shm::layout::{BellBoard, CONN_RECORDS, QUEUE_SLOTS, TenantMemory, VERSION};
use rdsock_shm::reason::Reason;
use rdsock_shm::sync::Ordering;
use tenant::{Answer, Daemon, Tenant, announcement, memfd, request, tcp_pair};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

/// Two honest tenants can still be matched.
fn still_serves(daemon: &Daemon) {
    let (mut client, mut server) = (Tenant::attach(daemon), Tenant::attach(daemon));
    let (connector, accepted) = tcp_pair();
    client.announce(1, 1, &connector, 1);
    server.announce(1, 1, &accepted, 0);
    client.promote();
    server.promote();
}

#[test]
fn garbage_is_refused_and_counted() {
    let daemon = Daemon::start(SMALL);
    let mut no_body = bytes_of(&head(kind::HELLO)).to_vec();
    let mut unknown = no_body.clone();
    unknown[6..8].copy_from_slice(&999u16.to_ne_bytes());
    no_body.push(1);
    let long = [bytes_of(&head(kind::QUERY)), &[0; 500]].concat();
    let texts: [&[u8]; 5] = [b"GET / HTTP/1.1", b"x", &no_body, &unknown, &long];
    for text in texts {
        let mut stranger = Tenant::stranger(&daemon).unwrap();
        stranger.send(text, &[]);
        assert_eq!(stranger.refused().code, refusal::MALFORMED, "{text:?}");
    }
    // Messages that make no sense for a stranger, and no sense for a tenant.
    let mut stranger = Tenant::stranger(&daemon).unwrap();
    stranger.kick();
    assert_eq!(stranger.refused().code, refusal::MALFORMED);
    let mut tenant = Tenant::attach(&daemon);
    tenant.hello();
    assert_eq!(tenant.refused().code, refusal::MALFORMED);
    assert!(daemon.counter("malformed") >= 7);
    still_serves(&daemon);
}

#[test]
fn another_version_is_told_the_right_one() {
    let daemon = Daemon::start(SMALL);
    let mut stranger = Tenant::stranger(&daemon).unwrap();
    let mut hello = Message::empty(kind::HELLO).as_bytes().to_vec();
    hello[4..6].copy_from_slice(&77u16.to_ne_bytes());
    assert_eq!(hello[..4], MAGIC.to_ne_bytes());
    stranger.send(&hello, &[]);
    let refused = stranger.refused();
    assert_eq!(
        (refused.code, refused.expected),
        (refusal::VERSION, VERSION)
    );
    assert_eq!(daemon.counter("wrong_version"), 1);
}

#[test]
fn boards_that_could_hurt_somebody_are_refused() {
    let daemon = Daemon::start(SMALL);
    let (memory, bells) = (
        size_of::<TenantMemory>() as u64,
        size_of::<BellBoard>() as u64,
    );
    let hello = |memory_size, bell_size| Hello {
        memory_size,
        bell_size,
    };
    let shrink = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    let null = std::fs::File::open("/dev/null").unwrap();
    let right = tenant::Memory::new();
    let unsealed = memfd(bells, SealFlag::empty());
    let growing = memfd(bells, SealFlag::F_SEAL_SHRINK);
    let short = memfd(4096, shrink);
    let blank = memfd(bells, shrink);
    let read_only = memfd(bells, shrink | SealFlag::F_SEAL_WRITE);
    let soon_read_only = memfd(bells, shrink | SealFlag::F_SEAL_FUTURE_WRITE);
    let ok = right.bells.as_raw_fd();
    let cases: Vec<(Hello, Vec<RawFd>)> = vec![
        (hello(memory, bells), vec![ok, ok]),
        (hello(memory, bells), vec![unsealed.as_raw_fd()]),
        (hello(memory, bells), vec![growing.as_raw_fd()]),
        (hello(memory, bells), vec![short.as_raw_fd()]),
        (hello(memory, bells), vec![blank.as_raw_fd()]),
        (hello(memory, bells), vec![read_only.as_raw_fd()]),
        (hello(memory, bells), vec![soon_read_only.as_raw_fd()]),
        (hello(memory, bells), vec![null.as_raw_fd()]),
        (hello(u64::MAX, bells), vec![ok]),
        (hello(u64::MAX, bells), vec![]),
        (hello(memory, 0), vec![ok]),
    ];
    let count = cases.len() as u64;
    for (hello, fds) in cases {
        let mut stranger = Tenant::stranger(&daemon).unwrap();
        stranger.send(Message::new(kind::HELLO, &hello).as_bytes(), &fds);
        assert_eq!(
            stranger.refused().code,
            refusal::MEMORY,
            "{hello:?} {fds:?}"
        );
    }
    assert_eq!(daemon.counter("bad_memory"), count);
    still_serves(&daemon);
}

/// What the daemon touches has no holes and is not paged out, and is the tenant's to write and to map again.
#[test]
fn nobody_makes_holes_in_the_memory_of_a_tenant() {
    let daemon = Daemon::start(SMALL);
    let mut tenant = Tenant::attach(&daemon);
    let (file, map) = (&tenant.memory.tenant, &tenant.memory.map);
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(file, how, 0, 4096), Err(Errno::EPERM));
    assert!(file.set_len(0).is_err() && file.set_len(1 << 30).is_err());
    // SAFETY: the mapping has a page, and nothing in it is referred to.
    let removed = unsafe { libc::madvise(map.as_mut_ptr().cast(), 4096, libc::MADV_REMOVE) };
    assert_eq!((removed, Errno::last()), (-1, Errno::EPERM));
    let sealed = SealFlag::F_SEAL_SEAL;
    assert_eq!(
        fcntl(file, FcntlArg::F_ADD_SEALS(sealed)),
        Err(Errno::EPERM)
    );
    // Its requests are read.
    let (connector, _accepted) = tcp_pair();
    tenant.announce(1, 1, &connector, 1);
    daemon.wait_until("it was heard", |stat| stat["counters"]["announced"] == 1);
}

/// A tenant that has no bell board is sent one, to be mapped by anybody, in which nobody makes holes.
#[test]
fn a_board_of_the_daemons_has_no_holes() {
    let daemon = Daemon::start(SMALL);
    let mut tenant = Tenant::stranger(&daemon).unwrap();
    tenant.send(tenant::hello_message().as_bytes(), &[]);
    let board = match tenant.receive() {
        Answer::Message(kind::WELCOME, _, mut fds) if fds.len() == 1 => fds.pop().unwrap(),
        other => panic!("{other:?}"),
    };
    let map = memmap2::MmapOptions::new().map_raw(&board).unwrap();
    assert_eq!(map.len(), size_of::<BellBoard>());
    // It is taken back, by this daemon or the next one.
    let mut again = Tenant::stranger(&daemon).unwrap();
    again.memory.bells = board.try_clone().unwrap().into();
    again.hello();
    match again.receive() {
        Answer::Message(kind::WELCOME, _, fds) => assert!(fds.is_empty()),
        other => panic!("{other:?}"),
    }
    if !nix::unistd::geteuid().is_root() {
        return tenant::actor::skipped("needs root to make memory without holes");
    }
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(&board, how, 0, 4096), Err(Errno::EPERM));
}

/// A caller that was sent its memory: it has mapped it, and has not said so.
fn greeted(daemon: &Daemon) -> (Tenant, Message) {
    let mut caller = Tenant::stranger(daemon).unwrap();
    caller.hello();
    match caller.receive_only() {
        Answer::Message(kind::WELCOME, _, mut fds) => {
            let attached = caller.memory.take(fds.remove(0));
            (caller, attached)
        }
        other => panic!("not welcome: {other:?}"),
    }
}

/// Who does not say that it has mapped its memory is no tenant, whatever its queue says, and counts as one on its account.
#[test]
fn nothing_is_handed_out_before_the_memory_is_mapped() {
    let daemon = Daemon::start(&format!("{SMALL}max_tenants_per_user = 2\n"));
    let mut server = Tenant::attach(&daemon);
    let (connector, accepted) = tcp_pair();
    server.announce(2, 1, &accepted, 0);
    let (mut client, attached) = greeted(&daemon);
    assert!(client.memory.put(&announcement(1, 1, &connector, 1)));
    client.kick();
    assert_eq!(client.refused().code, refusal::MALFORMED);
    let (mut client, mut more) = (greeted(&daemon), Tenant::stranger(&daemon).unwrap());
    more.hello();
    let refused = more.refused();
    assert_eq!((refused.code, refused.expected), (refusal::LIMIT, 2));
    assert_eq!(daemon.counter("announced"), 1);
    // What is not mapped there is not believed, nor what another connection was sent.
    client.0.send(attached.as_bytes(), &[]);
    assert_eq!(client.0.refused().code, refusal::IDENTITY);
    let (mut client, attached) = greeted(&daemon);
    assert!(client.memory.put(&announcement(1, 1, &connector, 1)));
    client.send(attached.as_bytes(), &[]);
    client.promote();
    server.promote();
}

/// It has some seconds for it, and then may come again.
#[test]
fn who_never_maps_its_memory_is_forgotten() {
    let daemon = Daemon::start(SMALL);
    let before = daemon.descriptors();
    let (mut caller, attached) = greeted(&daemon);
    assert!(daemon.descriptors() > before);
    nix::sys::socket::setsockopt(
        &caller.socket,
        nix::sys::socket::sockopt::ReceiveTimeout,
        &nix::sys::time::TimeVal::new(60, 0),
    )
    .unwrap();
    assert!(matches!(caller.receive(), Answer::Closed));
    assert!(caller.try_send(attached.as_bytes(), &[]).is_err());
    daemon.wait_until("it is given back", |_| daemon.descriptors() <= before);
    still_serves(&daemon);
}

/// Nor does the memory of a stream, which its two programs and those that they turn into map.
#[test]
fn the_memory_of_a_stream_has_no_holes() {
    let daemon = Daemon::start(SMALL);
    let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
    let (connector, accepted) = tcp_pair();
    client.announce(1, 1, &connector, 1);
    server.announce(1, 1, &accepted, 0);
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for tenant in [&mut client, &mut server] {
        let (_, fds) = tenant.promote();
        for fd in &fds[..2] {
            memmap2::MmapOptions::new().map_raw(fd).unwrap();
            if nix::unistd::geteuid().is_root() {
                assert_eq!(fallocate(fd, how, 0, 4096), Err(Errno::EPERM));
            }
        }
    }
}

#[test]
fn floods_of_descriptors_leave_none_behind() {
    let daemon = Daemon::start(SMALL);
    let file = std::fs::File::open("/dev/null").unwrap();
    daemon.stat();
    daemon.wait_until("quiet", |_| true);
    let before = daemon.descriptors();
    for count in [1, 3, 100, 253] {
        let fds = vec![file.as_raw_fd(); count];
        for text in [Message::empty(kind::KICK).as_bytes(), b"rubbish", b"\0"] {
            let stranger = Tenant::stranger(&daemon).unwrap();
            for _ in 0..20 {
                if stranger.try_send(text, &fds).is_err() {
                    break;
                }
            }
        }
    }
    daemon.wait_until("all are gone", |_| daemon.descriptors() <= before);
    still_serves(&daemon);
}

/// Whoever has made a socket that is handed over may have the kernel add a descriptor to each message that comes there.
#[test]
fn what_the_kernel_adds_to_messages_is_not_left_behind() {
    const MESSAGES: usize = 100;
    let daemon = Daemon::start(SMALL);
    let parent = Tenant::attach(&daemon);
    let before = daemon.descriptors();
    for text in [&b"rubbish"[..], Message::empty(kind::ADOPT).as_bytes()] {
        let (child, theirs) = Tenant::adopted(&parent);
        let on = 1_i32;
        // SAFETY: the option reads an integer of this size.
        let result = unsafe {
            libc::setsockopt(
                theirs.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PASSPIDFD,
                (&raw const on).cast(),
                size_of_val(&on) as u32,
            )
        };
        if result != 0 {
            return tenant::actor::skipped("needs Linux 6.5");
        }
        // It is not the child's word, so nobody is refused for it.
        let mut command = Command::new("true");
        let (child_end, text) = (child.socket.as_raw_fd(), text.to_vec());
        // SAFETY: only system calls between fork and exec; the message is made before.
        unsafe {
            command.pre_exec(move || {
                let flags = nix::sys::socket::MsgFlags::empty();
                for _ in 0..MESSAGES {
                    nix::sys::socket::send(child_end, &text, flags)?;
                }
                Ok(())
            })
        };
        assert!(command.status().unwrap().success());
    }
    let all = 2 * MESSAGES as u64;
    daemon.wait_until("all are read", |stat| {
        stat["counters"]["stray"].as_u64() >= Some(all)
    });
    daemon.wait_until("all are gone", |_| daemon.descriptors() <= before);
    still_serves(&daemon);
}

#[test]
fn nonsense_in_the_queue_is_ignored() {
    let daemon = Daemon::start(SMALL);
    let mut tenant = Tenant::attach(&daemon);
    for unknown in [0, 7, u32::MAX] {
        tenant.ask_for(&request(unknown, 1, 1));
    }
    tenant.ask_for(&request(what::ANNOUNCE, CONN_RECORDS as u32, 1));
    tenant.ask_for(&request(what::CLOSED, 77, 1));
    tenant.ask_for(&request(what::MAPPED, u32::MAX, 1));
    tenant.ask_for(&request(what::HOLDS, 3, 3));
    // A connection that it does not hold; ports beyond 65535; an impossible role.
    let (connector, accepted) = tcp_pair();
    let honest = announcement(1, 1, &connector, 1);
    for lie in [
        rdsock_shm::control::Request { fd: 0, ..honest },
        rdsock_shm::control::Request { fd: -1, ..honest },
        rdsock_shm::control::Request {
            fd: accepted.as_raw_fd(),
            ..honest
        },
        rdsock_shm::control::Request {
            cookie: honest.cookie + 1,
            ..honest
        },
        rdsock_shm::control::Request {
            local_port: 70_000,
            ..honest
        },
        rdsock_shm::control::Request {
            peer_port: 1,
            ..honest
        },
        rdsock_shm::control::Request {
            local: [9; 16],
            ..honest
        },
        rdsock_shm::control::Request {
            active: 3,
            ..honest
        },
    ] {
        tenant.ask_for(&lie);
        assert_eq!(
            tenant.verdict().reason,
            Reason::Unverified as u32,
            "{lie:?}"
        );
    }
    tenant.ask_for(&rdsock_shm::control::Request { netns: 1, ..honest });
    assert_eq!(tenant.verdict().reason, Reason::OtherNamespace as u32);
    // Every word of its memory may change at any time.
    for offset in (512..512 + 128 * QUEUE_SLOTS).step_by(8) {
        tenant
            .memory
            .word(offset)
            .store(u64::MAX, Ordering::Relaxed);
        tenant.kick();
    }
    for slot in 0..QUEUE_SLOTS {
        for sequence in 0..3 * QUEUE_SLOTS as u64 {
            tenant
                .memory
                .word(512 + 128 * slot)
                .store(sequence, Ordering::Relaxed);
        }
        tenant.kick();
    }
    assert!(daemon.counter("bad_requests") >= 5);
    still_serves(&daemon);
}

#[test]
fn another_processs_connection_can_not_be_taken() {
    let daemon = Daemon::start(SMALL);
    let mut thief = Tenant::attach(&daemon);
    // A child holds the socket alone.
    let (connector, accepted) = tcp_pair();
    let mut child = sleeper(&connector);
    let claim = announcement(1, 1, &connector, 1);
    drop(connector);
    thief.ask_for(&claim);
    assert_eq!(thief.verdict().reason, Reason::Unverified as u32);
    thief.announce(2, 1, &accepted, 0);
    assert_eq!(daemon.stat()["streams_now"], 0);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_connection_held_by_two_processes_has_to_wait() {
    let daemon = Daemon::start(SMALL);
    let mut tenant = Tenant::attach(&daemon);
    let (connector, accepted) = tcp_pair();
    let mut child = sleeper(&connector);
    let maybe_shared = |generation| rdsock_shm::control::Request {
        extra: 1,
        ..announcement(1, generation, &connector, 1)
    };
    tenant.announce(2, 1, &accepted, 0);
    tenant.ask_for(&maybe_shared(1));
    assert_eq!(tenant.verdict().reason, Reason::Shared as u32);
    child.kill().unwrap();
    child.wait().unwrap();
    // A test beside this one may fork, and so hold it, too, for a moment.
    for generation in 2.. {
        tenant.ask_for(&maybe_shared(generation));
        match tenant.receive() {
            Answer::Message(kind::PROMOTE, ..) => break,
            Answer::Message(kind::VERDICT, ..) => assert!(generation < 100),
            other => panic!("{other:?}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process that has inherited a socket, and sleeps.
fn sleeper(stream: &TcpStream) -> std::process::Child {
    let fd = stream.as_raw_fd();
    let mut command = Command::new("sleep");
    command.arg("100");
    // SAFETY: one system call between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::fcntl(fd, libc::F_SETFD, 0);
            Ok(())
        })
    };
    let child = command.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    child
}

#[test]
fn a_stale_announcement_can_not_catch_a_later_connection() {
    let daemon = Daemon::start(SMALL);
    let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
    let (connector, accepted) = tcp_pair();
    server.announce(1, 1, &accepted, 0);
    // The server closes without a word, and so the addresses are nobody's.
    daemon.wait_until("announced", |stat| stat["waiting_now"] == 1);
    client.announce(2, 1, &connector, 1);
    client.promote();
    server.promote();
    let (connector, accepted) = tcp_pair();
    server.announce(2, 1, &accepted, 0);
    daemon.wait_until("announced", |stat| stat["waiting_now"] == 1);
    drop(accepted);
    client.announce(3, 1, &connector, 1);
    // The connection is no longer established, whichever end is asked about.
    assert_eq!(client.verdict().reason, Reason::Unverified as u32);
}

#[test]
fn a_tenant_that_does_not_read_harms_only_itself() {
    let daemon = Daemon::start(SMALL);
    let mut deaf = Tenant::attach(&daemon);
    // Far more answers than a socket's buffer takes: its requests wait, and the daemon does not.
    for number in 0..5_000 {
        if !deaf.memory.put(&request(what::ANNOUNCE, number, 1)) {
            deaf.kick();
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    still_serves(&daemon);
    daemon.wait_until("its answers wait", |stat| {
        stat["tenants"][0]["unread_messages"] != 0
    });
    let stat = daemon.stat();
    let unread = stat["tenants"][0]["unread_messages"].as_u64().unwrap();
    assert!(unread < 5_000, "{unread}");
    // It is served again once it reads.
    let mut answers = 0;
    while daemon.stat()["tenants"][0]["unread_messages"] != 0 {
        assert_eq!(deaf.verdict().reason, Reason::Unverified as u32);
        answers += 1;
    }
    assert!(answers > 100, "{answers}");
}

#[test]
fn too_many_tenants_are_refused() {
    let daemon = Daemon::start("max_tenants_per_user = 2\n");
    let _first = (Tenant::attach(&daemon), Tenant::attach(&daemon));
    let mut third = Tenant::stranger(&daemon).unwrap();
    third.hello();
    let refused = third.refused();
    assert_eq!((refused.code, refused.expected), (refusal::LIMIT, 2));
}

#[test]
fn a_program_that_policy_excludes_is_refused() {
    let daemon = Daemon::start("[policy]\ndeny_programs = [\"hostile-*\"]\n");
    let mut excluded = Tenant::stranger(&daemon).unwrap();
    excluded.hello();
    assert_eq!(excluded.refused().code, refusal::POLICY);
    assert_eq!(daemon.counter("refused"), 1);
}

#[test]
fn a_killed_tenant_is_reaped() {
    // This test runs itself again as the tenant to be killed.
    if let Some(socket) = std::env::var_os("TENANT_TO_KILL") {
        return be_killed(socket.into());
    }
    let daemon = Daemon::start(SMALL);
    let before = daemon.descriptors();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_tenant_is_reaped"])
        .env("TENANT_TO_KILL", daemon.socket())
        .spawn()
        .unwrap();
    daemon.wait_until("ten streams", |stat| stat["streams_now"] == 10);
    child.kill().unwrap();
    child.wait().unwrap();
    daemon.wait_until("no streams", |stat| {
        stat["streams_now"] == 0 && stat["tenants_now"] == 0 && daemon.descriptors() <= before + 2
    });
}

fn be_killed(socket: std::path::PathBuf) {
    let mut tenant = Tenant::at(&socket).unwrap();
    tenant.hello();
    assert!(matches!(
        tenant.receive(),
        Answer::Message(kind::WELCOME, ..)
    ));
    let pairs: Vec<_> = (0..10).map(|_| tcp_pair()).collect();
    for (number, (connector, accepted)) in (0..).step_by(2).zip(&pairs) {
        tenant.announce(number, 1, connector, 1);
        tenant.announce(number + 1, 1, accepted, 0);
    }
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn adopts_only_what_the_sender_made() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    let daemon = Daemon::start(SMALL);
    let mut tenant = Tenant::attach(&daemon);
    let pair = |kind| socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let (mut adopted, _) = Tenant::adopted(&tenant);
    adopted.hello();
    assert!(matches!(
        adopted.receive(),
        Answer::Message(kind::WELCOME, ..)
    ));
    // A pair that another process made would give its rights away.
    let (_ours, theirs) = pair(SockType::SeqPacket);
    let mut command = Command::new("true");
    let (control, made_here) = (tenant.socket.as_raw_fd(), theirs.as_raw_fd());
    // SAFETY: only a system call between fork and exec; the message is made before.
    unsafe {
        command.pre_exec(move || {
            let rights = [made_here];
            let control_message = [nix::sys::socket::ControlMessage::ScmRights(&rights)];
            let text = bytes_of(&head(kind::ADOPT)).to_vec();
            let parts = [std::io::IoSlice::new(&text)];
            let flags = nix::sys::socket::MsgFlags::empty();
            nix::sys::socket::sendmsg::<()>(control, &parts, &control_message, flags, None)?;
            // Nor may it speak for its parent.
            nix::sys::socket::send(control, b"rubbish", flags)?;
            Ok(())
        })
    };
    assert!(command.status().unwrap().success());
    daemon.wait_until("not taken", |stat| {
        stat["counters"]["stray"].as_u64() >= Some(2)
    });
    // Which goes on as it was.
    tenant.ask(question::STAT);
    let mut stream = Tenant::stranger(&daemon).unwrap();
    let (_ours, theirs) = pair(SockType::Stream);
    stream.hello();
    stream.receive();
    stream.send(
        Message::empty(kind::ADOPT).as_bytes(),
        &[theirs.as_raw_fd()],
    );
    assert_eq!(stream.refused().code, refusal::MALFORMED);
}

/// Servers have children that end at once.
#[test]
fn a_child_that_ends_before_it_is_adopted_harms_nobody() {
    let daemon = Daemon::start(SMALL);
    let tenant = Tenant::attach(&daemon);
    let control = tenant.socket.as_raw_fd();
    let mut command = Command::new("true");
    // SAFETY: system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            let (_, theirs) = tenant::control_pair();
            let rights = [theirs.as_raw_fd()];
            let rights = [nix::sys::socket::ControlMessage::ScmRights(&rights)];
            let text = bytes_of(&head(kind::ADOPT)).to_vec();
            let parts = [std::io::IoSlice::new(&text)];
            let flags = nix::sys::socket::MsgFlags::empty();
            nix::sys::socket::sendmsg::<()>(control, &parts, &rights, flags, None)?;
            Ok(())
        })
    };
    daemon.signal(Signal::SIGSTOP);
    assert!(command.status().unwrap().success());
    daemon.signal(Signal::SIGCONT);
    let (mut adopted, _) = Tenant::adopted(&tenant);
    adopted.hello();
    assert!(matches!(
        adopted.receive(),
        Answer::Message(kind::WELCOME, ..)
    ));
    assert_eq!(daemon.counter("malformed"), 0);
}

#[test]
fn an_idle_daemon_uses_no_processor_and_ends_when_told() {
    let mut daemon = Daemon::start("idle_exit_seconds = 3600\n");
    let tenant = Tenant::attach(&daemon);
    std::thread::sleep(Duration::from_millis(300));
    let before = daemon.ticks();
    std::thread::sleep(Duration::from_secs(2));
    assert!(daemon.ticks() - before <= 1);
    drop(tenant);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
    assert!(!daemon.socket().exists());
}

#[test]
fn an_unused_daemon_ends_but_not_while_its_caller_lives() {
    let mut daemon = Daemon::start("idle_exit_seconds = 1\n");
    // This process has connected before and lives on, so the daemon waits for it.
    std::thread::sleep(Duration::from_secs(2));
    assert!(Tenant::stranger(&daemon).is_some());
    daemon.signal(Signal::SIGHUP);
    assert!(Tenant::stranger(&daemon).is_some());
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.wait(), Some(0));
}

/// Any bytes, with any number of descriptors, to a stranger and to a tenant.
#[test]
fn any_datagram_gets_a_clear_answer() {
    let daemon = Daemon::start(SMALL);
    let file = std::fs::File::open("/dev/null").unwrap();
    let body = prop::collection::vec(any::<u8>(), 0..200);
    let datagram = (any::<Option<u16>>(), body, 0..5_usize);
    let mut runner = TestRunner::new(Config::with_cases(128));
    let datagrams = prop::collection::vec(datagram, 1..8);
    let tested = runner.run(&(datagrams, any::<bool>()), |(datagrams, attach)| {
        let caller = match attach {
            true => Tenant::attach(&daemon),
            false => Tenant::stranger(&daemon).unwrap(),
        };
        for (kind, body, fds) in datagrams {
            let bytes = match kind {
                Some(kind) => [bytes_of(&head(kind % 18)), &body].concat(),
                None => body,
            };
            caller.send(&bytes, &vec![file.as_raw_fd(); fds]);
        }
        prop_assert!(daemon.stat()["counters"]["attached"].is_u64());
        Ok(())
    });
    tested.unwrap();
    still_serves(&daemon);
}

#[test]
fn a_flood_of_callers_does_not_wedge_the_daemon() {
    let daemon = Daemon::start(SMALL);
    let crowd: Vec<_> = (0..200).filter_map(|_| Tenant::stranger(&daemon)).collect();
    drop(crowd);
    std::thread::sleep(Duration::from_millis(100));
    still_serves(&daemon);
}

#[test]
fn a_limit_on_the_size_of_files_keeps_connections_on_the_kernel() {
    let daemon = Daemon::start_with(SMALL, |command| {
        // SAFETY: one system call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                let limit = nix::sys::resource::Resource::RLIMIT_FSIZE;
                Ok(nix::sys::resource::setrlimit(limit, 65_536, 65_536)?)
            })
        };
    });
    // There is no memory for a tenant either. It asks again later.
    let mut tenant = Tenant::stranger(&daemon).unwrap();
    tenant.hello();
    assert_eq!(tenant.refused().code, refusal::LIMIT);
    assert_eq!(daemon.stat()["streams_now"], 0);
}

/// Can the kernel keep descriptors away from a socket (`SO_PASSRIGHTS`, Linux 6.16)?
fn can_take_no_files() -> bool {
    let (socket, _) = tenant::control_pair();
    let no: libc::c_int = 0;
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the call reads one integer.
    let set = unsafe {
        let (fd, no) = (socket.as_raw_fd(), (&raw const no).cast());
        libc::setsockopt(fd, libc::SOL_SOCKET, 83, no, len)
    };
    set == 0
}

#[test]
fn nobody_sends_files_before_he_is_on_an_account() {
    if !can_take_no_files() {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: needs Linux 6.16");
    }
    const SHARE: usize = 40;
    let daemon = Daemon::start(&format!("max_descriptors_per_user = {SHARE}\n"));
    // They say nothing, and each costs its user three: there is room for so many, or for one less, while whoever asked whether the daemon
    // is there is on that account.
    let callers: Vec<_> = (0..SHARE)
        .map(|_| Tenant::stranger(&daemon).unwrap())
        .collect();
    for _ in 0..30 {
        let beyond = Tenant::stranger(&daemon).unwrap();
        assert!(beyond.try_send(b"rubbish", &[0]).is_err());
    }
    let heard = callers
        .iter()
        .filter(|caller| caller.try_send(b"rubbish", &[0]).is_ok());
    let heard = heard.count();
    assert!((SHARE / 3 - 1..=SHARE / 3).contains(&heard), "{heard}");
}
