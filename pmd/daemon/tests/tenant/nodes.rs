//! Two nodes on this machine, on models of the device that are linked, and stand-ins for the shim of a program that
//! connects and of one that listens. Node *n* has the address 127.0.0.*n*.

use std::io::Read;
use std::net::{
    Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream,
};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, connect,
    getsockname, listen, setsockopt, socket, sockopt,
};
use rdsock_shm::control::{Between, Message, Reached, Request, from_bytes, kind, request as what};

use super::{Answer, Daemon, Tenant, announcement, cookie_of, netns_of, request};

/// Streams between the nodes have small rings.
const FABRIC: &str = "connect_timeout_us = 10000000\nring_size = 65536\n";

/// The daemons of nodes 1 and 2.
pub struct Nodes {
    pub daemons: [Daemon; 2],
    _meet: tempfile::TempDir,
}

impl Nodes {
    /// With these lines in front of the configuration of each.
    pub fn start(top: [&str; 2]) -> Self {
        Self::start_with(top, |_| {})
    }

    /// The same with something done to the command of each.
    pub fn start_with(top: [&str; 2], change: impl Fn(&mut Command)) -> Self {
        Self::start_of(top, "", "", change)
    }

    /// Among so many further nodes, which are not there, with these lines of configuration.
    pub fn start_among(others: u8, fabric: &str) -> Self {
        let other = |id| format!(", {{ id = {id}, addresses = [\"127.0.0.{id}\"] }}");
        let others: String = (3..3 + others).map(other).collect();
        Self::start_of(["", ""], fabric, &others, |_| {})
    }

    fn start_of(top: [&str; 2], fabric: &str, others: &str, change: impl Fn(&mut Command)) -> Self {
        let meet = tempfile::tempdir().unwrap();
        std::fs::set_permissions(&meet, PermissionsExt::from_mode(0o700)).unwrap();
        let config = |node: usize| {
            format!(
                "{}\n[fabric]\nnode = {}\ndevice = \"model:{}\"\n{FABRIC}{fabric}\
                 nodes = [{{ id = 1, addresses = [\"127.0.0.1\"] }}, \
                 {{ id = 2, addresses = [\"127.0.0.2\"] }}{others}]\n",
                top[node],
                node + 1,
                meet.path().display(),
            )
        };
        let nodes = Nodes {
            daemons: [0, 1].map(|node| Daemon::start_with(&config(node), &change)),
            _meet: meet,
        };
        nodes.wait_until_met();
        nodes
    }

    /// Waits until each reaches the other.
    pub fn wait_until_met(&self) {
        for daemon in &self.daemons {
            daemon.wait_until("the nodes have met", |stat| {
                stat["fabric"]["nodes"][0]["up"] == true
            });
        }
    }

    pub fn client(&self) -> &Daemon {
        &self.daemons[0]
    }

    pub fn server(&self) -> &Daemon {
        &self.daemons[1]
    }
}

/// An IPv4 address as messages have it.
pub fn octets(address: Ipv4Addr) -> [u8; 16] {
    address.to_ipv6_mapped().octets()
}

