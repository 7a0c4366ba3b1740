//! Memory limits of control groups: how large the rings of a new stream may be, so that they end nobody.
//!
//! The kernel charges a page of a ring to the control group of the program that touches it first, and until the stream ends nobody
//! can give it back. A program over TCP that is not read from is throttled; one whose group has no memory left is ended. So rings
//! may take a share of a group's limit and no more. `docs/architecture.md`, "Rings and memory limits", has the rules.
//!
//! Which group a process is in, and what its limit is, is found in looks ([`Cgroups::of`]). The control thread, which makes streams,
//! reads numbers ([`Rule::take`]).

mod files;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::process::Peer;
use files::{Kind, Mount, group_in, limit_of, whole};

/// A limit that was read is believed for so long.
const BELIEVED: Duration = Duration::from_secs(1);
/// Groups above each other that are looked at, from the top. Who makes more below these harms nobody but what is in there.
const LEVELS: usize = 16;
/// So many groups are remembered in any case.
const REMEMBERED: usize = 1024;
/// Without a limit.
const NO_LIMIT: u64 = u64::MAX;
/// A ring is at most this part of what is left of a group's share, so that there are some for those who come later,
const PART: u64 = 16;
/// but not smaller than this.
pub const SMALLEST: u64 = 64 << 10;

/// A control group: its limit, and what rings have of that.
#[derive(Debug)]
pub struct Cgroup {
    /// Its folder.
    folder: PathBuf,
    above: Option<Arc<Cgroup>>,
    limit: AtomicU64,
    read: Mutex<Option<Instant>>,
    /// Bytes of rings that its programs, and those in groups below, may fill.
    taken: AtomicU64,
    /// Streams for which there was no room.
    refused: AtomicU64,
}

/// What a group has, for people.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct View {
    /// Its folder.
    pub folder: String,
    /// Bytes that it may have.
    pub limit: u64,
    /// Bytes of its rings.
    pub rings: u64,
    /// Streams that stayed on the kernel.
    pub refused: u64,
}

