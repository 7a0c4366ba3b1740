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
    /// The cores named as "A,B", else the first two of `allowed`; two different ones.
    pub fn choose(named: Option<&str>, allowed: &[usize]) -> Result<Self> {
        let cores = match (named, allowed) {
            (Some(text), _) => Self::named("--cores", text, allowed)?,
            (None, &[server, client, ..]) => Self { server, client },
            _ => {
                return Err(Error::Usage(format!(
                    "a comparison needs two cores, and this process may use only {allowed:?}"
                )));
            }
        };
        if cores.server == cores.client {
            return Err(Error::Usage("--cores must name two different cores".into()));
        }
        Ok(cores)
    }

    /// The cores that a flag names as "A,B", perhaps the same twice.
    pub fn named(flag: &str, text: &str, allowed: &[usize]) -> Result<Self> {
        let wrong = || Error::Usage(format!("{flag} {text}: expected two numbers, as in 0,1"));
        let number = |core: &str| core.trim().parse::<usize>().map_err(|_| wrong());
        let (server, client) = text.split_once(',').ok_or_else(wrong)?;
        let cores = [number(server)?, number(client)?];
        match cores.iter().find(|core| !allowed.contains(core)) {
            Some(core) => Err(Error::Usage(format!(
                "core {core} is not allowed; allowed are {allowed:?}"
            ))),
            None => Ok(Self {
                server: cores[0],
                client: cores[1],
            }),
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
