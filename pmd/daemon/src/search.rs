//! Searches all processes for other holders of a socket: a program that has forked says that its socket may be shared.
//!
//! Whoever had a socket may have handed it to any process, so all are looked at, and only then is it said to have a
//! single holder. That takes long where some process has very many descriptors. So what several programs of a user ask
//! is searched in one round, which goes on where it stopped with the next question, and each user pays for its own.
//!
//! Porters call it, never the control thread. What is read here (`/proc/PID/fd`, the links in it, `/proc/PID/status`)
//! takes no lock that a process holds during `exec`. A process may still keep everybody from these folders, for as long as it
//! likes. So no porter waits for another one's search, and a search that stands still is given up: a new one is begun, which
//! does not look into the process at which the other one stands. Few may stand so at a time.

use std::cell::LazyCell;
use std::collections::{HashMap, HashSet};
use std::fs::{self, ReadDir};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirEntryExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, readlinkat};
use nix::sys::stat::Mode;

use crate::own::processor_time;
use crate::process::parse_socket;

/// Longest that one question has the search go on, in processor time.
const STEP: Duration = Duration::from_millis(20);
/// How long what a round has found is kept for who asked.
const KEPT: Duration = Duration::from_secs(10);
/// A search that has been at one process for longer stands still.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a process is passed by at which a search has stood still. Longer, while it does.
const PASSED_BY: Duration = Duration::from_secs(60);
/// Searches of a user that may stand still: each of them holds a porter.
const MOST_LOST: usize = 2;
/// Threads of a process that are asked for its children, to tell whether one that is passed by is among them.
const MOST_THREADS: usize = 1024;
/// Questions of a user that may wait for a round.
const MOST_ASKED: usize = 1024;

/// Who else holds a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherHolder {
    /// Nobody.
    Nobody,
    /// This process, or it may: it is a relative of the tenant whose fds can't be looked at.
    Process(i32),
    /// Not found out yet: asked again, the search goes on.
    NotYet,
}

/// A process that holds a socket asks who else does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Question {
    pid: i32,
    inode: u64,
}

/// The searches of one user.
#[derive(Debug, Default)]
pub struct Searches {
    /// For the next round. Locked for a moment only.
    asked: Mutex<HashSet<Question>>,
    /// Locked for a moment only.
    desk: Mutex<Desk>,
}

/// The search that goes on, and those that were given up.
#[derive(Debug, Default)]
struct Desk {
    search: Arc<Search>,
    lost: Vec<Lost>,
}

#[derive(Debug, Default)]
struct Search {
    /// Locked by the porter that searches, which may stay away for as long as some process likes.
    state: Mutex<State>,
    place: Place,
}

/// A search that stood still at this process.
#[derive(Debug)]
struct Lost {
    pid: i32,
    when: Instant,
    search: Weak<Search>,
}

/// The process into which a search looks, and since when.
#[derive(Debug, Default)]
struct Place(Mutex<Option<(i32, Instant)>>);

/// Where a search may look.
struct Way<'a> {
    place: &'a Place,
    passed_by: HashSet<i32>,
}

#[derive(Debug, Default)]
struct State {
    budget: Budget,
    round: Option<Round>,
    finished: HashMap<Question, Finished>,
}

/// What a round that looked at all processes has found.
#[derive(Debug)]
struct Finished {
    when: Instant,
    holders: Vec<i32>,
    looked_at: Arc<HashSet<ProcessId>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Searches {
    /// Searches for a process other than `pid` that holds the socket with this inode, as long as the user has time for
    /// it. This process, whose many descriptors are none of a tenant's sockets, is left out.
    pub fn other_holder(&self, pid: i32, inode: u64) -> OtherHolder {
        let question = Question { pid, inode };
        {
            let mut asked = lock(&self.asked);
            if asked.len() < MOST_ASKED {
                asked.insert(question);
            }
        }
        let (search, passed_by) = lock(&self.desk).search();
        let mut state = match search.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            // Another porter searches for this user. It or the next one takes this question along.
            Err(TryLockError::WouldBlock) => return OtherHolder::NotYet,
        };
        let place = &search.place;
        let found = state.answer(question, &self.asked, &Way { place, passed_by });
        place.leave();
        if found != OtherHolder::NotYet {
            lock(&self.asked).remove(&question);
        }
        found
    }
}

