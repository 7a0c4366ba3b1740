//! One registration of the program as a state machine: where it is, whether it is armed, what it has to report. The instance
//! that has it acts; nothing here does: no call, no lock, no clock, no other file of the shim, so that the tests walk it alone
//! (`sockshim/tests/registration.rs`).
//!
//! | state | where it is | add again | modify | delete | stream comes | stream goes | is reported |
//! | --- | --- | --- | --- | --- | --- | --- | --- |
//! | `Free` | nowhere | – | – | – | – | – | – |
//! | `Kernel` | the program's instance | EEXIST | `Kernel` | `Free` | `Armed` (news, unless an edge was told), or `Fired` if it has | – | by the kernel |
//! | `Parked` | in neither: it has fired | EEXIST | `Kernel` | `Free` | `Fired` | – | never |
//! | `Armed` | the inner one | EEXIST | `Armed`, news | `Resting` or `Free` | – | `Kernel` | `Fired` with EPOLLONESHOT, else `Armed` |
//! | `Fired` | the inner one | EEXIST | `Armed`, news | `Resting` or `Free` | – | `Parked` | never |
//! | `Resting` | the inner one, deleted by the program | `Armed`, news | ENOENT | ENOENT | – | `Free` | never |
//!
//! *News* is something to report whatever the positions say: of what was just armed, the program knows nothing. EPOLLEXCLUSIVE has no
//! row of its own: such a registration can't be modified, and is not revived.
//!
//! **Marks** are the instance's (a bit for each registration, see `news.rs`), and what they mean is stated here: one that is not
//! marked has asked ([`needs`]) for all that it names, or a sign is on its way.

use libc::{EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLONESHOT, EPOLLOUT, EPOLLRDHUP};

/// `EPOLLIN` and what goes with it.
const IN: u32 = EPOLLIN as u32 | libc::EPOLLRDNORM as u32;
/// `EPOLLOUT` and what goes with it.
const OUT: u32 = EPOLLOUT as u32 | libc::EPOLLWRNORM as u32;

/// What EPOLLET compares: when any of it changes there is an edge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The position of the last byte that has come in: bytes are news until they were reported.
    pub head: u64,
    /// The marks, and the anchor's end.
    pub state: u64,
    /// Sends that found no room: room is news for each of them.
    pub refused: u32,
}

impl Snapshot {
    /// The same, as it was reported. Where there was no room (as `has_room` says) room is news, whoever has been refused any.
    pub fn with_room(self, has_room: bool) -> Self {
        let refused = self.refused.wrapping_sub(u32::from(!has_room));
        Snapshot { refused, ..self }
    }
}

/// Where a registration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: the slot is free.
    Free,
    /// In the program's instance.
    Kernel,
    /// In the inner one.
    Inner,
    /// In the inner one, but deleted by the program. Many delete and add one several times for each
    /// message; it goes when there is an edge that nobody waits for.
    Resting,
    /// In neither: EPOLLONESHOT has fired, and the kernel would report errors all the same.
    Parked,
}

/// See the table above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Kernel,
    Parked,
    Armed {
        /// Something to report was not reported yet, whatever the positions say.
        news: bool,
        /// What was last reported, for EPOLLET.
        reported: Snapshot,
    },
    Fired,
    Resting,
}

/// A registration with EPOLLONESHOT has come here from the program's instance, and a thread may still be on its way back with an
/// event of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Underway {
    Nobody,
    /// It was not reported since: the event counts, and it has fired with it.
    Silent,
    /// It was: the event would be a second one.
    Reported,
}

/// What becomes of an event that a thread brings, of a registration that has moved meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Brought {
    /// It is the program's.
    Counts,
    /// It was reported already.
    Twice,
}

/// What has to be asked for, so that whatever a registration names brings a sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Bytes, or the end of the direction.
    pub bytes: bool,
    /// Room in the ring.
    pub space: bool,
}

/// What a registration that waits for `events` has to ask for. The end of what comes in is a hang-up once the program has `shut` its own
/// direction, and a hang-up is told unasked.
pub fn needs(events: u32, shut: bool) -> Needs {
    Needs {
        bytes: events & (IN | EPOLLRDHUP as u32) != 0 || shut,
        space: events & OUT != 0,
    }
}

/// The program's registration of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registration {
    state: State,
    underway: Underway,
    /// What the program asked for, flags and all.
    pub events: u32,
    /// What it is told with an event.
    pub data: u64,
}

impl Registration {
    /// Just made, in the program's instance.
    pub fn new(events: u32, data: u64) -> Self {
        Registration {
            state: State::Kernel,
            underway: Underway::Nobody,
            events,
            data,
        }
    }

    /// Where it is.
    pub fn place(&self) -> Place {
        match self.state {
            State::Free => Place::Free,
            State::Kernel => Place::Kernel,
            State::Parked => Place::Parked,
            State::Armed { .. } | State::Fired => Place::Inner,
            State::Resting => Place::Resting,
        }
    }

