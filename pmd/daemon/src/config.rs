//! The configuration file. `docs/configuration.md` describes each key for people.

use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use rdsock_shm::layout::{MAX_RING, MIN_RING};
use serde::Deserialize;

use crate::accounts::{Limits, Thing};
use crate::confine::Confine;
use crate::fabric::FabricConfig;
use crate::memory::HugePages;
use crate::policy::{Policy, User};

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people and the journal.
    Text,
    /// One JSON object for each line.
    Json,
}

/// All keys, with their defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the control socket is made.
    pub socket: Option<PathBuf>,
    /// Users who have a control socket of their own, beside those that the daemon finds itself.
    pub sockets_for_users: Vec<User>,
    /// Bytes of each ring.
    pub ring_size: u64,
    /// When streams are made of huge pages.
    pub huge_pages: HugePages,
    /// Streams of one user.
    pub max_streams_per_user: u64,
    /// Bytes of stream memory of one user.
    pub max_bytes_per_user: u64,
    /// Attached processes.
    pub max_tenants: u64,
    /// Attached processes of one user.
    pub max_tenants_per_user: u64,
    /// Descriptors of the daemon that are used for one user; 0 for as many as are left for the others.
    pub max_descriptors_per_user: u64,
    /// Connects to and from other nodes of one user that are under way.
    pub max_connects_per_user: u64,
    /// Questions of one user that are being answered.
    pub max_queries_per_user: u64,
    /// Bytes of messages that wait for one user's programs.
    pub max_unread_bytes_per_user: u64,
    /// Ends the daemon when nothing has used it for so long; 0 for never.
    pub idle_exit_seconds: u64,
    /// What the daemon gives up once it is set up.
    pub confine: Confine,
    /// How a log line looks.
    pub log_format: LogFormat,
    /// How much is logged.
    pub log_level: LogLevel,
    /// Who may be accelerated.
    pub policy: Policy,
    /// Other nodes.
    pub fabric: Option<FabricConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            socket: None,
            sockets_for_users: Vec::new(),
            ring_size: 4 << 20,
            huge_pages: HugePages::Auto,
            max_streams_per_user: 16_384,
            max_bytes_per_user: 256 << 30,
            max_tenants: 8_192,
            max_tenants_per_user: 4_096,
            max_descriptors_per_user: 0,
            max_connects_per_user: 256,
            max_queries_per_user: 8,
            max_unread_bytes_per_user: 16 << 20,
            idle_exit_seconds: 0,
            confine: Confine::On,
            log_format: LogFormat::Text,
            log_level: LogLevel::Info,
            policy: Policy::default(),
            fabric: None,
        }
    }
}

/// Why a configuration is not used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text is no configuration: the message names line, key and what was expected.
    #[error("{path}: {message}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Line, key, expectation.
        message: String,
    },
}

impl Config {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text).map_err(|message| ConfigError::Parse {
            path: path.to_owned(),
            message,
        })
    }

    /// Parses the text of a file. The error names the line, the key and what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Config = toml::from_str(text).map_err(|error| error.to_string())?;
        let wrong = |key: &str, expected: String| {
            let line = line_of(text, key);
            Err(format!("line {line}: key `{key}`: expected {expected}"))
        };
        if !config.ring_size.is_power_of_two() || !(MIN_RING..=MAX_RING).contains(&config.ring_size)
        {
            return wrong(
                "ring_size",
                format!("a power of two from {MIN_RING} to {MAX_RING}"),
            );
        }
        if config
            .socket
            .as_ref()
            .is_some_and(|path| !path.is_absolute())
        {
            return wrong("socket", "an absolute path".into());
        }
        for (key, value) in [
            ("max_tenants", config.max_tenants),
            ("max_tenants_per_user", config.max_tenants_per_user),
            ("max_connects_per_user", config.max_connects_per_user),
            ("max_queries_per_user", config.max_queries_per_user),
        ] {
            if value == 0 {
                return wrong(key, "at least 1".into());
            }
        }
        Ok(config)
    }
}

