//! Two nodes at work: data, notifications, mail, interrupts.

use crate::node::{MEMORY, Node};
use crate::{Outcome, check};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdsock_rde::{Data, Kind, Notify, Operation};
use rdsock_vfio::{Device, EventFd, EventFlags};
use std::os::fd::AsFd;
use std::sync::Arc;

const CHUNK: usize = 64 << 10;
const ROUNDS: u64 = 200;

pub fn huge_pages(one: &Node, two: &Node) -> Outcome {
    check(one.huge && two.huge, || "it has ordinary pages".into())
}

/// Node 1 fills the memory of node 2, which answers by mail.
pub fn exchange(one: &mut Node, two: &mut Node) -> Outcome {
    for round in 0..ROUNDS {
        let (len, at) = match round % 10 {
            0 => (CHUNK, round as usize * 7 * 64 % (MEMORY - CHUNK)),
            _ => (64, round as usize * 64),
        };
        let sent: Vec<u8> = (0..len)
            .map(|i| (i as u64 * 31 + round * 17) as u8)
            .collect();
        check(one.local.copy_in(0, &sent), || "no room".into())?;
        let pieces = [one.local.piece(0, len as u32).ok_or("no piece")?];
        let status = one.finish(
            2,
            Operation::Write {
                to: two.remote(at as u64),
                data: Data::Pieces(&pieces),
                word: None,
                notify: Some(Notify {
                    set: 0,
                    payload: &round.to_le_bytes(),
                }),
            },
        )?;
        check(status.is_ok(), || {
            format!("round {round} ended with {status:?}")
        })?;
        let message = two.message()?;
        let right = message.source == 1
            && message.kind == Kind::Notification
            && message.length == len as u32
            && message.payload[..8] == round.to_le_bytes();
        check(right, || format!("round {round} brought {message:?}"))?;
        let mut arrived = vec![0; len];
        let memory = two.region.memory().ok_or("no memory")?;
        check(memory.copy_out(at, &mut arrived) && arrived == sent, || {
            format!("round {round} brought other bytes")
        })?;

        two.set.send(1, 0, &(!round).to_le_bytes())?;
        let answer = one.message()?;
        let right = answer.source == 2
            && answer.kind == Kind::Window
            && answer.payload[..8] == (!round).to_le_bytes();
        check(right, || format!("round {round} was answered {answer:?}"))?;
    }
    let stats = one.set.stats();
    check(stats.doorbells <= stats.posted, || format!("{stats:?}"))
}

/// Node 2 sleeps on its interrupt, and is woken by a message. Before that, and without ARM, it is not.
pub fn sleep_and_wake(one: &mut Node, two: &mut Node) -> Outcome {
    let event = EventFd::from_flags(EventFlags::EFD_NONBLOCK | EventFlags::EFD_CLOEXEC)?;
    let event = Arc::new(event);
    two.device.set_interrupt(1, Some(event.clone()))?;
    let fired = |ms: u16| -> Result<bool, nix::Error> {
        let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut fds, PollTimeout::from(ms))? == 1)
    };
    for round in 0..20u64 {
        one.set.send(2, 0, b"not armed")?;
        two.message()?;
        check(!fired(20)?, || {
            format!("round {round}: an interrupt that nobody asked for")
        })?;
        two.set.arm();
        check(!fired(20)?, || {
            format!("round {round}: an interrupt without a cause")
        })?;
        one.set.send(2, 0, b"wake up")?;
        check(fired(20_000)?, || format!("round {round}: no interrupt"))?;
        event.read()?;
        two.message()?;
        // What comes before it is armed fires at once.
        one.set.send(2, 0, b"before")?;
        crate::node::wait("the window", || Ok(one.set.outstanding() == 0))?;
        two.set.arm();
        check(fired(20_000)?, || {
            format!("round {round}: no interrupt for what was there")
        })?;
        event.read()?;
        two.message()?;
    }
    two.device.set_interrupt(1, None)?;
    Ok(())
}
