//! The client: orders one measurement of a server, runs it, and reports.
//!
//! Under `--control` a parent process has it warm up until the parent says `go` on stdin, and keeps the connection
//! open after the measurement until the parent says `finish`: so the parent can look at the live connection.

mod control;
mod cps;
mod one_way;
mod open_loop;
mod pace;
mod round_trip;

use crate::clock::Clock;
use crate::core_pin;
use crate::error::{Error, Result};
use crate::link::Link;
use crate::outcome::Outcome;
use crate::plan::{ClientPlan, Mode};
use crate::wire::{Order, Tally};
use rdsock_output::line;

/// One receive call of the server asks for at least so many bytes in the one-way modes.
const RECV_BYTES: u64 = 64 << 10;

/// Runs the measurement and prints its result.
pub fn run(plan: &ClientPlan) -> Result<()> {
    core_pin::pin(plan.core)?;
    if let Some(seconds) = plan.timeout {
        // SAFETY: no memory is passed; SIGALRM is left at its default, which ends the process.
        unsafe { libc::alarm(seconds) };
    }
    let clock = Clock::calibrated();
    let link = plan.address.connect(plan.wait)?;
    if !plan.nagle {
        link.set_nodelay()?;
    }
    let mut control = plan
        .control
        .then(|| control::Control::start(&link))
        .transpose()?;
    if let Some(control) = &mut control {
        control.warm_until_go(&link, plan.wait)?;
    }
    let outcome = measure(plan, &link, &clock)?;
    match &mut control {
        Some(control) => control.report_and_wait(&outcome),
        None if plan.json => Ok(rdsock_output::json(serde_json::json!(outcome))?),
        None => Ok(line!("{outcome}")?),
    }
}

/// Orders one phase and runs it.
fn measure(plan: &ClientPlan, link: &Link, clock: &Clock) -> Result<Outcome> {
    link.send_all(&order(plan).encode())?;
    match (plan.mode, plan.rate_limit) {
        (Mode::Rtt, None) => round_trip::run(plan, link, clock),
        (Mode::Rtt, Some(per_second)) => open_loop::run(plan, per_second, link, clock),
        (Mode::Rate | Mode::Bw, _) => one_way::run(plan, link, clock),
        (Mode::Cps, _) => cps::run(plan, link, clock),
    }
}

/// What the plan asks of the server.
fn order(plan: &ClientPlan) -> Order {
    Order {
        mode: plan.mode,
        wait: plan.wait,
        verify: plan.verify,
        size: plan.size as u64,
        warmup_ns: plan.warmup.as_nanos() as u64,
        recv_bytes: RECV_BYTES.max(plan.size as u64),
    }
}

/// Receives the server's tally.
fn tally(link: &Link) -> Result<Tally> {
    let record = link
        .recv_record()?
        .ok_or_else(|| Error::Peer("the server closed before its tally came".into()))?;
    Tally::decode(&record)
}

/// An error where `wrong` bytes came in `what`.
fn check_payload(wrong: u64, what: &str) -> Result<()> {
    match wrong {
        0 => Ok(()),
        wrong => Err(Error::Peer(format!(
            "WRONG BYTES: {wrong} bytes of {what} were not as they were sent"
        ))),
    }
}
