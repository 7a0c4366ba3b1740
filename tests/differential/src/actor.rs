//! A process that carries out steps: its descriptors by name, its threads, its children. It knows no state of a
//! connection: where a transfer starts comes with the step. Runs plain or under the shim, and cannot tell.

mod children;
mod files;
mod flow;
mod options;
mod raw;
mod transfer;
mod waits;

use std::collections::BTreeMap;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

use crate::control::{Place, dial, hear, say};

/// What a step answers.
type Answer = Result<String, Errno>;

/// What the threads of a process share.
#[derive(Debug)]
struct Scene {
    path: PathBuf,
    control: OwnedFd,
    fds: Mutex<BTreeMap<String, RawFd>>,
}

/// The words of a step, without the hidden ones, and those.
#[derive(Debug)]
struct Line {
    words: Vec<String>,
    places: Vec<Place>,
}

impl Line {
    fn new(words: &[&str]) -> Self {
        let (places, words): (Vec<&&str>, Vec<&&str>) =
            words.iter().partition(|word| word.starts_with('@'));
        Line {
            words: words.into_iter().map(ToString::to_string).collect(),
            places: places
                .into_iter()
                .filter_map(|word| Place::parse(word))
                .collect(),
        }
    }

    fn word(&self, at: usize) -> &str {
        self.words.get(at).map_or("", String::as_str)
    }

    fn number(&self, at: usize) -> i64 {
        self.word(at).parse().unwrap_or(0)
    }

    fn rest(&self, from: usize) -> &[String] {
        self.words.get(from..).unwrap_or(&[])
    }

    fn has(&self, word: &str) -> bool {
        self.rest(1).iter().any(|other| other == word)
    }

    fn place(&self, at: usize) -> Result<Place, Errno> {
        self.places.get(at).copied().ok_or(Errno::EINVAL)
    }
}

impl Scene {
    /// A descriptor; an unknown name is a closed one.
    fn fd(&self, name: &str) -> RawFd {
        let fds = self.fds.lock().unwrap_or_else(PoisonError::into_inner);
        fds.get(name).copied().unwrap_or(-1)
    }

    fn keep(&self, name: &str, fd: RawFd) {
        let mut fds = self.fds.lock().unwrap_or_else(PoisonError::into_inner);
        fds.insert(name.to_owned(), fd);
    }

    fn forget(&self, name: &str) -> RawFd {
        let mut fds = self.fds.lock().unwrap_or_else(PoisonError::into_inner);
        fds.remove(name).unwrap_or(-1)
    }

    fn names(&self) -> Vec<(String, RawFd)> {
        let fds = self.fds.lock().unwrap_or_else(PoisonError::into_inner);
        fds.iter().map(|(name, fd)| (name.clone(), *fd)).collect()
    }

    /// Carries out a step; what it answers.
    fn act(&self, line: &Line) -> String {
        let answer = transfer::act(self, line)
            .or_else(|| waits::act(self, line))
            .or_else(|| options::act(self, line))
            .or_else(|| files::act(self, line))
            .or_else(|| flow::act(self, line));
        match answer {
            Some(Ok(text)) => text,
            Some(Err(error)) => format!("{error:?}"),
            None => format!("UNKNOWN STEP {}", line.word(0)),
        }
    }
}

/// Carries out what the conductor at this socket says, under this name, until the conductor goes. `inherited` are
/// descriptors that an earlier program of this process had, as `NAME=NUMBER`.
pub fn play(path: PathBuf, name: &str, inherited: impl Iterator<Item = String>) {
    raw::note_signals();
    let inherited = inherited.filter_map(|word| {
        let (name, fd) = word.split_once('=')?;
        Some((name.to_owned(), fd.parse().ok()?))
    });
    enter(path, name, inherited.collect());
}

/// As a process that has just come to be: introduces itself, and carries out steps until the conductor goes.
fn enter(path: PathBuf, name: &str, fds: BTreeMap<String, RawFd>) {
    let Ok(control) = dial(&path) else { return };
    let scene = Arc::new(Scene {
        path,
        control,
        fds: Mutex::new(fds),
    });
    let hello = format!("hello {name} {}", std::process::id());
    if say(&scene.control, &hello).is_err() {
        return;
    }
    let mut threads: BTreeMap<u8, Sender<(String, String)>> = BTreeMap::new();
    while let Ok(Some(request)) = hear(&scene.control) {
        let mut words = request.splitn(3, ' ');
        let (Some(number), Some(thread), Some(text)) = (words.next(), words.next(), words.next())
        else {
            return;
        };
        match thread.parse().unwrap_or(0) {
            0 => {
                let words: Vec<&str> = text.split(' ').collect();
                let line = Line::new(&words);
                let answer = children::act(&scene, &line).unwrap_or_else(|| scene.act(&line));
                if say(&scene.control, &format!("{number} {answer}")).is_err() {
                    return;
                }
            }
            thread => {
                let sender = threads
                    .entry(thread)
                    .or_insert_with(|| begin(&scene, thread));
                let _ = sender.send((number.to_owned(), text.to_owned()));
            }
        }
    }
}

/// One more thread, that carries out what it is sent.
fn begin(scene: &Arc<Scene>, thread: u8) -> Sender<(String, String)> {
    let (sender, receiver) = channel::<(String, String)>();
    let scene = Arc::clone(scene);
    std::thread::spawn(move || {
        let hello = format!("thread {thread} {}", raw::thread_number());
        let _ = say(&scene.control, &hello);
        for (number, text) in receiver {
            let words: Vec<&str> = text.split(' ').collect();
            let answer = scene.act(&Line::new(&words));
            if say(&scene.control, &format!("{number} {answer}")).is_err() {
                return;
            }
        }
    });
    sender
}
