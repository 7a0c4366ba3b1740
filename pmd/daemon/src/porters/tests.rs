use super::*;
use crate::accounts::Charge;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::channel;

fn fetch<D: Send + 'static>(porters: &Porters<D>) -> D {
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        if let Some((_, Here::Found(found))) = porters.next(|uid| uid) {
            return found;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("no load was carried");
}

fn look<D: Send + 'static>(porters: &Porters<D>) -> (Owner, Load<D>) {
    match porters.next(|uid| uid) {
        Some((_, Here::Look(owner, load))) => (owner, load),
        _ => panic!("no look is due"),
    }
}

/// Threads that carry for those who are known.
fn threads<D: Send + 'static>(porters: &Porters<D>) -> usize {
    porters.shared.lock().crews.known.all
}

fn owner(uid: u32, connection: u64) -> Owner {
    Owner { uid, connection }
}

#[test]
fn quick_loads_are_for_the_caller_unless_it_was_made_to_wait() {
    let porters = Porters::new(Starter::new().unwrap(), Known::default()).unwrap();
    let quick = |uid, connection| {
        porters.give_quick(owner(uid, connection), move || Some(connection));
        porters.here()
    };
    assert_eq!(quick(7, 1), 1);
    // Behind the one before, of the same connection, and carried by a porter when that was carried.
    assert_eq!(quick(7, 1), 1);
    assert_eq!(porters.load(), (1, 1));
    let (who, load) = look(&porters);
    assert_eq!(who.connection, 1);
    assert_eq!(carry(load, processor_time()), (Some(1), Pace::InTime));
    porters.carried(Pace::InTime);
    assert_eq!(fetch(&porters), 1);
    // This one has to wait: another thread goes on, and trusts its user no more, but others.
    assert_eq!(quick(7, 2), 1);
    let (who, load) = look(&porters);
    assert!(porters.take_over() && !porters.take_over());
    quick(7, 3);
    assert_eq!(fetch(&porters), 3);
    assert_eq!(quick(8, 4), 1);
    porters.come_back(who, load(&Carrier::new()));
    assert_eq!(fetch(&porters), 2);
    drop(look(&porters));
    porters.carried(Pace::InTime);
    assert_eq!(porters.load(), (0, 0));
    // Who is late again and again is not trusted either.
    for connection in 5..8 {
        assert_eq!(quick(9, connection), 1);
        drop(look(&porters));
        porters.carried(Pace::Late);
    }
    quick(9, 8);
    assert_eq!(fetch(&porters), 8);
}

#[test]
fn a_load_is_late_that_waits_and_not_one_that_is_quick() {
    let nap = |_: &Carrier| {
        thread::sleep(3 * Trust::QUICK);
        Some(1)
    };
    assert_eq!(
        carry(Box::new(nap), processor_time()),
        (Some(1), Pace::Late)
    );
    let work = |_: &Carrier| {
        let start = processor_time();
        while processor_time() - start < 2 * Trust::QUICK {}
        Some(2)
    };
    assert_eq!(
        carry(Box::new(work), processor_time()),
        (Some(2), Pace::Late)
    );
    assert_eq!(
        carry(Box::new(|_| Some(3)), processor_time()),
        (Some(3), Pace::InTime)
    );
}

#[test]
fn trust_comes_back_with_time() {
    let mut trust = Trust::default();
    let start = Instant::now();
    trust.lost(7, start);
    assert!(!trust.has(7, start) && trust.has(8, start));
    for late in 0..Trust::LATE {
        assert!(trust.has(8, start), "{late} times late");
        trust.late(8, start);
    }
    assert!(!trust.has(8, start) && trust.has(9, start));
    // Many users may be one. While their threads are away, nobody is trusted, and a minute after that.
    for uid in 100..100 + Trust::LOST as u32 {
        trust.lost(uid, start);
    }
    assert!(!trust.has(9, start));
    let later = start + 2 * Trust::MEMORY;
    assert!(!trust.has(9, later));
    trust.away = 0;
    assert!(trust.has(9, later) && trust.has(7, later));
}

