//! Two nodes in one process, on models of the device that are wired to each other, with a control thread that
//! is the test's.

pub mod program;
pub mod stuck;
pub mod traffic;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rdsock_model::{Chaos, Counters, Fabric};
use rdsock_node::mail::Waker;
use rdsock_node::memory::stream_bytes;
use rdsock_node::stream::NodeStream;
use rdsock_node::{Command, Idle, Notice, Opening, Poller, Settings};
use rdsock_proto::{Addresses, Refusal};
use rdsock_rde::Rde;
use rdsock_shm::layout::{Direction, NOT_SWITCHED, Producer, StreamHeader};
use rdsock_vfio::{Space, model::ModelDevice};
use std::collections::HashMap;
use std::fs::File;
use std::io::Error;
use std::mem::offset_of;
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Whose streams are, where it makes no difference.
pub const USER: u32 = 7;
pub const RING: u64 = 64 << 10;
pub const LIMIT: Duration = Duration::from_secs(30);

/// How the two nodes are set up.
#[derive(Clone)]
pub struct Setup {
    /// Poll cores of each node.
    pub cores: [usize; 2],
    pub ring: u64,
    pub streams: usize,
    pub spin: Duration,
    pub resume_timeout: Duration,
    pub chaos: Chaos,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            cores: [1, 1],
            ring: RING,
            streams: 256,
            spin: Duration::from_micros(50),
            resume_timeout: LIMIT,
            chaos: Chaos::default(),
        }
    }
}

pub struct Site {
    pub poller: Poller,
    pub device: Arc<ModelDevice>,
    ring: u64,
    pub streams: HashMap<u64, Arc<NodeStream>>,
    pub notices: Vec<Notice>,
    next: u64,
}

/// Two nodes, 1 and 2, with one poll core each.
pub fn pair() -> [Site; 2] {
    pair_with(&Setup::default())
}

/// Two nodes with so many poll cores, up on all that both have.
pub fn pair_of(cores: [usize; 2]) -> [Site; 2] {
    pair_with(&Setup {
        cores,
        ..Setup::default()
    })
}

pub fn pair_with(setup: &Setup) -> [Site; 2] {
    let cores = setup.cores;
    let fabric = Fabric::new(setup.chaos);
    let mut sites = [1, 2].map(|node| site(&fabric, node, setup));
    for (at, site) in sites.iter_mut().enumerate() {
        let other = 2 - at as u16;
        site.until(|notice| *notice == Notice::NodeUp { node: other });
        site.until_up(other, cores[0].min(cores[1]));
    }
    sites
}

fn site(fabric: &Fabric, node: u16, setup: &Setup) -> Site {
    let cores = setup.cores[usize::from(node - 1)];
    let device = Arc::new(ModelDevice::new(fabric, cores));
    let rde = Rde::open(Space::new(device.clone())).unwrap();
    rde.management()
        .set_stall_timeout(Duration::from_millis(100));
    rde.management().join(node, &[1, 2]);
    let settings = Settings {
        node,
        peers: vec![3 - node],
        cores: vec![None; cores],
        idle: Idle::Adaptive { spin: setup.spin },
        streams: setup.streams,
        streams_per_node: setup.streams,
        ring_size: setup.ring,
        connect_timeout: LIMIT,
        resume_timeout: setup.resume_timeout,
        epoch: u64::from(node),
    };
    let waker = Arc::new(Waker::new().unwrap());
    Site {
        poller: Poller::start(rde, Some(fabric.clone()), settings, waker).unwrap(),
        device,
        ring: setup.ring,
        streams: HashMap::new(),
        notices: Vec::new(),
        next: 1,
    }
}

/// A stream's memfd with its header.
pub fn memory(ring: u64) -> File {
    let file = File::from(memfd_create(c"stream", MFdFlags::empty()).unwrap());
    file.set_len(stream_bytes(ring)).unwrap();
    for direction in 0..2 {
        let at = offset_of!(StreamHeader, directions)
            + direction * size_of::<Direction>()
            + offset_of!(Producer, switch_at);
        file.write_all_at(&NOT_SWITCHED.to_ne_bytes(), at as u64)
            .unwrap();
    }
    file
}