impl Desk {
    /// The search that goes on, and the processes that are passed by.
    fn search(&mut self) -> (Arc<Search>, HashSet<i32>) {
        self.lost
            .retain(|lost| lost.stands_still() || lost.when.elapsed() < PASSED_BY);
        let standing = self.lost.iter().filter(|lost| lost.stands_still()).count();
        if standing < MOST_LOST
            && let Some(pid) = self.search.place.stands_still()
        {
            let search = std::mem::take(&mut self.search);
            self.lost.push(Lost {
                pid,
                when: Instant::now(),
                search: Arc::downgrade(&search),
            });
        }
        let passed_by = self.lost.iter().map(|lost| lost.pid).collect();
        (self.search.clone(), passed_by)
    }
}

impl Lost {
    /// Its porter has not come back.
    fn stands_still(&self) -> bool {
        self.search.strong_count() > 0
    }
}

impl Place {
    fn enter(&self, pid: i32) {
        *lock(&self.0) = Some((pid, Instant::now()));
    }

    fn leave(&self) {
        *lock(&self.0) = None;
    }

    /// The process at which it stands still.
    fn stands_still(&self) -> Option<i32> {
        let (pid, since) = (*lock(&self.0))?;
        (since.elapsed() > PATIENCE).then_some(pid)
    }
}

impl Way<'_> {
    /// A process is looked into from now on, unless it is passed by.
    fn enters(&self, pid: i32) -> bool {
        let enters = !self.passed_by.contains(&pid);
        if enters {
            self.place.enter(pid);
        }
        enters
    }
}

impl State {
    fn answer(
        &mut self,
        question: Question,
        asked: &Mutex<HashSet<Question>>,
        way: &Way,
    ) -> OtherHolder {
        let State {
            budget,
            round,
            finished,
        } = self;
        let run = || {
            let end = processor_time() + STEP;
            finished.retain(|_, finished| finished.when.elapsed() < KEPT);
            let runs = round
                .as_ref()
                .is_some_and(|round| round.asked.contains(&question));
            if runs || finished.contains_key(&question) {
                // It needs no further round.
                lock(asked).remove(&question);
            }
            loop {
                if let Some(known) = finished.remove(&question) {
                    return known.verdict(question, end, way).unwrap_or_else(|| {
                        finished.insert(question, known);
                        OtherHolder::NotYet
                    });
                }
                let current = round.get_or_insert_with(|| {
                    let asked = std::mem::take(&mut *lock(asked));
                    Round::new(asked, way)
                });
                let done = current.run(end, way);
                if let Some(holder) = current.other_holder(question, way) {
                    current.asked.remove(&question);
                    return OtherHolder::Process(holder);
                }
                if !done {
                    return OtherHolder::NotYet;
                }
                if let Some(done) = round.take() {
                    done.finish(finished, way);
                }
            }
        };
        budget.run(run).unwrap_or(OtherHolder::NotYet)
    }
}

impl Finished {
    /// `None` where it can't be told now.
    fn verdict(&self, question: Question, end: Duration, way: &Way) -> Option<OtherHolder> {
        if let Some(holder) = self.holders.iter().find(|pid| **pid != question.pid) {
            return Some(OtherHolder::Process(*holder));
        }
        // Who has come since may have it from this very process.
        let mut newcomers = Round::new(HashSet::from([question]), way);
        newcomers.to_go.retain(|id| !self.looked_at.contains(id));
        match newcomers.run(end, way) {
            true => Some(match newcomers.other_holder(question, way) {
                Some(holder) => OtherHolder::Process(holder),
                None => OtherHolder::Nobody,
            }),
            false => None,
        }
    }
}

/// A process: its id, and the number of its folder in `/proc`. A later process with the same id has another folder. (A
/// folder may get another number, too; then its process is looked at again.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ProcessId {
    pid: i32,
    folder: u64,
}

/// One look at all processes, for all who asked before it began.
#[derive(Debug)]
struct Round {
    asked: HashSet<Question>,
    inodes: HashSet<u64>,
    /// The next one last.
    to_go: Vec<ProcessId>,
    is_listed: bool,
    looked_at: HashSet<ProcessId>,
    current: Option<(i32, Descriptors)>,
    /// Who holds what was asked for.
    holders: HashMap<u64, Vec<i32>>,
    /// Who may not be looked at.
    hidden: Vec<Hidden>,
}

#[derive(Debug)]
struct Hidden {
    pid: i32,
    /// `None` where it is not known.
    parent: Option<i32>,
}

