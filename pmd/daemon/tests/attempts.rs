//! What somebody with the sources has tried, and what came to nothing. It has to go on coming to nothing.

#[macro_use]
mod tenant;

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket, sockopt,
};
use nix::unistd::{ForkResult, fork};
use rdsock_shm::control::{Refused, from_bytes, kind, refusal};
use tenant::actor::{ATTACKER, Actor, Part, is_root, listen, say, skipped};
use tenant::measure::{Bystander, Honest};
use tenant::nodes::{Bound, Client, Nodes, Server};
use tenant::{Answer, Daemon, Tenant, tcp_pair};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

/// How long others are watched.
const WATCH: Duration = Duration::from_secs(2);

fn play(part: &Part) {
    match part.name.as_str() {
        "pager" => be_pager(part),
        "headless" => be_headless(part),
        other => panic!("no such part: {other}"),
    }
}

scene!(a_stream_is_not_paged_out, |test| {
    let daemon = Daemon::start(SMALL);
    let actor = Actor::start(test, "pager", &daemon.socket(), ATTACKER);
    let [own, stream, end] = actor.hear_numbers("mapped")[..] else {
        panic!("three numbers");
    };
    if own != 0 {
        return skipped("this kernel pages out nothing of a file when it is asked to");
    }
    // Who touches a page that is on its way out waits for all who have mapped the file.
    assert_eq!([stream, end], [1, 1]);
});

/// Asks the kernel to page out a page of its own, of a stream, and of an end; says which it still has mapped.
fn be_pager(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    let (connector, accepted) = tcp_pair();
    tenant.announce(1, 1, &connector, 1);
    tenant.announce(2, 1, &accepted, 0);
    let (_, fds) = tenant.promote();
    let own = File::from(memfd_create(c"own", MFdFlags::empty()).unwrap());
    own.set_len(4096).unwrap();
    let kept = [own.as_fd(), fds[0].as_fd(), fds[1].as_fd()].map(|file| {
        u8::from(is_mapped_when_paged_out(
            &MmapOptions::new().map_raw(&file).unwrap(),
        ))
    });
    say(&format!("mapped {} {} {}", kept[0], kept[1], kept[2]));
    listen();
}

/// Whether the first page of a mapping is in this process's page table still, when the kernel was asked to page it out.
fn is_mapped_when_paged_out(map: &MmapRaw) -> bool {
    const PRESENT: u64 = 1 << 63;
    const PAGE: usize = 4096;
    let pages = File::open("/proc/self/pagemap").unwrap();
    // What was just touched may not be on the kernel's lists yet.
    (0..100).all(|_| {
        // SAFETY: within the mapping, which holds nothing that is used; a request about it.
        let asked = unsafe {
            map.as_mut_ptr().add(PAGE - 1).write_volatile(1);
            libc::madvise(map.as_mut_ptr().cast(), PAGE, libc::MADV_PAGEOUT)
        };
        assert!(asked == 0 || Errno::last() == Errno::EINVAL);
        let mut entry = [0; 8];
        let at = map.as_ptr() as usize / PAGE * entry.len();
        pages.read_exact_at(&mut entry, at as u64).unwrap();
        u64::from_ne_bytes(entry) & PRESENT != 0
    })
}

scene!(a_process_whose_first_thread_has_ended, |test| {
    let daemon = Daemon::start(SMALL);
    let bystander = Bystander::new(&daemon);
    let mut honest = Honest::new(&daemon);
    let actor = Actor::start(test, "headless", &daemon.socket(), ATTACKER);
    actor.hear("headless");
    bystander.goes_on(&daemon, "a process without its first thread", WATCH);
    honest.promotion();
    // It can't be looked at any more: it gets nothing, and is no tenant for long.
    let [code, promoted] = actor.hear_numbers("refused")[..] else {
        panic!("two numbers");
    };
    assert_eq!((code, promoted), (refusal::IDENTITY.into(), 0));
});

/// Attaches; then its first thread ends, and another one goes on.
fn be_headless(part: &Part) {
    // SAFETY: this process has no thread beside this one and the harness's, which waits for it.
    if let ForkResult::Parent { .. } = unsafe { fork() }.unwrap() {
        listen();
        return;
    }
    let mut tenant = Tenant::attach_at(&part.socket);
    std::thread::spawn(move || {
        let own = std::process::id();
        let has_ended = || -> io::Result<bool> {
            let stat = std::fs::read_to_string(format!("/proc/self/task/{own}/stat"))?;
            Ok(stat
                .rsplit(") ")
                .next()
                .is_some_and(|rest| rest.starts_with('Z')))
        };
        while !has_ended().unwrap() {
            std::thread::yield_now();
        }
        say("headless");
        let (connector, accepted) = tcp_pair();
        tenant.announce(1, 1, &connector, 1);
        tenant.announce(2, 1, &accepted, 0);
        let mut promoted = 0;
        let code = loop {
            match tenant.receive() {
                Answer::Message(kind::REFUSED, body, _) => {
                    break from_bytes::<Refused>(&body).unwrap().code;
                }
                Answer::Message(kind, ..) => promoted += u32::from(kind == kind::PROMOTE),
                Answer::Closed => break 0,
            }
        };
        say(&format!("refused {code} {promoted}"));
        std::process::abort();
    });
    // SAFETY: ends this thread and nothing else; nobody joins it.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
}

/// Nobody has promised them anything.
#[test]
fn strangers_at_the_anchors_port_hold_up_nobody() {
    let nodes = Nodes::start([SMALL; 2]);
    let server = Server::start(nodes.server());
    let bystander = Bystander::new(nodes.client());
    let mut client = Client::at(&nodes.client().socket());
    let from = Bound::new(0).unwrap();
    let reached = client.reach(&from, server.address());
    let anchors = SocketAddr::from((Ipv4Addr::LOCALHOST, reached.anchor_port as u16));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    (0..200).map(|_| knock(anchors)).for_each(drop);
                }
            });
        }
        let longest = bystander.goes_on(nodes.client(), "strangers", WATCH);
        println!("an answer after {longest:?} at most");
        // Who was promised something gets it all the same.
        let stream = client.go(from, &reached);
        let end = Instant::now() + bystander.most;
        let sent = stream.and_then(|mut stream| {
            io::Write::write_all(&mut stream, b"mine").map_err(|_| Errno::EPIPE)?;
            Ok(stream)
        });
        let received = sent.is_ok() && server.receives("mine", end - Instant::now());
        over.store(true, Ordering::Relaxed);
        assert!(received, "{sent:?}");
    });
    assert!(nodes.client().counter("stray") > 0);
}

/// A connection that is on its way. It is broken when dropped.
fn knock(to: SocketAddr) -> std::os::fd::OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    let now = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&socket, sockopt::Linger, &now).unwrap();
    use std::os::fd::AsRawFd;
    let _ = connect(socket.as_raw_fd(), &SockaddrStorage::from(to));
    socket
}
