//! Streams: who announced what, who holds which stream, and the streams' memory.
//!
//! The [`Book`] says who; here are the memory, what it costs, and the numbers.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdsock_node::stream::NodeStream;
use rdsock_shm::control::{Message, Promote, kind};
use rdsock_shm::layout::DATA_OFFSET;
use tracing::warn;

use crate::accounts::Charge;
use crate::book::{Book, Conn, Stream};
use crate::channel::{Closer, Foreign, Outgoing};
use crate::fabric::octets;
use crate::memory::{HugePages, StreamFds, make_stream};
use crate::rights::Rights;

/// Streams for which there is memory ahead of time, at most.
const STOCK: usize = 8;

/// A stream's memory and what is needed to hand it out again.
#[derive(Debug)]
pub struct Memory {
    stream: Arc<Foreign>,
    ends: [Option<Arc<Foreign>>; 2],
    /// The bell boards of the tenants that announced the two ends, for those who may ring them.
    bells: [Option<Bells>; 2],
    ring_size: u64,
    /// Made of huge pages.
    pub huge: bool,
    /// Where the other end is, when that is on another node.
    pub elsewhere: Option<Elsewhere>,
    /// What it costs its payer.
    pub charge: Arc<Charge>,
}

/// A tenant's bell board.
#[derive(Clone, Debug)]
pub struct Bells {
    /// The board.
    pub board: Arc<Foreign>,
    /// The tenant's user.
    pub uid: u32,
}

/// The other end of a stream, on another node. On this host, the daemon stands for it.
#[derive(Debug)]
pub struct Elsewhere {
    /// The node.
    pub node: u16,
    /// Which end the program is.
    pub end: usize,
    /// From where to where the program that connected went.
    pub source: SocketAddr,
    /// As `source`.
    pub destination: SocketAddr,
    /// The data path's.
    pub stream: Arc<NodeStream>,
}

impl Elsewhere {
    /// What the program is told of its own address.
    pub fn local(&self) -> SocketAddr {
        match self.end {
            0 => self.source,
            _ => self.destination,
        }
    }

    /// What the program is told of its peer's address.
    pub fn peer(&self) -> SocketAddr {
        match self.end {
            0 => self.destination,
            _ => self.source,
        }
    }
}

impl Memory {
    /// From the descriptors of a new stream, what it costs its payer, and who lets go of it on that one's behalf.
    pub fn new(
        fds: StreamFds,
        bells: [Option<Bells>; 2],
        ring_size: u64,
        (charge, closer): (Arc<Charge>, &Closer),
        elsewhere: Option<Elsewhere>,
    ) -> Self {
        let paid = |file: OwnedFd| Arc::new(closer.foreign(file).paid_by(charge.clone()));
        Memory {
            stream: paid(fds.stream),
            ends: fds.ends.map(|end| end.map(&paid)),
            bells,
            ring_size,
            huge: fds.huge,
            elsewhere,
            charge,
        }
    }

    /// Where both directions are, as the ends have left them: to be read by whoever may wait.
    pub fn file(&self) -> Arc<Foreign> {
        self.stream.clone()
    }
}

/// Whether huge pages can be had, looked up now and then and warned of once.
#[derive(Debug, Default)]
pub struct HugeSupply {
    dry_until: Option<Instant>,
    warned: bool,
}

impl HugeSupply {
    const PAUSE: Duration = Duration::from_secs(1);

    fn wanted(&self, policy: HugePages, now: Instant) -> bool {
        policy != HugePages::Never && self.dry_until.is_none_or(|until| now >= until)
    }

    fn none_left(&mut self, policy: HugePages, now: Instant) {
        self.dry_until = Some(now + Self::PAUSE);
        if !std::mem::replace(&mut self.warned, true) || policy == HugePages::Always {
            warn!(
                "no huge pages for a stream: ordinary pages are used, which costs a little speed; \
                 reserve some with `sysctl vm.nr_hugepages=N`, or set huge_pages = \"never\""
            );
        }
    }
}

/// All streams. What the [`Book`] can do, they can.
#[derive(Debug)]
pub struct Streams {
    book: Book<Memory>,
    /// Those for which a look at their holders is due.
    looked_after: HashSet<u64>,
    /// Those of which it is being looked whether somebody holds them, and whether that has to be looked at once more.
    looked_at: HashMap<u64, bool>,
    next: u64,
    huge: HugeSupply,
    stock: Vec<Made>,
    /// The stock is to be filled up.
    ordered: bool,
}

/// Memory for a stream, made ahead of time: who is promoted does not wait for it.
#[derive(Debug)]
struct Made {
    id: u64,
    ring_size: u64,
    fds: StreamFds,
}

impl Default for Streams {
    fn default() -> Self {
        Streams {
            book: Book::default(),
            looked_after: HashSet::new(),
            looked_at: HashMap::new(),
            next: first_stream(),
            huge: HugeSupply::default(),
            stock: Vec::new(),
            ordered: false,
        }
    }
}

