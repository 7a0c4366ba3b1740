//! Honest tenants: two ends are matched, and what they leave is given back.

mod tenant;

use std::fs::File;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, fcntl};
use rdsock_shm::control::{Lookup, Message, NotFound, Promote, from_bytes, kind, request as what};
use rdsock_shm::layout::{
    BELL_MAGIC, DATA_OFFSET, Direction, END_MAGIC, EndPage, NOT_SWITCHED, Producer, STREAM_MAGIC,
    StreamHeader,
};
use rdsock_shm::reason::Reason;
use rdsock_shm::sync::Ordering;
use tenant::measure::Honest;
use tenant::{Answer, Daemon, Tenant, announcement, cookie, request, tcp_pair, tcp_pair_at};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

fn word(file: &File, at: usize) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at as u64).unwrap();
    u64::from_ne_bytes(bytes)
}

fn half(file: &File, at: usize) -> u32 {
    word(file, at) as u32
}

/// Checks the memory of one end; returns (stream memory, end page, bell board).
fn check(promote: &Promote, fds: Vec<std::os::fd::OwnedFd>, end: u32) -> [File; 3] {
    let files: [File; 3] = fds
        .into_iter()
        .map(File::from)
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    let [stream, page, bells] = &files;
    assert_eq!(promote.end, end);
    assert_eq!(
        (promote.ring_size, promote.data_offset, promote.huge),
        (65536, DATA_OFFSET, 0)
    );
    assert_eq!(stream.metadata().unwrap().len(), 4096 + 2 * 65536);
    assert_eq!(word(stream, 0), STREAM_MAGIC);
    assert_eq!(
        word(stream, offset_of!(StreamHeader, stream_id)),
        promote.stream_id
    );
    assert_eq!(word(stream, offset_of!(StreamHeader, ring_size)), 65536);
    for direction in 0..2 {
        let at = offset_of!(StreamHeader, directions) + direction * size_of::<Direction>();
        assert_eq!(
            word(stream, at + offset_of!(Producer, switch_at)),
            NOT_SWITCHED
        );
        assert_eq!(word(stream, at), 0);
    }
    assert_eq!(page.metadata().unwrap().len(), 4096);
    assert_eq!(word(page, 0), END_MAGIC);
    assert_eq!(half(page, offset_of!(EndPage, end)), end);
    assert_eq!(half(page, offset_of!(EndPage, holders)), 1);
    assert_eq!(
        word(page, offset_of!(EndPage, stream_id)),
        promote.stream_id
    );
    assert_eq!(word(bells, 0), BELL_MAGIC);
    let sealed = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    for file in [stream, page] {
        assert_eq!(fcntl(file, FcntlArg::F_GET_SEALS).unwrap(), sealed);
    }
    files
}

#[test]
fn two_tenants_get_a_stream() {
    let daemon = Daemon::start(SMALL);
    let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
    let (connector, accepted) = tcp_pair();
    server.announce(9, 4, &accepted, 0);
    client.announce(7, 3, &connector, 1);
    let (to_client, fds) = client.promote();
    assert_eq!((to_client.conn, to_client.generation), (7, 3));
    let client_files = check(&to_client, fds, 0);
    let (to_server, fds) = server.promote();
    assert_eq!((to_server.conn, to_server.generation), (9, 4));
    let server_files = check(&to_server, fds, 1);
    assert_eq!(to_client.stream_id, to_server.stream_id);

    // One memory for both, a page for each, and the other's bells.
    client_files[0].write_all_at(b"x", 5000).unwrap();
    assert_eq!(half(&server_files[0], 5000) as u8, b'x');
    client_files[1].write_all_at(b"x", 100).unwrap();
    assert_eq!(half(&server_files[1], 100) as u8, 0);
    client_files[2].write_all_at(b"x", 1000).unwrap();
    assert_eq!(half(&server.memory.bells, 1000) as u8, b'x');

    // Each message is counted, just behind its sending.
    let counted = || client.memory.header().messages.load(Ordering::Acquire);
    daemon.wait_until("counted", |_| counted() == client.received);

    let why = client.ask(rdsock_shm::control::question::WHY);
    assert_eq!(why["tenants"].as_array().unwrap().len(), 2);

    client.ask_for(&request(what::MAPPED, 7, 3));
    drop(connector);
    client.ask_for(&request(what::CLOSED, 7, 3));
    daemon.wait_until("the server still has it", |stat| stat["streams_now"] == 1);
    drop(accepted);
    server.ask_for(&request(what::CLOSED, 9, 4));
    daemon.wait_until("the stream is reaped", |stat| stat["streams_now"] == 0);
    let user = &daemon.stat()["users"][0];
    assert_eq!((&user["streams"], &user["bytes"]), (&0.into(), &0.into()));
}

