//! The loop of a poll core, on two nodes whose devices are models in this process.
//!
//! Node 1 writes numbered lines into the memory of node 2, each with a notification; node 2 reads the line
//! where the notification says, and answers with a message through its send window.
//! A queue set that is dropped forgets what it has not sent, so the client ends with a message that it
//! waits for, and the server ends with that.
//!
//!     cargo run --release -p rdsock-rde --example echo

use rdsock_model::{Chaos, Fabric, Running};
use rdsock_rde::{Data, DeviceFailed, NotPosted, Notify, Operation, QueueSet, Rde, Remote, Rights};
use rdsock_rde::{Sizes, Work};
use rdsock_vfio::{Shared, Space, model::ModelDevice};
use std::error::Error;
use std::sync::Arc;

const LINES: u64 = 1000;
/// Lines on their way at a time.
const WINDOW: u64 = 16;
const LINE: u64 = 64;
/// In place of a number: there are no more.
const END: u64 = u64::MAX;
/// Completions or messages taken in one turn.
const BATCH: usize = 32;

fn main() -> Result<(), Box<dyn Error>> {
    // Two devices on one fabric, and a thread that plays the hardware.
    let fabric = Fabric::new(Chaos::default());
    let (client, server) = (open(&fabric, 1, 2)?, open(&fabric, 2, 1)?);
    let _hardware = Running::start(fabric, false, || {})?;

    // Memory of the server that node 1, and nobody else, may write.
    let memory = Arc::new(server.space().allocate((WINDOW * LINE) as usize)?);
    let lines = Shared::new(&memory, 0, memory.len()).ok_or("no memory")?;
    let region = server.register(lines.clone(), Rights::Write, Some(1))?;
    let key = region.key();

    let serving = server.queue_set(0, Sizes::default())?;
    let asking = client.queue_set(0, Sizes::default())?;
    let thread = std::thread::spawn(move || serve(serving, &lines));
    let sum = ask(asking, |number| Remote {
        key,
        offset: number % WINDOW * LINE,
    })?;
    let stats = thread.join().map_err(|_| "the server panicked")??;
    println!("{LINES} lines written and answered; sum of the answers {sum}");
    println!("server: {stats:?}");
    Ok(())
}

/// Opens the device of node `node`, which `peer` may reach.
fn open(fabric: &Fabric, node: u16, peer: u16) -> Result<Rde, Box<dyn Error>> {
    let device = Arc::new(ModelDevice::new(fabric, 1));
    let rde = Rde::open(Space::new(device))?;
    rde.management().join(node, &[peer]);
    Ok(rde)
}

/// Writes all lines, and returns the sum of the answers.
fn ask(mut set: QueueSet, place: impl Fn(u64) -> Remote) -> Result<u64, DeviceFailed> {
    let (mut asked, mut answered, mut sum) = (0, 0, 0);
    while answered < LINES {
        // 1. What has completed. Nothing was asked to be reported here, so only failures come.
        set.poll_completions(BATCH, |done| eprintln!("failed: {done:?}"))?;
        // 2. What has arrived.
        set.poll_messages(BATCH, |message| {
            sum += word(&message.payload);
            answered += 1;
        })?;
        // 3. What there is to send, as much as the other end has room for.
        while asked < LINES && asked < answered + WINDOW {
            let line = format!("line {asked}");
            let work = Work {
                target: 2,
                operation: Operation::Write {
                    to: place(asked),
                    data: Data::Inline(line.as_bytes()),
                    word: None,
                    notify: Some(Notify {
                        set: 0,
                        payload: &asked.to_le_bytes(),
                    }),
                },
                tag: asked,
                report: false,
            };
            match set.post(&work) {
                Ok(()) => asked += 1,
                Err(NotPosted::Failed(failed)) => return Err(failed),
                Err(_) => break,
            }
        }
        // 4. One doorbell for all of it.
        set.ring();
    }
    let end = Notify {
        set: 0,
        payload: &END.to_le_bytes(),
    };
    let last = Work {
        target: 2,
        operation: Operation::Message(end),
        tag: 0,
        report: true,
    };
    match set.post(&last) {
        Err(NotPosted::Failed(failed)) => return Err(failed),
        other => other.expect("the queue is empty by now"),
    }
    set.ring();
    let mut ended = false;
    while !ended {
        set.poll_completions(BATCH, |_| ended = true)?;
    }
    Ok(sum)
}

/// Answers each line with the number in it.
fn serve(mut set: QueueSet, lines: &Shared) -> Result<rdsock_rde::Stats, DeviceFailed> {
    let mut answers = std::collections::VecDeque::with_capacity(WINDOW as usize);
    let mut ended = false;
    while !ended {
        set.poll_completions(BATCH, |done| eprintln!("failed: {done:?}"))?;
        set.poll_messages(BATCH, |message| {
            if word(&message.payload) == END {
                ended = true;
                return;
            }
            // The notification comes when the line is visible. Both are the other node's: not believed.
            let at = word(&message.payload) % WINDOW * LINE;
            let mut line = vec![0; message.length.min(LINE as u32) as usize];
            if lines.copy_out(at as usize, &mut line) {
                let text = String::from_utf8_lossy(&line);
                answers.push_back(text.trim_start_matches("line ").parse().unwrap_or(0));
            }
        })?;
        while let Some(answer) = answers.front() {
            let number: u64 = *answer;
            match set.send(1, 0, &number.to_le_bytes()) {
                Ok(_) => answers.pop_front(),
                Err(NotPosted::Failed(failed)) => return Err(failed),
                Err(_) => break,
            };
        }
    }
    Ok(set.stats())
}

fn word(payload: &[u8; 48]) -> u64 {
    payload[..8]
        .iter()
        .rev()
        .fold(0, |word, byte| word << 8 | u64::from(*byte))
}
