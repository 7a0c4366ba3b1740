//! Two processes with one node each, linked: this one measures, and starts itself again as the far end, which
//! answers. Each runs its own device in its own polling loop.

use crate::bench::{Node, POLLS, node};
use crate::cli::Test;
use crate::measure::DEPTH;
use crate::plan::{Error, Plan};
use rdsock_model::{Chaos, Counters, Fabric};
use rdsock_rde::spec::Key;
use rdsock_rde::{Data, Kind, Message, Notify, Operation, Remote, Work};
use rdsock_vfio::model::ModelDevice;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the notification of a write says.
const NOTE: &[u8] = b"stream, position";
/// Time for the far end to start.
const START: Duration = Duration::from_secs(10);

/// One of the two nodes.
pub struct Linked {
    node: Node,
    fabric: Fabric,
    start: Instant,
    other: u16,
    remote: Remote,
    far: Option<Far>,
}

/// The process of the far end, and where both meet.
struct Far {
    process: Child,
    _dir: tempfile::TempDir,
}

impl Drop for Far {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Linked {
    /// Starts the far end, and meets it.
    pub fn near(plan: &Plan) -> Result<Self, Error> {
        let dir = tempfile::tempdir().map_err(Error::Far)?;
        let mut far = Command::new(std::env::current_exe().map_err(Error::Far)?);
        let place = dir.path().join("fabric");
        far.arg("--far").arg(&place);
        far.args(["--size", &plan.size.to_string()]);
        // It inherits the core on which it is started.
        plan.device_core.map(core_affinity::set_for_current);
        let process = far.stdin(Stdio::piped()).spawn().map_err(Error::Far)?;
        plan.core.map(core_affinity::set_for_current);
        let far = Far { process, _dir: dir };
        let mut near = Linked::join(&place, 1, plan.size)?;
        near.far = Some(far);
        near.meet()?;
        Ok(near)
    }

    /// Answers until the near end has gone.
    pub fn far(dir: &Path, size: u32) -> Result<(), Error> {
        std::thread::spawn(|| {
            // The near end holds the other side of the pipe, and never writes.
            let _ = std::io::stdin().read(&mut [0]);
            std::process::exit(0);
        });
        let mut far = Linked::join(dir, 2, size)?;
        far.meet()?;
        loop {
            let kind = match far.message() {
                Ok(message) => message.kind,
                // The near end may be measuring something that needs no answer.
                Err(Error::Silence) => continue,
                Err(error) => return Err(error),
            };
            match kind {
                Kind::Window => far.send(&[0x5a; 48])?,
                Kind::Notification => far.post(Some(NOTE), false)?,
            }
            far.reap()?;
        }
    }

    fn join(dir: &Path, id: u16, size: u32) -> Result<Self, Error> {
        let fabric = Fabric::new(Chaos::default());
        let device = Arc::new(ModelDevice::linked(&fabric, dir, id, 1)?);
        let node = node(device, id, size)?;
        // The other one takes its time to start, and none of it is a failure.
        node.rde.management().set_stall_timeout(Duration::ZERO);
        Ok(Linked {
            remote: Remote {
                key: Key(0),
                offset: 0,
            },
            node,
            fabric,
            start: Instant::now(),
            other: 3 - id,
            far: None,
        })
    }

    /// Each tells the other where to write.
    fn meet(&mut self) -> Result<(), Error> {
        // In the lane of the writes, which must not come before it.
        let key = self.node.region.key().0.to_le_bytes();
        self.tell(&key)?;
        let since = Instant::now();
        let message = loop {
            match self.message() {
                Err(Error::Silence) if since.elapsed() < START => {}
                message => break message?,
            }
        };
        let [a, b, c, d, ..] = message.payload;
        self.remote.key = Key(u32::from_le_bytes([a, b, c, d]));
        Ok(())
    }

    /// What this device has done.
    pub fn counters(&self) -> Counters {
        self.node.device.function().counters()
    }

    /// One operation, and its answer if it gets one.
    pub fn operation(&mut self, test: Test) -> Result<(), Error> {
        match test {
            Test::Write => {
                self.post(None, true)?;
                self.until(|linked| linked.reap())
            }
            Test::WriteNotify => {
                self.post(Some(NOTE), false)?;
                self.message()?;
                self.reap().map(|_| ())
            }
            Test::Mailbox => {
                self.send(&[0x5a; 48])?;
                self.message().map(|_| ())
            }
            Test::WriteBw => {
                while self.node.set.outstanding() >= DEPTH {
                    self.until(|linked| linked.reap())?;
                }
                self.post(None, true)
            }
        }
    }

    fn send(&mut self, payload: &[u8]) -> Result<(), Error> {
        self.node.set.send(self.other, 0, payload)?;
        self.step();
        Ok(())
    }

    fn post(&mut self, note: Option<&[u8]>, report: bool) -> Result<(), Error> {
        let operation = Operation::Write {
            to: self.remote,
            data: Data::Pieces(&self.node.piece),
            word: None,
            notify: note.map(|payload| Notify { set: 0, payload }),
        };
        self.node.set.post(&Work {
            target: self.other,
            operation,
            tag: 0,
            report,
        })?;
        self.node.set.ring();
        self.step();
        Ok(())
    }

    fn tell(&mut self, payload: &[u8]) -> Result<(), Error> {
        self.node.set.post(&Work {
            target: self.other,
            operation: Operation::Message(Notify { set: 0, payload }),
            tag: 0,
            report: false,
        })?;
        self.node.set.ring();
        self.step();
        Ok(())
    }

    fn step(&self) {
        self.fabric.step(self.start.elapsed().as_nanos() as u64);
    }

    /// Takes completions: something when there was a report.
    fn reap(&mut self) -> Result<Option<()>, Error> {
        let mut got = None;
        self.node
            .set
            .poll_completions(16, |completion| got = Some(completion.status))?;
        match got {
            Some(status) if !status.is_ok() => Err(Error::Status(status)),
            got => Ok(got.map(|_| ())),
        }
    }

    fn message(&mut self) -> Result<Message, Error> {
        self.until(|linked| {
            let mut got = None;
            let set = &mut linked.node.set;
            set.poll_messages(1, |message| got = Some(*message))?;
            Ok(got)
        })
    }

    /// Polls, and runs the device, until `take` gets something.
    fn until<T>(
        &mut self,
        mut take: impl FnMut(&mut Self) -> Result<Option<T>, Error>,
    ) -> Result<T, Error> {
        let mut since = None;
        loop {
            for _ in 0..POLLS {
                if let Some(got) = take(self)? {
                    return Ok(got);
                }
                self.step();
            }
            if since.get_or_insert_with(Instant::now).elapsed() > Duration::from_secs(1) {
                self.node.set.check()?;
                return Err(Error::Silence);
            }
        }
    }
}
