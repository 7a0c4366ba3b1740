//! The state machine of an epoll registration, alone: each row of its table, and what each kind reports.

#[path = "../src/registration.rs"]
#[allow(dead_code)]
mod registration;

use libc::{
    EPOLLERR, EPOLLET, EPOLLEXCLUSIVE, EPOLLHUP, EPOLLIN, EPOLLONESHOT, EPOLLOUT, EPOLLRDHUP,
};
use registration::{Brought, Needs, Place, Registration, Snapshot, needs};

const IN: i16 = EPOLLIN as i16;
const OUT: i16 = EPOLLOUT as i16;
const DATA: u64 = 0xfeed_face;

fn asked(events: i32) -> Registration {
    Registration::new(events as u32, DATA)
}

/// In the inner instance, armed, and with its first news told (all was there).
fn settled(events: i32) -> Registration {
    let mut registration = asked(events);
    assert!(registration.enter(false));
    registration.report((EPOLLIN | EPOLLOUT) as u32, Snapshot::default());
    registration
}

/// What was done to a registration.
#[derive(Clone, Copy, Debug)]
enum Step {
    Enter,
    EnterFired,
    Leave,
    Park,
    Modify,
    Rest,
    Free,
    Fire,
}
use Step::*;

const STEPS: [Step; 8] = [Enter, EnterFired, Leave, Park, Modify, Rest, Free, Fire];

/// Where it is, and whether it is armed there.
type Seen = (Place, bool);
const FREE: Seen = (Place::Free, false);
const KERNEL: Seen = (Place::Kernel, false);
const PARKED: Seen = (Place::Parked, false);
const ARMED: Seen = (Place::Inner, true);
const FIRED: Seen = (Place::Inner, false);
const RESTING: Seen = (Place::Resting, false);

/// The way to each state, and where each step leads from there.
#[rustfmt::skip]
const TABLE: [(&[Step], Seen, [Seen; 8]); 6] = [
    //                             Enter    EnterFired Leave    Park     Modify   Rest     Free  Fire
    (&[],                 KERNEL,  [ARMED,   FIRED,    KERNEL,  PARKED,  KERNEL,  KERNEL,  FREE, KERNEL]),
    (&[Park],             PARKED,  [FIRED,   FIRED,    PARKED,  PARKED,  KERNEL,  PARKED,  FREE, PARKED]),
    (&[Enter],            ARMED,   [ARMED,   ARMED,    KERNEL,  ARMED,   ARMED,   RESTING, FREE, FIRED]),
    (&[Enter, Fire],      FIRED,   [FIRED,   FIRED,    PARKED,  FIRED,   ARMED,   RESTING, FREE, FIRED]),
    (&[Enter, Rest],      RESTING, [ARMED,   ARMED,    RESTING, RESTING, RESTING, RESTING, FREE, RESTING]),
    (&[Free],             FREE,    [FREE,    FREE,     FREE,    FREE,    FREE,    FREE,    FREE, FREE]),
];

fn take(registration: &mut Registration, step: Step) {
    let now = Snapshot::default();
    match step {
        Enter => drop(registration.enter(false)),
        EnterFired => drop(registration.enter(true)),
        Leave => drop(registration.leave()),
        Park => registration.park(),
        Modify => registration.modify((EPOLLIN | EPOLLONESHOT) as u32, DATA),
        Rest => registration.rest(),
        Free => drop(registration.free()),
        Fire => {
            let event = registration.event(IN, &now);
            registration.report(event, now);
        }
    }
}

fn seen(registration: &Registration) -> Seen {
    (registration.place(), registration.is_armed())
}

#[test]
fn each_row_of_the_table() {
    for (way, state, leads_to) in TABLE {
        let mut at = asked(EPOLLIN | EPOLLONESHOT);
        way.iter().for_each(|step| take(&mut at, *step));
        assert_eq!(seen(&at), state, "{way:?}");
        for (step, expected) in STEPS.into_iter().zip(leads_to) {
            let mut next = at;
            take(&mut next, step);
            assert_eq!(seen(&next), expected, "{state:?}, {step:?}");
        }
    }
}

