//! `rdsockd`, the rdsock daemon. See `lib.rs`.

use std::process::ExitCode;

use clap::Parser;
use rdsockd::args::Args;
use rdsockd::daemon::Daemon;

fn main() -> ExitCode {
    let args = Args::parse();
    if args.print_man {
        return Args::print_man().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let config = match args.config() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("rdsockd: {error}");
            return ExitCode::from(2);
        }
    };
    if args.check_config {
        println!("the configuration is good");
        return ExitCode::SUCCESS;
    }
    rdsockd::log::start(&config);
    match Daemon::new(args, config).and_then(Daemon::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