/// A first stream number that a daemon before this one has not used lately, so that a tenant's
/// old streams are not taken for new ones.
fn first_stream() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs() % 100_000) * 1_000_000 + 1
}

impl Deref for Streams {
    type Target = Book<Memory>;

    fn deref(&self) -> &Book<Memory> {
        &self.book
    }
}

impl DerefMut for Streams {
    fn deref_mut(&mut self) -> &mut Book<Memory> {
        &mut self.book
    }
}

impl Streams {
    /// A stream.
    pub fn get(&self, id: u64) -> Option<&Stream<Memory>> {
        self.book.stream(id)
    }

    /// A number for a new stream.
    pub fn number(&mut self) -> u64 {
        let id = self.next;
        self.next += 1;
        id
    }

    /// The number and the memory of a new stream, of huge pages where the policy wants them and they can be had.
    pub fn make_memory(
        &mut self,
        ring_size: u64,
        policy: HugePages,
    ) -> io::Result<(u64, StreamFds)> {
        let now = Instant::now();
        let try_huge = self.huge.wanted(policy, now);
        // The oldest first. What was made before the configuration changed fits no more.
        while !try_huge && !self.stock.is_empty() {
            let made = self.stock.remove(0);
            if made.ring_size == ring_size {
                return Ok((made.id, made.fds));
            }
        }
        let id = self.number();
        let fds = make_stream(id, ring_size, try_huge)?;
        if try_huge && !fds.huge {
            self.huge.none_left(policy, now);
        }
        Ok((id, fds))
    }

    /// Streams for which there is memory already.
    pub fn in_stock(&self) -> usize {
        self.stock.len()
    }

    /// True when the stock is to be filled up, once: [`Streams::restock`] is to be called soon.
    pub fn is_to_be_restocked(&mut self) -> bool {
        let lacks = self.stock.len() <= STOCK / 2;
        lacks && !std::mem::replace(&mut self.ordered, true)
    }

    /// Makes memory for one of the next streams; true when more is lacking. Huge pages are not kept in stock.
    pub fn restock(&mut self, ring_size: u64, policy: HugePages) -> bool {
        self.ordered = false;
        if self.stock.len() >= STOCK || self.huge.wanted(policy, Instant::now()) {
            return false;
        }
        let id = self.number();
        // Where there are no descriptors now, the next stream says so.
        let Ok(fds) = make_stream(id, ring_size, false) else {
            return false;
        };
        self.stock.push(Made { id, ring_size, fds });
        self.ordered = self.stock.len() < STOCK;
        self.ordered
    }

    /// A look at a stream's holders is due. False when it was already.
    pub fn look_after(&mut self, id: u64) -> bool {
        self.looked_after.insert(id)
    }

    /// The look that was due is being taken.
    pub fn looked(&mut self, id: u64) {
        self.looked_after.remove(&id);
    }

    /// Begins to look whether somebody holds a stream. False where that is being looked at: it will be once more behind that.
    pub fn begin_look(&mut self, id: u64) -> bool {
        match self.looked_at.entry(id) {
            Entry::Vacant(entry) => {
                entry.insert(false);
                true
            }
            Entry::Occupied(mut entry) => {
                entry.insert(true);
                false
            }
        }
    }

    /// It was looked at. True where it has to be once more.
    pub fn end_look(&mut self, id: u64) -> bool {
        self.looked_at.remove(&id).unwrap_or(false)
    }

    /// The PROMOTE message for a connection of this user that holds an end.
    pub fn promotion(&self, conn: Conn, uid: u32) -> Option<Outgoing> {
        let (stream_id, end) = self.book.seat_of(conn)?;
        let memory = &self.book.stream(stream_id)?.memory;
        let elsewhere = memory.elsewhere.as_ref();
        let words = |address: SocketAddr| (octets(address.ip()), u32::from(address.port()));
        let (local, local_port) = elsewhere
            .map(Elsewhere::local)
            .map(words)
            .unwrap_or_default();
        let (peer, peer_port) = elsewhere
            .map(Elsewhere::peer)
            .map(words)
            .unwrap_or_default();
        let promote = Promote {
            conn: conn.number,
            generation: conn.generation,
            stream_id,
            ring_size: memory.ring_size,
            data_offset: DATA_OFFSET,
            end: end as u32,
            huge: memory.huge.into(),
            local,
            peer,
            local_port,
            peer_port,
            node: elsewhere.map_or(0, |elsewhere| elsewhere.node.into()),
            reserved: 0,
        };
        let mut fds = vec![memory.stream.clone(), memory.ends.get(end)?.clone()?];
        // Whoever has the end by now, maybe by inheritance.
        let bells = memory.bells.get(1 - end)?.as_ref();
        let bells = bells.filter(|bells| Rights::may_ring(uid, bells.uid));
        fds.extend(bells.map(|bells| bells.board.clone()));
        Some(Outgoing {
            bytes: Message::new(kind::PROMOTE, &promote).as_bytes().to_vec(),
            fds,
        })
    }
}
