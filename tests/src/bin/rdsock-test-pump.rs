//! A program for the fault tests: plain sockets, every byte checked, and one line for whatever
//! happens to a connection. It knows nothing of rdsock.
//!
//! - `serve AT` echoes on each connection.
//! - `send AT MEGABYTES MB_PER_S` sends a pattern at that rate and checks the echo of it.
//! - `hold AT COUNT SECONDS` opens connections, uses each a little, leaves them idle for so
//!   long, and uses each again.
//! - `tick AT HOW` sends eight bytes five times a second on one connection for ever, and waits for their echo
//!   in this way: `recv`, `poll` or `epoll`.
//! - `child AT HOW` has a child use its connection, which is made by `vfork` or `clone` without libc's
//!   knowledge, and uses it itself after SIGUSR1.
//! - `churn AT THREADS SECONDS` has threads open connections, use them and close most of them, for so long. Then it keeps
//!   what is open and waits.
//! - `close AT HOW` closes a connection that is registered with epoll, once a byte has come, and says how
//!   many events come then: by `close`, `dup2` or `close_range`, or by `close` with a `fork`ed child that has it too.
//!
//! AT is an address with a port, or a port of 127.0.0.1.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

const BLOCK: usize = 64 << 10;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |word: &str| word.parse::<u64>().expect("a number");
    match words.as_slice() {
        ["serve", at] => serve(address(at)),
        ["send", at, megabytes, rate] => send(address(at), number(megabytes) << 20, number(rate)),
        ["tick", at, how] => tick(address(at), how),
        ["child", at, how] => child(address(at), how),
        ["churn", at, threads, seconds] => churn(address(at), number(threads), number(seconds)),
        ["close", at, how] => close(address(at), how),
        ["hold", at, count, seconds] => hold(address(at), number(count), number(seconds)),
        _ => {
            eprintln!(
                "usage: serve AT | churn AT THREADS SECONDS | send AT MEGABYTES MB_PER_S | hold AT COUNT SECONDS | tick AT HOW | child AT HOW | \
                 close AT HOW"
            );
            ExitCode::from(2)
        }
    }
}

fn address(word: &str) -> SocketAddr {
    match word.parse::<u16>() {
        Ok(port) => (Ipv4Addr::LOCALHOST, port).into(),
        Err(_) => word.parse().expect("an address with a port, or a port"),
    }
}

fn connect(at: SocketAddr) -> TcpStream {
    TcpStream::connect(at).expect("the server listens")
}

