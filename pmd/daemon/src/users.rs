//! The users that are known when the daemon starts: each gets a control socket of its own.
//!
//! Later the daemon has not the privilege any more to give a socket to a user. Who is not known calls at the socket for everybody.
//! Subordinate ids are nobody's own: one user has very many of them, who runs programs as each takes no sockets from others by that.

use std::collections::HashSet;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use nix::unistd::geteuid;

use crate::config::Config;

/// Sockets at most,
const MOST: usize = 256;
/// and of the daemon's descriptors this part.
const PART: u64 = 16;

/// Users who may attach. None where the daemon serves its own user alone.
pub fn known(config: &Config, descriptors: u64) -> Vec<u32> {
    if !geteuid().is_root() {
        return Vec::new();
    }
    let named = config.sockets_for_users.iter().map(|user| user.0);
    let text = fs::read_to_string("/etc/subuid").unwrap_or_default();
    let running = not_subordinate(running(), &text).collect();
    let all = in_order(named, running, registered());
    let allowed = all.filter(|user| config.policy.allows_user(*user));
    let most = MOST.min((descriptors / PART) as usize);
    let mut seen = HashSet::new();
    allowed
        .filter(|user| seen.insert(*user))
        .take(most)
        .collect()
}

/// First those that the configuration names, then those of `/etc/passwd`, who runs something before who does not, then other owners of
/// running processes: one user may be very many of these, by subordinate numbers.
fn in_order(
    named: impl IntoIterator<Item = u32>,
    running: Vec<u32>,
    registered: Vec<u32>,
) -> impl Iterator<Item = u32> {
    let known: HashSet<u32> = registered.iter().copied().collect();
    let known = running
        .clone()
        .into_iter()
        .filter(move |user| known.contains(user));
    let named = named.into_iter();
    named.chain(known).chain(registered).chain(running)
}

fn running() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter(|entry| {
        let name = entry.file_name();
        name.to_str()
            .is_some_and(|name| name.parse::<u32>().is_ok())
    });
    processes.filter_map(|process| Some(process.metadata().ok()?.uid()))
}

fn registered() -> Vec<u32> {
    let text = fs::read_to_string("/etc/passwd").unwrap_or_default();
    parse(&text)
}

/// Those of some users that no range of a text as `subuid(5)` describes it holds.
fn not_subordinate(users: impl Iterator<Item = u32>, text: &str) -> impl Iterator<Item = u32> {
    let range = |line: &str| -> Option<Range<u32>> {
        let mut numbers = line.split(':').skip(1).map(|word| word.trim().parse().ok());
        let (first, count) = (numbers.next()??, numbers.next()??);
        Some(first..first.saturating_add(count))
    };
    let ranges: Vec<_> = text.lines().filter_map(range).collect();
    users.filter(move |user| !ranges.iter().any(|range| range.contains(user)))
}

/// The users of a text as `passwd(5)` describes it.
fn parse(text: &str) -> Vec<u32> {
    let number = |line: &str| line.split(':').nth(2)?.parse().ok();
    text.lines().filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A user may have processes of 65,536 subordinate users.
    #[test]
    fn who_runs_as_very_many_users_is_in_nobodys_way() {
        let many = || 100_000..165_536;
        let running: Vec<u32> = [0].into_iter().chain(many()).chain([1000]).collect();
        let all: Vec<u32> = in_order([7], running, vec![33, 0, 1000, 1001]).collect();
        assert_eq!(all[..5], [7, 0, 1000, 33, 0]);
        let place = |user| all.iter().position(|other| *other == user);
        assert!(place(1001) < place(100_000));
        assert!(place(165_535).is_some());
    }

    #[test]
    fn subordinate_ids_are_no_users_of_their_own() {
        let text = "# none\nme:100000:65536\n1000:300000:1\nbad:1\nall:4294967000:65536\n";
        let users = [0, 1, 99_999, 100_000, 165_535, 165_536, 300_000, 300_001];
        let own = not_subordinate(users.into_iter(), text);
        assert_eq!(own.collect::<Vec<_>>(), [0, 1, 99_999, 165_536, 300_001]);
        assert_eq!(not_subordinate([7].into_iter(), "").count(), 1);
    }

    #[test]
    fn users_are_named_once_and_the_named_ones_first() {
        let text =
            "root:x:0:0:root:/root:/bin/bash\n# none\n\nwww:x:33:33::/:/bin/false\nbad:x:-1\n";
        assert_eq!(parse(text), [0, 33]);
        if !geteuid().is_root() {
            return eprintln!(
                "SKIPPED, NOTHING WAS CHECKED: only root's daemon serves other users"
            );
        }
        let text = "sockets_for_users = [64001, 64002]\n[policy]\ndeny_users = [64002]";
        let config = Config::parse(text).unwrap();
        let all = known(&config, 1 << 20);
        assert_eq!(all[0], 64001);
        assert!(all.contains(&0) && !all.contains(&64002), "{all:?}");
        let once: HashSet<_> = all.iter().collect();
        assert_eq!(once.len(), all.len());
        assert_eq!(known(&config, PART), [64001]);
    }
}
