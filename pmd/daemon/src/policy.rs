//! Who may be accelerated: users, programs, ports.

use serde::{Deserialize, Deserializer};

use crate::process::Program;

/// The `[policy]` table. An empty `allow` list allows all; `deny` wins over `allow`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    allow_users: Vec<User>,
    deny_users: Vec<User>,
    allow_programs: Vec<Pattern>,
    deny_programs: Vec<Pattern>,
    allow_ports: Vec<u16>,
    deny_ports: Vec<u16>,
}

impl Policy {
    /// May this user's programs attach?
    pub fn allows_user(&self, uid: u32) -> bool {
        allowed(&self.allow_users, &self.deny_users, |user| user.0 == uid)
    }

    /// May this program attach? By its name, or the basename of its executable.
    pub fn allows_program(&self, program: &Program) -> bool {
        let is = |pattern: &Pattern| {
            pattern.0.matches(&program.name) || pattern.0.matches(&program.executable)
        };
        allowed(&self.allow_programs, &self.deny_programs, is)
    }

    /// May one program attach, and another one not?
    pub fn judges_programs(&self) -> bool {
        !(self.allow_programs.is_empty() && self.deny_programs.is_empty())
    }

    /// May a connection with these two ports be accelerated?
    pub fn allows_ports(&self, local: u16, peer: u16) -> bool {
        let is = |port: &u16| *port == local || *port == peer;
        allowed(&self.allow_ports, &self.deny_ports, is)
    }
}

fn allowed<T>(allow: &[T], deny: &[T], is: impl Fn(&T) -> bool) -> bool {
    (allow.is_empty() || allow.iter().any(&is)) && !deny.iter().any(&is)
}

/// A user, given by number or name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User(pub u32);

impl<'de> Deserialize<'de> for User {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a user's number or name")]
        enum Given {
            Number(u32),
            Name(String),
        }
        match Given::deserialize(deserializer)? {
            Given::Number(uid) => Ok(User(uid)),
            Given::Name(name) => match nix::unistd::User::from_name(&name) {
                Ok(Some(user)) => Ok(User(user.uid.as_raw())),
                _ => Err(serde::de::Error::custom(format!(
                    "no user is named {name:?}"
                ))),
            },
        }
    }
}

/// A pattern for a program's name.
#[derive(Clone, Debug)]
struct Pattern(glob::Pattern);

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let pattern = glob::Pattern::new(&text);
        pattern.map(Pattern).map_err(|error| {
            let expected = "a pattern for a program's name, as \"nginx\" or \"redis-*\"";
            serde::de::Error::custom(format!("{text:?}: {error}, expected {expected}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Policy {
        toml::from_str(text).unwrap()
    }

    fn program(name: &str) -> Program {
        Program {
            name: name.into(),
            executable: "redis-check-rdb".into(),
        }
    }

    #[test]
    fn nothing_said_allows_all() {
        let policy = Policy::default();
        assert!(policy.allows_user(7) && policy.allows_ports(1, 2));
        assert!(policy.allows_program(&Program::default()));
        assert!(!policy.judges_programs());
    }

    #[test]
    fn deny_wins_over_allow() {
        let policy = policy(
            "allow_users = [\"root\", 1000]\n deny_users = [1000]\n allow_programs = [\"redis-*\"]\n \
             deny_programs = [\"redis-cli\"]\n deny_ports = [22]",
        );
        assert!(policy.allows_user(0));
        assert!(!policy.allows_user(1000) && !policy.allows_user(1));
        assert!(policy.judges_programs());
        assert!(policy.allows_program(&program("redis-server")));
        assert!(policy.allows_program(&program("started-by-another-name")));
        assert!(!policy.allows_program(&program("redis-cli")));
        assert!(!policy.allows_program(&Program::default()));
        assert!(!policy.allows_ports(22, 5000) && !policy.allows_ports(5000, 22));
        assert!(policy.allows_ports(80, 5000));
    }

    #[test]
    fn a_user_that_does_not_exist_is_an_error() {
        let error = toml::from_str::<Policy>("deny_users = [\"no-such-user\"]").unwrap_err();
        assert!(error.to_string().contains("no-such-user"));
    }
}