/// A program of node 2 that listens there.
pub struct Server {
    pub tenant: Tenant,
    pub listener: TcpListener,
    /// What came on each accepted connection first, where it is accepted.
    received: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Listens and accepts nobody.
    pub fn deaf(daemon: &Daemon, backlog: i32) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 2), 0)).unwrap();
        listen(&listener, Backlog::new(backlog).unwrap()).unwrap();
        let mut tenant = Tenant::attach(daemon);
        tenant.ask_for(&listens(&listener));
        let known = |stat: &serde_json::Value| stat["fabric"]["listeners"].as_u64() >= Some(1);
        daemon.wait_until("it listens", known);
        Server {
            tenant,
            listener,
            received: Arc::default(),
        }
    }

    /// Listens, accepts, and reads.
    pub fn start(daemon: &Daemon) -> Self {
        let server = Self::deaf(daemon, 1024);
        let listener = server.listener.try_clone().unwrap();
        let received = server.received.clone();
        std::thread::spawn(move || {
            // Its threads end with the test's process.
            while let Ok((mut stream, _)) = listener.accept() {
                let received = received.clone();
                let read = move || {
                    let mut bytes = [0; 64];
                    if let Ok(length @ 1..) = stream.read(&mut bytes) {
                        let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
                        received.lock().unwrap().push(text);
                        // Open until the other end closes.
                        while let Ok(1..) = stream.read(&mut bytes) {}
                    }
                };
                let small = std::thread::Builder::new().stack_size(64 << 10);
                small.spawn(read).unwrap();
            }
        });
        server
    }

    pub fn address(&self) -> SocketAddrV4 {
        match self.listener.local_addr().unwrap() {
            SocketAddr::V4(address) => address,
            SocketAddr::V6(_) => unreachable!(),
        }
    }

    pub fn received(&self) -> Vec<String> {
        self.received.lock().unwrap().clone()
    }

    /// Whether this comes within a while.
    pub fn receives(&self, text: &str, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        loop {
            if self.received().iter().any(|received| received == text) {
                return true;
            }
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What a shim says of a socket that listens.
pub fn listens(listener: &TcpListener) -> Request {
    let SocketAddr::V4(local) = listener.local_addr().unwrap() else {
        unreachable!()
    };
    Request {
        fd: listener.as_raw_fd(),
        cookie: cookie_of(listener),
        netns: netns_of(listener),
        local: octets(*local.ip()),
        local_port: local.port().into(),
        ..request(what::LISTENS, 0, 0)
    }
}

/// A socket that is bound to a port of this host, and not connected.
pub struct Bound {
    socket: OwnedFd,
    pub port: u16,
}

impl Bound {
    /// To a port, or any with 0.
    pub fn new(port: u16) -> nix::Result<Self> {
        Self::at(Ipv4Addr::LOCALHOST, port)
    }

    /// The same at one of this host's addresses.
    pub fn at(ip: Ipv4Addr, port: u16) -> nix::Result<Self> {
        Self::over(SockType::Stream, ip, port)
    }

    /// The same of another kind.
    pub fn over(kind: SockType, ip: Ipv4Addr, port: u16) -> nix::Result<Self> {
        let socket = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)?;
        let name = SockaddrIn::from(SocketAddrV4::new(ip, port));
        bind(socket.as_raw_fd(), &name)?;
        let port = getsockname::<SockaddrIn>(socket.as_raw_fd())?.port();
        Ok(Bound { socket, port })
    }

    /// To a port that others share.
    pub fn beside(place: SocketAddrV4) -> nix::Result<Self> {
        let (family, kind) = (AddressFamily::Inet, SockType::Stream);
        let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, sockopt::ReusePort, &true)?;
        bind(socket.as_raw_fd(), &SockaddrIn::from(place))?;
        let port = place.port();
        Ok(Bound { socket, port })
    }

    /// To a port of IPv6, of which the port of IPv4 with that number is no part.
    pub fn of_six_only() -> nix::Result<Self> {
        let (family, kind) = (AddressFamily::Inet6, SockType::Stream);
        let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
        let name = SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0));
        bind(socket.as_raw_fd(), &name)?;
        let port = getsockname::<SockaddrIn6>(socket.as_raw_fd())?.port();
        Ok(Bound { socket, port })
    }

    /// At a device alone: another one may be bound to the same port at the others.
    pub fn at_device(device: &str) -> nix::Result<Self> {
        let bound = Bound::at(Ipv4Addr::UNSPECIFIED, 0)?;
        setsockopt(&bound.socket, sockopt::BindToDevice, &device.into())?;
        Ok(bound)
    }

    /// To no port yet.
    pub fn not_yet() -> nix::Result<Self> {
        let (family, kind) = (AddressFamily::Inet, SockType::Stream);
        let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Bound { socket, port: 0 })
    }

    /// At any address, also one that this host does not have.
    pub fn anywhere(ip: Ipv4Addr) -> nix::Result<Self> {
        let (family, kind) = (AddressFamily::Inet, SockType::Stream);
        let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, sockopt::IpFreebind, &true)?;
        let name = SockaddrIn::from(SocketAddrV4::new(ip, 0));
        bind(socket.as_raw_fd(), &name)?;
        let port = getsockname::<SockaddrIn>(socket.as_raw_fd())?.port();
        Ok(Bound { socket, port })
    }

    /// To the anchors' port of the daemon.
    pub fn connect(self, anchor: u32) -> nix::Result<TcpStream> {
        let port = anchor.try_into().map_err(|_| Errno::EINVAL)?;
        let to = SockaddrIn::new(127, 0, 0, 1, port);
        connect(self.socket.as_raw_fd(), &to)?;
        Ok(self.socket.into())
    }
}