#[test]
fn ipv6_and_v4_mapped_connections_too() {
    let daemon = Daemon::start(SMALL);
    let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
    let (connector, accepted) = tcp_pair_at("[::1]:0");
    client.announce(0, 1, &connector, 1);
    server.announce(0, 1, &accepted, 0);
    client.promote();
    server.promote();
    let listener = std::net::TcpListener::bind("[::]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let connector = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    client.announce(1, 1, &connector, 1);
    server.announce(1, 1, &accepted, 0);
    assert_eq!(client.promote().0.conn, 1);
    assert_eq!(server.promote().0.conn, 1);
}

#[test]
fn a_program_that_talks_to_itself() {
    let daemon = Daemon::start(SMALL);
    let mut tenant = Tenant::attach(&daemon);
    let (connector, accepted) = tcp_pair();
    tenant.announce(1, 1, &connector, 1);
    // A new announcement of the same connection replaces the old one.
    tenant.announce(1, 2, &connector, 1);
    tenant.announce(2, 1, &accepted, 2);
    let mut got = [tenant.promote().0, tenant.promote().0];
    got.sort_by_key(|promote| promote.conn);
    assert_eq!(
        got.map(|promote| (promote.conn, promote.generation, promote.end)),
        [(1, 2, 0), (2, 1, 1)]
    );
    drop(tenant);
    drop((connector, accepted));
    daemon.wait_until("reaped", |stat| stat["streams_now"] == 0);
}

#[test]
fn ends_that_disagree_stay_on_the_kernel() {
    let daemon = Daemon::start(SMALL);
    let mut tenant = Tenant::attach(&daemon);
    let (connector, accepted) = tcp_pair();
    for (a, b) in [(2, 2), (1, 1), (0, 0)] {
        tenant.announce(1, 1, &connector, a);
        tenant.announce(2, 1, &accepted, b);
        for _ in 0..2 {
            assert_eq!(tenant.verdict().reason, Reason::Foreign as u32);
        }
    }
}

#[test]
fn limits_and_ports_keep_connections_on_the_kernel() {
    let daemon =
        Daemon::start("ring_size = 65536\nmax_streams_per_user = 1\n[policy]\ndeny_ports = [9]\n");
    let mut tenant = Tenant::attach(&daemon);
    let pairs = [tcp_pair(), tcp_pair()];
    tenant.announce(1, 1, &pairs[0].0, 1);
    tenant.announce(2, 1, &pairs[0].1, 0);
    tenant.promote();
    tenant.promote();
    tenant.announce(3, 1, &pairs[1].0, 1);
    tenant.announce(4, 1, &pairs[1].1, 0);
    assert_eq!(tenant.verdict().reason, Reason::Limit as u32);
    assert_eq!(tenant.verdict().reason, Reason::Limit as u32);
    let mut to_port_9 = announcement(5, 1, &pairs[1].0, 1);
    to_port_9.peer_port = 9;
    tenant.ask_for(&to_port_9);
    let verdict = tenant.verdict();
    assert_eq!((verdict.conn, verdict.reason), (5, Reason::Policy as u32));
}

#[test]
fn an_inherited_socket_is_found_again() {
    let daemon = Daemon::start(SMALL);
    let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
    let (connector, accepted) = tcp_pair();
    client.announce(1, 1, &connector, 1);
    server.announce(1, 1, &accepted, 0);
    let (first, _) = server.promote();
    client.promote();
    // As after exec: the control connection is gone, the process and its socket live.
    drop(server);
    drop(client);
    daemon.wait_until("both left", |stat| {
        stat["tenants"].as_array().unwrap().is_empty()
    });
    assert_eq!(daemon.stat()["streams_now"], 1);
    let mut server = Tenant::attach(&daemon);
    let mut generation = 0;
    let mut look = |cookie, fd| {
        generation += 1;
        let lookup = Lookup {
            conn: 5,
            generation,
            cookie,
            fd,
            reserved: 0,
        };
        server.send(Message::new(kind::LOOKUP, &lookup).as_bytes(), &[]);
        server.receive()
    };
    let fd = accepted.as_raw_fd();
    // Which question it answers is said.
    let not_found = |answer| match answer {
        Answer::Message(kind::NOT_FOUND, body, _) => from_bytes(&body),
        _ => None,
    };
    let no = |generation| {
        Some(NotFound {
            conn: 5,
            generation,
        })
    };
    assert_eq!(not_found(look(1, fd)), no(1));
    let other = look(cookie(&accepted), connector.as_raw_fd());
    assert_eq!(not_found(other), no(2));
    assert_eq!(not_found(look(cookie(&accepted), 0)), no(3));
    let Answer::Message(kind::PROMOTE, body, fds) = look(cookie(&accepted), fd) else {
        panic!("not found");
    };
    let again: Promote = from_bytes(&body).unwrap();
    assert_eq!((again.conn, again.generation), (5, 4));
    assert_eq!(again.stream_id, first.stream_id);
    check(&again, fds, 1);
    // A socket that has a holder gets no second stream.
    server.announce(6, 1, &accepted, 0);
    assert_eq!(server.verdict().reason, Reason::Shared as u32);
    drop(server);
    drop((connector, accepted));
    daemon.wait_until("reaped", |stat| stat["streams_now"] == 0);
}

#[test]
fn an_end_that_declines_frees_the_other() {
    let daemon = Daemon::start(SMALL);
    let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
    let (connector, accepted) = tcp_pair();
    client.announce(1, 1, &connector, 1);
    server.announce(1, 1, &accepted, 0);
    client.promote();
    server.promote();
    client.ask_for(&request(what::DECLINED, 1, 1));
    assert_eq!(server.verdict().reason, Reason::PeerDemoted as u32);
    // The other end has it still.
    assert_eq!(daemon.stat()["streams_now"], 1);
    // And both may try again.
    client.announce(1, 2, &connector, 1);
    server.announce(1, 2, &accepted, 0);
    assert_eq!(client.promote().0.generation, 2);
    drop((client, server, connector, accepted));
    daemon.wait_until("given back", |stat| stat["streams_now"] == 0);
}

#[test]
fn a_daemon_that_was_killed_is_followed_by_another() {
    let mut daemon = Daemon::start(SMALL);
    let mut tenant = Tenant::attach(&daemon);
    daemon.kill_and_restart();
    assert!(matches!(tenant.receive(), Answer::Closed));
    let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
    let (connector, accepted) = tcp_pair();
    client.announce(1, 1, &connector, 1);
    server.announce(1, 1, &accepted, 0);
    client.promote();
    server.promote();
}

#[test]
fn two_thousand_streams_come_and_go() {
    let daemon = Daemon::start(SMALL);
    let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
    let (soft, hard) = nix::sys::resource::getrlimit(LIMIT).unwrap();
    nix::sys::resource::setrlimit(LIMIT, hard, hard).unwrap();
    assert!(
        soft > 6_000 || hard > 6_000,
        "too few descriptors for this test"
    );
    let before = daemon.descriptors();
    let pairs: Vec<_> = (0..2_000).map(|_| tcp_pair()).collect();
    let start = std::time::Instant::now();
    for (number, (connector, accepted)) in (0..).zip(&pairs) {
        client.announce(number, 1, connector, 1);
        server.announce(number, 1, accepted, 0);
        assert_eq!(client.promote().0.conn, number);
        assert_eq!(server.promote().0.conn, number);
    }
    println!("{:?} for each stream", start.elapsed() / 2_000);
    assert_eq!(daemon.stat()["streams_now"], 2_000);
    drop((client, server, pairs));
    daemon.wait_until("all are given back", |stat| {
        stat["streams_now"] == 0 && daemon.descriptors() <= before
    });
}

const LIMIT: nix::sys::resource::Resource = nix::sys::resource::Resource::RLIMIT_NOFILE;

#[test]
fn connections_in_another_network_namespace() {
    use std::os::unix::process::CommandExt;
    // This test runs itself again, in a namespace of its own.
    if let Some(socket) = std::env::var_os("TENANT_IN_NAMESPACE") {
        return be_elsewhere(socket.into());
    }
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("left out: only root may make a network namespace");
    }
    let daemon = Daemon::start(SMALL);
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "connections_in_another_network_namespace",
            "--nocapture",
        ])
        .env("TENANT_IN_NAMESPACE", daemon.socket());
    // SAFETY: one system call between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?));
    }
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // The namespace is let go with its last tenant.
    daemon.wait_until("gone", |stat| stat["tenants_now"] == 0);
    let mut here = Tenant::attach(&daemon);
    let (connector, accepted) = tcp_pair();
    here.announce(1, 1, &connector, 1);
    here.announce(2, 1, &accepted, 0);
    here.promote();
}

