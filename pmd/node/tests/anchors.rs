//! Programs that stay on their anchors: the daemons carry their bytes, and their endings.
#[allow(dead_code)]
mod site;

use rdsock_node::Notice;
use rdsock_proto::Refusal;
use site::*;
use std::io::{Read, Write};
use std::net::Shutdown;

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect()
}

fn is_over(sites: &mut [Site; 2], connection: &Connection) {
    for (site, stream) in sites.iter_mut().zip(&connection.streams) {
        let ticket = stream.ticket;
        site.until(|notice| *notice == Notice::Released { ticket });
    }
}

#[test]
fn bytes_go_both_ways_and_ends_of_file_arrive() {
    let mut sites = pair();
    let connection = connect(&mut sites);
    let [mut a, mut b] = connection
        .programs
        .each_ref()
        .map(|s| s.try_clone().unwrap());
    a.write_all(b"ping").unwrap();
    let mut four = [0; 4];
    b.read_exact(&mut four).unwrap();
    assert_eq!(&four, b"ping");
    b.write_all(b"pong").unwrap();
    a.read_exact(&mut four).unwrap();
    assert_eq!(&four, b"pong");
    // Much more than rings and staging areas hold, both ways at once.
    let threads: Vec<_> = connection
        .programs
        .iter()
        .zip([1, 2])
        .map(|(program, seed)| {
            let mut writer = program.try_clone().unwrap();
            std::thread::spawn(move || {
                writer.write_all(&pattern(5_000_000, seed)).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            })
        })
        .collect();
    let readers: Vec<_> = [(a, 2), (b, 1)]
        .map(|(mut program, seed)| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                program.read_to_end(&mut bytes).unwrap();
                let expected = pattern(5_000_000, seed);
                let wrong = bytes.iter().zip(&expected).position(|(a, b)| a != b);
                assert_eq!((bytes.len(), wrong), (expected.len(), None));
            })
        })
        .into();
    for thread in threads.into_iter().chain(readers) {
        thread.join().unwrap();
    }
    is_over(&mut sites, &connection);
}

#[test]
fn a_half_closed_connection_carries_on_the_other_way() {
    let mut sites = pair();
    let connection = connect(&mut sites);
    let [a, b] = &connection.programs;
    (&mut &*a).write_all(b"question").unwrap();
    a.shutdown(Shutdown::Write).unwrap();
    let mut question = Vec::new();
    (&mut &*b).read_to_end(&mut question).unwrap();
    assert_eq!(question, b"question");
    for _ in 0..3 {
        (&mut &*b).write_all(&pattern(300_000, 3)).unwrap();
        let mut answer = vec![0; 300_000];
        (&mut &*a).read_exact(&mut answer).unwrap();
        assert!(answer == pattern(300_000, 3));
    }
    b.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&mut &*a).read(&mut [0; 10]).unwrap(), 0);
    is_over(&mut sites, &connection);
}

#[test]
fn a_reset_reaches_the_other_end() {
    let mut sites = pair();
    let connection = connect(&mut sites);
    let Connection {
        programs: [a, mut b],
        files,
        streams,
    } = connection;
    b.write_all(b"never read").unwrap();
    // Closing with unread bytes resets.
    let mut byte = [0];
    while a.peek(&mut byte).unwrap() == 0 {}
    drop(a);
    let error = b.read(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let connection = Connection {
        programs: [b.try_clone().unwrap(), b],
        files,
        streams,
    };
    is_over(&mut sites, &connection);
}

#[test]
fn a_refused_connect_is_told() {
    let mut sites = pair();
    refused(&mut sites, Refusal::NoListener);
    refused(&mut sites, Refusal::Policy);
    connect(&mut sites);
}

#[test]
fn the_end_of_a_node_ends_its_streams() {
    let mut sites = pair();
    let connection = connect(&mut sites);
    let [first, second] = sites;
    drop(second);
    let mut a = connection.programs[0].try_clone().unwrap();
    let mut b = connection.programs[1].try_clone().unwrap();
    // Its own program sees its anchor end; the other node waits for it to come back.
    assert!(matches!(b.read(&mut [0; 1]), Ok(0) | Err(_)));
    a.write_all(b"into the void").unwrap();
    drop(first);
    assert!(matches!(a.read(&mut [0; 1]), Ok(0) | Err(_)));
}
