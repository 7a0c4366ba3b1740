//! Steps that ask for readiness: `poll`, `ppoll`, `select`, and epoll instances. An instance carries the name of a
//! registration in its data, which so is checked, too.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use libc::{c_int, epoll_event, pollfd, timespec};
use nix::errno::Errno;

use super::transfer::result;
use super::{Answer, Line, Scene};

/// Names of bits, the same for poll and epoll.
const BITS: [(&str, u32); 6] = [
    ("in", libc::EPOLLIN as u32),
    ("pri", libc::EPOLLPRI as u32),
    ("out", libc::EPOLLOUT as u32),
    ("err", libc::EPOLLERR as u32),
    ("hup", libc::EPOLLHUP as u32),
    ("rdhup", libc::EPOLLRDHUP as u32),
];

/// How a registration behaves.
const MODES: [(&str, u32); 3] = [
    ("et", libc::EPOLLET as u32),
    ("oneshot", libc::EPOLLONESHOT as u32),
    ("exclusive", libc::EPOLLEXCLUSIVE as u32),
];

/// The bits that a list of names like `in,et` means.
pub fn bits(names: &str) -> u32 {
    let names: Vec<&str> = names.split(',').collect();
    let all = BITS.iter().chain(&MODES);
    let named = all.filter(|(name, _)| names.contains(name));
    named.fold(0, |bits, (_, bit)| bits | bit)
}

/// The names of bits.
pub fn names(bits: u32) -> String {
    let set = BITS.iter().filter(|(_, bit)| bits & bit != 0);
    set.map(|(name, _)| *name).collect::<Vec<_>>().join(",")
}

/// The name of a registration as the data of an instance.
pub fn data(name: &str) -> u64 {
    let bytes = name.bytes().take(8);
    bytes
        .rev()
        .fold(0, |word, byte| word << 8 | u64::from(byte))
}

fn name_of(data: u64) -> String {
    let bytes = data.to_le_bytes();
    let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(8);
    String::from_utf8_lossy(bytes.get(..length).unwrap_or(&bytes)).into_owned()
}

/// What was reported, in the order of the names: the order of the calls is free.
fn list(mut reports: Vec<String>) -> String {
    reports.sort();
    match reports.is_empty() {
        true => "nothing".to_owned(),
        false => reports.join(" "),
    }
}

/// Says so when a wait with a limit found nothing before the limit.
fn in_time(limit: i64, began: Instant, reports: Vec<String>) -> String {
    let early = limit > 0
        && reports.is_empty()
        && began.elapsed() < Duration::from_millis(limit.unsigned_abs());
    list(reports) + if early { " TOO EARLY" } else { "" }
}

fn span(milliseconds: i64) -> Option<timespec> {
    let milliseconds = u32::try_from(milliseconds).ok()?;
    Some(timespec {
        tv_sec: (milliseconds / 1000).into(),
        tv_nsec: (milliseconds % 1000 * 1_000_000).into(),
    })
}

fn named<'a>(scene: &Scene, line: &'a Line) -> Vec<(&'a str, RawFd, &'a str)> {
    let split = |word: &'a String| word.split_once(':').unwrap_or((word, ""));
    let words = line.rest(2).iter().map(split);
    words
        .map(|(name, bits)| (name, scene.fd(name), bits))
        .collect()
}

/// `poll LIMIT NAME:BITS…`, and `ppoll`.
fn poll(scene: &Scene, line: &Line) -> Answer {
    let limit = line.number(1);
    let asked = named(scene, line);
    let entry = |(_, fd, names): &(&str, RawFd, &str)| pollfd {
        fd: *fd,
        events: bits(names) as i16,
        revents: 0,
    };
    let mut entries: Vec<pollfd> = asked.iter().map(entry).collect();
    let (began, count) = (Instant::now(), entries.len() as libc::nfds_t);
    let span = span(limit);
    let span = span.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the list and the time limit live until the call returns.
    let found = result(unsafe {
        match line.word(0) {
            "ppoll" => libc::ppoll(entries.as_mut_ptr(), count, span, std::ptr::null()),
            _ => libc::poll(entries.as_mut_ptr(), count, limit as c_int),
        }
    } as isize)?;
    let told: Vec<_> = entries
        .iter()
        .zip(&asked)
        .filter(|(entry, _)| entry.revents != 0)
        .collect();
    let miscounted = if told.len() == found {
        ""
    } else {
        " MISCOUNTED"
    };
    let told = told.iter().map(|(entry, (name, ..))| {
        let nval = if entry.revents & libc::POLLNVAL != 0 {
            "nval"
        } else {
            ""
        };
        format!("{name}:{}{nval}", names(entry.revents as u16 as u32))
    });
    Ok(in_time(limit, began, told.collect()) + miscounted)
}

