//! The command line.

use std::path::PathBuf;

use clap::{CommandFactory, Parser};

use crate::config::{Config, ConfigError, LogLevel};
use crate::endpoint::default_socket;

/// The rdsock daemon: matches the two ends of same-host TCP connections of preloaded programs
/// and gives them shared memory to talk through.
#[derive(Debug, Parser)]
#[command(name = "rdsockd", version)]
pub struct Args {
    /// Read the configuration from FILE (TOML; every key is described in docs/configuration.md)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Check the configuration, say what is wrong with it, and end
    #[arg(long)]
    pub check_config: bool,
    /// Make the control socket at PATH [default: /run/rdsock/rdsockd.sock for root,
    /// $XDG_RUNTIME_DIR/rdsock/rdsockd.sock for everybody else]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// End when nothing has used the daemon for SECONDS (0: never)
    #[arg(long, value_name = "SECONDS")]
    pub idle_exit: Option<u64>,
    /// Print the manual page
    #[arg(long, hide = true)]
    pub print_man: bool,
    /// How much to log
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
}

impl Args {
    /// The manual page.
    pub fn man() -> std::io::Result<Vec<u8>> {
        let mut page = Vec::new();
        clap_mangen::Man::new(Args::command()).render(&mut page)?;
        Ok(page)
    }

    /// The configuration: the file's, with what the command line says on top.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let mut config = match &self.config {
            Some(path) => Config::read(path)?,
            None => Config::default(),
        };
        if let Some(seconds) = self.idle_exit {
            config.idle_exit_seconds = seconds;
        }
        if let Some(level) = self.log_level {
            config.log_level = level;
        }
        let said = self.socket.clone().or(config.socket.take());
        config.socket = Some(said.unwrap_or_else(default_socket));
        Ok(config)
    }
}
