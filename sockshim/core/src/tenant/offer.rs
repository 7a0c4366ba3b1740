//! A stream that the daemon offers for a connection: mapped while no call on the connection is in
//! the kernel, and declined when it can't be.

use super::attach::attached_user;
use super::link::link;
use super::lock::Guard;
use super::memory::count;
use super::requests::{blank, put};
use crate::address::Address;
use crate::brand;
use crate::conn::{self, Conn, born, phase};
use crate::hidden::hide;
use crate::known::{Need, TCP_INQ, need_of};
use crate::state::TOLD;
use crate::stream::{self, Offer, Stream};
use crate::sys;
use libc::c_int;
use rdsock_shm::control::{Promote, Request, request};
use rdsock_shm::layout::Counter;
use rdsock_shm::reason::{Reason, State};
use std::sync::atomic::Ordering::*;

/// Maps an offered stream, or keeps the offer until the kernel calls under way have ended.
pub(super) fn follow(guard: &Guard, offer: Offer) {
    let Some(held) = conn::by_index(offer.promote.conn as usize) else {
        offer.close();
        return;
    };
    let mask = sys::block_signals();
    follow_with_signals_blocked(guard, offer, &held);
    sys::restore_signals(mask);
}

fn follow_with_signals_blocked(guard: &Guard, offer: Offer, held: &conn::Use) {
    let Promote {
        generation,
        stream_id,
        ..
    } = offer.promote;
    let (index, conn) = (held.index, held.conn);
    let declined = Request {
        stream_id,
        generation,
        ..blank(request::DECLINED, index, conn)
    };
    if (TOLD.declines)(conn)
        || conn.generation.load(Relaxed) != generation
        || conn
            .phase
            .compare_exchange(phase::ANNOUNCED, phase::INSTALLING, SeqCst, Relaxed)
            .is_err()
    {
        offer.close();
        put(guard, &declined);
        return;
    }
    if conn.in_rx.load(SeqCst) != 0 || conn.in_tx.load(SeqCst) != 0 {
        conn.phase.store(phase::ANNOUNCED, SeqCst);
        // SAFETY: the lock is held.
        unsafe {
            conn.set_offer(Offer {
                fds: offer.fds.map(|fd| if fd >= 0 { hide(fd) } else { fd }),
                ..offer
            })
        };
        return;
    }
    match install(held, &offer.promote, offer.fds) {
        Ok(stream) => {
            (TOLD.mapping)();
            // SAFETY: the phase is INSTALLING, set above.
            unsafe { conn.set_stream(stream) };
            conn.epoch.store(link().epoch.load(Relaxed), Relaxed);
            take_names(conn, &offer.promote);
            conn.phase.store(phase::MAPPED, SeqCst);
            conn.tell(index, State::Rings, Reason::None);
            if let Some(record) = conn::record(index) {
                record.stream_id.store(stream_id, Relaxed);
            }
            count(Counter::Promoted);
            put(
                guard,
                &Request {
                    stream_id,
                    generation,
                    ..blank(request::MAPPED, index, conn)
                },
            );
            (TOLD.mapped)(held);
        }
        Err(reason) => {
            conn.phase.store(phase::NEVER, SeqCst);
            conn.tell(index, State::Kernel, reason);
            put(guard, &declined);
        }
    }
    offer.close();
}

/// A program that has inherited a connection to another node is told its true addresses, as the one
/// before it was.
fn take_names(conn: &Conn, promote: &Promote) {
    let (Ok(local_port), Ok(peer_port)) = (
        u16::try_from(promote.local_port),
        u16::try_from(promote.peer_port),
    ) else {
        return;
    };
    if local_port != 0 && conn.born.load(Relaxed) == born::UNKNOWN && conn.names.claim() {
        let (local, peer) = (promote.local, promote.peer);
        conn.names.tell(
            Address {
                ip: local,
                port: local_port,
            },
            Address {
                ip: peer,
                port: peer_port,
            },
            0,
        );
    }
}

/// Maps a stream, and makes the receiving half ready: the other end may switch from then on.
fn install(held: &conn::Use, promote: &Promote, fds: [c_int; 3]) -> Result<Stream, Reason> {
    let conn = held.conn;
    let fd = conn.fd.load(Relaxed);
    let stream = Stream::map(
        fds,
        promote.ring_size,
        promote.data_offset,
        promote.end,
        promote.stream_id,
    )
    .ok_or(Reason::NoMemory)?;
    let end = stream.at(held, fd);
    let fault = if stream.page().installed.load(Acquire) != 0 {
        // Inherited over exec: everything stands in the end page.
        end.free_own_locks(stream::pid());
        end.note_barriers();
        None
    } else if link().looking_up.load(Relaxed) != 0 {
        // Offered to who had it before, who has not followed, and may have it still: it does not know of a stream.
        Some(Reason::Shared)
    } else if has_option_of_kernel(fd) || brand::is_on(fd) {
        Some(Reason::Option)
    } else if !brand::put_on(fd) {
        Some(Reason::Sandbox)
    } else {
        let flags = sys::fcntl(fd, libc::F_GETFL, 0);
        let is_ready = end.promote(flags & libc::O_NONBLOCK as isize != 0);
        if !is_ready {
            brand::take_off(fd);
        }
        (!is_ready).then_some(Reason::NotQuiet)
    };
    if let Some(fault) = fault {
        stream.unmap();
        return Err(fault);
    }
    end.hold(stream::pid());
    conn.owner.store(attached_user(), Relaxed);
    own_options(conn, fd);
    Ok(stream)
}

/// True when an option is set that only the kernel can honour: an accepted connection has those of its listener.
fn has_option_of_kernel(fd: c_int) -> bool {
    const OPTIONS: [c_int; 6] = [
        libc::SO_RCVLOWAT,
        libc::SO_OOBINLINE,
        libc::SO_ZEROCOPY,
        libc::SO_TIMESTAMP,
        libc::SO_TIMESTAMPNS,
        libc::SO_TIMESTAMPING,
    ];
    OPTIONS.into_iter().any(|name| {
        let value = sys::getsockopt::<c_int>(fd, libc::SOL_SOCKET, name).unwrap_or(0);
        need_of(libc::SOL_SOCKET, name, value) != Need::Nothing
    }) || sys::has_filter(fd)
}

/// The anchor sends single bytes from now on, which must leave at once.
fn own_options(conn: &Conn, fd: c_int) {
    let on = |name| {
        sys::getsockopt::<c_int>(fd, libc::IPPROTO_TCP, name).is_some_and(|value| value != 0)
    };
    let tells = if on(TCP_INQ) { conn::TELLS_UNREAD } else { 0 };
    let options = u32::from(on(libc::TCP_NODELAY)) | u32::from(on(libc::TCP_CORK)) << 1;
    let said = conn.options.load(Relaxed) & conn::SAYS_BRAND;
    conn.options.store(options | tells | said, Relaxed);
    if options & 2 != 0 {
        sys::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_CORK, &0_i32);
    }
    sys::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, &1_i32);
}
