//! Who holds an end: the processes that have its anchor. So the last close is known as the last, and the other end is told of it
//! by marks, before the kernel has said anything.
//!
//! The kernel does not tell how many processes have a socket. So they are counted (`holders`), each before it comes to be: by the one
//! that forks or starts it. Once it runs, it puts its number into the table (`held_by`). It is taken out of both when it closes
//! its last descriptor. One that just ends, or is killed, does nothing; whoever closes later finds by its number that it is no
//! more. As does one that runs another program by now, which did not get the descriptor (`GOING`).
//!
//! Every doubt is on one side: who is counted and not in the table (it was killed before that, or there was no room) counts as one
//! that holds. Then a last close is not known as such, no mark is made, and the peer is told by the kernel: as of a process that was
//! killed. What must not be is the other mistake, and for that nobody is taken out but by itself or for its end.
//!
//! Two that close at the same time say so first (`CLOSING`), and look then: at least one of them sees that it is the last.

use super::{End, Process, Shared};
use crate::layout::holder::{CLOSING, GOING, PID};
use crate::sync::{AtomicU32, Ordering::*, fence};

fn pid_of(entry: u32) -> u32 {
    entry & PID
}

impl Shared {
    /// A process is about to come to be that gets this end from one that has it.
    pub fn count_holder(&self) {
        self.page().holders.fetch_add(1, SeqCst);
    }

    /// One that was counted holds nothing, and is not in the table: it never came to be.
    pub fn uncount_holder(&self) {
        let less = |count: u32| count.checked_sub(1);
        let _ = self.page().holders.fetch_update(SeqCst, SeqCst, less);
    }

    /// This process has closed its last descriptor.
    pub fn let_go(&self, pid: u32) {
        if let Some((place, entry)) = self.holder(pid) {
            // Nobody else takes out one that runs; and who did has counted it out.
            if place.compare_exchange(entry, 0, SeqCst, Relaxed).is_err() {
                return;
            }
        }
        self.uncount_holder();
    }

    /// This process is about to run another program, which does not get the end. It may fail to: then it [stays](Self::stay).
    pub fn go(&self, pid: u32) {
        if let Some((place, _)) = self.holder(pid) {
            place.fetch_or(GOING, SeqCst);
        }
    }

    /// Takes [`Self::go`] back.
    pub fn stay(&self, pid: u32) {
        if let Some((place, _)) = self.holder(pid) {
            place.fetch_and(!GOING, SeqCst);
        }
    }

    /// True when this process is in the table.
    pub fn is_held_by(&self, pid: u32) -> bool {
        self.holder(pid).is_some()
    }

    /// The entry of a process, and what stands there.
    fn holder(&self, pid: u32) -> Option<(&AtomicU32, u32)> {
        let entries = self.page().held_by.iter();
        let mut found = entries.map(|place| (place, place.load(SeqCst)));
        found.find(|(_, entry)| *entry != 0 && pid_of(*entry) == pid)
    }
}

impl<S: Process> End<'_, S> {
    /// This process holds the end, and is counted already.
    pub fn hold(&self, pid: u32) {
        if pid == 0 || pid_of(pid) != pid {
            return;
        }
        if let Some((place, _)) = self.shared.holder(pid) {
            // The same process as another program.
            place.fetch_and(!(GOING | CLOSING), SeqCst);
            return;
        }
        let enter = |place: &AtomicU32| place.compare_exchange(0, pid, SeqCst, Relaxed).is_ok();
        if !self.page().held_by.iter().any(enter) {
            self.uncount_ended(pid);
            self.page().held_by.iter().any(enter);
        }
    }

    /// This process is about to close its last descriptor: true when nobody else holds the end.
    pub fn is_last_to_close(&self, pid: u32) -> bool {
        let holders = &self.page().holders;
        if holders.load(Acquire) <= 1 {
            return true;
        }
        self.uncount_ended(pid);
        let own = self.shared.holder(pid);
        if let Some((place, _)) = own {
            place.fetch_or(CLOSING, SeqCst);
        }
        fence(SeqCst);
        let entries = self.page().held_by.iter();
        let closing = entries.filter(|place| place.load(SeqCst) & CLOSING != 0);
        holders.load(SeqCst) as usize <= closing.count() + usize::from(own.is_none())
    }

    /// Takes out those that are no more, or hold the end no more; but not this process.
    fn uncount_ended(&self, pid: u32) {
        for place in &self.page().held_by {
            let entry = place.load(SeqCst);
            let other = pid_of(entry);
            if other == 0 || other == pid {
                continue;
            }
            let holds = self.socket.is_running(other)
                && (entry & GOING == 0 || self.socket.may_have_anchor(other));
            if !holds && place.compare_exchange(entry, 0, SeqCst, Relaxed).is_ok() {
                self.shared.uncount_holder();
            }
        }
    }
}
