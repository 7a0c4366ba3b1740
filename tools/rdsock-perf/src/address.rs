//! Where a server is: a TCP address or the name of a UNIX socket, and how to listen and connect there.

use crate::error::{Doing, Error, Result};
use crate::link::{Link, Stream};
use crate::plan::Wait;
use std::fmt;
use std::io;
use std::mem::size_of;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::FromRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// IP address and port.
    Tcp(SocketAddr),
    /// Path of a UNIX stream socket, or `@name` in the abstract name space.
    Unix(String),
}

impl fmt::Display for Address {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(out, "{address}"),
            Self::Unix(name) => write!(out, "unix:{name}"),
        }
    }
}

impl Address {
    /// The address of connections in mode `cps`, given the port that the server told.
    pub fn for_short_connections(&self, port: u64) -> Self {
        match self {
            Self::Tcp(address) => Self::Tcp(SocketAddr::new(address.ip(), port as u16)),
            Self::Unix(name) => Self::Unix(format!("{name}.cps")),
        }
    }

    /// Connects. While spinning the call does not sleep in the kernel.
    pub fn connect(&self, wait: Wait) -> Result<Link> {
        let connected = match (self, wait) {
            (Self::Tcp(address), Wait::Block) => TcpStream::connect(address).map(Stream::Tcp),
            (Self::Tcp(address), Wait::Spin) => connect_spinning(address).map(Stream::Tcp),
            (Self::Unix(name), _) => unix_address(name)
                .and_then(|at| UnixStream::connect_addr(&at))
                .map(Stream::Unix),
        };
        Ok(Link::new(
            connected.doing(|| format!("connect to {self}"))?,
            wait,
        ))
    }
}

/// The address of a UNIX socket from its name.
fn unix_address(name: &str) -> io::Result<UnixAddr> {
    match name.strip_prefix('@') {
        Some(name) => UnixAddr::from_abstract_name(name),
        None => UnixAddr::from_pathname(name),
    }
}

/// Connects with non-blocking calls only.
fn connect_spinning(address: &SocketAddr) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    // SAFETY: no memory is passed.
    let raw = unsafe {
        libc::socket(
            family,
            libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            0,
        )
    };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `raw` was just made and nobody else owns it.
    let stream = unsafe { TcpStream::from_raw_fd(raw) };
    loop {
        if raw_connect(raw, address) == 0 {
            return Ok(stream);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EISCONN) => return Ok(stream),
            Some(libc::EINPROGRESS | libc::EALREADY | libc::EINTR) => {}
            _ => return Err(error),
        }
    }
}

/// One call of `connect`.
fn raw_connect(fd: i32, address: &SocketAddr) -> i32 {
    match address {
        SocketAddr::V4(v4) => {
            let name = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: `name` is a whole sockaddr_in and its size is passed.
            unsafe {
                libc::connect(
                    fd,
                    (&raw const name).cast(),
                    size_of::<libc::sockaddr_in>() as u32,
                )
            }
        }
        SocketAddr::V6(v6) => {
            let name = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: `name` is a whole sockaddr_in6 and its size is passed.
            unsafe {
                libc::connect(
                    fd,
                    (&raw const name).cast(),
                    size_of::<libc::sockaddr_in6>() as u32,
                )
            }
        }
    }
}

/// A listening socket. That of a path removes the path when dropped.
pub struct Listener {
    kind: Kind,
    /// Where it listens, with the port that the system chose.
    pub address: Address,
    /// Device and number of the path that was made.
    made: Option<(u64, u64)>,
}

/// What tells the file at a path from another one that came in its place.
fn number(path: &str) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

enum Kind {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens at `address`; port 0 lets the system choose.
    pub fn bind(address: &Address) -> Result<Self> {
        let doing = || format!("listen at {address}");
        match address {
            Address::Tcp(at) => {
                let listener = TcpListener::bind(at).doing(doing)?;
                let address = Address::Tcp(listener.local_addr().doing(doing)?);
                Ok(Self {
                    kind: Kind::Tcp(listener),
                    address,
                    made: None,
                })
            }
            Address::Unix(name) => {
                let listener = unix_address(name)
                    .and_then(|at| UnixListener::bind_addr(&at))
                    .doing(doing)?;
                Ok(Self {
                    kind: Kind::Unix(listener),
                    address: address.clone(),
                    made: number(name),
                })
            }
        }
    }

    /// The port, or 0 for a UNIX socket.
    pub fn port(&self) -> u64 {
        match &self.address {
            Address::Tcp(at) => u64::from(at.port()),
            Address::Unix(_) => 0,
        }
    }

    /// Waits for the next connection. While spinning it calls a non-blocking `accept` in a loop.
    pub fn accept(&self, wait: Wait) -> Result<Link> {
        loop {
            let accepted = match &self.kind {
                Kind::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
                Kind::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
            };
            match accepted {
                Ok(stream) => return Ok(Link::new(stream, wait)),
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    return Err(Error::Io {
                        doing: format!("accept at {}", self.address),
                        source: error,
                    });
                }
            }
        }
    }

    /// Chooses how [`Listener::accept`] waits.
    pub fn set_wait(&self, wait: Wait) -> Result<()> {
        let spin = wait == Wait::Spin;
        match &self.kind {
            Kind::Tcp(listener) => listener.set_nonblocking(spin),
            Kind::Unix(listener) => listener.set_nonblocking(spin),
        }
        .doing(|| "make a listener non-blocking")
    }
}

/// Whether `accept` should just be called again: nothing there yet, or a connection that died in the queue.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(name) = &self.address
            && !name.starts_with('@')
            && number(name) == self.made
        {
            let _ = std::fs::remove_file(name);
        }
    }
}