impl Cgroup {
    fn new(folder: PathBuf, above: Option<Arc<Cgroup>>) -> Self {
        Cgroup {
            folder,
            above,
            limit: AtomicU64::new(NO_LIMIT),
            read: Mutex::new(None),
            taken: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// It and those above it.
    fn levels(self: &Arc<Self>) -> impl Iterator<Item = &Arc<Self>> {
        std::iter::successors(Some(self), |group| group.above.as_ref())
    }

    /// Those that have a limit.
    pub fn limited(self: &Arc<Self>) -> impl Iterator<Item = &Arc<Self>> {
        let has_limit = |group: &&Arc<Self>| group.limit.load(Ordering::Relaxed) != NO_LIMIT;
        self.levels().filter(has_limit)
    }

    /// It, for people.
    pub fn view(&self) -> View {
        View {
            folder: self.folder.to_string_lossy().into_owned(),
            limit: self.limit.load(Ordering::Relaxed),
            rings: self.taken.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }

    /// Reads the limit, if that was long ago. One that can't be read stays what it was: a daemon without descriptors makes no streams either.
    fn refresh(&self, kind: Kind) {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read.is_some_and(|at| at.elapsed() < BELIEVED) {
            return;
        }
        if let Ok(limit) = limit_of(kind, &self.folder) {
            self.limit
                .store(limit.unwrap_or(NO_LIMIT), Ordering::Relaxed);
        }
        *read = Some(Instant::now());
    }

    /// Bytes that are left of what rings may have.
    fn left(&self, percent: u64) -> u64 {
        let limit = self.limit.load(Ordering::Relaxed);
        let share = u128::from(limit) * u128::from(percent) / 100;
        (share as u64).saturating_sub(self.taken.load(Ordering::Relaxed))
    }
}

/// All control groups that processes were found in.
#[derive(Debug)]
pub struct Cgroups {
    mounts: Vec<Mount>,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    groups: HashMap<PathBuf, Arc<Cgroup>>,
    /// Those that nobody is in are looked for when there are so many.
    most: usize,
}

impl Cgroups {
    /// Those that the daemon sees. Where it sees none, there are no limits for it.
    pub fn of_this_machine() -> Self {
        let mountinfo = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
        Self::at(Mount::all_in(&mountinfo))
    }

    fn at(mounts: Vec<Mount>) -> Self {
        let known = Known {
            groups: HashMap::new(),
            most: REMEMBERED,
        };
        Cgroups {
            mounts,
            known: Mutex::new(known),
        }
    }

    /// The group that a process is in, with its limit and those above it read again where that was long ago. `None` where none is seen. A
    /// look: a lock of the kernel's is waited for that who makes groups may hold.
    pub fn of(&self, peer: &Peer) -> Option<Arc<Cgroup>> {
        self.named(&whole(peer.cgroup().ok()?).ok()?)
    }

    /// The one that a text like `/proc/PID/cgroup` names.
    fn named(&self, text: &[u8]) -> Option<Arc<Cgroup>> {
        let (kind, group) = group_in(text)?;
        let mounts = self.mounts.iter().filter(|mount| mount.kind == kind);
        let mut seen = mounts.filter_map(|mount| Some((mount, mount.folder_of(group)?)));
        let (mount, folder) = seen.next()?;
        let mut above = None;
        for level in mount.levels(&folder).into_iter().take(LEVELS) {
            let group = self.known(level, above);
            group.refresh(kind);
            above = Some(group);
        }
        above
    }

    fn known(&self, folder: &Path, above: Option<Arc<Cgroup>>) -> Arc<Cgroup> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = known.groups.get(folder) {
            return group.clone();
        }
        if known.groups.len() >= known.most {
            known.groups.retain(|_, group| Arc::strong_count(group) > 1);
            // So that not all are looked at each time, where many are in use.
            known.most = REMEMBERED.max(2 * known.groups.len());
        }
        let group = Arc::new(Cgroup::new(folder.to_owned(), above));
        known.groups.insert(folder.to_owned(), group.clone());
        group
    }
}

/// One end of a stream that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Seat<'a> {
    /// The group of its program, if that is known.
    pub group: Option<&'a Arc<Cgroup>>,
    /// Its program may be made to touch the pages of both rings: the other one says that bytes are there which it has not written.
    pub both: bool,
}

/// The rings of a stream, on the account of control groups until this is dropped.
#[derive(Debug, Default)]
pub struct Rings {
    taken: Vec<(Arc<Cgroup>, u64)>,
}

impl Rings {
    /// Is no group charged for them?
    pub fn are_free(&self) -> bool {
        self.taken.is_empty()
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        for (group, bytes) in &self.taken {
            group.taken.fetch_sub(*bytes, Ordering::Relaxed);
        }
    }
}

/// A control group has no room for the rings of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a control group's memory limit leaves no room for rings")]
pub struct Full;

/// What rings may have of limits, and how large they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Of each limit, in percent.
    pub percent: u64,
    /// Bytes of a ring where no limit is in the way; a power of two.
    pub largest: u64,
    /// Rings are not smaller than this, a power of two.
    pub smallest: u64,
}

impl Rule {
    /// Bytes of each ring of a stream between two programs, and what they cost control groups. Quick. One thread takes, others give back.
    pub fn take(self, ends: [Seat<'_>; 2]) -> Result<(u64, Rings), Full> {
        let mut wanted: Vec<(Arc<Cgroup>, u64)> = Vec::new();
        for end in ends {
            let rings = if end.both { 2 } else { 1 };
            for group in end.group.into_iter().flat_map(Cgroup::limited) {
                match wanted
                    .iter_mut()
                    .find(|(known, _)| Arc::ptr_eq(known, group))
                {
                    // There are no more.
                    Some((_, both)) => *both = 2,
                    None => wanted.push((group.clone(), rings)),
                }
            }
        }
        let mut size = self.largest;
        for (group, rings) in &wanted {
            let left = group.left(self.percent);
            let smallest = self.smallest.min(self.largest);
            if left / rings < smallest {
                group.refused.fetch_add(1, Ordering::Relaxed);
                return Err(Full);
            }
            // Not 0, since `smallest` is not.
            let most = (left / PART / rings).max(smallest).ilog2();
            size = size.min(1 << most);
        }
        for (group, rings) in &mut wanted {
            // From now on in bytes.
            *rings *= size;
            group.taken.fetch_add(*rings, Ordering::Relaxed);
        }
        Ok((size, Rings { taken: wanted }))
    }
}

#[cfg(test)]
mod tests;
