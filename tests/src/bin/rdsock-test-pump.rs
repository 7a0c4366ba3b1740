//! A program for the fault tests: plain sockets, every byte checked, and one line for whatever
//! happens to a connection. It knows nothing of rdsock.
//!
//! - `serve AT` echoes on each connection.
//! - `send AT MEGABYTES MB_PER_S` sends a pattern at that rate and checks the echo of it.
//! - `hold AT COUNT SECONDS` opens connections, uses each a little, leaves them idle for so
//!   long, and uses each again.
//!
//! AT is an address with a port, or a port of 127.0.0.1.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
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
        ["hold", at, count, seconds] => hold(address(at), number(count), number(seconds)),
        _ => {
            eprintln!("usage: serve AT | send AT MEGABYTES MB_PER_S | hold AT COUNT SECONDS");
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
            if writer.write_all(block).is_err() {
                return; // the reader sees it too, and says it
            }
            done += block.len() as u64;
            let due = Duration::from_secs_f64(done as f64 / (rate as f64 * 1e6));
            std::thread::sleep(due.saturating_sub(started.elapsed()));
        }
        let _ = writer.shutdown(Shutdown::Write);
    });
    let mut got = vec![0; BLOCK];
    let mut done = 0;
    while done < bytes {
        if let Err(error) = connection.read_exact(&mut got) {
            println!("broke at {done}: {:?}", error.kind());
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
