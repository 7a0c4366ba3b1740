//! The server: echoes, receives or accepts as each client orders; one thread for each connection.

use crate::address::{Address, Listener};
use crate::clock::Clock;
use crate::core_pin;
use crate::error::{Doing, Error, Result};
use crate::link::Link;
use crate::pattern::{END, Pattern};
use crate::plan::{Mode, ServerPlan, Wait};
use crate::wire::{Order, Tally};
use rdsock_output::line;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Serves until the first client has gone (`--once`) or for ever.
pub fn run(plan: &ServerPlan) -> Result<()> {
    core_pin::pin(plan.core)?;
    let clock = Clock::calibrated();
    let listener = Listener::bind(&plan.address)?;
    if plan.json {
        let address = listener.address.to_string();
        rdsock_output::json(
            json!({"event": "listening", "pid": std::process::id(), "address": address}),
        )?;
    } else {
        line!("listening at {}", listener.address)?;
    }
    let wait = plan.wait;
    loop {
        let link = listener.accept(Wait::Block)?;
        let session = Session {
            link,
            address: listener.address.clone(),
            wait,
            clock,
        };
        if plan.once {
            return session.serve();
        }
        let serve = move || {
            if let Err(error) = session.serve() {
                rdsock_output::complain("rdsock-perf", format_args!("a client: {error}"));
            }
        };
        std::thread::Builder::new()
            .spawn(serve)
            .doing(|| "start a thread for a client")?;
    }
}

/// One client.
struct Session {
    link: Link,
    address: Address,
    wait: Option<Wait>,
    clock: Clock,
}

impl Session {
    /// Obeys orders until the client closes the connection.
    fn serve(mut self) -> Result<()> {
        self.link.set_nodelay()?;
        while let Some(record) = self.link.recv_record()? {
            let mut order = Order::decode(&record)?;
            order.wait = self.wait.unwrap_or(order.wait);
            self.link.set_wait(order.wait);
            match order.mode {
                Mode::Rtt => self.echo(&order)?,
                Mode::Rate | Mode::Bw => self.receive(&order)?,
                Mode::Cps => self.accept(&order)?,
            }
        }
        Ok(())
    }

    /// Sends each message back, the last one too.
    fn echo(&self, order: &Order) -> Result<()> {
        let mut message = vec![0; order.size as usize];
        loop {
            self.link.recv_exact(&mut message)?;
            self.link.send_all(&message)?;
            if message.last() == Some(&END) {
                return Ok(());
            }
        }
    }

    /// Receives with large calls until the end mark, then tells what it counted.
    fn receive(&self, order: &Order) -> Result<()> {
        let mut buffer = vec![0; order.recv_bytes as usize];
        let pattern = order
            .verify
            .then(|| Pattern::new(order.recv_bytes as usize));
        let mut window = Window::new(self.clock.ticks(Duration::from_nanos(order.warmup_ns)));
        let (mut position, mut wrong) = (0, 0);
        loop {
            let received = self.link.recv_some(&mut buffer)?;
            window.add(self.clock.now(), received as u64);
            let Some(&last) = buffer[..received].last() else {
                return Err(Error::Peer(
                    "the client closed the connection in the middle of a stream".into(),
                ));
            };
            if let Some(pattern) = &pattern {
                wrong += pattern.wrong(position, &buffer[..received]);
                position += received as u64;
            }
            if last == END {
                break;
            }
        }
        let (bytes, ticks) = window.counted();
        let tally = Tally {
            bytes,
            ns: self.clock.ns(ticks),
            wrong,
            ..Tally::default()
        };
        self.link.send_all(&tally.encode())
    }

