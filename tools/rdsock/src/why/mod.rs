//! `rdsock why`: each TCP connection, accelerated or not, and the reason.

mod explain;
mod machine;
mod nodes;
mod patience;
mod report;
mod table;

use std::process::ExitCode;

use rdsock_output::OutputError;
use rdsock_shm::control::question;

use crate::cli::WhyArgs;
use crate::daemon::{AskError, Daemon, WhyAnswer};
use machine::Machine;
use report::Report;

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum WhyError {
    /// No such process.
    #[error("there is no process {0}")]
    NoProcess(i32),
    /// The daemon does not answer.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// Nobody can be told.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Nothing was asked that can be answered without a daemon.
    #[error("no daemon answers: start rdsockd, or run programs with rdsock run")]
    NoDaemon,
}

/// Prints the report.
pub fn why(args: &WhyArgs) -> Result<ExitCode, WhyError> {
    // It is everybody's processes that root looks at. Who has no such privilege sees little more than his own.
    let _ = rdsock_files::proc::mount_own();
    let daemon = Daemon::find()?;
    let answer: Option<WhyAnswer> = match &daemon {
        Some(daemon) => Some(daemon.ask(question::WHY)?),
        None => None,
    };
    let mut machine = Machine::new();
    if let Some(pid) = args.pid
        && !machine.exists(pid)
    {
        return Err(WhyError::NoProcess(pid));
    }
    if args.pid.is_none() && answer.is_none() && !args.json {
        return Err(WhyError::NoDaemon);
    }
    let report = Report::new(daemon.as_ref(), answer, args.pid, &mut machine);
    if args.json {
        rdsock_output::json(report.to_json())?;
    } else {
        table::print(&report, args.pid)?;
    }
    Ok(ExitCode::SUCCESS)
}
