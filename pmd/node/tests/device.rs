//! A device that lies, breaks or goes away under load: the driver gives it up, all streams end as TCP may
//! end, and nothing hangs. And one that is only slow, or whose link comes and goes: nothing is lost.
#[allow(dead_code)]
mod site;

use rdsock_model::{Chaos, Corruption, Fault};
use rdsock_node::{Command, Notice, Opening};
use rdsock_proto::Refusal;
use rdsock_shm::layout::mark;
use site::program::Program;
use site::traffic::Traffic;
use site::*;
use std::io::{ErrorKind, Read};
use std::sync::atomic::Ordering::Acquire;
use std::time::Duration;

/// Connections with traffic both ways.
fn busy(sites: &mut [Site; 2], count: usize) -> (Vec<Connection>, Vec<[Traffic; 2]>) {
    let connections: Vec<Connection> = (0..count).map(|_| connect(sites)).collect();
    let ends = |connection: &Connection| connection.programs.each_ref().map(Traffic::start);
    let traffic: Vec<[Traffic; 2]> = connections.iter().map(ends).collect();
    move_on(&traffic);
    (connections, traffic)
}

fn move_on(traffic: &[[Traffic; 2]]) {
    for end in traffic.iter().flatten() {
        end.moves(1_000_000);
    }
}

/// Plays a fault at node 1 under load, after which its device is not used any more.
fn fails(fault: Fault) {
    ends(|site| site.device.function().inject(fault));
}

/// Does something to node 1 under load after which its device is not used any more. Both nodes, without streams.
fn ends(cause: impl FnOnce(&mut Site)) -> [Site; 2] {
    let mut sites = pair_with(&Setup {
        resume_timeout: Duration::from_millis(700),
        ..Setup::default()
    });
    // One program is on its rings, and idle.
    let idle = connect(&mut sites);
    let mut program = Program::new(&idle.files[0], 0, idle.programs[0].try_clone().unwrap());
    sites[0].poller.command(Command::Ready {
        stream: idle.streams[0].clone(),
    });
    program.switch();
    let (connections, traffic) = busy(&mut sites, 3);

    cause(&mut sites[0]);
    sites[0].until(|notice| *notice == Notice::DeviceFailed);

    // Everything ends, here at once and there when it is clear that the node is not coming back.
    let gone = Notice::NodeGone { node: 1 };
    sites[1].until(|notice| *notice == gone);
    for connection in connections.iter().chain([&idle]) {
        for (site, stream) in sites.iter_mut().zip(&connection.streams) {
            let ticket = stream.ticket;
            site.until(|notice| *notice == Notice::Released { ticket });
        }
    }
    for end in traffic.into_iter().flatten() {
        end.ended();
    }
    let error = program.anchor.read(&mut [0; 1]).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let marks = program.incoming().producer.mark.load(Acquire);
    assert_ne!(marks & mark::RESET, 0);

    // What is new stays on the kernel, at either node.
    for at in [0, 1] {
        let file = memory(RING);
        let stream = sites[at].stream(2 - at as u16, Opening::Connect, &file);
        let ticket = stream.ticket;
        let addresses = addresses();
        sites[at]
            .poller
            .command(Command::Connect { stream, addresses });
        let why = Refusal::Lost;
        sites[at].until(|notice| *notice == Notice::Refused { ticket, why });
        sites[at].until(|notice| *notice == Notice::Released { ticket });
    }
    for site in &mut sites {
        site.streams.clear();
    }
    sites
}

#[test]
fn a_device_that_is_wanted_back_is_let_go() {
    let [one, _two] = ends(|site| site.poller.command(Command::GiveBack));
    let device = one.device;
    drop(one.poller);
    assert_eq!(std::sync::Arc::strong_count(&device), 1, "somebody has it");
}

/// Makes a test of each fault.
macro_rules! fail_with {
    ($($name:ident: $fault:expr;)*) => { $(
        #[test]
        fn $name() {
            fails($fault);
        }
    )* };
}

fail_with! {
    a_completion_with_a_wrong_phase: Fault::Corrupt(Corruption::Phase);
    a_completion_with_a_wrong_cookie: Fault::Corrupt(Corruption::Cookie);
    a_completion_with_a_wrong_index: Fault::Corrupt(Corruption::Index);
    a_completion_of_another_target: Fault::Corrupt(Corruption::Target);
    a_completion_with_an_unknown_status: Fault::Corrupt(Corruption::Status);
    a_completion_that_comes_twice: Fault::Corrupt(Corruption::Twice);
    a_completion_for_nothing: Fault::CompletionForNothing(0);
    a_message_out_of_place: Fault::MessageOutOfPlace(0);
    a_reset_in_flight: Fault::ResetInFlight;
    a_device_that_is_gone: Fault::Remove;
    a_device_that_is_stuck_for_good: Fault::Stuck(0, true);
}

#[test]
fn a_device_that_fails_without_streams() {
    let mut sites = pair();
    sites[0].device.function().inject(Fault::Remove);
    sites[0].until(|notice| *notice == Notice::DeviceFailed);
}

/// Plays a fault that passes under load. No stream notices.
fn passes(begin: Fault, end: Fault, duration: Duration) {
    let mut sites = pair();
    let (_connections, traffic) = busy(&mut sites, 3);
    for at in [0, 1] {
        let function = sites[at].device.function();
        function.inject(begin);
        std::thread::sleep(duration);
        function.inject(end);
        move_on(&traffic);
    }
}

#[test]
fn a_link_that_goes_down_for_a_moment() {
    let moment = Duration::from_millis(30);
    passes(Fault::LinkDown(true), Fault::LinkDown(false), moment);
}

/// Longer than a lane waits, and than a session lives in silence.
const LONG: Duration = Duration::from_millis(800);

#[test]
fn a_link_that_goes_down_for_long() {
    passes(Fault::LinkDown(true), Fault::LinkDown(false), LONG);
}

#[test]
fn a_queue_that_looks_full_for_long() {
    passes(Fault::Full(0, true), Fault::Full(0, false), LONG);
}

#[test]
fn a_device_that_is_stuck_for_long() {
    passes(Fault::Stuck(0, true), Fault::Stuck(0, false), LONG);
}

#[test]
fn delays_full_queues_and_a_flapping_link_lose_nothing() {
    for seed in 1..=3 {
        let mut sites = pair_with(&Setup {
            chaos: Chaos {
                seed,
                delay_ns: 100_000,
                reorder_lanes: true,
                full_ppm: 1000,
                link_ppm: 20,
                link_down_ns: 200_000_000,
                ..Chaos::default()
            },
            ..Setup::default()
        });
        let (_connections, traffic) = busy(&mut sites, 3);
        for _ in 0..3 {
            move_on(&traffic);
        }
    }
}
