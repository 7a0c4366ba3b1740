use super::*;
use crate::accounts::{Accounts, Limits, Thing};
use crate::shares::Known;

fn free() -> Result<Charge, Over> {
    Ok(Charge::of_nothing())
}

const CLIENT: TenantId = 1;
const SERVER: TenantId = 2;

pub(crate) fn announced(tenant: TenantId, number: u32, role: Role) -> Announced {
    let (client, server) = ("127.0.0.1:50000", "127.0.0.1:80");
    let (local, peer) = match role {
        Role::Active => (client, server),
        _ => (server, client),
    };
    Announced {
        conn: Conn {
            tenant,
            number,
            generation: 1,
        },
        fd: 3,
        pid: 10,
        uid: tenant as u32,
        cookie: 100 + tenant,
        inode: 200 + tenant,
        seen: Instant::now(),
        route: Route {
            netns: 1,
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
        },
        role,
        other_end: None,
        times: None,
    }
}

fn open(book: &mut Book<()>) {
    let (client, server) = (
        announced(CLIENT, 7, Role::Active),
        announced(SERVER, 9, Role::Passive),
    );
    assert!(matches!(book.announce(server, free), Announcement::Waits));
    let Announcement::Matches(other) = book.announce(client, free) else {
        panic!("the other end waits");
    };
    assert_eq!(other.conn, server.conn);
    book.open(5, order(client, other).unwrap(), 1000, ());
}

#[test]
fn two_ends_become_a_stream_and_leave_nothing_behind() {
    let mut book = Book::default();
    open(&mut book);
    assert_eq!(book.waiting(), 0);
    assert_eq!(book.tenant_gone(CLIENT), [5]);
    assert!(!book.stream(5).unwrap().is_abandoned());
    assert_eq!(
        book.release(announced(SERVER, 9, Role::Passive).conn),
        Some(5)
    );
    assert!(book.stream(5).unwrap().is_abandoned());
    assert!(book.close(5).is_some());
    assert!(book.seats.is_empty() && book.cookies.is_empty());
}

#[test]
fn both_ends_in_one_process() {
    let mut book = Book::<()>::default();
    let a = announced(1, 1, Role::Active);
    let b = Announced {
        cookie: 7,
        ..announced(1, 2, Role::Passive)
    };
    assert!(matches!(book.announce(a, free), Announcement::Waits));
    let Announcement::Matches(other) = book.announce(b, free) else {
        panic!("the other end waits");
    };
    book.open(1, order(other, b).unwrap(), 1, ());
    assert_eq!(book.tenant_gone(1), [1]);
    assert!(book.stream(1).unwrap().is_abandoned());
}

#[test]
fn a_socket_that_is_held_elsewhere_gets_no_second_stream() {
    let mut book = Book::default();
    open(&mut book);
    let child = Announced {
        cookie: 100 + SERVER,
        ..announced(3, 0, Role::Passive)
    };
    assert!(matches!(
        book.announce(child, free),
        Announcement::Refused(Reason::Shared)
    ));
    book.hold(5, 1, child.conn, None);
    book.tenant_gone(SERVER);
    book.tenant_gone(CLIENT);
    assert!(!book.stream(5).unwrap().is_abandoned());
    assert_eq!(book.seat_of(child.conn), Some((5, 1)));
    book.tenant_gone(3);
    assert!(book.stream(5).unwrap().is_abandoned());
}

#[test]
fn an_announcement_that_waits_is_replaced_or_taken_back() {
    let mut book = Book::<()>::default();
    let first = announced(CLIENT, 7, Role::Active);
    assert!(matches!(book.announce(first, free), Announcement::Waits));
    assert_eq!(book.release(first.conn), None);
    assert_eq!(book.waiting(), 0);
    // The same addresses, but a new socket: the earlier one can't exist any more.
    assert!(matches!(book.announce(first, free), Announcement::Waits));
    let later = Announced {
        cookie: 999,
        ..announced(3, 0, Role::Active)
    };
    assert!(matches!(book.announce(later, free), Announcement::Waits));
    assert_eq!(book.waiting(), 1);
    assert!(!book.seats.contains_key(&CLIENT));
    let of = |generation| Conn {
        generation,
        ..later.conn
    };
    book.release(of(0));
    assert_eq!(book.waiting(), 1);
    book.release(of(2));
    assert_eq!(book.waiting(), 0);
}

#[test]
fn roles_must_agree() {
    let with = |a, b| {
        let ends = (announced(1, 0, a), announced(2, 0, b));
        order(ends.0, ends.1).map(|[first, _]| first.conn.tenant)
    };
    assert_eq!(with(Role::Active, Role::Passive), Some(1));
    assert_eq!(with(Role::Passive, Role::Unknown), Some(2));
    assert_eq!(with(Role::Unknown, Role::Active), Some(2));
    assert_eq!(with(Role::Unknown, Role::Unknown), None);
    assert_eq!(with(Role::Active, Role::Active), None);
    assert_eq!(with(Role::Passive, Role::Passive), None);
}

#[test]
fn a_tenant_holds_an_end_once_by_its_latest_record() {
    let mut book = Book::default();
    open(&mut book);
    let record = |number| announced(CLIENT, number, Role::Active).conn;
    for number in 100..200 {
        book.hold(5, 0, record(number), None);
    }
    assert_eq!(book.stream(5).unwrap().ends[0].holders.len(), 1);
    assert_eq!(book.seats[&CLIENT].len(), 1);
    // Those before it are nothing any more.
    assert_eq!(book.release(record(7)), None);
    assert_eq!(book.release(record(150)), None);
    assert!(book.holds(CLIENT, 5, 0));
    assert_eq!(book.release(record(199)), Some(5));
    assert!(!book.holds(CLIENT, 5, 0));
    assert_eq!(book.tenant_gone(SERVER), [5]);
    assert!(book.stream(5).unwrap().is_abandoned());
    book.close(5);
    assert!(book.seats.is_empty());
}

/// Its user may close the socket of each, and never say so.
#[test]
fn who_waits_does_so_on_an_account() {
    let limits = Limits {
        user: [2; Thing::ALL.len()],
        all: [u64::MAX; Thing::ALL.len()],
        shared: [false; Thing::ALL.len()],
    };
    let mut accounts = Accounts::new(limits, Known::default());
    let mut book = Book::<()>::default();
    let mut announce = |book: &mut Book<()>, number: u32| {
        let mut announced = announced(CLIENT, number, Role::Active);
        announced.cookie += 10 * u64::from(number);
        announced.route.local.set_port(1000 + number as u16);
        book.announce(announced, || accounts.charge(7, &[(Thing::Waiting, 1)]))
    };
    for number in 0..2 {
        let waits = announce(&mut book, number);
        assert!(matches!(waits, Announcement::Waits));
    }
    let third = announce(&mut book, 2);
    assert!(matches!(third, Announcement::Over(over) if over.thing == Thing::Waiting));
    assert_eq!(book.waiting(), 2);
    // Who finds the other end there does not wait.
    let mut other = announced(SERVER, 9, Role::Passive);
    other.route.peer.set_port(1001);
    let refuse = || panic!("it pays for a wait");
    assert!(matches!(
        book.announce(other, refuse),
        Announcement::Matches(_)
    ));
    let waits = announce(&mut book, 3);
    assert!(matches!(waits, Announcement::Waits));
    book.tenant_gone(CLIENT);
    assert_eq!(accounts.of_all(Thing::Waiting), 0);
}
