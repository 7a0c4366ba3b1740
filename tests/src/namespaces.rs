//! Two hosts on one: network namespaces with a link between them. Needs root.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::place;

const PREFIX: &str = "rdsock-tests-";

/// Two network namespaces and a veth link between them. Dropping it removes them.
#[derive(Debug)]
pub struct Namespaces {
    /// What they are called, see [`crate::Program::inside`].
    pub names: [String; 2],
    number: u8,
}

impl Namespaces {
    /// Makes them, with addresses at both ends of the link.
    ///
    /// # Panics
    /// When `ip` can't: this needs root.
    pub fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        remove_left_over();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let names = ["a", "b"].map(|side| format!("{PREFIX}{pid}-{number}{side}"));
        let made = Namespaces { names, number };
        for name in &made.names {
            ip(&format!("netns add {name}"));
        }
        let [a, b] = &made.names;
        ip(&format!(
            "-n {a} link add link0 type veth peer name link0 netns {b}"
        ));
        for (side, name) in made.names.iter().enumerate() {
            let (four, six) = (made.v4(side), made.v6(side));
            ip(&format!("-n {name} link set lo up"));
            ip(&format!("-n {name} address add {four}/24 dev link0"));
            ip(&format!("-n {name} address add {six}/64 dev link0 nodad"));
            ip(&format!("-n {name} link set link0 up"));
        }
        made
    }

    /// The IPv4 address of a side, 0 or 1.
    pub fn v4(&self, side: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, self.number, 1 + side as u8)
    }

    /// The IPv6 address of a side, 0 or 1.
    pub fn v6(&self, side: usize) -> Ipv6Addr {
        Ipv6Addr::new(0xfd78, 0, 0, self.number.into(), 0, 0, 0, 1 + side as u16)
    }
}

impl Default for Namespaces {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            remove(name);
        }
    }
}

fn ip(args: &str) {
    let output = Command::new(place::command(&["ip"]))
        .args(args.split_whitespace())
        .output()
        .expect("ip can be run");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {args}: {errors}");
}

fn remove(name: &str) {
    // It is not there when its making has failed.
    let _ = Command::new(place::command(&["ip"]))
        .args(["netns", "delete", name])
        .output();
}

/// Those of tests that were killed.
fn remove_left_over() {
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten() {
        let Some(name) = entry
            .ok()
            .and_then(|entry| entry.file_name().into_string().ok())
        else {
            continue;
        };
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            remove(&name);
        }
    }
}