impl Site {
    /// Waits for a notice.
    pub fn until(&mut self, wanted: impl Fn(&Notice) -> bool) -> Notice {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.notices.iter().position(&wanted) {
                return self.notices.remove(at);
            }
            match self.poller.notice() {
                Some(notice) => self.notices.push(notice),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
            assert!(Instant::now() < end, "not told; seen: {:?}", self.notices);
        }
    }

    /// What its device has done.
    pub fn counters(&self) -> Counters {
        self.device.function().counters()
    }

    /// Waits until a node is up on so many cores.
    pub fn until_up(&self, node: u16, cores: usize) {
        let end = Instant::now() + LIMIT;
        let up = || self.poller.cores().filter(|core| core.is_up(node)).count();
        while up() != cores {
            assert!(Instant::now() < end, "up on {} cores, not {cores}", up());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn stream(&mut self, node: u16, opening: Opening, file: &File) -> Arc<NodeStream> {
        self.stream_of(USER, node, opening, file)
    }

    pub fn stream_of(
        &mut self,
        user: u32,
        node: u16,
        opening: Opening,
        file: &File,
    ) -> Arc<NodeStream> {
        let ticket = self.next;
        self.next += 1;
        let berth = self
            .poller
            .berth(node, opening, user, || Ok::<_, Error>(()));
        let berth = berth.unwrap().unwrap();
        let made = (self.poller).stream(ticket, node, opening, berth, file, Box::new(()));
        let made = made.unwrap();
        let stream = made.expect("there is room");
        self.streams.insert(ticket, stream.clone());
        stream
    }
}

/// A socket pair over loopback: the program's, and the daemon's.
pub fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let program = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    program.set_read_timeout(Some(LIMIT)).unwrap();
    let (daemon, _) = listener.accept().unwrap();
    // As shim and daemon have it: a wake byte does not wait for an acknowledgement.
    for socket in [&program, &daemon] {
        socket.set_nodelay(true).unwrap();
    }
    (program, daemon)
}

/// Lets the process have as many descriptors as it may.
pub fn raise_limits() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}

/// A connection from a program of node 1 to one of node 2.
pub struct Connection {
    pub programs: [TcpStream; 2],
    pub files: [File; 2],
    pub streams: [Arc<NodeStream>; 2],
}

pub fn addresses() -> Addresses {
    Addresses {
        source: Ipv6Addr::LOCALHOST,
        source_port: 1111,
        destination: Ipv6Addr::LOCALHOST,
        destination_port: 2222,
    }
}

pub fn connect(sites: &mut [Site; 2]) -> Connection {
    connect_of(sites, USER)
}

/// The same for programs of a user.
pub fn connect_of(sites: &mut [Site; 2], user: u32) -> Connection {
    let files = sites.each_ref().map(|site| memory(site.ring));
    let (program, socket) = sockets();
    let asking = sites[0].stream_of(user, 2, Opening::Connect, &files[0]);
    sites[0].poller.attach(&asking, socket.into());
    sites[0].poller.command(Command::Connect {
        stream: asking.clone(),
        addresses: addresses(),
    });
    let incoming = sites[1].until(|notice| matches!(notice, Notice::Incoming { .. }));
    let Notice::Incoming { id, .. } = incoming else {
        unreachable!()
    };
    let (served, socket) = sockets();
    let asked = sites[1].stream_of(user, 1, Opening::Accept(id), &files[1]);
    sites[1].poller.command(Command::Accept {
        id,
        stream: asked.clone(),
    });
    sites[1].poller.attach(&asked, socket.into());
    let ticket = asking.ticket;
    sites[0].until(|notice| *notice == Notice::Established { ticket });
    Connection {
        programs: [program, served],
        files,
        streams: [asking, asked],
    }
}

/// Asks, and is refused.
pub fn refused(sites: &mut [Site; 2], why: Refusal) {
    let file = memory(sites[0].ring);
    let asking = sites[0].stream(2, Opening::Connect, &file);
    let ticket = asking.ticket;
    sites[0].poller.command(Command::Connect {
        stream: asking,
        addresses: addresses(),
    });
    let incoming = sites[1].until(|notice| matches!(notice, Notice::Incoming { .. }));
    if let Notice::Incoming { id, .. } = incoming {
        sites[1].poller.command(Command::Refuse { id, why });
    }
    sites[0].until(|notice| *notice == Notice::Refused { ticket, why });
    sites[0].until(|notice| *notice == Notice::Released { ticket });
}
