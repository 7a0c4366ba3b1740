//! The program's end of a stream to another node is promoted, with the daemon as the other end.

use crate::book::{Announced, Conn, Role, Route};
use crate::connections::End;
use crate::daemon::Daemon;
use crate::streams::{Elsewhere, Memory};
use rdsock_node::Command;
use rdsock_node::memory::Board;
use rdsock_shm::reason::Reason;

/// In place of a tenant: the daemon itself.
const DAEMON: u64 = 0;

impl Daemon {
    /// A tenant was found to hold a connection that it says is a stream to another node.
    pub(crate) fn promote_carried(&mut self, announced: Announced, ticket: u64) -> Result<(), End> {
        let conn = announced.conn;
        match self.try_promote(announced, ticket) {
            Ok(()) => match self.promotion(conn) {
                Some(message) => self.send(conn.tenant, message),
                None => Ok(()),
            },
            Err(reason) => self.turn_down(conn, reason),
        }
    }

    fn try_promote(&mut self, announced: Announced, ticket: u64) -> Result<(), Reason> {
        let listeners = self.fabric.as_ref().map_or(0, |f| f.listeners.len());
        for listener in 0..listeners {
            // It may have been announced before its other end was accepted.
            self.on_anchors(listener);
        }
        let bells = self.tenant(announced.conn.tenant).map(|t| t.bells.clone());
        let bells = bells.ok_or(Reason::Unverified)?;
        let fabric = self.fabric.as_mut().ok_or(Reason::NoDevice)?;
        let carried = fabric.carried.get_mut(&ticket).ok_or(Reason::Unverified)?;
        let Route { local, peer, netns } = announced.route;
        let (Some((cookie, inode)), true) = (carried.socket, carried.anchor == Some((local, peer)))
        else {
            return Err(Reason::Unverified);
        };
        let board = Board::new(&bells).map_err(|_| Reason::NoMemory)?;
        let fds = carried.fds.take();
        if fds.is_none() && carried.mapped {
            // Somebody has the stream of this very socket.
            return Err(Reason::Shared);
        }
        let stream = carried.stream.clone();
        stream.set_board(board);
        let elsewhere = Elsewhere {
            node: stream.node,
            end: stream.end,
            source: carried.source,
            destination: carried.destination,
            stream: stream.clone(),
        };
        let ours = Announced {
            conn: Conn {
                tenant: DAEMON,
                number: ticket as u32,
                generation: 0,
            },
            fd: -1,
            pid: std::process::id() as i32,
            uid: announced.uid,
            cookie,
            inode,
            route: Route {
                netns,
                local: peer,
                peer: local,
            },
            role: Role::Unknown,
        };
        let ends = match stream.end {
            0 => [announced, ours],
            _ => [ours, announced],
        };
        match fds {
            Some(fds) => {
                let board = fabric.board.clone();
                let boards = match stream.end {
                    0 => [bells, board],
                    _ => [board, bells],
                };
                let bytes = fds.bytes;
                let ring_size = stream.memory.ring_size();
                let memory = Memory::new(fds, boards, ring_size, Some(elsewhere));
                self.counters.streams_opened += 1;
                self.book.open(ticket, ends, bytes, memory);
            }
            // Who was handed it has forked before it came to that: this is the child.
            None => {
                let before = self.book.close(ticket).ok_or(Reason::Shared)?;
                let mut memory = before.memory;
                memory.hand_anew(stream.end, bells);
                self.book.open(ticket, ends, before.bytes, memory);
            }
        }
        // The daemon is no tenant that holds it.
        self.book.release(ours.conn);
        Ok(())
    }

    /// A stream is not handed to anybody else from now on.
    pub(crate) fn note_mapped(&mut self, ticket: u64) {
        let fabric = self.fabric.as_mut();
        if let Some(carried) = fabric.and_then(|fabric| fabric.carried.get_mut(&ticket)) {
            carried.mapped = true;
        }
    }

    /// A tenant has mapped the stream of a connection.
    pub(crate) fn on_mapped(&mut self, conn: Conn) {
        self.book.mapped(conn);
        let stream = self
            .book
            .seat_of(conn)
            .and_then(|(id, _)| self.book.stream(id))
            .and_then(|stream| stream.memory.elsewhere.as_ref())
            .map(|elsewhere| elsewhere.stream.clone());
        if let Some(stream) = &stream {
            self.note_mapped(stream.ticket);
        }
        if let (Some(stream), Some(fabric)) = (stream, &mut self.fabric) {
            fabric.poller.command(Command::Ready { stream });
        }
    }
}
