//! The TCP sockets that a fuzzer holds, and the memory of which it held when: a PROMOTE for any other is
//! a fault of the daemon's.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use rdsock_shm::control::Request;

use crate::dice::Dice;
use crate::stock::linger;
use crate::tenant::{announcement, cookie};

/// Held at most at a time.
const MOST: usize = 24;
/// Remembered at most. A fuzzer makes far fewer.
const REMEMBERED: usize = 2_000_000;

/// One end of a connection.
pub struct Socket {
    pub stream: TcpStream,
    /// What both ends write into a stream's memory: the cookie of the end that connected.
    pub pair: u64,
    pub active: u32,
    /// What a true announcement of it says.
    pub truth: Request,
}

/// See the module's text.
pub struct Sockets {
    listener: TcpListener,
    pub held: Vec<Socket>,
    /// The pair of each (descriptor, cookie) that this process ever held.
    ever: HashMap<(i32, u64), u64>,
}

impl Sockets {
    pub fn new() -> Self {
        Sockets {
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            held: Vec::new(),
            ever: HashMap::new(),
        }
    }

    /// Takes over an end.
    pub fn hold(&mut self, stream: TcpStream, pair: u64, active: u32, dice: &mut Dice) {
        if self.held.len() >= MOST {
            self.close_one(dice);
        }
        if stream.peer_addr().is_err() {
            // Its other end was closed in the meantime.
            return;
        }
        let truth = announcement(0, 0, &stream, active);
        self.ever.insert((stream.as_raw_fd(), truth.cookie), pair);
        assert!(self.ever.len() < REMEMBERED, "too much to remember");
        self.held.push(Socket {
            stream,
            pair,
            active,
            truth,
        });
    }

    /// Makes a connection.
    pub fn make(&mut self, dice: &mut Dice) {
        let Ok(connector) = TcpStream::connect(self.listener.local_addr().unwrap()) else {
            return;
        };
        let (accepted, _) = self.listener.accept().unwrap();
        // No port is left waiting behind it.
        linger(&connector, 0);
        let pair = cookie(&connector);
        self.hold(connector, pair, 1, dice);
        self.hold(accepted, pair, 0, dice);
    }

    /// Any of them.
    pub fn any(&self, dice: &mut Dice) -> Option<&Socket> {
        dice.one_of(&self.held)
    }

    pub fn close_one(&mut self, dice: &mut Dice) {
        drop(self.take(dice));
    }

    pub fn take(&mut self, dice: &mut Dice) -> Option<Socket> {
        let count = self.held.len();
        (count > 0).then(|| self.held.swap_remove(dice.below(count)))
    }

    /// Closes one and opens it again, as another connection: often with the same number.
    pub fn replace_one(&mut self, dice: &mut Dice) {
        self.close_one(dice);
        self.make(dice);
    }

    /// The pair of a socket that this process holds, or held, under this number.
    pub fn pair_of(&self, fd: i32, cookie: u64) -> Option<u64> {
        self.ever.get(&(fd, cookie)).copied()
    }
}