fn be_elsewhere(socket: std::path::PathBuf) {
    set_loopback_up();
    let mut tenant = Tenant::at(&socket).unwrap();
    tenant.hello();
    assert!(matches!(
        tenant.receive(),
        Answer::Message(kind::WELCOME, ..)
    ));
    let (connector, accepted) = tcp_pair();
    tenant.announce(1, 1, &connector, 1);
    tenant.announce(2, 1, &accepted, 0);
    tenant.promote();
    tenant.promote();
    // A thread that moved to a namespace that the process is not in: nobody can look there.
    let pair = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        set_loopback_up();
        tcp_pair()
    });
    let (connector, _accepted) = pair.join().unwrap();
    tenant.announce(3, 1, &connector, 1);
    assert_eq!(tenant.verdict().reason, Reason::OtherNamespace as u32);
}

fn set_loopback_up() {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: a request made of integers, with the name of the interface; zeroes are a value.
    let result = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
        request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request)
    };
    assert_eq!(result, 0);
}

/// Two messages, two announcements, maybe the pair, two answers; and that nobody holds the stream before it any more.
#[test]
fn a_promotion_takes_few_looks_and_few_questions() {
    const COUNT: u64 = 200;
    let daemon = Daemon::start(SMALL);
    let mut honest = Honest::new(&daemon);
    honest.promotion();
    let counted = || ["looks", "asked"].map(|name| daemon.counter(name));
    let before = counted();
    for _ in 0..COUNT {
        honest.promotion();
    }
    let after = counted();
    let [looks, asked] = [0, 1].map(|at| (after[at] - before[at]) as f64 / COUNT as f64);
    println!("{looks} looks and {asked} messages with questions for a promotion");
    // Some for the answer to `stat`.
    assert!(looks < 8.5, "{looks} looks");
    // One for each announcement, one for the pair, and two for the stream before it.
    assert!(asked < 5.1, "{asked} messages with questions");
}
