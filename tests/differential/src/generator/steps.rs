//! Steps that end at once.

use super::{Instance, Writer};

impl Writer<'_> {
    pub(super) fn any_step(&mut self) {
        match self.rng.usize(..100) {
            0..22 => self.send(),
            22..40 => self.receive(),
            40..50 => self.ask(),
            50..58 => self.wait_on_instance(),
            58..64 => self.control(),
            64..74 => self.sleeper(),
            74..78 => self.flow(),
            78..80 => self.fill(),
            80..83 => self.demote(),
            83..86 => self.option(),
            86..89 => self.shut(),
            89..91 => self.close(),
            91..93 => self.copy(),
            93..95 => self.child(),
            95 => self.pairs(),
            96 => self.one_way(),
            97 => self.warm(),
            _ => self.put('A', "nap 800"),
        }
    }

    /// A connection and a side that this process still has, by chance.
    pub(super) fn end(&mut self) -> Option<(usize, usize)> {
        let conn = match self.chance(2) {
            true => self.favourite,
            false => self.rng.usize(..self.conns.len()),
        };
        let side = self.rng.usize(..2);
        (!self.conns[conn].sides[side].has_closed).then_some((conn, side))
    }

    fn size(&mut self) -> usize {
        let most = self.most;
        let size = match self.rng.usize(..8) {
            0..2 => 1,
            2..4 => self.rng.usize(1..50),
            4..6 => self.rng.usize(1..1500),
            6 => self.rng.usize(1..9000),
            _ => self.rng.usize(1..=most),
        };
        size.min(most)
    }

    /// Sends so much that it fits, by one call.
    pub(super) fn send(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        let size = self.size();
        self.send_on(conn, side, size);
    }

    pub(super) fn send_on(&mut self, conn: usize, side: usize, size: usize) {
        let (most, end) = (self.most, self.conns[conn].end(side));
        let other_closed = self.conns[conn].sides[1 - side].has_closed;
        let own = &self.conns[conn].sides[side];
        if own.is_full || own.unread + size > most || own.pieces > 20 {
            return;
        }
        let actor = own.actor;
        let how = match self.rng.usize(..10) {
            0 => format!("write {end} {size}"),
            1 => format!("writev {end} {size} {}", self.rng.usize(1..5)),
            2 => format!("sendmsg {end} {size} {}", self.rng.usize(1..5)),
            3 => format!("sendfile {end} {size}"),
            4 => format!("sendfile {end} {size} offset"),
            5 => format!("splicein {end} {size}"),
            6 => format!("send {end} {size} dontwait"),
            _ => format!("send {end} {size}"),
        };
        self.put(actor, how);
        let conn = &mut self.conns[conn];
        if other_closed {
            conn.is_odd = true;
        } else if !conn.sides[side].has_shut {
            // Also where the other side has shut: how much fits is not Linux's to say.
            conn.sides[side].unread += size;
            conn.sides[side].pieces += 1;
        }
    }

    /// Receives, or looks, by a call that does not wait.
    fn receive(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        let (end, own) = (
            self.conns[conn].end(side),
            self.conns[conn].sides[side].clone(),
        );
        let other = self.conns[conn].sides[1 - side].clone();
        if other.is_full {
            return;
        }
        let size = match self.rng.usize(..4) {
            0 => self.size(),
            1 => other.unread.max(1),
            2 => (other.unread / 2).max(1),
            _ => 100_000,
        };
        // Only where it ends at once anyway.
        let is_safe = !own.is_blocking || (other.unread > 0 && !self.conns[conn].is_odd);
        let how = match self.rng.usize(..10) {
            0 if is_safe => format!("read {end} {size}"),
            1 if is_safe => format!("readv {end} {size} {}", self.rng.usize(1..5)),
            2 if is_safe && size <= other.unread => format!("spliceout {end} {size}"),
            3 => format!("recvmsg {end} {size} {} dontwait", self.rng.usize(1..4)),
            4..6 => format!("recv {end} {size} dontwait peek"),
            6 => format!("recv {end} {size} dontwait waitall"),
            7 => format!("recv {end} {size} dontwait trunc"),
            _ => format!("recv {end} {size} dontwait"),
        };
        let moves = !how.contains("peek");
        self.put(own.actor, how);
        if moves {
            let other = &mut self.conns[conn].sides[1 - side];
            other.unread -= size.min(other.unread);
            other.pieces = if other.unread == 0 { 0 } else { other.pieces };
        }
    }

    /// Asks without waiting: poll, select, FIONREAD, SO_ERROR.
    fn ask(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        let (end, actor) = (
            self.conns[conn].end(side),
            self.conns[conn].sides[side].actor,
        );
        match self.rng.usize(..6) {
            0 => self.put(actor, format!("fionread {end}")),
            1 if self.chance(3) => self.put(actor, format!("err {end}")),
            2 => self.put(
                actor,
                format!("select 0 {}", self.ends_of(actor, "in,out", 1000)),
            ),
            3 => self.put(
                actor,
                format!("ppoll 0 {}", self.ends_of(actor, "in,out,rdhup", 1000)),
            ),
            _ => {
                let bits = self.any(&["in", "out", "in,out,rdhup", "rdhup", "in,rdhup"]);
                self.put(actor, format!("poll 0 {}", self.ends_of(actor, bits, 1000)));
            }
        }
    }

    /// The ends of a process, for a list of poll. Those that were filled are left out: how far they are from room is not
    /// Linux's to say.
    pub(super) fn ends_of(&self, actor: char, bits: &str, most: usize) -> String {
        let mut words = Vec::new();
        for conn in &self.conns {
            for side in [0, 1] {
                let own = &conn.sides[side];
                if own.actor == actor && !own.has_closed && !own.is_full {
                    words.push(format!("{}:{bits}", conn.end(side)));
                }
            }
        }
        words.truncate(most);
        words.join(" ")
    }

    pub(super) fn instance(&mut self) {
        let name = format!("e{}", self.instances.len());
        // Often of one process, with the same connections.
        let last = self.instances.last().map(|last| last.actor);
        let actor = match last {
            Some(actor) if self.chance(2) => actor,
            _ => self.any(&['A', 'B']),
        };
        self.put(actor, format!("epoll {name}"));
        self.instances.push(Instance {
            name,
            actor,
            registered: Vec::new(),
            is_nested: false,
        });
        let which = self.instances.len() - 1;
        let bits = self.bits();
        let own_bits = self.chance(2);
        for conn in 0..self.conns.len() {
            for side in [0, 1] {
                let own = &self.conns[conn].sides[side];
                if own.actor == actor && !own.has_closed && self.rng.usize(..8) > 0 {
                    let bits = if own_bits { self.bits() } else { bits.clone() };
                    self.register(which, conn, side, bits);
                }
            }
        }
    }

    fn bits(&mut self) -> String {
        let asked = self.any(&["in", "in,rdhup", "in,out,rdhup", "in,out", "out", "rdhup"]);
        let mode = self.any(&["", ",et", ",et", ",oneshot", ",et,oneshot"]);
        format!("{asked}{mode}")
    }

    fn register(&mut self, which: usize, conn: usize, side: usize, bits: String) {
        let (end, instance) = (self.conns[conn].end(side), &mut self.instances[which]);
        let (name, actor) = (instance.name.clone(), instance.actor);
        let known = instance
            .registered
            .iter_mut()
            .find(|entry| (entry.0, entry.1) == (conn, side));
        match known {
            Some(entry) => {
                entry.2 = bits.clone();
                self.put(actor, format!("ctl {name} mod {end} {bits}"));
            }
            None => {
                instance.registered.push((conn, side, bits.clone()));
                let extra =
                    if self.chance(10) && !bits.contains("rdhup") && !bits.contains("oneshot") {
                        ",exclusive"
                    } else {
                        ""
                    };
                if !extra.is_empty() {
                    // Such a registration can't be changed.
                    self.instances[which].registered.pop();
                }
                self.put(actor, format!("ctl {name} add {end} {bits}{extra}"));
            }
        }
    }

    /// Changes a registration, deletes one, or adds one.
    fn control(&mut self) {
        if self.instances.is_empty() {
            return;
        }
        let which = self.rng.usize(..self.instances.len());
        let Some((conn, side)) = self.end() else {
            return;
        };
        let instance = self.instances[which].clone();
        if self.conns[conn].sides[side].actor != instance.actor {
            return;
        }
        let known = instance
            .registered
            .iter()
            .position(|entry| (entry.0, entry.1) == (conn, side));
        match known {
            Some(at) if self.chance(3) => {
                self.instances[which].registered.remove(at);
                let end = self.conns[conn].end(side);
                self.put(
                    instance.actor,
                    format!("ctl {} del {end} in", instance.name),
                );
                if self.chance(2) {
                    let bits = self.bits();
                    self.register(which, conn, side, bits);
                }
            }
            _ => {
                let bits = self.bits();
                self.register(which, conn, side, bits);
            }
        }
    }

    /// Asks an instance without waiting.
    fn wait_on_instance(&mut self) {
        if self.instances.is_empty() {
            return;
        }
        let which = self.rng.usize(..self.instances.len());
        let instance = self.instances[which].clone();
        if self.has_full(&instance) {
            return;
        }
        self.put(instance.actor, format!("ewait {} 0", instance.name));
        if self.chance(3) {
            self.put(instance.actor, format!("ewait {} 0", instance.name));
        }
        if self.chance(2) {
            self.wait_on_others(which);
        }
        if self.chance(8)
            && which > 0
            && !instance.is_nested
            && self.instances[0].actor == instance.actor
        {
            self.instances[which].is_nested = true;
            self.put(instance.actor, format!("ctl e0 add {} in", instance.name));
        }
    }

    /// Asks the other instances of the process: each has to tell.
    fn wait_on_others(&mut self, which: usize) {
        let actor = self.instances[which].actor;
        for other in 0..self.instances.len() {
            let instance = self.instances[other].clone();
            if other != which && instance.actor == actor && !self.has_full(&instance) {
                self.put(actor, format!("ewait {} 0", instance.name));
            }
        }
    }

    /// An instance that would tell of room in a filled connection.
    pub(super) fn has_full(&self, instance: &Instance) -> bool {
        instance
            .registered
            .iter()
            .any(|entry| self.conns[entry.0].sides[entry.1].is_full)
            || self.instances.iter().any(|other| {
                other.is_nested
                    && other
                        .registered
                        .iter()
                        .any(|entry| self.conns[entry.0].sides[entry.1].is_full)
            })
    }

    /// Fills a connection, sees that there is no room, and drains it: now, with whoever waits for room being told.
    fn fill(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        self.fill_end(conn, side);
    }

    fn fill_end(&mut self, conn: usize, side: usize) {
        if !self.conns[conn].is_whole() || !self.may("fill") {
            return;
        }
        let (end, far) = (self.conns[conn].end(side), self.conns[conn].end(1 - side));
        let (actor, other) = (
            self.conns[conn].sides[side].actor,
            self.conns[conn].sides[1 - side].actor,
        );
        let waiter = match self.rng.usize(..6) {
            _ if actor == other => None,
            0 => Some(format!("poll -1 {end}:out")),
            1 => Some(format!("send {end} 5")),
            2 => Some(format!("select -1 {end}:out")),
            3..5 => Some(format!("ewait {} -1", self.instance_for_room(actor, &end))),
            _ => None,
        };
        self.put(actor, format!("fill {end}"));
        self.put(actor, format!("poll 0 {end}:out"));
        if let Some(call) = &waiter {
            self.put_thread(actor, 1, format!("start {call}"));
            self.put_thread(actor, 1, "still");
        }
        self.put(other, format!("drain {far}"));
        if let Some(call) = &waiter {
            self.put_thread(actor, 1, "join");
            if call.starts_with("send") {
                self.put(other, format!("drain {far}"));
            }
        }
        self.conns[conn].sides[side].unread = 0;
        self.conns[conn].sides[side].pieces = 0;
        self.put(actor, format!("poll 1000 {end}:out"));
        if self.chance(2) {
            // The direction may move to its ring now.
            let size = self.size();
            self.send_on(conn, side, size);
            self.put(actor, format!("poll 0 {end}:out"));
        }
    }

    /// An instance that waits for room of one end, and has been told of what there is.
    fn instance_for_room(&mut self, actor: char, end: &str) -> String {
        let name = format!("r{}", self.copies);
        self.copies += 1;
        let mode = self.any(&["", ",et"]);
        self.put(actor, format!("epoll {name}"));
        self.put(actor, format!("ctl {name} add {end} out{mode}"));
        self.put(actor, format!("ewait {name} 0"));
        name
    }

    /// One side of a connection sends alone, for so long that this direction comes to its ring; the other one may then be filled.
    pub(super) fn one_way(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        if !self.conns[conn].is_quiet() {
            return;
        }
        let (end, far) = (self.conns[conn].end(side), self.conns[conn].end(1 - side));
        let sides = &self.conns[conn].sides;
        let (actor, other) = (sides[side].actor, sides[1 - side].actor);
        for round in 0..6 {
            self.put(actor, format!("send {end} 1"));
            self.put(other, format!("recv {far} 1"));
            if round > 3 {
                self.put(actor, "nap 800");
            }
        }
        if self.chance(2) {
            self.fill_end(conn, 1 - side);
        }
    }

    fn demote(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        let end = self.conns[conn].end(side);
        if !self.conns[conn].is_whole() {
            return;
        }
        // After a control that is unknown, what was unread comes with the next call of the other end: a known difference.
        let all = if self.conns[conn].is_quiet() { 4 } else { 3 };
        let how = ["lowat", "stamp", "async", "ioctl"][self.rng.usize(..all)];
        self.put(
            self.conns[conn].sides[side].actor,
            format!("demote {end} {how}"),
        );
    }

    fn option(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        let (end, actor) = (
            self.conns[conn].end(side),
            self.conns[conn].sides[side].actor,
        );
        match self.rng.usize(..6) {
            0..2 => {
                let on = self.chance(2);
                let how = self.any(&["", " ioctl"]);
                self.conns[conn].sides[side].is_blocking = !on;
                self.put(
                    actor,
                    format!("nonblock {end} {}{how}", if on { "on" } else { "off" }),
                );
            }
            2 => {
                self.put(actor, format!("nodelay {end} 0"));
                self.put(actor, format!("isnodelay {end}"));
                // Without it, when a byte comes is Nagle's to say.
                self.put(actor, format!("nodelay {end} 1"));
            }
            3 => self.put(actor, format!("isnodelay {end}")),
            4 => self.put(actor, format!("inq {end}")),
            _ => self.put(actor, format!("rcvtimeo {end} 0")),
        }
    }

    fn shut(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        let end = self.conns[conn].end(side);
        let how = self.any(&["wr", "wr", "wr", "rdwr", "rd"]);
        if how != "wr" {
            self.conns[conn].is_odd = true;
        }
        let own = &mut self.conns[conn].sides[side];
        own.has_shut |= how != "rd";
        let actor = own.actor;
        self.put(actor, format!("shut {end} {how}"));
    }

    fn close(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        let (end, conn) = (self.conns[conn].end(side), &mut self.conns[conn]);
        let resets = conn.sides[1 - side].unread > 0 || conn.sides[1 - side].is_full;
        let actor = conn.sides[side].actor;
        conn.sides[side].has_closed = true;
        conn.sides[side].has_shut = true;
        conn.is_odd |= resets;
        let linger = self.rng.usize(..5) == 0;
        if linger {
            self.conns
                .iter_mut()
                .filter(|conn| end.starts_with(&conn.name))
                .for_each(|conn| conn.is_odd |= conn.end(side) == end);
            self.put(actor, format!("linger {end} 0"));
        }
        let how = self.any(&["close", "close", "closerange"]);
        self.put(actor, format!("{how} {end}"));
        for instance in &mut self.instances {
            instance.registered.retain(|entry| {
                let conn = &self.conns[entry.0];
                conn.end(entry.1) != end
            });
        }
    }

    /// A copy of a descriptor, used once and closed.
    fn copy(&mut self) {
        let Some((conn, side)) = self.end() else {
            return;
        };
        let (end, actor) = (
            self.conns[conn].end(side),
            self.conns[conn].sides[side].actor,
        );
        let copy = format!("d{}", self.copies);
        self.copies += 1;
        let how = self.any(&["", " fcntl"]);
        self.put(actor, format!("dup {end} {copy}{how}"));
        self.put(actor, format!("poll 0 {copy}:in,out"));
        self.put(actor, format!("recv {copy} 1000 dontwait peek"));
        self.put(actor, format!("close {copy}"));
    }

    /// Round trips on one connection.
    fn pairs(&mut self) {
        let Some((conn, _)) = self.end() else { return };
        if self.conns[conn].is_whole() {
            let rounds = self.rng.usize(1..4);
            let name = self.conns[conn].name.clone();
            self.put('A', format!("talk {rounds} {name}"));
        }
    }
}
