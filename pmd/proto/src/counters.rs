//! What went wrong, counted: no message of a peer is refused in silence.

use crate::message::Malformed;

macro_rules! counts {
    ($($(#[$doc:meta])* $variant:ident, $name:literal, $text:literal;)*) => {
        /// Something that is counted, for each peer. The documentation names the consequence.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Count { $($(#[$doc])* $variant,)* }

        impl Count {
            /// All of them, in the order of [`Counters`].
            pub const ALL: &'static [Count] = &[$(Count::$variant,)*];

            /// A name for machines, as `docs/protocol.md` has it.
            pub fn name(self) -> &'static str {
                match self { $(Count::$variant => $name,)* }
            }

            /// A phrase for people.
            pub fn text(self) -> &'static str {
                match self { $(Count::$variant => $text,)* }
            }
        }
    };
}

counts! {
    /// A message of another length. Ignored.
    BadLength, "bad_length", "messages of a wrong length";
    /// A message of another version. Ignored, so no session comes up.
    BadVersion, "bad_version", "messages of another protocol version";
    /// A message of an unknown kind. Ignored.
    BadKind, "bad_kind", "messages of an unknown kind";
    /// A field with an impossible value. The message is ignored.
    BadField, "bad_field", "messages with an impossible field";
    /// A reserved byte that is not 0. The message is ignored.
    BadReserved, "bad_reserved", "messages with a reserved byte set";
    /// A message of a session that is over. Ignored; a few are normal after a loss.
    StaleSession, "stale_session", "messages of an earlier session";
    /// A message before the session was up. Ignored.
    NoSession, "no_session", "messages before the greeting";
    /// An id that names no stream, or one that is over. The message is ignored; a few are normal
    /// after the peer's worker has restarted.
    UnknownStream, "unknown_stream", "messages for an unknown stream";
    /// The id of another node's stream. The message is ignored.
    ForeignStream, "foreign_stream", "messages for another node's stream";
    /// A message that the stream's state does not allow. It is ignored.
    WrongState, "wrong_state", "messages that do not fit the stream's state";
    /// A CONNECT without its OFFER. Ignored.
    NoOffer, "no_offer", "connects without an offer";
    /// More unanswered connects than agreed. Ignored.
    ConnectFlood, "connect_flood", "connects beyond the agreed number";
    /// A connect refused since the table, or the node's share of it, is full. Answered REFUSE.
    NoRoom, "no_room", "connects refused for lack of room";
    /// Credit below what was given, or beyond what was written. The stream is reset.
    BadCredit, "bad_credit", "credits for bytes that were not sent";
    /// A head beyond what was granted, or behind the end. The stream is reset.
    BadHead, "bad_head", "notifications beyond what was granted";
    /// An end before the head, beyond what was granted, or other than said before. The stream is
    /// reset.
    BadEnd, "bad_end", "impossible ends of a direction";
    /// A resume that contradicts completed writes. The stream is reset.
    BadResume, "bad_resume", "impossible resumes";
    /// A completion for nothing that was posted. Ignored.
    StrayCompletion, "stray_completion", "completions for nothing";
    /// The engine refused a write. The stream is reset.
    AccessRefused, "access_refused", "writes refused by the peer's protection";
    /// The session was lost (link, silence, or the peer greeted anew). Streams wait.
    SessionLost, "session_lost", "lost sessions";
    /// The peer came with another epoch. Its streams have ended.
    PeerRestarted, "peer_restarted", "restarts of the peer";
}

/// Counts of each [`Count`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters([u64; Count::ALL.len()]);

impl Counters {
    pub(crate) const fn new() -> Self {
        Counters([0; Count::ALL.len()])
    }

    /// How often it happened.
    pub fn get(&self, count: Count) -> u64 {
        self.0[count as usize]
    }

    pub(crate) fn add(&mut self, count: Count) {
        self.0[count as usize] += 1;
    }
}

impl From<Malformed> for Count {
    fn from(malformed: Malformed) -> Self {
        match malformed {
            Malformed::Length => Count::BadLength,
            Malformed::Version => Count::BadVersion,
            Malformed::Kind => Count::BadKind,
            Malformed::Field => Count::BadField,
            Malformed::Reserved => Count::BadReserved,
        }
    }
}