fn serve(at: SocketAddr) -> ExitCode {
    let listener = TcpListener::bind(at).expect("the port is free");
    println!("listening");
    for connection in listener.incoming() {
        let mut connection = match connection {
            Ok(connection) => connection,
            Err(error) => {
                println!("accept: {:?}", error.kind());
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let thread = std::thread::Builder::new().stack_size(256 << 10);
        let echo = thread.spawn(move || {
            let (bytes, end) = echo(&mut connection);
            match end {
                None => println!("ended after {bytes}"),
                Some(kind) => println!("broke after {bytes}: {kind:?}"),
            }
        });
        echo.expect("a thread can be started");
    }
    ExitCode::SUCCESS
}

/// Echoes until the end; bytes echoed, and the error if it was one.
fn echo(connection: &mut TcpStream) -> (u64, Option<ErrorKind>) {
    let mut block = vec![0; BLOCK];
    let mut total = 0;
    loop {
        let length = match connection.read(&mut block) {
            Ok(0) => return (total, None),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return (total, Some(error.kind())),
        };
        let filled = block.get(..length).unwrap_or_default();
        if let Err(error) = connection.write_all(filled) {
            return (total, Some(error.kind()));
        }
        total += length as u64;
    }
}

/// The pattern repeats after this many bytes: no multiple of a ring, a page or a block, so bytes
/// from a wrong place are wrong bytes.
const PERIOD: usize = (5 << 20) + 12_347;

/// The pattern, once around and a block more, so that each block is one slice of it. Copied and
/// compared as slices, which is quick in a debug build too.
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(PERIOD + BLOCK + 8);
    while bytes.len() < PERIOD {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(PERIOD);
    bytes.extend_from_within(..BLOCK);
    bytes
}

/// The block of the pattern that starts at this position.
fn block_at(pattern: &[u8], position: u64) -> &[u8] {
    let start = (position % PERIOD as u64) as usize;
    pattern.get(start..start + BLOCK).unwrap_or_default()
}

fn send(at: SocketAddr, bytes: u64, rate: u64) -> ExitCode {
    let mut connection = connect(at);
    let mut writer = connection.try_clone().expect("a socket can be duplicated");
    let pattern = Arc::new(pattern());
    let right = Arc::clone(&pattern);
    let writing = std::thread::spawn(move || {
        let started = Instant::now();
        let mut done = 0;
        while done < bytes {
            let block = block_at(&pattern, done);
            if let Err(error) = writer.write_all(block) {
                return Some(error.kind());
            }
            done += block.len() as u64;
            let due = Duration::from_secs_f64(done as f64 / (rate as f64 * 1e6));
            std::thread::sleep(due.saturating_sub(started.elapsed()));
        }
        let _ = writer.shutdown(Shutdown::Write);
        None
    });
    let mut got = vec![0; BLOCK];
    let mut done = 0;
    while done < bytes {
        if let Err(error) = connection.read_exact(&mut got) {
            // A reset is told once, to whichever call comes first; a receive behind that finds the end.
            let _ = connection.shutdown(Shutdown::Both);
            let sending = writing.join().expect("the writer does not panic");
            let reset = sending.filter(|kind| *kind == ErrorKind::ConnectionReset);
            println!("broke at {done}: {:?}", reset.unwrap_or(error.kind()));
            return ExitCode::from(3);
        }
        if got != block_at(&right, done) {
            println!("WRONG bytes at {done}");
            return ExitCode::from(4);
        }
        done += got.len() as u64;
        if done == 16 * BLOCK as u64 {
            println!("begun");
        }
    }
    let _ = writing.join();
    match connection.read(&mut got) {
        Ok(0) => {
            println!("done {done}");
            ExitCode::SUCCESS
        }
        other => {
            println!("WRONG end: {other:?}");
            ExitCode::from(4)
        }
    }
}

fn hold(at: SocketAddr, count: u64, seconds: u64) -> ExitCode {
    let mut connections: Vec<TcpStream> = (0..count).map(|_| connect(at)).collect();
    for round in 0..24 {
        talk(&mut connections, round);
        std::thread::sleep(Duration::from_millis(2));
    }
    println!("held");
    std::thread::sleep(Duration::from_secs(seconds));
    talk(&mut connections, 99);
    println!("done {count}");
    ExitCode::SUCCESS
}

fn churn(at: SocketAddr, threads: u64, seconds: u64) -> ExitCode {
    /// Of so many connections one is kept, in the place of an older one.
    const KEPT: u64 = 4;
    const PLACES: u64 = 16;
    let end = Instant::now() + Duration::from_secs(seconds);
    let work = move || {
        let mut kept: Vec<TcpStream> = Vec::new();
        for round in 0.. {
            if Instant::now() >= end {
                break;
            }
            let mut one = [connect(at)];
            for number in 0..5 {
                talk(&mut one, number);
            }
            let [one] = one;
            let place = (round / KEPT % PLACES) as usize;
            match round % KEPT {
                0 if place < kept.len() => kept[place] = one,
                0 => kept.push(one),
                _ => {}
            }
        }
        kept
    };
    let threads: Vec<_> = (0..threads).map(|_| std::thread::spawn(work)).collect();
    let threads = threads.into_iter().map(|thread| thread.join());
    let kept: Vec<Vec<TcpStream>> = threads.map(|kept| kept.expect("it ends")).collect();
    println!("settled with {}", kept.iter().map(Vec::len).sum::<usize>());
    std::thread::sleep(Duration::from_secs(60));
    ExitCode::SUCCESS
}

fn talk(connections: &mut [TcpStream], round: u64) {
    for (number, connection) in connections.iter_mut().enumerate() {
        let out = (round << 32 | number as u64).to_le_bytes();
        let mut back = [0; 8];
        connection.write_all(&out).expect("the connection lives");
        connection
            .read_exact(&mut back)
            .expect("the connection lives");
        assert_eq!(back, out, "the echo is right");
    }
}

/// Waits in this way until there is something to be read.
fn wait_by(how: &str, connection: &TcpStream, epoll: RawFd) {
    let mut one = libc::pollfd {
        fd: connection.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    match how {
        // SAFETY: one valid entry.
        "poll" => assert_eq!(unsafe { libc::poll(&mut one, 1, -1) }, 1),
        // SAFETY: room for one event.
        "epoll" => assert_eq!(unsafe { libc::epoll_wait(epoll, &mut event, 1, -1) }, 1),
        _ => {}
    }
}

/// An epoll instance that has this descriptor.
fn epoll_with(fd: RawFd) -> RawFd {
    // SAFETY: plain system calls, with a valid event.
    unsafe {
        let epoll = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        let mut event = libc::epoll_event {
            events: libc::EPOLLIN as u32,
            u64: 1,
        };
        assert_eq!(
            libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event),
            0
        );
        epoll
    }
}

fn tick(at: SocketAddr, how: &str) -> ExitCode {
    let mut connection = connect(at);
    let epoll = epoll_with(connection.as_raw_fd());
    for number in 1_u64.. {
        let out = number.to_le_bytes();
        let mut back = [0; 8];
        connection.write_all(&out).expect("the connection lives");
        wait_by(how, &connection, epoll);
        connection
            .read_exact(&mut back)
            .expect("the connection lives");
        assert_eq!(back, out, "the echo is right");
        if number == 8 {
            println!("begun");
        }
        println!("tick {number}");
        std::thread::sleep(Duration::from_millis(if number < 8 { 5 } else { 200 }));
    }
    ExitCode::SUCCESS
}

/// What a child does with its parent's connection.
extern "C" fn use_as_child(fd: *mut libc::c_void) -> libc::c_int {
    let fd = fd as RawFd;
    for _ in 0..8 {
        let mut bytes = [7_u8; 8];
        // SAFETY: the buffer is valid for its length.
        unsafe {
            libc::send(fd, bytes.as_ptr().cast(), 8, 0);
            libc::recv(fd, bytes.as_mut_ptr().cast(), 8, libc::MSG_WAITALL);
        }
    }
    0
}

fn child(at: SocketAddr, how: &str) -> ExitCode {
    let mut wanted = nix::sys::signal::SigSet::empty();
    wanted.add(nix::sys::signal::Signal::SIGUSR1);
    wanted.thread_block().expect("a signal can be blocked");
    let connections = [connect(at)];
    let shares = match how {
        "vfork" => libc::CLONE_VM | libc::CLONE_VFORK,
        _ => 0,
    };
    let mut stack = vec![0_u128; 1 << 16];
    let fd = connections[0].as_raw_fd();
    // SAFETY: the child has a stack of its own, and calls nothing that needs a thread's state. With shared memory
    // this thread sleeps meanwhile.
    unsafe {
        let top = stack.as_mut_ptr().add(stack.len()).cast();
        let pid = libc::clone(
            use_as_child,
            top,
            shares | libc::SIGCHLD,
            fd as *mut libc::c_void,
        );
        assert!(pid > 0, "a child can be made");
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        assert_eq!(status, 0, "the child's status");
    }
    println!("child ended");
    wanted.wait().expect("SIGUSR1 comes");
    let mut connections = connections;
    for round in 0..24 {
        talk(&mut connections, round);
    }
    std::thread::sleep(Duration::from_secs(60));
    ExitCode::SUCCESS
}

fn close(at: SocketAddr, how: &str) -> ExitCode {
    let mut connections = [connect(at)];
    for round in 0..8 {
        talk(&mut connections, round);
    }
    let [mut connection] = connections;
    let epoll = epoll_with(connection.as_raw_fd());
    println!("fd {} ready", connection.as_raw_fd());
    connection.read_exact(&mut [0]).expect("a byte comes");
    let fd = connection.into_raw_fd();
    // SAFETY: the descriptor is this function's, and not used after it is closed. The child does nothing but sleep.
    unsafe {
        match how {
            "dup2" => {
                let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY);
                assert_eq!(libc::dup2(null, fd), fd);
            }
            "close_range" => assert_eq!(libc::close_range(fd as u32, fd as u32, 0), 0),
            "fork" => {
                if libc::fork() == 0 {
                    libc::sleep(10);
                    libc::_exit(0);
                }
                assert_eq!(libc::close(fd), 0);
            }
            _ => assert_eq!(libc::close(fd), 0),
        }
    }
    println!("closed");
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: room for one event.
    let events = unsafe { libc::epoll_wait(epoll, &mut event, 1, 2000) };
    println!("{events} events");
    ExitCode::SUCCESS
}