impl Round {
    fn new(asked: HashSet<Question>, way: &Way) -> Self {
        let mut round = Round {
            inodes: asked.iter().map(|question| question.inode).collect(),
            asked,
            to_go: Vec::new(),
            is_listed: false,
            looked_at: HashSet::new(),
            current: None,
            holders: HashMap::new(),
            hidden: Vec::new(),
        };
        round.list(way);
        round
    }

    /// Lists the processes. Where there are none the list could not be had (there was no descriptor, say): this one is among them.
    fn list(&mut self, way: &Way) {
        let mut first: HashSet<i32> = HashSet::new();
        // It is an order only, and has to take less time than it saves.
        for question in self.asked.iter().take(16) {
            first.extend(relatives(question.pid, 32, way));
        }
        way.enters(ALL);
        self.to_go = processes().collect();
        self.to_go.sort_by_key(|id| first.contains(&id.pid));
        self.is_listed = !self.to_go.is_empty();
    }

    /// True when all processes have been looked at.
    fn run(&mut self, end: Duration, way: &Way) -> bool {
        let own = std::process::id() as i32;
        if !self.is_listed {
            self.list(way);
        }
        if !self.is_listed {
            return false;
        }
        loop {
            if let Some((pid, descriptors)) = &mut self.current {
                let look = match way.enters(*pid) {
                    true => descriptors.look(&self.inodes),
                    false => Look::Hidden,
                };
                match look {
                    Look::Found(inode) => {
                        let holders = self.holders.entry(inode).or_default();
                        // Two are enough: one of them is another one than who asks.
                        if holders.len() < 2 && !holders.contains(pid) {
                            holders.push(*pid);
                        }
                        continue;
                    }
                    Look::More => {}
                    Look::Later => return false,
                    Look::All => self.current = None,
                    Look::Hidden => {
                        let (pid, parent) = (*pid, parent_of(*pid, way));
                        self.hidden.push(Hidden { pid, parent });
                        self.current = None;
                    }
                }
            }
            if processor_time() > end {
                return false;
            }
            if self.current.is_some() {
                continue;
            }
            let Some(next) = self.to_go.pop() else {
                return true;
            };
            self.looked_at.insert(next);
            if next.pid != own {
                self.current = Some((next.pid, Descriptors::new(next.pid)));
            }
        }
    }

    /// Another holder, as far as is known.
    fn other_holder(&self, question: Question, way: &Way) -> Option<i32> {
        if !self.asked.contains(&question) {
            return None;
        }
        let holders = self.holders.get(&question.inode).into_iter().flatten();
        if let Some(holder) = holders.copied().find(|pid| *pid != question.pid) {
            return Some(holder);
        }
        if self.hidden.is_empty() {
            return None;
        }
        // Relatives are who inherits.
        let parent = parent_of(question.pid, way);
        // Those of the first process are anybody's.
        let family = parent.filter(|parent| *parent > 1);
        let all = LazyCell::new(|| relatives(question.pid, MOST_THREADS, way));
        let is_relative = |other: &&Hidden| {
            let related = Some(other.pid) == parent
                || match other.parent {
                    Some(parent) => parent == question.pid || Some(parent) == family,
                    None => all.contains(&other.pid),
                };
            related && other.pid != question.pid
        };
        self.hidden.iter().find(is_relative).map(|other| other.pid)
    }

    fn finish(self, finished: &mut HashMap<Question, Finished>, way: &Way) {
        let looked_at = Arc::new(self.looked_at.clone());
        for question in &self.asked {
            let mut holders = self.holders.get(&question.inode).cloned();
            if let (None, Some(hidden)) = (&holders, self.other_holder(*question, way)) {
                holders = Some(vec![hidden]);
            }
            let known = Finished {
                when: Instant::now(),
                holders: holders.unwrap_or_default(),
                looked_at: looked_at.clone(),
            };
            finished.insert(*question, known);
        }
    }
}

/// What came of a look at descriptors.
enum Look {
    /// The socket with this inode is among them.
    Found(u64),
    /// Not among some of them; there are more.
    More,
    /// No descriptors of our own are left.
    Later,
    /// That were all.
    All,
    /// They may not be looked at.
    Hidden,
}

/// The descriptors of a process, on the way through them.
#[derive(Debug)]
struct Descriptors {
    pid: i32,
    /// Folders that are still to be opened.
    folders: Vec<String>,
    open: Option<(OwnedFd, ReadDir)>,
    any: bool,
}

impl Descriptors {
    fn new(pid: i32) -> Self {
        Descriptors {
            pid,
            folders: vec![format!("/proc/{pid}/fd")],
            open: None,
            any: false,
        }
    }

