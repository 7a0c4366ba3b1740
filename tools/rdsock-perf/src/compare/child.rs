//! A child process that talks in lines: every wait for it has a limit, and it is killed when dropped.

use super::interrupt::{self, GLANCE};
use crate::error::{Doing, Error, Result};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{self, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How much of a child's stderr is kept, in bytes.
const KEPT: usize = 8 << 10;

/// A running child.
pub struct Child {
    name: String,
    process: process::Child,
    lines: Receiver<String>,
    complaints: Arc<Mutex<String>>,
    /// The process that does the work, where it is not the one that was started but a child of that.
    worker: Option<libc::pid_t>,
}

impl Child {
    /// Starts `command`; the kernel kills it if this process dies.
    pub fn start(name: &str, mut command: Command) -> Result<Self> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: between fork and exec only prctl is called, which is async-signal-safe and allocates nothing.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as usize);
                Ok(())
            })
        };
        let mut process = command
            .spawn()
            .doing(|| format!("start {name} ({:?})", command.get_program()))?;
        let (send, lines) = channel();
        let stdout = process.stdout.take().expect("stdout is piped");
        std::thread::spawn(move || {
            for line in BufReader::new(stdout)
                .lines()
                .map_while(std::result::Result::ok)
            {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        let complaints = Arc::new(Mutex::new(String::new()));
        let stderr = process.stderr.take().expect("stderr is piped");
        let kept = complaints.clone();
        // Not joined: a daemon that the child started may hold the pipe open for ever.
        std::thread::spawn(move || keep(stderr, &kept));
        Ok(Self {
            name: name.into(),
            process,
            lines,
            complaints,
            worker: None,
        })
    }

    /// Says one line to the child.
    pub fn tell(&mut self, word: &str) -> Result<()> {
        let stdin = self.process.stdin.as_mut().expect("stdin is piped");
        let told = writeln!(stdin, "{word}").and_then(|()| stdin.flush());
        told.map_err(|_| self.failure("ended before it was told to"))
    }

    /// Waits for the event `kind`, at most `limit`.
    pub fn event(&mut self, kind: &str, limit: Duration) -> Result<Value> {
        let line = self.line(kind, limit)?;
        let event: Value = serde_json::from_str(&line).map_err(|_| {
            self.failure(&format!(
                "said {line:?} where the event {kind:?} was expected"
            ))
        })?;
        if event["event"] != kind {
            return Err(self.failure(&format!(
                "said {line:?} where the event {kind:?} was expected"
            )));
        }
        if let Some(pid) = event["pid"]
            .as_i64()
            .and_then(|pid| libc::pid_t::try_from(pid).ok())
            && pid > 1
            && pid != self.process.id() as libc::pid_t
        {
            self.worker = Some(pid);
        }
        Ok(event)
    }

    /// Waits for the next line.
    fn line(&mut self, what: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        loop {
            interrupt::check()?;
            match self.lines.recv_timeout(GLANCE) {
                Ok(line) => return Ok(line),
                Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(self.failure(&format!(
                        "gave no {what:?} within {} s",
                        limit.as_secs_f32()
                    )));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let how = match self.wait(Duration::from_secs(1)) {
                        Ok(status) => status.to_string(),
                        Err(Error::Interrupted) => return Err(Error::Interrupted),
                        Err(_) => "it closed its output".into(),
                    };
                    return Err(self.failure(&format!("ended without {what:?} ({how})")));
                }
            }
        }
    }

    /// Waits for the end of the child, at most `limit`.
    fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            interrupt::check()?;
            if let Some(status) = self
                .process
                .try_wait()
                .doing(|| format!("wait for {}", self.name))?
            {
                self.worker = None;
                return Ok(status);
            }
            if Instant::now() >= end {
                return Err(self.failure(&format!("did not end within {} s", limit.as_secs_f32())));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for a good end of the child, at most `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<()> {
        match self.wait(limit)? {
            status if status.success() => Ok(()),
            status => Err(self.failure(&format!("failed ({status})"))),
        }
    }

    /// An error when the child has ended.
    pub fn check(&mut self) -> Result<()> {
        let ended = self.process.try_wait();
        match ended.doing(|| format!("wait for {}", self.name))? {
            None => Ok(()),
            Some(status) => Err(self.failure(&format!("ended ({status})"))),
        }
    }

    /// Asks the child to end (SIGTERM), and waits for that, at most `limit`.
    pub fn terminate(self, limit: Duration) -> Result<()> {
        // SAFETY: the child was not waited for, so its pid is its own.
        unsafe { libc::kill(self.process.id() as libc::pid_t, libc::SIGTERM) };
        self.finish(limit)
    }

    /// Waits for the end of the child and takes all that it wrote to stdout; whether it ended well, and its text.
    pub fn output(mut self, limit: Duration) -> Result<(bool, String)> {
        drop(self.process.stdin.take());
        let status = self.wait(limit)?;
        let mut text = String::new();
        while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(200)) {
            text.push_str(&line);
            text.push('\n');
        }
        if !status.success() {
            text.push_str(&self.said());
        }
        Ok((status.success(), text))
    }

    /// An error about this child, with what it complained of.
    fn failure(&self, what: &str) -> Error {
        let said = self.said();
        let said = if said.is_empty() {
            said
        } else {
            format!("; it said: {said}")
        };
        Error::Peer(format!("{} {what}{said}", self.name))
    }

    /// What it wrote to stderr; waits a moment for the pipe to be read.
    fn said(&self) -> String {
        std::thread::sleep(Duration::from_millis(20));
        self.complaints
            .lock()
            .map(|text| text.trim().to_owned())
            .unwrap_or_default()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.process.try_wait() {
            return;
        }
        if let Some(worker) = self.worker {
            // SAFETY: the worker told us its own pid, and its parent, which would reap it, has not ended.
            unsafe { libc::kill(worker, libc::SIGKILL) };
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Reads a child's stderr to its end and keeps the first part.
fn keep(mut stderr: impl Read, kept: &Mutex<String>) {
    let mut piece = [0; 1024];
    while let Ok(bytes @ 1..) = stderr.read(&mut piece) {
        if let Ok(mut text) = kept.lock()
            && text.len() < KEPT
        {
            text.push_str(&String::from_utf8_lossy(&piece[..bytes]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Child::start("the test", command).unwrap()
    }

    #[test]
    fn events_come_and_words_go() {
        let mut child =
            shell(r#"echo '{"event":"a","pid":0}'; read word; echo "{\"event\":\"$word\"}""#);
        child.event("a", Duration::from_secs(5)).unwrap();
        child.tell("b").unwrap();
        child.event("b", Duration::from_secs(5)).unwrap();
        child.finish(Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn silence_has_a_limit() {
        let mut child = shell("exec sleep 100");
        let begun = Instant::now();
        let error = child
            .event("a", Duration::from_millis(100))
            .unwrap_err()
            .to_string();
        assert!(error.contains("no \"a\" within"), "{error}");
        drop(child);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn an_early_end_is_told_with_its_reason() {
        let error = shell("echo bad thing >&2; exit 7")
            .event("a", Duration::from_secs(5))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("bad thing") && error.contains('7'),
            "{error}"
        );
    }

    #[test]
    fn output_and_status() {
        let (good, text) = shell("echo one; echo two")
            .output(Duration::from_secs(5))
            .unwrap();
        assert_eq!((good, text.as_str()), (true, "one\ntwo\n"));
        let (good, text) = shell("echo one; echo three >&2; exit 1")
            .output(Duration::from_secs(5))
            .unwrap();
        assert!(!good && text.contains("three"));
    }
}
