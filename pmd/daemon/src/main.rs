//! `rdsockd`, the rdsock daemon. See `lib.rs`.

#![deny(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

use nix::sys::signal::SigHandler;

use rdsockd::args::Args;
use rdsockd::daemon::Daemon;

/// What its complaints begin with.
const NAME: &str = "rdsockd";

/// The status after something was printed.
fn told(printed: Result<(), rdsock_output::OutputError>) -> ExitCode {
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            rdsock_output::failed(NAME, error);
            ExitCode::FAILURE
        }
    }
}

fn main() -> ExitCode {
    let args = match rdsock_output::parse::<Args>(NAME) {
        Ok(args) => args,
        Err(status) => return status,
    };
    if args.print_man {
        return told(
            Args::man()
                .map_err(Into::into)
                .and_then(|page| rdsock_output::bytes(&page)),
        );
    }
    let config = match args.config() {
        Ok(config) => config,
        Err(error) => {
            rdsock_output::complain(NAME, error);
            return ExitCode::from(2);
        }
    };
    if args.check_config {
        return told(rdsock_output::line!("the configuration is good"));
    }
    // A limit of file sizes (ulimit -f) counts for shared memory, too: an error for whoever wants it, not the end of all.
    // SAFETY: no handler is set.
    let _ =
        unsafe { nix::sys::signal::signal(nix::sys::signal::Signal::SIGXFSZ, SigHandler::SigIgn) };
    rdsockd::heap::prepare();
    let own_proc = rdsock_files::proc::mount_own();
    let lines = rdsockd::log::start(&config);
    if let Err(error) = own_proc {
        tracing::debug!(
            "no /proc of its own ({error}): whoever locks a folder there holds up looks"
        );
    }
    let status = match Daemon::new(args, config, &lines).and_then(Daemon::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    };
    lines.finish();
    status
}