/// Control connections that have not said who they are.
const CALLERS: u64 = 512;
/// Sockets of one user that other nodes may reach.
const LISTENERS: u64 = 4096;
/// So many processes may have inherited each stream of a user that has all it may.
const HEIRS: u64 = 4;
/// Connections whose other end is waited for. A connection to a program that is not attached is one for as long as it is there.
const WAITING: u64 = 262_144;
/// Descriptors kept back for the daemon itself.
const RESERVE: u64 = 64;
impl Config {
    /// What may be had, where the daemon may have so many descriptors.
    pub fn limits(&self, descriptors: u64) -> Limits {
        let free = descriptors.saturating_sub(RESERVE);
        let carried = self.fabric.as_ref().map_or(0, |f| f.max_streams as u64);
        // A daemon that serves one user has nobody to share with.
        let several = geteuid().is_root();
        let limit = |thing| -> (u64, u64, bool) {
            match (thing, self.max_descriptors_per_user) {
                (Thing::Descriptors, 0) => (free, free, several),
                (Thing::Descriptors, most) => (free, most, false),
                (Thing::Callers, _) => (CALLERS, CALLERS, several),
                (Thing::Tenants, _) => (self.max_tenants, self.max_tenants_per_user, several),
                (Thing::Streams, _) => (u64::MAX, self.max_streams_per_user, false),
                (Thing::Bytes, _) => (u64::MAX, self.max_bytes_per_user, false),
                (Thing::Carried, _) => (carried, carried, several),
                (Thing::Connects, _) => {
                    let few = (free / 64).max(1);
                    (u64::MAX, self.max_connects_per_user.min(few), false)
                }
                (Thing::Queries, _) => (u64::MAX, self.max_queries_per_user, false),
                (Thing::Unread, _) => (u64::MAX, self.max_unread_bytes_per_user, false),
                (Thing::Listeners, _) => (u64::MAX, LISTENERS, false),
                (Thing::Inherited, _) => {
                    let most = self.max_streams_per_user.saturating_mul(HEIRS);
                    (u64::MAX, most, false)
                }
                (Thing::Waiting, _) => (WAITING, WAITING, several),
            }
        };
        Limits {
            all: Thing::ALL.map(|thing| limit(thing).0),
            user: Thing::ALL.map(|thing| limit(thing).1),
            shared: Thing::ALL.map(|thing| limit(thing).2),
        }
    }
}

/// Number of the line that sets a top-level key.
fn line_of(text: &str, key: &str) -> usize {
    let sets = |line: &str| {
        line.trim_start()
            .strip_prefix(key)
            .is_some_and(|rest| rest.trim_start().starts_with('='))
    };
    text.lines().position(sets).map_or(1, |index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_holds_every_key_at_its_default() {
        let example = include_str!("../../../docs/rdsockd.example.toml");
        let set = Config::parse(example).unwrap();
        let default = Config {
            socket: set.socket.clone(),
            ..Config::default()
        };
        assert_eq!(format!("{set:?}"), format!("{default:?}"));
        // "unknown field `none`, expected one of `socket`, …"
        let error = Config::parse("none = 1").unwrap_err();
        let (_, known) = error.split_once("expected one of").unwrap();
        let keys: Vec<&str> = known.split('`').skip(1).step_by(2).collect();
        assert!(keys.contains(&"sockets_for_users"), "{error}");
        for key in keys {
            let [value, table] = [format!("{key} = "), format!("[{key}]")];
            let mut lines = example.lines().map(|line| line.trim_start_matches("# "));
            let is_there = lines.any(|line| line.starts_with(&value) || line == table);
            assert!(is_there, "{key} is missing");
        }
    }

    #[test]
    fn the_examples_table_of_nodes_is_one_and_holds_every_key_at_its_default() {
        let example = include_str!("../../../docs/rdsockd.example.toml");
        let (_, commented) = example.split_once("# [fabric]\n").unwrap();
        let lines = commented.lines().filter_map(|line| line.strip_prefix("# "));
        // Not the prose between.
        let is_toml = |line: &&str| line.starts_with('[') || line.contains(" = ");
        let table: Vec<&str> = lines.filter(is_toml).collect();
        let whole = Config::parse(&format!("[fabric]\n{}", table.join("\n"))).unwrap();
        let needed = |line: &&&str| {
            let keys = ["[", "node =", "device =", "id =", "name =", "addresses ="];
            keys.iter().any(|key| line.starts_with(key))
        };
        let needed: Vec<&str> = table.iter().filter(needed).copied().collect();
        assert_eq!(table.len() - needed.len(), 6);
        let short = Config::parse(&format!("[fabric]\n{}", needed.join("\n"))).unwrap();
        assert!(whole.fabric.is_some() && whole.fabric == short.fabric);
    }

    #[test]
    fn errors_name_the_line_and_the_key() {
        let unknown = Config::parse("ring_size = 4096\nrings = 3\n").unwrap_err();
        assert!(
            unknown.contains("line 2") && unknown.contains("rings"),
            "{unknown}"
        );
        let size = Config::parse("\n\nring_size = 5000\n").unwrap_err();
        assert!(
            size.contains("line 3") && size.contains("power of two"),
            "{size}"
        );
        let kind = Config::parse("huge_pages = \"yes\"\n").unwrap_err();
        assert!(kind.contains("line 1") && kind.contains("auto"), "{kind}");
        let glob = Config::parse("[policy]\ndeny_programs = [\"a[\"]\n").unwrap_err();
        assert!(glob.contains("line 2"), "{glob}");
        assert!(Config::parse("socket = \"here\"").is_err());
        assert!(Config::parse("max_tenants = 0").is_err());
    }
}
