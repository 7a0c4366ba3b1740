//! Streams: who announced what, who holds which stream, and the streams' memory.
//!
//! The [`Book`] says who; here are the memory, what it costs, and the numbers.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdsock_node::stream::NodeStream;
use rdsock_shm::control::{Message, Promote, kind};
use rdsock_shm::layout::DATA_OFFSET;
use tracing::warn;

use crate::accounts::{Charge, Paid};
use crate::book::{Book, Conn, Stream};
use crate::cgroups::Rings;
use crate::channel::Outgoing;
use crate::fabric::octets;
use crate::memory::{HugePages, StreamFds, empty, make_stream};
use crate::rights::Rights;

/// Streams for which there is memory ahead of time, at most.
const STOCK: usize = 8;

/// A stream's memory and what is needed to hand it out again.
#[derive(Debug)]
pub struct Memory {
    stream: Arc<Paid>,
    ends: [Option<Arc<Paid>>; 2],
    /// The bell boards of the tenants that announced the two ends, for those who may ring them.
    bells: [Option<Bells>; 2],
    ring_size: u64,
    /// Made of huge pages.
    pub huge: bool,
    /// On the account of control groups.
    _rings: Rings,
    /// Its ends are of one user, who could end both.
    pub of_one_user: bool,
    /// Where the other end is, when that is on another node.
    pub elsewhere: Option<Elsewhere>,
}

/// A tenant's bell board.
#[derive(Clone, Debug)]
pub struct Bells {
    /// The board.
    pub board: Arc<Paid>,
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
    /// From the descriptors of a new stream, and what it costs its payer.
    pub fn new(
        fds: StreamFds,
        bells: [Option<Bells>; 2],
        ring_size: u64,
        charge: Arc<Charge>,
        rings: Rings,
        of_one_user: bool,
        elsewhere: Option<Elsewhere>,
    ) -> Self {
        let paid = |file| Arc::new(Paid::new(file, charge.clone()));
        Memory {
            stream: paid(fds.stream),
            ends: fds.ends.map(|end| end.map(&paid)),
            bells,
            ring_size,
            huge: fds.huge,
            _rings: rings,
            of_one_user,
            elsewhere,
        }
    }

    /// No end is open any more. Takes the rings apart, also from a program that has kept the memory: what it keeps is on the account of who
    /// has written it. May wait.
    pub fn empty_rings(&self) {
        // Huge pages are between programs of one user. Where it does not work, the memory goes with the last who has it.
        let _ = empty(&*self.stream, DATA_OFFSET);
    }

    /// Where both directions are, as the ends have left them: to be read by whoever may wait.
    pub fn file(&self) -> Arc<Paid> {
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
    next: u64,
    huge: HugeSupply,
    /// The oldest first.
    stock: Vec<Made>,
    /// Ring size of the last stream: that of the next one, most likely.
    last_size: u64,
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
            next: first_stream(),
            huge: HugeSupply::default(),
            stock: Vec::new(),
            last_size: 0,
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
        self.last_size = ring_size;
        let fits = |made: &Made| made.ring_size == ring_size;
        if !try_huge && let Some(at) = self.stock.iter().position(fits) {
            let made = self.stock.remove(at);
            return Ok((made.id, made.fds));
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
        let lacks = self.stock.len() <= STOCK / 2 || self.lacks_last_size();
        lacks && !std::mem::replace(&mut self.ordered, true)
    }

    /// Streams of the last size have half of the stock at least, those of other sizes the rest.
    fn lacks_last_size(&self) -> bool {
        let fitting = self
            .stock
            .iter()
            .filter(|made| made.ring_size == self.last_size);
        fitting.count() < STOCK / 2
    }

    fn is_stock_full(&self) -> bool {
        self.stock.len() >= STOCK && !self.lacks_last_size()
    }

    /// Makes memory for one of the next streams; true when more is lacking. Huge pages are not kept in stock.
    pub fn restock(&mut self, policy: HugePages) -> bool {
        self.ordered = false;
        if self.is_stock_full() || self.huge.wanted(policy, Instant::now()) {
            return false;
        }
        let ring_size = self.last_size;
        let is_other = |made: &Made| made.ring_size != ring_size;
        if self.stock.len() >= STOCK
            && let Some(at) = self.stock.iter().position(is_other)
        {
            self.stock.remove(at);
        }
        let id = self.number();
        // Where there are no descriptors now, the next stream says so.
        let Ok(fds) = make_stream(id, ring_size, false) else {
            return false;
        };
        self.stock.push(Made { id, ring_size, fds });
        self.ordered = !self.is_stock_full();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::rounded;

    /// Takes memory for a stream; was it there already?
    fn take(streams: &mut Streams, ring_size: u64) -> bool {
        let before = streams.in_stock();
        let (_, fds) = streams.make_memory(ring_size, HugePages::Never).unwrap();
        assert_eq!(fds.bytes, rounded(ring_size, 4096));
        let was_there = streams.in_stock() < before;
        if streams.is_to_be_restocked() {
            while streams.restock(HugePages::Never) {}
        }
        assert!(streams.in_stock() <= STOCK);
        was_there
    }

    #[test]
    fn streams_of_two_sizes_share_the_stock() {
        let mut streams = Streams::default();
        assert!(!take(&mut streams, 4096));
        assert_eq!(streams.in_stock(), STOCK);
        assert!((0..3 * STOCK).all(|_| take(&mut streams, 4096)));
        assert!(!take(&mut streams, 65536), "none of this size yet");
        for _ in 0..STOCK {
            assert!(take(&mut streams, 4096) && take(&mut streams, 65536));
        }
    }
}
