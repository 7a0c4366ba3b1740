//! Has a program carried out, step by step, by the processes of a stage, and keeps what each step answered. It alone knows
//! where in its direction each transfer starts, and which answers are not Linux's to fix (how much a buffer holds).

use std::collections::{BTreeMap, BTreeSet};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::control::Place;
use crate::pattern::Direction;
use crate::program::{Program, Step};
use crate::stage::Stage;

/// Slices of time that a step may take before it is a hang.
const PATIENCE: u32 = 80;

/// What became of a program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// For each step that was begun what it answered; then what was left behind.
    pub lines: Vec<String>,
    /// Connections that were to be on rings, and those that were.
    pub wanted: usize,
    /// Of these, those that were.
    pub reached: usize,
    /// The processes can't be used any more.
    pub is_broken: bool,
}

#[derive(Clone, Debug)]
struct Connection {
    /// The processes of the dialling and the accepting end.
    sides: [char; 2],
    sent: [u64; 2],
    taken: [u64; 2],
    is_demoted: bool,
}

/// One end of a connection, under any of its names.
#[derive(Clone, Copy, Debug)]
struct End {
    conn: usize,
    side: usize,
}

/// An edge that was told.
#[derive(Clone, Debug)]
struct Told {
    bits: String,
    /// Bytes that had been sent to the end by then.
    sent: u64,
    /// How often it was told again, though nothing had happened.
    again: u32,
}

/// A call of another thread that has not ended.
struct Pending {
    number: u64,
    step: Step,
}

struct Conductor<'a> {
    stage: &'a mut Stage,
    connections: Vec<Connection>,
    numbers: BTreeMap<String, usize>,
    ends: BTreeMap<String, End>,
    /// Connections that were filled and not drained: there an edge for room says something.
    full: BTreeSet<usize>,
    /// Edge-triggered registrations: an instance and a name.
    edges: BTreeSet<(String, String)>,
    /// Ends that many bytes were sent on: whether there was no room for a while is not Linux's to fix, nor is an edge for it.
    flowed: BTreeSet<(usize, usize)>,
    /// Instances that may have an edge for room, for those that they are nested in.
    rooms: BTreeSet<String>,
    /// No edge may be told again.
    is_exact: bool,
    /// What an instance was last told of a name by an edge.
    told: BTreeMap<(String, String), Told>,
    /// Edges of a connection's ends that Linux may give once more, or the shim: each instance may tell of so many.
    again: BTreeMap<usize, u32>,
    pending: BTreeMap<(char, u8), Pending>,
    children: BTreeSet<char>,
    next: u64,
    log: Log,
}

/// Carries out a program.
pub fn conduct(stage: &mut Stage, program: &Program) -> Log {
    let mut conductor = Conductor {
        stage,
        connections: Vec::new(),
        numbers: BTreeMap::new(),
        ends: BTreeMap::new(),
        full: BTreeSet::new(),
        edges: BTreeSet::new(),
        flowed: BTreeSet::new(),
        rooms: BTreeSet::new(),
        is_exact: program.is_exact,
        told: BTreeMap::new(),
        again: BTreeMap::new(),
        pending: BTreeMap::new(),
        children: BTreeSet::new(),
        next: 0,
        log: Log::default(),
    };
    for name in ['A', 'B', 'C'] {
        conductor.prepare(name);
    }
    for step in &program.steps {
        let line = conductor.step(step);
        if conductor.log.is_broken {
            conductor.log.lines.push(format!("{line} ({step})"));
            return conductor.log;
        }
        conductor.log.lines.push(line);
    }
    conductor.finish();
    conductor.log
}