#[test]
fn only_an_armed_one_reports() {
    for (way, state, _) in TABLE {
        let mut at = asked(EPOLLIN | EPOLLONESHOT);
        way.iter().for_each(|step| take(&mut at, *step));
        let event = at.event(IN | EPOLLHUP as i16, &Snapshot::default());
        assert_eq!(event != 0, state == ARMED, "{state:?}");
    }
}

/// A value after some change, by name.
fn changed(head: u64, state: u64, refused: u32) -> Snapshot {
    Snapshot {
        head,
        state,
        refused,
    }
}

#[test]
fn level_reports_as_long_as_it_is_ready() {
    let mut level = settled(EPOLLIN | EPOLLOUT);
    for _ in 0..3 {
        assert_eq!(level.event(IN, &changed(0, 0, 0)), EPOLLIN as u32);
        level.report(EPOLLIN as u32, changed(0, 0, 0));
    }
    assert_eq!(
        level.event(0, &changed(9, 9, 9)),
        0,
        "not ready, whatever changed"
    );
}

#[test]
fn edge_reports_what_is_new() {
    let edge = settled(EPOLLIN | EPOLLOUT | EPOLLET);
    let rows: [(&str, i16, Snapshot, i16); 9] = [
        ("nothing new", IN | OUT, changed(0, 0, 0), 0),
        ("bytes", IN | OUT, changed(1, 0, 0), IN | OUT),
        ("bytes that are read already", OUT, changed(1, 0, 0), 0),
        ("an end", IN, changed(0, 1, 0), IN),
        ("a change without readiness", 0, changed(0, 1, 0), 0),
        ("a refused send, no room yet", IN, changed(0, 0, 1), 0),
        ("a refused send, and room", OUT, changed(0, 0, 1), OUT),
        ("bytes and a refused send", IN, changed(1, 0, 1), IN),
        ("all", IN | OUT, changed(1, 1, 1), IN | OUT),
    ];
    for (name, ready, now, expected) in rows {
        assert_eq!(edge.event(ready, &now), expected as u32, "{name}");
    }
}

#[test]
fn each_edge_is_reported_once() {
    let mut edge = settled(EPOLLIN | EPOLLOUT | EPOLLET);
    let now = changed(1, 0, 0);
    edge.report(edge.event(IN, &now), now);
    assert_eq!(edge.event(IN, &now), 0);
    assert_ne!(edge.event(IN, &changed(2, 0, 0)), 0);
}

/// Bytes come while the ring is full: reporting them does not use up the room that will come.
#[test]
fn an_edge_of_bytes_leaves_the_one_of_room() {
    let mut edge = settled(EPOLLIN | EPOLLOUT | EPOLLET);
    let now = changed(1, 0, 1);
    edge.report(edge.event(IN, &now), now);
    assert_eq!(edge.event(OUT, &now), EPOLLOUT as u32);
    edge.report(EPOLLOUT as u32, now);
    assert_eq!(edge.event(OUT, &now), 0);
}

/// A stream comes, and its registration moves: what the program was told before is no edge again.
#[test]
fn what_was_told_before_the_stream_came_is_no_edge() {
    let mut edge = asked(EPOLLIN | EPOLLOUT | EPOLLET);
    assert!(edge.enter(false));
    assert_ne!(edge.event(IN, &Snapshot::default()), 0);
    edge.was_told(Snapshot::default());
    assert_eq!(edge.event(IN | OUT, &Snapshot::default()), 0);
    assert_ne!(edge.event(IN, &changed(1, 0, 0)), 0);
    edge.was_told(Snapshot::default().with_room(false));
    assert_eq!(edge.event(IN, &Snapshot::default()), 0);
    assert_eq!(edge.event(OUT, &Snapshot::default()), EPOLLOUT as u32);
}

/// Nobody was refused any, but the anchor had none when it was reported.
#[test]
fn room_that_was_not_there_is_an_edge() {
    let mut edge = settled(EPOLLIN | EPOLLOUT | EPOLLET);
    let now = changed(1, 0, 0);
    edge.report(edge.event(IN, &now), now);
    assert_eq!(edge.event(OUT, &now), EPOLLOUT as u32);
}

