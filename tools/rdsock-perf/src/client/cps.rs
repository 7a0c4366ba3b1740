//! Mode `cps`: connect, let the server accept and close, see the end of the stream, close; one after the other.
//!
//! The server closes first, so that the waiting time of a closed connection (TIME_WAIT) falls on its port and the
//! client never runs out of its own.

use super::tally;
use crate::address::Address;
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::latency::Latencies;
use crate::link::Link;
use crate::outcome::Outcome;
use crate::plan::{ClientPlan, Mode, Wait};
use crate::wire::RECORD;

/// Measures each connection from before `socket` to after `close`.
pub fn run(plan: &ClientPlan, link: &Link, clock: &Clock) -> Result<Outcome> {
    let server = plan.address.for_short_connections(tally(link)?.port);
    let mut samples = Latencies::preallocated();
    let mut made = 0;
    let warm = clock.now() + clock.ticks(plan.warmup);
    while clock.now() < warm {
        connect_and_close(&server, plan.wait)?;
        made += 1;
    }
    let start = clock.now();
    let end = start + clock.ticks(plan.seconds);
    let mut now = start;
    while now < end {
        let before = clock.now();
        connect_and_close(&server, plan.wait)?;
        now = clock.now();
        samples.record(clock.ns(now - before));
    }
    let seconds = clock.ns(now - start) as f64 / 1e9;
    made += samples.count();
    let accepted = stop(link, &server, plan.wait)?;
    if accepted < made {
        return Err(Error::Peer(format!(
            "{made} connections were made and only {accepted} accepted"
        )));
    }
    Ok(Outcome::of_latencies(
        Mode::Cps,
        plan.wait,
        0,
        &samples,
        seconds,
        clock,
    ))
}

/// One connection.
fn connect_and_close(server: &Address, wait: Wait) -> Result<()> {
    let link = server.connect(wait)?;
    match link.recv_some(&mut [0])? {
        0 => Ok(()),
        _ => Err(Error::Peer(
            "a byte came where only the end of the stream was expected".into(),
        )),
    }
}

/// Ends the phase: how many connections the server accepted.
fn stop(link: &Link, server: &Address, wait: Wait) -> Result<u64> {
    link.send_all(&[0; RECORD])?;
    tally(link)?;
    // The accepting thread may be asleep in `accept`: this connection wakes it. Where it has already looked up, the
    // listener may be gone, and that is as good.
    let _ = connect_and_close(server, wait);
    Ok(tally(link)?.accepted)
}