/// `select LIMIT NAME:in,out…`, and `pselect`.
fn select(scene: &Scene, line: &Line) -> Answer {
    let limit = line.number(1);
    let asked = named(scene, line);
    // SAFETY: empty sets are all zeros.
    let mut sets: [libc::fd_set; 2] = unsafe { std::mem::zeroed() };
    let kinds = ["in", "out"];
    let mut highest = -1;
    for (_, fd, names) in &asked {
        if !(0..1024).contains(fd) {
            return Ok("no descriptor".to_owned());
        }
        highest = highest.max(*fd);
        for (set, kind) in sets.iter_mut().zip(kinds) {
            if names.split(',').any(|name| name == kind) {
                // SAFETY: the number lies in the set.
                unsafe { libc::FD_SET(*fd, set) };
            }
        }
    }
    let [input, output] = &mut sets;
    let (began, none) = (Instant::now(), std::ptr::null_mut());
    let span = span(limit);
    let span = span.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the sets and the time limit live until the call returns.
    let found = unsafe { libc::pselect(highest + 1, input, output, none, span, std::ptr::null()) };
    result(found as isize)?;
    let mut told = Vec::new();
    for (name, fd, _) in &asked {
        // SAFETY: the number lies in the set.
        let is_set = |(set, _): &(&libc::fd_set, &str)| unsafe { libc::FD_ISSET(*fd, *set) };
        let kinds: Vec<&str> = sets
            .iter()
            .zip(kinds)
            .filter(is_set)
            .map(|(_, kind)| kind)
            .collect();
        if !kinds.is_empty() {
            told.push(format!("{name}:{}", kinds.join(",")));
        }
    }
    Ok(in_time(limit, began, told))
}

/// `ctl E add|mod|del NAME BITS`.
fn control(scene: &Scene, line: &Line) -> Answer {
    let name = line.word(3);
    let what = match line.word(2) {
        "add" => libc::EPOLL_CTL_ADD,
        "mod" => libc::EPOLL_CTL_MOD,
        _ => libc::EPOLL_CTL_DEL,
    };
    let mut event = epoll_event {
        events: bits(line.word(4)),
        u64: data(name),
    };
    let (instance, fd) = (scene.fd(line.word(1)), scene.fd(name));
    // SAFETY: the event lives until the call returns.
    result(unsafe { libc::epoll_ctl(instance, what, fd, &mut event) } as isize)?;
    Ok("ok".to_owned())
}

/// What an instance reports.
pub fn events(instance: RawFd, limit: i64, most: usize) -> Result<Vec<(String, u32)>, Errno> {
    let mut events = vec![epoll_event { events: 0, u64: 0 }; most.max(1)];
    let (to, count) = (events.as_mut_ptr(), events.len() as c_int);
    // SAFETY: the list lives until the call returns.
    let found = result(unsafe { libc::epoll_wait(instance, to, count, limit as c_int) } as isize)?;
    events.truncate(found);
    let told = events
        .iter()
        .map(|event| (name_of(event.u64), event.events));
    Ok(told.collect())
}

/// `ewait E LIMIT [MOST]`.
fn wait(scene: &Scene, line: &Line) -> Answer {
    let (limit, began) = (line.number(2), Instant::now());
    let most = match line.number(3) {
        0 => 100,
        most => most as usize,
    };
    let told = events(scene.fd(line.word(1)), limit, most)?;
    let told = told
        .iter()
        .map(|(name, bits)| format!("{name}:{}", names(*bits)));
    Ok(in_time(limit, began, told.collect()))
}

/// The steps of this module.
pub fn act(scene: &Scene, line: &Line) -> Option<Answer> {
    Some(match line.word(0) {
        "poll" | "ppoll" => poll(scene, line),
        "select" => select(scene, line),
        "epoll" => {
            // SAFETY: no requirements.
            let made = result(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) } as isize);
            made.map(|fd| {
                scene.keep(line.word(1), fd as RawFd);
                "ok".to_owned()
            })
        }
        "ctl" => control(scene, line),
        "ewait" => wait(scene, line),
        _ => return None,
    })
}
