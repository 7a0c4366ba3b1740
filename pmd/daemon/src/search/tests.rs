use super::*;
use crate::own::alone;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

impl<'a> Way<'a> {
    fn free(place: &'a Place) -> Self {
        let passed_by = HashSet::new();
        Way { place, passed_by }
    }
}

fn listener() -> (TcpListener, u64) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let inode = nix::sys::stat::fstat(&listener).unwrap().st_ino;
    (listener, inode)
}

/// A process that sleeps, with this descriptor and so many others.
fn sleeper(inherits: Option<i32>, many: i32) -> Child {
    let mut command = Command::new("sleep");
    // SAFETY: system calls between fork and exec.
    let command = unsafe {
        command.arg("100").pre_exec(move || {
            if let Some(fd) = inherits {
                libc::fcntl(fd, libc::F_SETFD, 0);
            }
            for fd in 0..many {
                libc::dup2(0, 100 + fd);
            }
            Ok(())
        })
    };
    command.spawn().unwrap()
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn ask_on(searches: &Searches, pid: i32, inode: u64) -> (OtherHolder, u32) {
    for times in 0.. {
        let found = searches.other_holder(pid, inode);
        if found != OtherHolder::NotYet {
            return (found, times);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    unreachable!()
}

/// Where it could not be had: not that there were no processes.
#[test]
fn a_list_of_processes_is_asked_for_until_it_is_there() {
    let place = Place::default();
    let way = Way::free(&place);
    let mut round = Round::new(HashSet::new(), &way);
    assert!(round.is_listed);
    let own = std::process::id() as i32;
    round.to_go.clear();
    round.is_listed = false;
    assert!(round.run(processor_time() + Duration::from_secs(60), &way));
    assert!(round.looked_at.iter().any(|id| id.pid == own));
}

#[test]
fn who_else_holds_a_socket_is_found() {
    let _alone = alone();
    let (listener, inode) = listener();
    let me = std::process::id() as i32;
    let child = sleeper(None, 0);
    let its = child.id() as i32;
    assert_eq!(parent_of(its, &Way::free(&Place::default())), Some(me));
    // Held by this process alone, which does not count.
    let searches = Searches::default();
    assert_eq!(ask_on(&searches, its, inode).0, OtherHolder::Nobody);
    let heir = sleeper(Some(listener.as_raw_fd()), 0);
    let found = OtherHolder::Process(heir.id() as i32);
    assert_eq!(ask_on(&searches, its, inode).0, found);
    // Who holds it is not another holder.
    assert_eq!(
        ask_on(&searches, heir.id() as i32, inode).0,
        OtherHolder::Nobody
    );
    end(heir);
    assert_eq!(ask_on(&searches, its, inode).0, OtherHolder::Nobody);
    end(child);
}

/// No single step would come to an end.
#[test]
fn very_many_descriptors_make_it_longer_and_no_more() {
    let _alone = alone();
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
    let many = limit.unwrap().1.min(20_000) as i32 - 200;
    crate::own::raise_limits();
    let full: Vec<Child> = (0..4).map(|_| sleeper(None, many)).collect();
    let (listener, inode) = listener();
    let searches = Searches::default();
    let (found, times) = ask_on(&searches, 1, inode);
    assert_eq!(found, OtherHolder::Nobody);
    assert!(
        times > 0,
        "the processes have too few descriptors for this test"
    );
    // Several who ask have one round.
    let (_other, second) = self::listener();
    assert_eq!(searches.other_holder(1, inode), OtherHolder::NotYet);
    assert_eq!(searches.other_holder(1, second), OtherHolder::NotYet);
    ask_on(&searches, 1, inode);
    ask_on(&searches, 1, second);
    let search = lock(&searches.desk).search.clone();
    let state = search.state.lock().unwrap();
    assert!(state.finished.is_empty() && searches.asked.lock().unwrap().is_empty());
    drop((state, listener));
    full.into_iter().for_each(end);
}

/// It was looked at before, or did not run yet, when the one who asks handed the socket on.
#[test]
fn who_came_while_it_was_searched_is_seen() {
    let _alone = alone();
    let (listener, inode) = listener();
    let question = Question { pid: 1, inode };
    let place = Place::default();
    let way = Way::free(&place);
    let mut round = Round::new(HashSet::from([question]), &way);
    let later = processor_time() + Duration::from_secs(60);
    assert!(round.run(later, &way));
    let mut finished = HashMap::new();
    round.finish(&mut finished, &way);
    let finished = finished.remove(&question).unwrap();
    assert_eq!(
        finished.verdict(question, later, &way),
        Some(OtherHolder::Nobody)
    );
    let heir = sleeper(Some(listener.as_raw_fd()), 0);
    let found = OtherHolder::Process(heir.id() as i32);
    assert_eq!(finished.verdict(question, later, &way), Some(found));
    end(heir);
}

#[test]
fn a_process_whose_first_thread_has_ended_is_looked_at() {
    let _alone = alone();
    let (listener, inode) = listener();
    let script = "import os,threading,time,ctypes\n\
                  threading.Thread(target=time.sleep,args=(100,)).start()\n\
                  ctypes.CDLL(None).pthread_exit(None)";
    let fd = listener.as_raw_fd();
    let mut command = Command::new("python3");
    // SAFETY: one system call between fork and exec.
    let command = unsafe {
        command.args(["-c", script]).pre_exec(move || {
            libc::fcntl(fd, libc::F_SETFD, 0);
            Ok(())
        })
    };
    let Ok(child) = command.spawn() else {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: there is no python3");
    };
    let pid = child.id() as i32;
    let is_empty = || fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|dir| dir.count() == 0);
    while !is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let found = ask_on(&Searches::default(), 1, inode).0;
    assert_eq!(found, OtherHolder::Process(pid));
    end(child);
}

#[test]
fn a_search_is_paid_for_by_its_user() {
    let mut budget = Budget::default();
    let busy = || {
        let start = processor_time();
        while processor_time() - start < Duration::from_millis(150) {}
    };
    let start = Instant::now();
    assert!(budget.run(busy).is_some());
    // A second was saved up, and ten times as long as the search took has to pass.
    assert!(budget.next >= start + 10 * Duration::from_millis(150) - Budget::SAVED);
    budget.next = Instant::now() + Duration::from_secs(600);
    assert!(budget.run(|| ()).is_none());
}

/// A search that stands still at this process, for as long as what is returned is kept.
fn stands_still_at(searches: &Searches, pid: i32) -> Arc<Search> {
    let search = lock(&searches.desk).search.clone();
    let since = Instant::now().checked_sub(2 * PATIENCE).unwrap();
    *lock(&search.place.0) = Some((pid, since));
    search
}

#[test]
fn nobody_waits_for_a_search_that_another_porter_goes_on_with() {
    let searches = Searches::default();
    let search = lock(&searches.desk).search.clone();
    let state = search.state.lock().unwrap();
    assert_eq!(searches.other_holder(1, 1), OtherHolder::NotYet);
    drop(state);
    assert!(lock(&searches.asked).len() == 1 && lock(&searches.desk).lost.is_empty());
}

#[test]
fn a_search_that_stands_still_is_given_up_and_the_process_passed_by() {
    // Nobody's number.
    const STRANGER: i32 = i32::MAX;
    let _alone = alone();
    let (listener, inode) = listener();
    let me = std::process::id() as i32;
    let heir = sleeper(Some(listener.as_raw_fd()), 0);
    let its = heir.id() as i32;
    let searches = Searches::default();
    let lost = stands_still_at(&searches, its);
    let state = lost.state.lock().unwrap();
    // It may hold what its relatives have, and nobody else is told so.
    assert_eq!(ask_on(&searches, STRANGER, inode).0, OtherHolder::Nobody);
    assert_eq!(ask_on(&searches, me, inode).0, OtherHolder::Process(its));
    let more = stands_still_at(&searches, STRANGER);
    let held = more.state.lock().unwrap();
    assert_eq!(ask_on(&searches, STRANGER, inode).0, OtherHolder::Nobody);
    // Two porters are lost, and no third one.
    let last = stands_still_at(&searches, me);
    let third = last.state.lock().unwrap();
    assert_eq!(searches.other_holder(STRANGER, inode), OtherHolder::NotYet);
    assert_eq!(lock(&searches.desk).lost.len(), 2);
    drop((third, state, held));
    drop((last, lost, more));
    end(heir);
}