    /// Looks for one that is asked for.
    fn look(&mut self, inodes: &HashSet<u64>) -> Look {
        loop {
            if let Some((folder, entries)) = &mut self.open {
                for (count, entry) in entries.by_ref().enumerate() {
                    self.any = true;
                    let entry = match entry {
                        Ok(entry) => entry,
                        // It has ended.
                        Err(_) => break,
                    };
                    match readlinkat(&*folder, entry.file_name().as_os_str()) {
                        Ok(link) => {
                            let inode = link.to_str().and_then(parse_socket);
                            if let Some(inode) = inode.filter(|inode| inodes.contains(inode)) {
                                return Look::Found(inode);
                            }
                        }
                        Err(Errno::EACCES | Errno::EPERM) => return Look::Hidden,
                        // It was closed.
                        Err(_) => {}
                    }
                    if count == 63 {
                        return Look::More;
                    }
                }
                self.open = None;
                self.go_to_threads();
            }
            let Some(folder) = self.folders.pop() else {
                return Look::All;
            };
            match open_folder(&folder) {
                Ok(open) => self.open = Some(open),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return Look::Hidden;
                }
                Err(error) if is_shortage(&error) => {
                    self.folders.push(folder);
                    return Look::Later;
                }
                // It has ended.
                Err(_) => {}
            }
        }
    }

    /// A process whose first thread has ended shows none, though others hold them.
    fn go_to_threads(&mut self) {
        if std::mem::replace(&mut self.any, true) {
            return;
        }
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid));
        let threads = threads.into_iter().flatten().flatten();
        self.folders
            .extend(threads.filter_map(|thread| Some(format!("{}/fd", thread.path().to_str()?))));
    }
}

fn open_folder(path: &str) -> io::Result<(OwnedFd, ReadDir)> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let folder = open(path, flags, Mode::empty())?;
    Ok((folder, fs::read_dir(path)?))
}

fn is_shortage(error: &io::Error) -> bool {
    let shortages = [libc::EMFILE, libc::ENFILE, libc::ENOMEM];
    error
        .raw_os_error()
        .is_some_and(|errno| shortages.contains(&errno))
}

/// Stands for `/proc`, in which the search is for a moment, too.
const ALL: i32 = 0;

fn processes() -> impl Iterator<Item = ProcessId> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        Some(ProcessId {
            pid: entry.file_name().to_str()?.parse().ok()?,
            folder: entry.ino(),
        })
    })
}

/// Parent, children and siblings of a process, as far as the kernel lists them.
fn relatives(pid: i32, threads: usize, way: &Way) -> Vec<i32> {
    let parent = parent_of(pid, way);
    let of = [Some(pid), parent.filter(|parent| *parent > 1)];
    let mut relatives: Vec<i32> = of
        .into_iter()
        .flatten()
        .flat_map(|pid| children(pid, threads, way))
        .collect();
    relatives.extend(parent);
    relatives
}

/// Children of the first threads of a process.
fn children(pid: i32, most: usize, way: &Way) -> Vec<i32> {
    if !way.enters(pid) {
        return Vec::new();
    }
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let threads = threads.into_iter().flatten().flatten().take(most);
    let lists =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_ascii_whitespace()
                .filter_map(|word| word.parse().ok())
                .collect::<Vec<i32>>()
        })
        .collect()
}

/// Parent of a process. Not from `/proc/PID/stat`, which may have to wait for a process in the middle of `exec`.
fn parent_of(pid: i32, way: &Way) -> Option<i32> {
    if !way.enters(pid) {
        return None;
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    parent?.trim().parse().ok()
}

/// Processor time that a user may have spent on searching `/proc`: a tenth of all time.
#[derive(Debug)]
struct Budget {
    next: Instant,
}

impl Default for Budget {
    fn default() -> Self {
        let now = Instant::now();
        Budget {
            next: now.checked_sub(Self::SAVED).unwrap_or(now),
        }
    }
}

impl Budget {
    const SHARE: u32 = 10;
    /// Saved up at most.
    const SAVED: Duration = Duration::from_secs(1);

    fn run<T>(&mut self, search: impl FnOnce() -> T) -> Option<T> {
        let now = Instant::now();
        if self.next > now {
            return None;
        }
        let before = processor_time();
        let result = search();
        let spent = processor_time().saturating_sub(before);
        let earliest = now.checked_sub(Self::SAVED).unwrap_or(now);
        self.next = self.next.max(earliest) + spent * Self::SHARE;
        Some(result)
    }
}

#[cfg(test)]
mod tests;
