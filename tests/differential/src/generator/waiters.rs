//! Steps of several threads and processes: somebody sleeps, something happens that must wake him; transfers by whole
//! loops; children.

use super::Writer;

impl Writer<'_> {
    /// A thread sleeps, the main thread of its process does this and that, the other end does what must end the sleep.
    pub(super) fn sleeper(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        if !self.conns[conn].is_quiet() {
            return;
        }
        let (end, actor) = (
            self.conns[conn].end(side),
            self.conns[conn].sides[side].actor,
        );
        let (is_blocking, other) = (
            self.conns[conn].sides[side].is_blocking,
            self.conns[conn].sides[1 - side].actor,
        );
        let size = self.rng.usize(1..200);
        let instance = self.sleepy_instance(conn, side);
        let (call, is_receive) = match self.rng.usize(..8) {
            0 if is_blocking => (format!("recv {end} 1000"), true),
            1 if is_blocking => (format!("recv {end} {size} waitall"), true),
            2 if is_blocking => (format!("read {end} 1000"), true),
            3 => (format!("poll -1 {end}:in"), false),
            4 => (format!("select -1 {end}:in"), false),
            _ => match &instance {
                Some(which) => (format!("ewait {} -1", self.instances[*which].name), false),
                None => return,
            },
        };
        if call.starts_with("ewait") {
            // Old edges are taken first.
            self.put(
                actor,
                format!("ewait {} 0", call.split(' ').nth(1).unwrap_or_default()),
            );
        }
        self.put_thread(actor, 1, format!("start {call}"));
        self.put_thread(actor, 1, "still");
        let times = self.rng.usize(..4);
        for _ in 0..times {
            self.meanwhile(conn, side, instance.filter(|_| call.starts_with("ewait")));
        }
        if self.chance(8) && !call.contains("waitall") {
            self.put_thread(actor, 1, "poke");
        }
        if self.chance(8) {
            self.put_thread(actor, 1, "interrupt");
            self.put_thread(actor, 1, "join");
            return;
        }
        if self.chance(8) && !call.contains("waitall") {
            // The end wakes, too.
            let far = self.conns[conn].end(1 - side);
            self.conns[conn].sides[1 - side].has_shut = true;
            self.put(other, format!("shut {far} wr"));
        } else {
            self.send_on(conn, 1 - side, size);
            if is_receive {
                self.conns[conn].sides[1 - side].unread = 0;
                self.conns[conn].sides[1 - side].pieces = 0;
            }
        }
        self.put_thread(actor, 1, "join");
    }

    /// An instance in which this end asks for input, and which has nothing to say.
    fn sleepy_instance(&self, conn: usize, side: usize) -> Option<usize> {
        let is_silent = |entry: &(usize, usize, String)| {
            self.conns[entry.0].is_quiet() && !entry.2.contains("out")
        };
        self.instances.iter().position(|instance| {
            let own = instance
                .registered
                .iter()
                .find(|entry| (entry.0, entry.1) == (conn, side));
            let asks =
                own.is_some_and(|entry| entry.2.starts_with("in") && !entry.2.contains("oneshot"));
            let nests = self.instances.iter().any(|other| other.is_nested);
            asks && !nests && instance.registered.iter().all(is_silent)
        })
    }

    /// What changes nothing for a sleeper.
    fn meanwhile(&mut self, conn: usize, side: usize, instance: Option<usize>) {
        let (end, actor) = (
            self.conns[conn].end(side),
            self.conns[conn].sides[side].actor,
        );
        match (self.rng.usize(..6), instance) {
            (0..2, Some(which)) => {
                let name = self.instances[which].name.clone();
                self.put(actor, format!("ewait {name} 0"));
            }
            (2..5, Some(which)) => {
                let name = self.instances[which].name.clone();
                let entries = &mut self.instances[which].registered;
                let Some(own) = entries
                    .iter_mut()
                    .find(|entry| (entry.0, entry.1) == (conn, side))
                else {
                    return;
                };
                // Not for room, which there is: that would wake the sleeper now.
                own.2 = own.2.replace("out,", "").replace(",out", "");
                let bits = own.2.clone();
                if self.chance(2) {
                    self.put(actor, format!("ctl {name} mod {end} {bits}"));
                } else {
                    self.put(actor, format!("ctl {name} del {end} in"));
                    self.put(actor, format!("ctl {name} add {end} {bits}"));
                }
            }
            (_, None) => self.put(actor, format!("poll 0 {end}:in")),
            _ => self.put(actor, format!("fionread {end}")),
        }
    }

    /// Many bytes from one side to the other, by loops of two threads.
    pub(super) fn flow(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        if !self.conns[conn].is_whole() {
            return;
        }
        let count = match self.rng.usize(..3) {
            0 => self.rng.usize(1..20_000),
            1 => self.rng.usize(1..300_000),
            _ => self.rng.usize(1..1_500_000),
        };
        let (end, far) = (self.conns[conn].end(side), self.conns[conn].end(1 - side));
        let sides = &self.conns[conn].sides;
        let (own, other, unread) = (
            sides[side].clone(),
            sides[1 - side].clone(),
            sides[side].unread,
        );
        let mut how = |is_blocking: bool| {
            let how = self.any(&["block", "poll", "et", "etshort"]);
            if how == "block" && !is_blocking {
                "poll"
            } else {
                how
            }
        };
        let (out, into) = (how(own.is_blocking), how(other.is_blocking));
        // A shared instance of the receiver's, where nothing else makes noise.
        self.put_thread(own.actor, 1, format!("start flow {end} {count} {out}"));
        self.put_thread(
            other.actor,
            2,
            format!("start gather {far} {} {into}", count + unread),
        );
        self.put_thread(own.actor, 1, "join");
        self.put_thread(other.actor, 2, "join");
        self.conns[conn].sides[side].unread = 0;
        self.conns[conn].sides[side].pieces = 0;
    }

    /// A child that uses the connections of its parent, and ends.
    pub(super) fn child(&mut self) {
        if self.children.len() > 2 || !self.may("children") {
            return;
        }
        let Some((conn, side)) = self.end() else {
            return;
        };
        let (actor, end) = (
            self.conns[conn].sides[side].actor,
            self.conns[conn].end(side),
        );
        if actor == 'C' || !self.conns[conn].is_quiet() {
            return;
        }
        let name = ['D', 'E', 'F'][self.children.len()];
        self.children.push(name);
        let how = self.any(&["fork", "fork", "clone", "bare", "vfork", "spawn"]);
        self.put(actor, format!("{how} {name}"));
        if self.chance(3) {
            self.put(name, format!("exec {name}"));
        }
        let (far, other) = (
            self.conns[conn].end(1 - side),
            self.conns[conn].sides[1 - side].actor,
        );
        let size = self.rng.usize(1..900);
        self.put(name, format!("send {end} {size}"));
        self.put(other, format!("recv {far} 2000 dontwait"));
        self.put(other, format!("send {far} {size}"));
        self.put(name, format!("poll 0 {end}:in,out"));
        self.put(name, format!("recv {end} 2000 dontwait"));

        if self.chance(2) {
            self.put(name, "exit");
        } else {
            self.put(name, "kill");
        }
        self.put(actor, "reap");
    }
}