/// The number in `n=NUMBER …`.
fn moved(answer: &str) -> u64 {
    let number = answer
        .strip_prefix("n=")
        .and_then(|rest| rest.split(' ').next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// What a step moves: bytes out of the process, or into it.
fn transfer(word: &str) -> Option<bool> {
    match word {
        "send" | "write" | "writev" | "sendmsg" | "sendfile" | "splicein" | "fill" | "flow" => {
            Some(true)
        }
        "recv" | "read" | "readv" | "recvmsg" | "spliceout" | "drain" | "gather" => Some(false),
        _ => None,
    }
}

impl Conductor<'_> {
    fn hang(&mut self, what: &str) -> String {
        self.log.is_broken = true;
        let output = self.stage.output();
        let died = output.lines().rev().take(5).collect::<Vec<_>>().join(" | ");
        format!(
            "HANG {what}{}{died}",
            if died.is_empty() { "" } else { ": " }
        )
    }

    fn ask(&mut self, name: char, thread: u8, text: &str) -> Option<u64> {
        self.next += 1;
        let link = self.stage.links.get_mut(&name)?;
        link.ask(self.next, thread, text).then_some(self.next)
    }

    /// Asks the main thread and waits for its answer.
    fn call(&mut self, name: char, text: &str) -> String {
        self.call_thread(name, 0, text)
    }

    fn call_thread(&mut self, name: char, thread: u8, text: &str) -> String {
        if !self.stage.links.contains_key(&name) {
            return "no process".to_owned();
        }
        let number = self.ask(name, thread, text);
        let link = self.stage.links.get_mut(&name);
        let answer = number
            .zip(link)
            .and_then(|(number, link)| link.answer(number, PATIENCE));
        answer.unwrap_or_else(|| self.hang(&format!("in {name}")))
    }

    /// Lets a process listen, and notes what it has open, once.
    fn prepare(&mut self, name: char) {
        let known = self
            .stage
            .links
            .get(&name)
            .is_none_or(|link| link.port.is_some());
        if known {
            return;
        }
        let port = self.call(name, "listen");
        let at_first = self.call(name, "wipe");
        if let Some(link) = self.stage.links.get_mut(&name) {
            (link.port, link.at_first) = (Some(port), at_first);
        }
    }

    fn step(&mut self, step: &Step) -> String {
        let key = (step.actor, step.thread);
        match step.word(0) {
            "conn" => self.connect(step),
            "warm" => self.warm(step.rest(1), 5, true),
            "talk" => self.warm(step.rest(2), step.number(1), false),
            "fork" | "clone" | "bare" | "vfork" | "spawn" | "exec" => self.child(step),
            "kill" => self.kill(step.actor),
            "exit" => self.exit(step.actor),
            "start" => self.start(step),
            "still" => self.still(key),
            "join" => self.join(key),
            "interrupt" => self.interrupt(key, Signal::SIGUSR1, true),
            "poke" => self.interrupt(key, Signal::SIGUSR2, false),
            _ if self.pending.contains_key(&key) => "busy".to_owned(),
            _ => {
                let text = self.text(&step.words);
                let answer = self.call_thread(step.actor, step.thread, &text);
                self.note(&step.words, &answer)
            }
        }
    }

    /// The words of a step with the hidden ones.
    fn text(&self, words: &[String]) -> String {
        let word = |at: usize| words.get(at).map_or("", String::as_str);
        let end = self.ends.get(word(1)).copied();
        let mut text = words.join(" ");
        if let (Some(out), Some(end)) = (transfer(word(0)), end) {
            if word(0) == "drain" {
                text += &format!(" {}", self.unread(end));
            }
            text += &format!(" {}", self.place(end, out));
        }
        text
    }

    fn unread(&self, end: End) -> u64 {
        let connection = self.connections.get(end.conn);
        connection.map_or(0, |connection| {
            connection.sent[1 - end.side].saturating_sub(connection.taken[end.side])
        })
    }

    fn place(&self, end: End, out: bool) -> Place {
        let from = if out { end.side } else { 1 - end.side };
        let connection = self.connections.get(end.conn);
        let at = connection.map_or(0, |connection| match out {
            true => connection.sent[end.side],
            false => connection.taken[end.side],
        });
        let conn = end.conn;
        Place {
            direction: Direction { conn, from },
            at,
        }
    }

    /// Counts what a step has moved; its line in the log.
    fn note(&mut self, words: &[String], answer: &str) -> String {
        let word = |at: usize| words.get(at).map_or("", String::as_str);
        let end = self.ends.get(word(1)).copied();
        if let (Some(out), Some(end)) = (transfer(word(0)), end) {
            let peeks = words.iter().any(|word| word == "peek");
            if let Some(connection) = self.connections.get_mut(end.conn)
                && !peeks
            {
                let counts = if out {
                    &mut connection.sent
                } else {
                    &mut connection.taken
                };
                counts[end.side] += moved(answer);
            }
        }
        match word(0) {
            "fill" => self.full.extend(end.map(|end| end.conn)),
            "drain" => self
                .full
                .retain(|conn| end.is_none_or(|end| end.conn != *conn)),
            _ => {}
        }
        match word(0) {
            "flow" => self.flowed.extend(end.map(|end| (end.conn, end.side))),
            "dup" if answer == "ok" => {
                if let Some(end) = end {
                    self.ends.insert(word(2).to_owned(), end);
                }
            }
            "demote" => {
                if let Some(connection) = end.and_then(|end| self.connections.get_mut(end.conn)) {
                    connection.is_demoted = true;
                }
                self.may_repeat(end);
            }
            "shut" => {
                // The call is an edge, and so is the answer to its FIN, up to 40 ms later.
                self.told.retain(|(_, name), _| name != word(1));
                self.may_repeat(end);
            }
            "ctl" if answer == "ok" => {
                let key = (word(1).to_owned(), word(3).to_owned());
                self.told.remove(&key);
                let has = |name| word(4).split(',').any(|bit| bit == name);
                if has("et") && has("out") {
                    self.rooms.insert(word(1).to_owned());
                }
                match has("et") {
                    true => self.edges.insert(key),
                    false => self.edges.remove(&key),
                };
            }
            "ewait" => {
                let answer = self.without_edges_for_room(word(1), answer);
                return self.without_repeated_edges(word(1), &answer);
            }
            // How much fits is not Linux's to fix.
            "fill" => {
                return answer
                    .split_once(' ')
                    .map_or(answer, |(_, rest)| rest)
                    .to_owned();
            }
            "drain" => {
                let whole = answer
                    .strip_prefix("n=")
                    .and_then(|rest| rest.split_once(" of "));
                if whole.is_some_and(|(got, whole)| got == whole) {
                    return "all".to_owned();
                }
            }
            _ => {}
        }
        answer.to_owned()
    }

    /// An edge for room where there was room before says nothing: Linux gives one with each arrival, and may give more.
    fn without_edges_for_room(&self, instance: &str, answer: &str) -> String {
        let kept = answer.split(' ').filter_map(|report| {
            let (name, bits) = report.split_once(':').unwrap_or((report, ""));
            let end = self.ends.get(name);
            let is_full = end.is_some_and(|end| self.full.contains(&end.conn));
            if self.rooms.contains(name) {
                // A nested instance: nobody knows what it tells of.
                return None;
            }
            if is_full || !self.edges.contains(&(instance.to_owned(), name.to_owned())) {
                return Some(report.to_owned());
            }
            let has_flowed = end.is_some_and(|end| self.flowed.contains(&(end.conn, end.side)));
            if has_flowed && ["out", "in,out"].contains(&bits) {
                // With what was unread before.
                return None;
            }
            let bits: Vec<&str> = bits.split(',').filter(|bit| *bit != "out").collect();
            (!bits.is_empty()).then(|| format!("{name}:{}", bits.join(",")))
        });
        let kept: Vec<String> = kept.collect();
        match kept.is_empty() {
            true => "nothing".to_owned(),
            false => kept.join(" "),
        }
    }

    /// Something has happened that may repeat an edge of this connection, once in each instance.
    fn may_repeat(&mut self, end: Option<End>) {
        if let Some(end) = end {
            *self.again.entry(end.conn).or_default() += 1;
        }
    }

    /// An edge of what is still there may be told again, though nothing was sent: by Linux when a FIN is acknowledged, and when
    /// bytes come in two pieces; by the shim when a connection comes to its rings or leaves them, since then it can't ask the
    /// kernel what it has told. Programs bear it (epoll(7): "multiple events can be generated"). Once for each such cause it says
    /// nothing here; more often it would be an instance that does not stop.
    fn without_repeated_edges(&mut self, instance: &str, answer: &str) -> String {
        if self.is_exact {
            return answer.to_owned();
        }
        let mut kept = Vec::new();
        for report in answer.split(' ').filter(|report| *report != "nothing") {
            let (name, bits) = report.split_once(':').unwrap_or((report, ""));
            let key = (instance.to_owned(), name.to_owned());
            let end = self.ends.get(name).copied();
            let Some(end) = end.filter(|_| self.edges.contains(&key)) else {
                kept.push(report);
                continue;
            };
            let connection = self.connections.get(end.conn);
            let sent = connection.map_or(0, |connection| connection.sent[1 - end.side]);
            // Every connection may come to its rings.
            let most = 1 + self.again.get(&end.conn).copied().unwrap_or(0);
            match self.told.get_mut(&key) {
                Some(told) if told.bits == bits && told.sent == sent && told.again < most => {
                    told.again += 1;
                }
                told => {
                    let again = told.map_or(0, |told| told.again);
                    let bits = bits.to_owned();
                    self.told.insert(key, Told { bits, sent, again });
                    kept.push(report);
                }
            }
        }
        match kept.is_empty() {
            true => "nothing".to_owned(),
            false => kept.join(" "),
        }
    }

    /// `A conn c0 B`: A dials, B accepts.
    fn connect(&mut self, step: &Step) -> String {
        let name = step.word(1).to_owned();
        let to = step.word(2).chars().next().unwrap_or('B');
        let port = self.stage.links.get(&to).and_then(|link| link.port.clone());
        let (Some(port), None) = (port, self.numbers.get(&name)) else {
            return "no listener".to_owned();
        };
        let dialled = self.call(step.actor, &format!("dial {name}a {port}"));
        if dialled != "ok" {
            return dialled;
        }
        let accepted = self.call(to, &format!("accept {name}b"));
        let conn = self.connections.len();
        for (side, letter) in ["a", "b"].into_iter().enumerate() {
            self.ends
                .insert(format!("{name}{letter}"), End { conn, side });
        }
        self.numbers.insert(name, conn);
        self.connections.push(Connection {
            sides: [step.actor, to],
            sent: [0; 2],
            taken: [0; 2],
            is_demoted: false,
        });
        accepted
    }

    /// Round trips of a byte on connections, and until they are on rings where they can be.
    fn warm(&mut self, names: &[String], rounds: u64, until_on_rings: bool) -> String {
        let named = names
            .iter()
            .filter_map(|name| Some((name.clone(), *self.numbers.get(name)?)));
        let named: Vec<(String, usize)> = named.collect();
        let mut failed = BTreeSet::new();
        for _ in 0..rounds {
            self.round(&named, &mut failed);
        }
        let able = |conductor: &Self, conn: usize| {
            let connection = conductor.connections.get(conn);
            connection.is_some_and(|connection| {
                !connection.is_demoted && !connection.sides.contains(&'C')
            })
        };
        let mut open = named.clone();
        open.retain(|(name, conn)| able(self, *conn) && !failed.contains(name));
        if until_on_rings && self.stage.is_preloaded() {
            self.log.wanted += open.len();
            for _ in 0..15 {
                if open.is_empty() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_micros(500));
                let before = self.carried(&open);
                self.round(&open, &mut failed);
                let after = self.carried(&open);
                let mut pairs = before.iter().zip(&after);
                let count = open.len();
                open.retain(|_| pairs.next().is_some_and(|(before, after)| before != after));
                self.log.reached += count - open.len();
            }
            // Not tried again: those that a child has, too, will never be.
            for (_, conn) in &open {
                if let Some(connection) = self.connections.get_mut(*conn) {
                    connection.is_demoted = true;
                }
            }
        }
        match failed.is_empty() {
            true => "ok".to_owned(),
            false => format!(
                "failed: {}",
                failed.into_iter().collect::<Vec<_>>().join(" ")
            ),
        }
    }

    fn round(&mut self, named: &[(String, usize)], failed: &mut BTreeSet<String>) {
        for (side, out) in [(0, true), (1, false), (1, true), (0, false)] {
            self.pump(named, side, out, failed);
        }
    }

    /// Connections by the process that has this side of them.
    fn grouped<'b>(
        &self,
        named: &'b [(String, usize)],
        side: usize,
    ) -> BTreeMap<char, Vec<&'b (String, usize)>> {
        let mut groups: BTreeMap<char, Vec<&(String, usize)>> = BTreeMap::new();
        for entry in named {
            if let Some(connection) = self.connections.get(entry.1) {
                groups
                    .entry(connection.sides[side])
                    .or_default()
                    .push(entry);
            }
        }
        groups
    }

    fn pump(
        &mut self,
        named: &[(String, usize)],
        side: usize,
        out: bool,
        failed: &mut BTreeSet<String>,
    ) {
        let letter = if side == 0 { 'a' } else { 'b' };
        for (actor, group) in self.grouped(named, side) {
            let mut text = format!("pump {}", if out { "send" } else { "recv" });
            group
                .iter()
                .for_each(|(name, _)| text += &format!(" {name}{letter}"));
            for (_, conn) in &group {
                text += &format!(" {}", self.place(End { conn: *conn, side }, out));
            }
            let answer = self.call(actor, &text);
            let mut digits = answer.chars();
            for (name, conn) in group {
                let Some(connection) = self.connections.get_mut(*conn) else {
                    continue;
                };
                if digits.next() != Some('1') {
                    failed.insert(name.clone());
                    continue;
                }
                let counts = if out {
                    &mut connection.sent
                } else {
                    &mut connection.taken
                };
                counts[side] += 1;
            }
        }
    }

    /// What the kernel has carried on each.
    fn carried(&mut self, named: &[(String, usize)]) -> Vec<String> {
        let mut all = BTreeMap::new();
        for (actor, group) in self.grouped(named, 0) {
            let names: Vec<String> = group.iter().map(|(name, _)| format!("{name}a")).collect();
            let answer = self.call(actor, &format!("counters {}", names.join(" ")));
            let words = answer.split(' ').map(str::to_owned);
            all.extend(group.into_iter().map(|(name, _)| name.clone()).zip(words));
        }
        let of = |(name, _): &(String, usize)| all.get(name).cloned().unwrap_or_default();
        named.iter().map(of).collect()
    }

    /// A step that makes a process, or a new program of one.
    fn child(&mut self, step: &Step) -> String {
        let is_exec = step.word(0) == "exec";
        let name = match is_exec {
            true => step.actor,
            false => step.word(1).chars().next().unwrap_or('D'),
        };
        let taken = self.stage.links.contains_key(&name);
        if is_exec != taken || (is_exec && !self.children.contains(&name)) {
            return "no such child".to_owned();
        }
        if is_exec {
            if self.ask(name, 0, &format!("exec {name}")).is_none() {
                return self.hang("before exec");
            }
            self.stage.links.remove(&name);
        } else {
            let answer = self.call(step.actor, &step.words.join(" "));
            if answer.parse::<i32>().is_err() {
                return answer;
            }
        }
        self.children.insert(name);
        match self.stage.welcome() {
            true => "ok".to_owned(),
            false => self.hang("before the new process said anything"),
        }
    }

    fn kill(&mut self, name: char) -> String {
        match self.stage.links.get(&name) {
            Some(link) if self.children.contains(&name) => {
                let _ = kill(Pid::from_raw(link.pid), Signal::SIGKILL);
                self.forget(name)
            }
            _ => "no such child".to_owned(),
        }
    }

    fn exit(&mut self, name: char) -> String {
        if !self.children.contains(&name) {
            return "no such child".to_owned();
        }
        let _ = self.ask(name, 0, "exit");
        self.forget(name)
    }

    /// A child is gone as soon as its line is closed at its end.
    fn forget(&mut self, name: char) -> String {
        self.children.remove(&name);
        self.pending.retain(|(actor, _), _| *actor != name);
        if let Some(mut link) = self.stage.links.remove(&name) {
            let _ = link.answer(u64::MAX, PATIENCE);
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
        "ok".to_owned()
    }

    fn start(&mut self, step: &Step) -> String {
        let key = (step.actor, step.thread);
        let words = step.rest(1).to_vec();
        if step.thread == 0 || self.pending.contains_key(&key) {
            return "busy".to_owned();
        }
        if !self.stage.links.contains_key(&step.actor) {
            return "no process".to_owned();
        }
        match self.ask(step.actor, step.thread, &self.text(&words)) {
            None => self.hang("before a start"),
            Some(number) => {
                let step = Step {
                    words,
                    ..step.clone()
                };
                self.pending.insert(key, Pending { number, step });
                "started".to_owned()
            }
        }
    }

    /// The call waits, and uses no processor time for it.
    fn still(&mut self, key: (char, u8)) -> String {
        std::thread::sleep(std::time::Duration::from_millis(2));
        let (Some(pending), Some(link)) =
            (self.pending.get(&key), self.stage.links.get_mut(&key.0))
        else {
            return "nothing started".to_owned();
        };
        if link.has_answered(pending.number) {
            return "has ended".to_owned();
        }
        let Some(thread) = link.threads.get(&key.1) else {
            return "waits".to_owned();
        };
        let path = format!("/proc/{}/task/{thread}/", link.pid);
        let read = |name: &str| std::fs::read_to_string(path.clone() + name).unwrap_or_default();
        for pause in [0, 1, 2, 3] {
            std::thread::sleep(std::time::Duration::from_millis(pause));
            if read("stat")
                .rsplit(") ")
                .next()
                .is_some_and(|rest| rest.starts_with('S'))
            {
                return "waits".to_owned();
            }
        }
        let used = || {
            read("schedstat")
                .split(' ')
                .next()
                .and_then(|ns| ns.parse::<u64>().ok())
                .unwrap_or(0)
        };
        let before = used();
        std::thread::sleep(std::time::Duration::from_millis(60));
        match used() - before {
            0..20_000_000 => "waits".to_owned(),
            spent => format!("BURNS {} ms of 60", spent / 1_000_000),
        }
    }

    fn join(&mut self, key: (char, u8)) -> String {
        let (Some(pending), Some(link)) =
            (self.pending.remove(&key), self.stage.links.get_mut(&key.0))
        else {
            return "nothing started".to_owned();
        };
        match link.answer(pending.number, PATIENCE) {
            Some(answer) => self.note(&pending.step.words, &answer),
            None => self.hang(&format!(
                "in {}/{}: {}",
                key.0,
                key.1,
                pending.step.words.join(" ")
            )),
        }
    }

    /// Sends signals to a thread: until its call ends, or three where it does not, since the call is begun anew. What any
    /// handler ends must have ended before the next step, which may end it as well.
    fn interrupt(&mut self, key: (char, u8), signal: Signal, until_it_ends: bool) -> String {
        let (Some(pending), Some(link)) =
            (self.pending.get(&key), self.stage.links.get_mut(&key.0))
        else {
            return "nothing started".to_owned();
        };
        let number = pending.number;
        let is_never_restarted =
            matches!(pending.step.word(0), "poll" | "ppoll" | "select" | "ewait");
        let most = match until_it_ends || is_never_restarted {
            true => 5000,
            false => 3,
        };
        for _ in 0..most {
            if link.has_answered(number) {
                break;
            }
            if let Some(thread) = link.threads.get(&key.1) {
                // SAFETY: a signal for a thread of a process that this stage has started.
                unsafe { libc::syscall(libc::SYS_tgkill, link.pid, *thread, signal as i32) };
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        "ok".to_owned()
    }

    /// Ends what the program has left, and says what can't be ended.
    fn finish(&mut self) {
        if let Some(((actor, thread), _)) = self.pending.first_key_value() {
            self.log
                .lines
                .push(format!("{actor}/{thread} waits at the end"));
            self.log.is_broken = true;
            return;
        }
        for child in self.children.clone() {
            self.exit(child);
        }
        for name in ['A', 'B', 'C'] {
            self.call(name, "reap");
            let now = self.call(name, "wipe");
            let at_first = self
                .stage
                .links
                .get(&name)
                .map(|link| link.at_first.clone());
            let low = |text: &str| text.split(' ').next().map(str::to_owned);
            let is_clean =
                low(&now) == low(&at_first.unwrap_or_default()) && now.ends_with("streams=0");
            if !is_clean {
                self.log.is_broken = true;
                self.log.lines.push(format!("{name} LEFT BEHIND {now}"));
            }
        }
        let [streams, waiting] = self.stage.left_in_daemon();
        if streams + waiting != 0 {
            self.log.is_broken = true;
            self.log.lines.push(format!(
                "LEFT BEHIND {streams} streams in the daemon, and {waiting} connections that wait for their other end"
            ));
        }
    }
}
