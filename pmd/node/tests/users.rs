//! Programs that do to their anchors whatever they like: those of other users go on, and so do the other connections of theirs.
#[allow(dead_code)]
mod site;

use rdsock_node::{Command, Opening};
use site::stuck::Stuck;
use site::*;
use std::io::{Error, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

const ATTACKER: u32 = 64_001;
const VICTIM: u32 = 64_002;
const PATIENCE: Duration = Duration::from_secs(60);

fn programs(connection: &Connection) -> [TcpStream; 2] {
    connection.programs.each_ref().map(|program| {
        program.set_read_timeout(Some(PATIENCE)).unwrap();
        program.try_clone().unwrap()
    })
}

/// Questions and answers, so many.
fn talk([mut one, mut other]: [TcpStream; 2], times: usize) {
    for number in 0..times {
        let mut byte = [0];
        one.write_all(&[number as u8]).unwrap();
        other.read_exact(&mut byte).unwrap();
        other.write_all(&byte).unwrap();
        one.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [number as u8]);
    }
}

/// The nodes end, whatever their threads do.
fn end(sites: [Site; 2]) {
    let (ended, end) = channel();
    std::thread::spawn(move || {
        drop(sites);
        ended.send(())
    });
    end.recv_timeout(PATIENCE).expect("the nodes do not end");
}

/// A connection on which the daemon's thread waits, as soon as it is looked at.
fn get_stuck(site: &mut Site, user: u32) -> Option<(TcpStream, Stuck)> {
    let (mut program, socket) = sockets();
    program.write_all(b"x").unwrap();
    let stuck = Stuck::new(&socket)?;
    let file = memory(RING);
    let stream = site.stream_of(user, 2, Opening::Connect, &file);
    site.poller.attach(&stream, socket.into());
    site.poller.command(Command::Gone { stream });
    Some((program, stuck))
}

#[test]
fn who_makes_the_daemon_wait_at_an_anchor_waits_alone() {
    let mut sites = pair();
    let before = connect_of(&mut sites, VICTIM);
    let Some(stuck) = get_stuck(&mut sites[0], ATTACKER) else {
        return;
    };
    let after = connect_of(&mut sites, VICTIM);
    for connection in [&before, &after] {
        talk(programs(connection), 100);
    }
    end(sites);
    drop(stuck);
}

#[test]
fn urgent_bytes_come_in_their_place_and_keep_nobody() {
    let mut sites = pair();
    let [urgent, other] = [(); 2].map(|()| connect_of(&mut sites, ATTACKER));
    let [mut one, mut two] = programs(&urgent);
    one.write_all(b"before ").unwrap();
    // SAFETY: the kernel reads six bytes.
    let sent = unsafe {
        let bytes = b"urgent";
        libc::send(one.as_raw_fd(), bytes.as_ptr().cast(), 6, libc::MSG_OOB)
    };
    assert_eq!(sent, 6);
    talk(programs(&other), 100);
    one.write_all(b" after").unwrap();
    let mut all = [0; 19];
    two.read_exact(&mut all).unwrap();
    assert_eq!(&all, b"before urgent after");
    talk([two, one], 10);
    end(sites);
}

/// Writes, or reads, until it is told to end, and no thread of a node waits for it.
fn without_end(
    program: &TcpStream,
    over: &Arc<AtomicBool>,
    what: fn(&mut TcpStream, &mut [u8]) -> std::io::Result<usize>,
) -> JoinHandle<()> {
    let (mut program, over) = (program.try_clone().unwrap(), over.clone());
    std::thread::spawn(move || {
        let mut bytes = vec![0; 256 << 10];
        while !over.load(Ordering::Relaxed) && what(&mut program, &mut bytes).is_ok() {}
    })
}

#[test]
fn bytes_without_end_leave_the_other_connections_of_a_user_their_turn() {
    let mut sites = pair();
    let [flood, other] = [(); 2].map(|()| connect_of(&mut sites, ATTACKER));
    let over = Arc::new(AtomicBool::new(false));
    let [one, two] = &flood.programs;
    let write = |program: &mut TcpStream, bytes: &mut [u8]| program.write(bytes);
    let read = |program: &mut TcpStream, bytes: &mut [u8]| program.read(bytes);
    let busy = [
        without_end(one, &over, write),
        without_end(two, &over, write),
        without_end(one, &over, read),
        without_end(two, &over, read),
    ];
    talk(programs(&other), 100);
    over.store(true, Ordering::Relaxed);
    for program in [one, two] {
        program.shutdown(std::net::Shutdown::Both).unwrap();
    }
    for busy in busy {
        busy.join().unwrap();
    }
    end(sites);
}

#[test]
fn a_thread_is_paid_for_once_and_until_its_last_stream_has_gone() {
    let mut sites = pair();
    let (paid, kept) = channel::<()>();
    let mut payments = 0;
    let mut streams = Vec::new();
    let site = &mut sites[0];
    for (ticket, user) in [ATTACKER, VICTIM, ATTACKER, VICTIM].into_iter().enumerate() {
        let pay = || {
            payments += 1;
            Ok::<_, Error>(paid.clone())
        };
        let berth = site.poller.berth(2, Opening::Connect, user, pay).unwrap();
        let ticket = 1000 + ticket as u64;
        let made = (site.poller).stream(
            ticket,
            2,
            Opening::Connect,
            berth.unwrap(),
            &memory(RING),
            Box::new(()),
        );
        streams.push(made.unwrap().unwrap());
    }
    assert_eq!(payments, 2);
    drop(paid);
    streams.truncate(1);
    let refuse = || Err::<(), _>(Error::other("no more"));
    // The other user's thread ends, this one's lives.
    let gone = site.poller.berth(2, Opening::Connect, VICTIM, refuse);
    assert!(gone.is_err());
    assert!(
        site.poller
            .berth(2, Opening::Connect, ATTACKER, refuse)
            .is_ok()
    );
    assert_eq!(kept.try_recv(), Err(TryRecvError::Empty));
    streams.clear();
    assert_eq!(
        kept.recv_timeout(PATIENCE),
        Err(RecvTimeoutError::Disconnected)
    );
    end(sites);
}
