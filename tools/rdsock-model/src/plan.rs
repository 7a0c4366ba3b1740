//! The flags, checked.

use crate::cli::Flags;
use rdsock_model::Chaos;
use rdsock_model::sheet::MAX_NODE;
use rdsock_vfio::serve::Serving;
use std::path::PathBuf;
use std::time::Duration;

/// What is to be served.
#[derive(Debug)]
pub struct Plan {
    /// Names of the devices, and their sockets.
    pub nodes: Vec<(u16, PathBuf)>,
    /// How each is served.
    pub serving: Serving,
    /// What happens by chance.
    pub chaos: Chaos,
    /// Spin without work.
    pub busy: bool,
    /// Print counters at the end; and this often, if it is not zero.
    pub stats: Option<Duration>,
}

/// Why there is nothing to run.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No node has the id.
    #[error("--node {0}=…: an id is 1 to {MAX_NODE}")]
    Id(u16),
    /// Two devices have one name.
    #[error("--node {0}=… is given twice")]
    Twice(u16),
    /// Two devices have one socket.
    #[error("{}: each node needs a socket of its own", .0.display())]
    Socket(PathBuf),
    /// Not a possible number.
    #[error("--queue-sets {0}: expected a power of two up to 256")]
    QueueSets(usize),
}

impl Plan {
    /// Checks flags.
    pub fn check(flags: Flags) -> Result<Self, PlanError> {
        for (at, (id, path)) in flags.nodes.iter().enumerate() {
            let before = flags.nodes.get(..at).unwrap_or(&[]);
            if *id == 0 || u32::from(*id) > MAX_NODE {
                return Err(PlanError::Id(*id));
            }
            if before.iter().any(|(other, _)| other == id) {
                return Err(PlanError::Twice(*id));
            }
            if before.iter().any(|(_, other)| other == path) {
                return Err(PlanError::Socket(path.clone()));
            }
        }
        let sets = flags.queue_sets;
        if !sets.is_power_of_two() || sets > 256 {
            return Err(PlanError::QueueSets(sets));
        }
        Ok(Plan {
            nodes: flags.nodes,
            serving: Serving {
                queue_sets: sets,
                trapped: flags.trapped,
            },
            chaos: Chaos {
                seed: flags.seed,
                delay_ns: flags.delay_us.saturating_mul(1000),
                reorder_lanes: flags.reorder,
                refuse_ppm: flags.refuse_ppm,
                full_ppm: flags.full_ppm,
                link_ppm: flags.link_ppm,
                link_down_ns: flags.link_down_us.saturating_mul(1000),
            },
            busy: flags.busy,
            stats: flags.stats.map(Duration::from_secs),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn check(flags: &[&str]) -> Result<Plan, PlanError> {
        let flags = ["rdsock-model"].iter().chain(flags);
        Plan::check(Flags::try_parse_from(flags).unwrap())
    }

    #[test]
    fn flags_that_make_no_sense_are_named() {
        let cases: [(&[&str], PlanError); 4] = [
            (&["--node", "0=/a"], PlanError::Id(0)),
            (&["--node", "1=/a", "--node", "1=/b"], PlanError::Twice(1)),
            (
                &["--node", "1=/a", "--node", "2=/a"],
                PlanError::Socket("/a".into()),
            ),
            (
                &["--node", "1=/a", "--queue-sets", "3"],
                PlanError::QueueSets(3),
            ),
        ];
        for (flags, expected) in cases {
            assert_eq!(check(flags).unwrap_err(), expected);
        }
        for bad in ["1", "x=/a", "1="] {
            assert!(Flags::try_parse_from(["rdsock-model", "--node", bad]).is_err());
        }
        assert!(Flags::try_parse_from(["rdsock-model"]).is_err());
    }

    #[test]
    fn a_plan_has_what_was_asked_for() {
        let plan = check(&["--node", "7=/a", "--stats", "--delay-us", "3", "--trapped"]).unwrap();
        assert_eq!(plan.nodes, [(7, "/a".into())]);
        assert_eq!(plan.stats, Some(Duration::ZERO));
        assert_eq!((plan.chaos.delay_ns, plan.serving.trapped), (3000, true));
        let plan = check(&["--node", "7=/a", "--stats", "2"]).unwrap();
        assert_eq!(plan.stats, Some(Duration::from_secs(2)));
    }
}