    /// True when it is in the inner instance, and may report something.
    pub fn is_armed(&self) -> bool {
        matches!(self.state, State::Armed { .. })
    }

    fn has(&self, flag: i32) -> bool {
        self.events & flag as u32 != 0
    }

    fn arm(&mut self) {
        self.state = State::Armed {
            news: true,
            reported: Snapshot::default(),
        };
    }

    /// Its stream has come, and it is about to be deleted from the program's instance, where it may fire until then. True when a
    /// thread may be under way with an event from now on, and none was before.
    pub fn begin_to_move(&mut self) -> bool {
        let before = self.underway;
        if self.state == State::Kernel && self.has(EPOLLONESHOT) || before != Underway::Nobody {
            self.underway = Underway::Silent;
        }
        before == Underway::Nobody && self.underway != before
    }

    /// Nobody is under way with an event of it any more. True when somebody may have been.
    pub fn arrived(&mut self) -> bool {
        std::mem::replace(&mut self.underway, Underway::Nobody) != Underway::Nobody
    }

    /// It has come to the inner instance, from the program's (where it has `fired`), from neither, or back from rest. False, and
    /// nothing is changed, where it can't.
    pub fn enter(&mut self, fired: bool) -> bool {
        match self.state {
            State::Kernel if fired => self.state = State::Fired,
            State::Kernel | State::Resting => self.arm(),
            State::Parked => self.state = State::Fired,
            State::Free | State::Armed { .. } | State::Fired => return false,
        }
        true
    }

    /// It has just come from the program's instance, which has reported all that it has seen: only what differs from this is news.
    pub fn was_told(&mut self, all: Snapshot) {
        if let State::Armed { news, reported } = &mut self.state {
            (*news, *reported) = (false, all);
        }
    }

    /// Its stream has gone, and it leaves the inner instance: for the program's one (true), or for none, since it has fired.
    pub fn leave(&mut self) -> bool {
        self.state = match self.state {
            State::Armed { .. } => State::Kernel,
            State::Fired => State::Parked,
            other => other,
        };
        self.state == State::Kernel
    }

    /// It has fired in the program's instance, and is in neither from now on.
    pub fn park(&mut self) {
        if self.state == State::Kernel {
            self.state = State::Parked;
        }
    }

    /// The program has modified it. One in neither instance is in the program's again.
    pub fn modify(&mut self, events: u32, data: u64) {
        (self.events, self.data) = (events, data);
        match self.state {
            State::Armed { .. } | State::Fired => self.arm(),
            State::Parked => self.state = State::Kernel,
            State::Kernel | State::Free | State::Resting => {}
        }
    }

    /// The program has deleted it, and may make it again soon.
    pub fn rest(&mut self) {
        if self.place() == Place::Inner {
            self.state = State::Resting;
        }
    }

    /// It is no more: where it was.
    pub fn free(&mut self) -> Place {
        let place = self.place();
        self.state = State::Free;
        place
    }

    /// Something has happened that is to be reported whatever the positions say: an edge of an anchor that counts.
    pub fn note_news(&mut self) {
        if let State::Armed { news, .. } = &mut self.state {
            *news = true;
        }
    }

    /// What it reports, where `seen` is what its descriptor is ready for, as of `now`: 0 for nothing.
    pub fn event(&self, seen: i16, now: &Snapshot) -> u32 {
        let State::Armed { news, reported } = self.state else {
            return 0;
        };
        let seen = seen as u16 as u32 & (self.events & 0xffff | (EPOLLERR | EPOLLHUP) as u32);
        let is_edge = news
            || now.state != reported.state
            || seen & IN != 0 && now.head != reported.head
            || seen & OUT != 0 && now.refused != reported.refused;
        if self.has(EPOLLET) && !is_edge {
            0
        } else {
            seen
        }
    }

    /// What [`Registration::event`] gave, not 0, is reported.
    pub fn report(&mut self, seen: u32, now: Snapshot) {
        let State::Armed { news, reported } = &mut self.state else {
            return;
        };
        *news = false;
        *reported = now.with_room(seen & OUT != 0);
        if self.has(EPOLLONESHOT) {
            self.state = State::Fired;
            if self.underway == Underway::Silent {
                self.underway = Underway::Reported;
            }
        }
    }

    /// A thread brings an event with this data from the program's instance. `None`: it is not of this one.
    pub fn bring(&mut self, data: u64) -> Option<Brought> {
        if self.data != data || self.place() != Place::Inner {
            return None;
        }
        match std::mem::replace(&mut self.underway, Underway::Nobody) {
            Underway::Nobody => None,
            Underway::Silent => {
                self.state = State::Fired;
                Some(Brought::Counts)
            }
            Underway::Reported => Some(Brought::Twice),
        }
    }
}