#[test]
fn who_makes_a_porter_wait_waits_alone() {
    let porters = Porters::new(Starter::new().unwrap(), Known::default()).unwrap();
    let (end, ended) = channel::<()>();
    porters.give(owner(7, 1), move || ended.recv().ok().map(|()| 1));
    for (uid, connection) in [(7, 1), (7, 2), (8, 3), (7, 2)] {
        let owner = owner(uid, connection);
        porters.give(owner, move || Some(10 * connection));
    }
    let mut found = [fetch(&porters), fetch(&porters), fetch(&porters)];
    found.sort_unstable();
    assert_eq!(found, [20, 20, 30]);
    assert_eq!(porters.here(), 0);
    assert_eq!(porters.load(), (1, 1));
    assert_eq!((porters.waiting_of(7), porters.waiting_of(8)), (1, 0));
    end.send(()).unwrap();
    // The loads of one connection are carried in order.
    assert_eq!([fetch(&porters), fetch(&porters)], [1, 10]);
}

#[test]
fn a_close_that_lingers_is_interrupted() {
    let porters = Porters::<()>::new(Starter::new().unwrap(), Known::default()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 65536]).is_ok() {}
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 60,
    };
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Linger, &linger).unwrap();
    drop(
        porters
            .closer(owner(7, 1))
            .foreign(std::os::fd::OwnedFd::from(socket)),
    );
    let start = Instant::now();
    while porters.load() != (0, 0) {
        assert!(start.elapsed() < Duration::from_secs(30), "it lingers");
        thread::sleep(Duration::from_millis(1));
    }
    drop(peer);
}

/// Notes on which thread it is let go of.
struct Noted(Arc<Mutex<Vec<thread::ThreadId>>>);

impl Drop for Noted {
    fn drop(&mut self) {
        self.0.lock().unwrap().push(thread::current().id());
    }
}

#[test]
fn what_strangers_have_is_let_go_of_by_a_porter_of_its_owners() {
    let porters: Porters<bool> = Porters::new(Starter::new().unwrap(), Known::default()).unwrap();
    let notes = Arc::new(Mutex::new(Vec::new()));
    let thing = || porters.closer(owner(7, 1)).foreign(Noted(notes.clone()));
    let next = || {
        let start = Instant::now();
        loop {
            if let Some(by) = notes.lock().unwrap().pop() {
                return by;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "it stays");
            thread::yield_now();
        }
    };
    drop(thing());
    assert_ne!(next(), thread::current().id());
    // Who carries for that user lets go of it at once, and nobody who carries for another one does.
    for (uid, is_owners) in [(7, true), (8, false)] {
        let (thing, notes) = (thing(), notes.clone());
        porters.give(owner(uid, 2), move || {
            drop(thing);
            let this = thread::current().id();
            Some(notes.lock().unwrap().first() == Some(&this))
        });
        assert_eq!(fetch(&porters), is_owners);
        next();
    }
    // Nor does the caller, where it carries a look itself.
    let thing = thing();
    porters.give_quick(owner(7, 3), move || {
        drop(thing);
        None
    });
    let (_, load) = look(&porters);
    assert_eq!(carry(load, processor_time()).0, None);
    porters.carried(Pace::InTime);
    assert_ne!(next(), thread::current().id());
}

#[test]
fn what_strangers_have_is_on_an_account_until_it_is_let_go_of() {
    let porters: Porters<()> = Porters::new(Starter::new().unwrap(), Known::default()).unwrap();
    let charge = Arc::new(Charge::of_nothing());
    let (end, ended) = channel::<()>();
    porters.give(owner(7, 1), move || {
        let _ = ended.recv();
        None
    });
    let thing = porters.closer(owner(7, 1)).foreign(());
    drop(thing.paid_by(charge.clone()));
    assert_eq!(Arc::strong_count(&charge), 2);
    // To be handed over is another matter.
    let thing = porters.closer(owner(7, 1)).foreign(3);
    assert_eq!(thing.paid_by(charge.clone()).hand_over(), 3);
    assert_eq!(Arc::strong_count(&charge), 2);
    drop(end);
    let start = Instant::now();
    while Arc::strong_count(&charge) != 1 {
        assert!(start.elapsed() < Duration::from_secs(20), "it stays");
        thread::yield_now();
    }
}