    /// Accepts and closes connections at a second listener until the client says on the first connection that it
    /// is done. The client's last connection comes after that word was acknowledged, so that the accepting
    /// thread finds `done` set however it waits.
    fn accept(&self, order: &Order) -> Result<()> {
        let listener = Listener::bind(&match &self.address {
            Address::Tcp(_) => Address::Tcp(self.short_address()?),
            Address::Unix(_) => self.address.for_short_connections(0),
        })?;
        listener.set_wait(order.wait)?;
        self.link.send_all(
            &Tally {
                port: listener.port(),
                ..Tally::default()
            }
            .encode(),
        )?;
        let (done, accepted) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let acceptor = {
            let (done, accepted, wait) = (done.clone(), accepted.clone(), order.wait);
            let accept_all = move || -> Result<()> {
                while !done.load(Ordering::Acquire) {
                    drop(listener.accept(wait)?);
                    accepted.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            };
            std::thread::Builder::new()
                .spawn(accept_all)
                .doing(|| "start the accepting thread")?
        };
        let end = self.link.recv_record();
        done.store(true, Ordering::Release);
        if end?.is_none() {
            // The client died: nobody will make the last connection, and the thread ends with the process.
            return Ok(());
        }
        let tally = || {
            Tally {
                accepted: accepted.load(Ordering::Relaxed),
                ..Tally::default()
            }
            .encode()
        };
        self.link.send_all(&tally())?;
        acceptor
            .join()
            .map_err(|_| Error::Peer("the accepting thread died".into()))??;
        self.link.send_all(&tally())
    }

    /// This connection's own local address with a port of the system's choice.
    fn short_address(&self) -> Result<std::net::SocketAddr> {
        let (local, _) = self.link.ends()?;
        let mut address: std::net::SocketAddr = local
            .parse()
            .map_err(|_| Error::Peer(format!("{local} is not an address")))?;
        address.set_port(0);
        Ok(address)
    }
}

/// Counts bytes between two receive calls: the first after the warm-up, whose own bytes do not count since they
/// were sent before, and the last.
struct Window {
    warmup: u64,
    first: Option<u64>,
    start: Option<u64>,
    last: u64,
    bytes: u64,
    /// All bytes but those of the first call, for streams shorter than the warm-up.
    all: u64,
}

impl Window {
    /// A window that opens `warmup` ticks after the first byte.
    fn new(warmup: u64) -> Self {
        Self {
            warmup,
            first: None,
            start: None,
            last: 0,
            bytes: 0,
            all: 0,
        }
    }

    /// Adds a receive call that returned at `now` with `bytes`.
    #[inline]
    fn add(&mut self, now: u64, bytes: u64) {
        self.last = now;
        match (self.start, self.first) {
            (Some(_), _) => self.bytes += bytes,
            (None, None) => {
                self.first = Some(now);
                if self.warmup == 0 {
                    self.start = Some(now);
                }
            }
            (None, Some(first)) => {
                self.all += bytes;
                if now - first >= self.warmup {
                    self.start = Some(now);
                }
            }
        }
    }

    /// Bytes and ticks of the window; of the whole stream where that was shorter than the warm-up.
    fn counted(&self) -> (u64, u64) {
        match (self.start, self.first) {
            (Some(start), _) if self.bytes > 0 => (self.bytes, self.last - start),
            (_, Some(first)) => (self.all, self.last - first),
            _ => (0, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_opens_after_the_warmup() {
        let mut window = Window::new(100);
        for (now, bytes) in [(1000, 5), (1050, 7), (1100, 11), (1150, 13), (1200, 17)] {
            window.add(now, bytes);
        }
        assert_eq!(window.counted(), (13 + 17, 100));
    }

    #[test]
    fn without_warmup_only_the_first_call_is_left_out() {
        let mut window = Window::new(0);
        for now in [10, 20, 30] {
            window.add(now, 64);
        }
        assert_eq!(window.counted(), (128, 20));
    }

    #[test]
    fn a_stream_shorter_than_the_warmup_counts_whole() {
        let mut window = Window::new(1_000_000);
        for now in [10, 20, 30] {
            window.add(now, 64);
        }
        assert_eq!(window.counted(), (128, 20));
        assert_eq!(Window::new(5).counted(), (0, 0));
    }
}
