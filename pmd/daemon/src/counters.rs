//! What the daemon counts.

use serde::Serialize;

/// Counted since the daemon's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Processes that attached.
    pub attached: u64,
    /// Processes that left.
    pub detached: u64,
    /// Processes that were refused, for whatever cause.
    pub refused: u64,
    /// Callers that were turned away unheard, since very many of their user's had called in vain.
    pub turned_away: u64,
    /// Messages that were none, or made no sense where they came.
    pub malformed: u64,
    /// Messages of another version.
    pub wrong_version: u64,
    /// Memory that was not what it must be.
    pub bad_memory: u64,
    /// Requests in a tenant's queue that made no sense.
    pub bad_requests: u64,
    /// Messages that a process sent on a connection of another one.
    pub stray: u64,
    /// Processes that were found not to be who they were when they attached.
    pub changed: u64,
    /// Turns of the control thread.
    pub turns: u64,
    /// Microseconds of the longest turn of the control thread.
    pub longest_turn_us: u64,
    /// Microseconds of processor time of the turn that took most of it. A longer turn was kept from its processor, or
    /// waited.
    pub longest_turn_cpu_us: u64,
    /// Turns of the control thread that took more than 50 ms.
    pub long_turns: u64,
    /// Control threads that had to wait for a stranger, and were replaced by another one.
    pub held_up: u64,
    /// Looks that the control thread has taken.
    pub looks: u64,
    /// Messages in which the kernel was asked for sockets.
    pub asked: u64,
    /// Connections announced.
    pub announced: u64,
    /// Announcements that the kernel did not confirm.
    pub unverified: u64,
    /// Announcements turned down for another reason.
    pub turned_down: u64,
    /// Streams made.
    pub streams_opened: u64,
    /// Streams whose memory was given back.
    pub streams_closed: u64,
    /// Streams of huge pages.
    pub streams_huge: u64,
    /// Streams that an end could not map.
    pub declined: u64,
    /// Streams that an end left for the kernel.
    pub left: u64,
    /// Streams handed to a process that inherited the socket.
    pub inherited: u64,
    /// Tenants that were cut off because they did not read.
    pub cut_off: u64,
    /// Questions answered.
    pub questions: u64,
    /// Connects to other nodes that were asked for.
    pub reaches: u64,
    /// Connects that went over the fabric.
    pub reached: u64,
    /// Connects that were left to the kernel.
    pub not_reached: u64,
    /// Streams that other nodes have asked for.
    pub incoming: u64,
    /// Streams of other nodes that were refused.
    pub incoming_refused: u64,
}