#[test]
fn there_are_never_too_many_threads() {
    let known = (0..2 * MOST as u32).chain([u32::MAX]).collect();
    let porters = Porters::new(Starter::new().unwrap(), known).unwrap();
    let (end, ended) = channel::<()>();
    let ended = Arc::new(Mutex::new(ended));
    let wait = |uid, connection| {
        let ended = ended.clone();
        porters.give(owner(uid, connection), move || {
            let _ = ended.lock().map(|ended| ended.recv());
            Some(uid)
        });
    };
    // One user alone does not get them all.
    for connection in 0..2 * SHARE as u64 {
        wait(u32::MAX, connection);
    }
    assert!(threads(&porters) <= 2 * SHARE + KEPT);
    porters.give(owner(1, 1), || Some(1));
    assert_eq!(fetch(&porters), 1);
    let end_of_patience = Instant::now() + Duration::from_secs(20);
    while porters.load() != (SHARE, SHARE) {
        assert!(Instant::now() < end_of_patience, "{:?}", porters.load());
        thread::sleep(Duration::from_millis(1));
    }
    for user in 0..2 * MOST as u32 {
        wait(user, 0);
    }
    // Who had nothing to carry for a moment may have ended meanwhile.
    while porters.load().1 != MOST {
        assert!(Instant::now() < end_of_patience, "{:?}", porters.load());
        assert!(threads(&porters) <= MOST);
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(threads(&porters), MOST);
    drop(end);
    let count = 2 * MOST + 2 * SHARE;
    let mut found: Vec<u32> = (0..count).map(|_| fetch(&porters)).collect();
    found.sort_unstable();
    found.dedup();
    assert!(found.into_iter().eq((0..2 * MOST as u32).chain([u32::MAX])));
    assert!(porters.shared.lock().users.is_empty());
}

#[test]
fn very_many_users_hold_up_no_porter_of_who_is_known() {
    let porters = Porters::new(Starter::new().unwrap(), [7].into_iter().collect()).unwrap();
    let (end, ended) = channel::<()>();
    let ended = Arc::new(Mutex::new(ended));
    let users = 2 * (MOST / SHARE) as u32;
    for (uid, connection) in (100..100 + users).flat_map(|uid| (0..8).map(move |of| (uid, of))) {
        let ended = ended.clone();
        porters.give(owner(uid, connection), move || {
            let _ = ended.lock().map(|ended| ended.recv());
            Some(uid)
        });
    }
    let end_of_patience = Instant::now() + Duration::from_secs(20);
    while porters.load().1 != OF_CROWD {
        assert!(Instant::now() < end_of_patience, "{:?}", porters.load());
        thread::sleep(Duration::from_millis(1));
    }
    for connection in 0..MOST as u64 {
        porters.give(owner(7, connection), || Some(7));
        assert_eq!(fetch(&porters), 7);
    }
    assert_eq!(porters.load().1, OF_CROWD);
    drop(end);
    let count = users as usize * SHARE;
    assert!((0..count).all(|_| fetch(&porters) >= 100));
    while porters.load() != (0, 0) {
        thread::sleep(Duration::from_millis(1));
    }
    assert!(porters.shared.lock().users.is_empty());
}

/// Who gives a load starts no thread, and waits for none: there may be an attacker in its way.
#[test]
fn a_starter_that_is_held_up_holds_up_nobody_who_gives_loads() {
    let starter = Starter::held_up();
    let porters = Porters::new(starter.clone(), Known::default()).unwrap();
    let (release, held) = channel::<()>();
    let held = Arc::new(Mutex::new(held));
    for uid in 0..KEPT as u32 {
        let held = held.clone();
        porters.give(owner(uid, 1), move || {
            let _ = held.lock().unwrap().recv();
            None
        });
    }
    for uid in 10..15 {
        porters.give(owner(uid, 1), move || Some(uid));
    }
    porters.carried(Pace::InTime);
    // One for each load that nobody can carry, and not one for each look at them.
    porters.carried(Pace::InTime);
    assert!(starter.ordered() <= KEPT + 5, "{}", starter.ordered());
    drop(release);
    let mut found: Vec<u32> = (0..5).map(|_| fetch(&porters)).collect();
    found.sort_unstable();
    assert_eq!(found, [10, 11, 12, 13, 14]);
}

/// Who computes for the crowd takes no processor from the control thread.
#[test]
fn who_carries_for_the_crowd_weighs_less() {
    let weight = || -> i32 {
        // SAFETY: takes two integers; 0 is this thread.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    };
    let own = weight();
    let nice = |known: &[u32], uid| {
        let known = known.iter().copied().collect();
        let porters = Porters::new(Starter::new().unwrap(), known).unwrap();
        porters.give(owner(uid, 1), move || Some(weight()));
        fetch(&porters)
    };
    let known: Vec<u32> = IN_PLACE_OF_USERS.into_iter().chain([7]).collect();
    assert_eq!(nice(&known, 7), own);
    assert_eq!(nice(&known, NOBODY), own);
    assert_eq!(nice(&known, 8), own.max(NICE));
    // Where nobody is known, all are the crowd.
    assert_eq!(nice(&IN_PLACE_OF_USERS, 8), own);
}