/// A program of node 1 that connects to node 2.
pub struct Client {
    pub tenant: Tenant,
    /// Where it says that its sockets are.
    pub netns: u64,
    questions: u64,
}

impl Client {
    pub fn at(socket: &Path) -> Self {
        Self::over(Tenant::attach_at(socket))
    }

    /// As this tenant.
    pub fn over(tenant: Tenant) -> Self {
        Client {
            tenant,
            netns: netns_of(&TcpListener::bind("127.0.0.1:0").unwrap()),
            questions: 0,
        }
    }

    /// Asks whether a connect may go to another node.
    pub fn ask(&mut self, from: &Bound, to: SocketAddrV4) {
        self.ask_as(from, (Ipv4Addr::LOCALHOST, from.port), to);
    }

    /// The same, as if the socket were bound elsewhere.
    pub fn ask_as(&mut self, from: &Bound, name: (Ipv4Addr, u16), to: SocketAddrV4) {
        self.questions += 1;
        let question = Between {
            question: self.questions,
            netns: self.netns,
            local: octets(name.0),
            peer: octets(*to.ip()),
            local_port: name.1.into(),
            peer_port: to.port().into(),
            fd: from.socket.as_raw_fd(),
            reserved: 0,
        };
        let message = Message::new(kind::REACH, &question);
        self.tenant.send(message.as_bytes(), &[]);
    }

    /// The answer to the question asked last.
    pub fn answer(&mut self) -> Reached {
        loop {
            match self.tenant.receive() {
                Answer::Message(kind::REACHED, body, _) => {
                    let reached: Reached = from_bytes(&body).unwrap();
                    if reached.question == self.questions {
                        return reached;
                    }
                }
                Answer::Message(..) => {}
                Answer::Closed => panic!("hung up"),
            }
        }
    }

    pub fn reach(&mut self, from: &Bound, to: SocketAddrV4) -> Reached {
        self.ask(from, to);
        self.answer()
    }

    /// The same from a new socket, as often as it takes: a machine that is busy may have no time for a connect.
    pub fn reach_at_last(&mut self, to: SocketAddrV4) -> (Bound, Reached) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let from = Bound::new(0).unwrap();
            let reached = self.reach(&from, to);
            if reached.ticket != 0 {
                return (from, reached);
            }
            assert!(Instant::now() < end, "reason {}", reached.reason);
        }
    }

    /// Makes the anchor, and announces it as a shim does.
    pub fn go(&mut self, from: Bound, reached: &Reached) -> nix::Result<TcpStream> {
        let stream = from.connect(reached.anchor_port)?;
        let number = self.questions as u32 & 0xfff;
        self.tenant.ask_for(&Request {
            stream_id: reached.ticket,
            ..announcement(number, self.questions as u32, &stream, 1)
        });
        Ok(stream)
    }
}
