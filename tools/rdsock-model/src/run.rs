//! Serves the devices until somebody ends it.

use crate::plan::Plan;
use crate::report;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rdsock_model::{Fabric, Fault, Running};
use rdsock_vfio::serve::Server;
use std::os::fd::AsFd;
use std::path::PathBuf;

/// Why it could not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A socket could not be made.
    #[error("cannot serve node {node} at {}: {source}", path.display())]
    Serve {
        /// Its name.
        node: u16,
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Nobody can be told.
    #[error(transparent)]
    Output(#[from] rdsock_output::OutputError),
    /// A system call failed.
    #[error("{0}: {1}")]
    System(&'static str, std::io::Error),
}

/// Serves the devices of a plan.
pub fn run(plan: &Plan) -> Result<(), RunError> {
    // Before there are threads, which inherit it.
    let signals = signals().map_err(|errno| RunError::System("signals", errno.into()))?;
    let fabric = Fabric::new(plan.chaos);
    let mut servers = Vec::new();
    for (node, path) in &plan.nodes {
        let server = Server::start(&fabric, path, plan.serving);
        let failed = |source| RunError::Serve {
            node: *node,
            path: path.clone(),
            source,
        };
        servers.push((*node, server.map_err(failed)?));
        tracing::info!(node, socket = %path.display(), "serving");
    }
    let running = Running::start(fabric, plan.busy, || {});
    let _running = running.map_err(|error| RunError::System("the devices' thread", error))?;
    let pause = match plan.stats {
        Some(every) if !every.is_zero() => PollTimeout::try_from(every).unwrap_or(PollTimeout::MAX),
        _ => PollTimeout::NONE,
    };
    loop {
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        let ready = match poll(&mut fds, pause) {
            Ok(0) => {
                print(&servers)?;
                continue;
            }
            Err(Errno::EINTR) => continue,
            ready => ready,
        };
        let came = ready.and_then(|_| signals.read_signal());
        match came.map_err(|errno| RunError::System("waiting for signals", errno.into()))? {
            Some(signal) if signal.ssi_signo == Signal::SIGUSR1 as u32 => print(&servers)?,
            Some(signal) if signal.ssi_signo == Signal::SIGUSR2 as u32 => {
                for (_, server) in &servers {
                    server.function().inject(Fault::Remove);
                }
            }
            _ => break,
        }
    }
    if plan.stats.is_some() {
        print(&servers)?;
    }
    Ok(())
}

fn signals() -> Result<SignalFd, Errno> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGINT);
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGUSR1);
    mask.add(Signal::SIGUSR2);
    mask.thread_block()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC)
}

fn print(servers: &[(u16, Server)]) -> Result<(), RunError> {
    for (node, server) in servers {
        let line = report::line(*node, &server.function().counters());
        rdsock_output::line!("{line}")?;
    }
    Ok(())
}
