//! The two cores of a comparison.

use crate::error::{Error, Result};
use std::fmt;

/// Two different cores: server and client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cores {
    pub server: usize,
    pub client: usize,
}

impl Cores {
    /// The cores named as "A,B", else the first two of `allowed`.
    pub fn choose(named: Option<&str>, allowed: &[usize]) -> Result<Self> {
        let cores = match named {
            None => allowed.to_vec(),
            Some(text) => text
                .split(',')
                .map(|core| {
                    core.trim().parse().map_err(|_| {
                        Error::Usage(format!("--cores {text}: expected two numbers, as in 0,1"))
                    })
                })
                .collect::<Result<Vec<usize>>>()?,
        };
        match cores[..] {
            [server, client, ..] if named.is_none() || cores.len() == 2 => {
                if server == client {
                    return Err(Error::Usage("--cores must name two different cores".into()));
                }
                match cores.iter().take(2).find(|core| !allowed.contains(core)) {
                    Some(core) => Err(Error::Usage(format!(
                        "core {core} is not allowed; allowed are {allowed:?}"
                    ))),
                    None => Ok(Self { server, client }),
                }
            }
            _ if named.is_none() => Err(Error::Usage(format!(
                "a comparison needs two cores, and this process may use only {allowed:?}"
            ))),
            _ => Err(Error::Usage(
                "--cores: expected two numbers, as in 0,1".into(),
            )),
        }
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{},{}", self.server, self.client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_two_allowed_unless_named() {
        let choose = |named| Cores::choose(named, &[2, 3, 7]);
        assert_eq!(
            choose(None).unwrap(),
            Cores {
                server: 2,
                client: 3
            }
        );
        assert_eq!(
            choose(Some("7, 2")).unwrap(),
            Cores {
                server: 7,
                client: 2
            }
        );
        for wrong in ["2", "2,2", "2,4", "2,3,7", "a,b", ""] {
            assert!(choose(Some(wrong)).is_err(), "{wrong}");
        }
        assert!(Cores::choose(None, &[3]).is_err());
    }
}
