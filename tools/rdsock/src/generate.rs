//! Manual pages and shell completions, made from the command line's definition.

use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;

type Result = std::result::Result<ExitCode, Box<dyn std::error::Error>>;

/// Prints a completion script.
pub fn completions(shell: Shell) -> Result {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "rdsock", &mut script);
    rdsock_output::bytes(&script)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes `rdsock.1` and a page for each command.
pub fn man(dir: &Path) -> Result {
    rdsock_output::fill(dir, |to| clap_mangen::generate_to(Cli::command(), to))
        .map_err(|error| format!("can't write manual pages to {}: {error}", dir.display()))?;
    Ok(ExitCode::SUCCESS)
}