/// Two instances have the same descriptor.
#[test]
fn each_registration_has_each_edge() {
    let mut pair = [settled(EPOLLOUT | EPOLLET), settled(EPOLLOUT | EPOLLET)];
    let now = changed(0, 0, 1);
    for edge in &mut pair {
        assert_eq!(edge.event(OUT, &now), EPOLLOUT as u32);
        edge.report(EPOLLOUT as u32, now);
    }
}

#[test]
fn what_was_just_armed_is_news() {
    for flags in [0, EPOLLET, EPOLLET | EPOLLONESHOT, EPOLLEXCLUSIVE] {
        let mut it = asked(EPOLLIN | flags);
        it.enter(false);
        assert_eq!(it.event(IN, &Snapshot::default()), EPOLLIN as u32);
    }
    let mut edge = settled(EPOLLIN | EPOLLET);
    assert_eq!(edge.event(IN, &Snapshot::default()), 0);
    edge.modify((EPOLLIN | EPOLLET) as u32, 5);
    assert_eq!(edge.event(IN, &Snapshot::default()), EPOLLIN as u32);
    assert_eq!(edge.data, 5);
    edge.report(EPOLLIN as u32, Snapshot::default());
    edge.note_news();
    assert_eq!(edge.event(IN, &Snapshot::default()), EPOLLIN as u32);
    edge.rest();
    edge.enter(false);
    assert_eq!(edge.event(IN, &Snapshot::default()), EPOLLIN as u32);
}

#[test]
fn errors_and_hangups_are_told_unasked_and_no_flag_is() {
    let all = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLERR | EPOLLHUP;
    for (events, told) in [
        (0, EPOLLERR | EPOLLHUP),
        (EPOLLOUT, EPOLLOUT | EPOLLERR | EPOLLHUP),
        (EPOLLET | EPOLLRDHUP, EPOLLRDHUP | EPOLLERR | EPOLLHUP),
        (EPOLLONESHOT | EPOLLIN, EPOLLIN | EPOLLERR | EPOLLHUP),
    ] {
        let mut it = asked(events);
        it.enter(false);
        assert_eq!(it.event(all as i16, &Snapshot::default()), told as u32);
    }
}

#[test]
fn what_is_asked_for() {
    let rows = [
        (EPOLLIN, false, true, false),
        (EPOLLRDHUP, false, true, false),
        (EPOLLOUT, false, false, true),
        (EPOLLIN | EPOLLOUT, false, true, true),
        (0, false, false, false),
        // Then the end of the other direction is a hang-up.
        (0, true, true, false),
        (EPOLLOUT | EPOLLET, true, true, true),
    ];
    for (events, shut, bytes, space) in rows {
        assert_eq!(
            needs(events as u32, shut),
            Needs { bytes, space },
            "{events:#x}"
        );
    }
}

/// A thread is on its way from the program's instance with an event, while the registration moves.
#[test]
fn an_event_that_is_brought_counts_once() {
    let rows = [
        // Reported here meanwhile: then it would be the second one.
        (true, Some(Brought::Twice)),
        // Not: then the registration has fired with it.
        (false, Some(Brought::Counts)),
    ];
    for (reported, expected) in rows {
        let mut once = asked(EPOLLIN | EPOLLONESHOT);
        assert!(once.begin_to_move());
        assert!(!once.begin_to_move(), "counted once");
        assert!(once.enter(false));
        if reported {
            take(&mut once, Fire);
        }
        assert_eq!(once.bring(DATA + 1), None);
        assert_eq!(once.bring(DATA), expected);
        assert_eq!(seen(&once), FIRED);
        assert_eq!(once.bring(DATA), None, "nobody else is under way");
        assert!(!once.arrived());
    }
    let mut level = asked(EPOLLIN);
    assert!(!level.begin_to_move(), "level shows again, if it is true");
    level.enter(false);
    assert_eq!(level.bring(DATA), None);
}
