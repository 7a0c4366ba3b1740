//! Steps that move many bytes as a whole program would: `flow NAME COUNT HOW` sends, `gather NAME COUNT HOW` receives.
//! Each is a loop that is right on Linux and relies on what Linux promises: a short transfer means that nothing more is
//! there (or no room is), and whoever waits is told. A wait of two seconds in vain is a `STALL`.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use libc::{c_int, epoll_event, pollfd};
use nix::errno::Errno;

use super::transfer::result;
use super::waits::{bits, data, events};
use super::{Answer, Line, Scene};

const PATIENCE: i64 = 2000;

/// How a loop waits.
enum Way {
    /// By the call itself.
    Block,
    Poll,
    /// By an instance, edge-triggered, until EAGAIN (false) or a short transfer (true). One of its own ends with it.
    Edge(RawFd, bool, #[allow(dead_code)] Option<OwnedFd>),
}

/// An instance of its own for each loop, or one that the program has.
fn way(scene: &Scene, line: &Line, wanted: &str) -> Result<Way, Errno> {
    let short = match line.word(3) {
        "et" => false,
        "etshort" => true,
        "poll" => return Ok(Way::Poll),
        _ => return Ok(Way::Block),
    };
    if !line.word(4).is_empty() {
        return Ok(Way::Edge(scene.fd(line.word(4)), short, None));
    }
    let mut event = epoll_event {
        events: bits(wanted),
        u64: data(line.word(1)),
    };
    // SAFETY: the new descriptor is nobody else's; the event lives until the call returns.
    unsafe {
        let made = result(libc::epoll_create1(libc::EPOLL_CLOEXEC) as isize)? as RawFd;
        let owner = OwnedFd::from_raw_fd(made);
        let fd = scene.fd(line.word(1));
        result(libc::epoll_ctl(made, libc::EPOLL_CTL_ADD, fd, &mut event) as isize)?;
        Ok(Way::Edge(made, short, Some(owner)))
    }
}

impl Way {
    /// Waits until the connection may be ready; false after the time limit.
    fn wait(&self, name: &str, fd: RawFd, bit: i16) -> Result<bool, Errno> {
        match self {
            Way::Block => Ok(true),
            Way::Poll => {
                let mut entry = pollfd {
                    fd,
                    events: bit,
                    revents: 0,
                };
                // SAFETY: the list lives until the call returns.
                let found = unsafe { libc::poll(&mut entry, 1, PATIENCE as c_int) };
                Ok(result(found as isize)? > 0)
            }
            Way::Edge(instance, ..) => {
                let wanted = (bit as u32) | (libc::EPOLLERR | libc::EPOLLHUP) as u32;
                // What others of the instance say is not this loop's.
                for _ in 0..1000 {
                    let told = events(*instance, PATIENCE, 16)?;
                    if told.is_empty() {
                        return Ok(false);
                    }
                    if told
                        .iter()
                        .any(|(other, bits)| other == name && bits & wanted != 0)
                    {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }

    /// Whether a transfer of so many bytes, of which so many were asked, is followed by a wait.
    fn pauses(&self, moved: usize, asked: usize) -> bool {
        matches!(self, Way::Edge(_, true, _)) && moved < asked
    }

    fn flags(&self) -> c_int {
        match self {
            Way::Block => libc::MSG_NOSIGNAL,
            _ => libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
        }
    }
}

/// Sizes of the calls, uneven, from the place alone.
fn size(at: u64) -> usize {
    const SIZES: [usize; 8] = [1, 100, 4096, 65_536, 333, 16_384, 1_000_000, 70_000];
    SIZES[(at / 7 % 8) as usize]
}

/// Calls `step` with the place and size of the next transfer until all is moved.
fn all(
    line: &Line,
    way: &Way,
    wait: impl Fn() -> Result<bool, Errno>,
    mut step: impl FnMut(u64, usize) -> Result<(usize, Option<String>), Errno>,
) -> Answer {
    let (place, whole) = (line.place(0)?, line.number(2) as usize);
    let mut moved = 0;
    while moved < whole {
        let at = place.at + moved as u64;
        let asked = size(at);
        let paused = match step(at, asked) {
            Ok((0, _)) => return Ok(format!("n={moved} of {whole}, end")),
            Ok((count, None)) => {
                moved += count;
                way.pauses(count, asked)
            }
            Ok((_, Some(fault))) => return Ok(format!("n={moved} of {whole}{fault}")),
            Err(Errno::EAGAIN) => true,
            Err(Errno::EINTR) => false,
            Err(error) => return Ok(format!("n={moved} of {whole} {error:?}")),
        };
        if paused && moved < whole && !wait()? {
            return Ok(format!("n={moved} of {whole} STALL"));
        }
    }
    Ok(format!("n={moved} of {whole}"))
}

fn flow(scene: &Scene, line: &Line) -> Answer {
    let (name, fd, place) = (line.word(1), scene.fd(line.word(1)), line.place(0)?);
    let way = way(scene, line, "out,et")?;
    let whole = line.number(2) as u64;
    let mut bytes = vec![0; 1 << 20];
    let wait = || way.wait(name, fd, libc::POLLOUT);
    all(line, &way, wait, |at, asked| {
        let asked = asked.min((place.at + whole - at) as usize);
        let bytes = bytes.get_mut(..asked).unwrap_or_default();
        place.direction.fill(at, bytes);
        // SAFETY: the buffer lives until the call returns.
        let sent = unsafe { libc::send(fd, bytes.as_ptr().cast(), asked, way.flags()) };
        Ok((result(sent)?, None))
    })
}

fn gather(scene: &Scene, line: &Line) -> Answer {
    let (name, fd, place) = (line.word(1), scene.fd(line.word(1)), line.place(0)?);
    let way = way(scene, line, "in,rdhup,et")?;
    let mut bytes = vec![0; 1 << 20];
    let wait = || way.wait(name, fd, libc::POLLIN);
    all(line, &way, wait, |at, asked| {
        let bytes = bytes.get_mut(..asked).unwrap_or_default();
        // SAFETY: the buffer lives until the call returns.
        let got = unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), asked, way.flags()) };
        let got = result(got)?;
        Ok((
            got,
            place
                .direction
                .fault(at, bytes.get(..got).unwrap_or_default()),
        ))
    })
}

/// The steps of this module.
pub fn act(scene: &Scene, line: &Line) -> Option<Answer> {
    Some(match line.word(0) {
        "flow" => flow(scene, line),
        "gather" => gather(scene, line),
        _ => return None,
    })
}
