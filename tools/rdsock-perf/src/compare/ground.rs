//! What the paths of a comparison stand on: namespaces, other programs, and how to start a process on each path.

use super::LeftOut;
use super::nodes::Nodes;
use super::proof::is_shimmed;
use super::veth::Veth;
use crate::error::{Doing, Error, Result};
use crate::plan::{Cell, ComparePlan, Path, Wait};
use std::path::PathBuf;
use std::process::Command;

/// Name of the environment variable with the shim's spin budget, in microseconds.
const SPIN_BUDGET: &str = "RDSOCK_SPIN_US";

/// Name of the environment variable that says where the daemon is.
pub const SOCKET: &str = "RDSOCK_SOCKET";

/// What the paths stand on, and which paths are left out.
pub struct Ground {
    program: PathBuf,
    /// Two namespaces, where a path needs them.
    pub veth: Option<Veth>,
    /// The rdsock program, where a path needs it.
    pub rdsock: Option<PathBuf>,
    /// Its daemon, where a path starts it by itself.
    pub rdsockd: Option<PathBuf>,
    /// The program that measures bare devices, where it is there.
    pub engine: Option<PathBuf>,
    /// Paths that can't be measured here.
    pub left_out: Vec<LeftOut>,
}

impl Ground {
    /// Finds out which of the plan's paths are possible. A path that the user named must be.
    pub fn prepare(plan: &ComparePlan) -> Result<Self> {
        let program = std::env::current_exe().doing(|| "find this program's own file")?;
        if is_shimmed("self")? {
            return Err(Error::Usage(
                "compare starts rdsock itself: don't run it under rdsock".into(),
            ));
        }
        let mut ground = Self {
            program,
            veth: None,
            rdsock: None,
            rdsockd: None,
            engine: None,
            left_out: Vec::new(),
        };
        for &path in &plan.paths {
            let prepared = match path {
                Path::FloorEngine => find("rdsock-engine-perf", &ground.program)
                    .map(|found| ground.engine = Some(found)),
                Path::TcpVeth => Veth::make().map(|veth| ground.veth = Some(veth)),
                Path::RdsockLocal | Path::RdsockAdaptive => {
                    find_rdsock(plan.rdsock.as_ref(), &ground.program)
                        .map(|found| ground.rdsock = Some(found))
                }
                Path::RdsockNodes => ground.prepare_nodes(plan),
                _ => Ok(()),
            };
            match prepared {
                Err(reason) if plan.paths_named || plan.rdsock.is_some() && path.is_rdsock() => {
                    return Err(Error::Usage(format!("{path} can't be measured: {reason}")));
                }
                Err(reason) => ground.left_out.push(LeftOut { path, reason }),
                Ok(()) => {}
            }
        }
        Ok(ground)
    }

    /// The programs that two nodes need, and namespaces for them where these can be made.
    fn prepare_nodes(&mut self, plan: &ComparePlan) -> std::result::Result<(), String> {
        let rdsock = find_rdsock(plan.rdsock.as_ref(), &self.program)?;
        self.rdsockd = Some(find("rdsockd", &rdsock)?);
        self.rdsock = Some(rdsock);
        if self.veth.is_none() && is_root() {
            self.veth = Some(Veth::make()?);
        }
        Ok(())
    }

    /// What is measured in one round of `cell`, in order.
    pub fn lanes(&self, plan: &ComparePlan, cell: Cell) -> Vec<(Path, Wait)> {
        let is_in = |path: &&Path| self.left_out.iter().all(|left| left.path != **path);
        let lanes = plan.paths.iter().filter(is_in);
        lanes
            .flat_map(|&path| {
                plan.waits_of(path, cell)
                    .into_iter()
                    .map(move |wait| (path, wait))
            })
            .collect()
    }

    /// The start of the commands of server and client for `path`, up to this program's own name.
    pub fn commands(&self, path: Path, wait: Wait, nodes: Option<&Nodes>) -> [Command; 2] {
        let mut commands = match (path, &self.veth, &self.rdsock) {
            (Path::TcpVeth, Some(veth), _) => within(Some(veth), &self.program),
            (Path::RdsockNodes, veth, Some(rdsock)) => {
                let mut commands = within(veth.as_ref(), rdsock);
                for (command, socket) in commands
                    .iter_mut()
                    .zip(nodes.map(Nodes::sockets).into_iter().flatten())
                {
                    command.env(SOCKET, socket);
                    command.args(["run", "--"]).arg(&self.program);
                }
                commands
            }
            (Path::RdsockLocal | Path::RdsockAdaptive, _, Some(rdsock)) => [(); 2].map(|()| {
                let mut command = Command::new(rdsock);
                command.args(["run", "--"]).arg(&self.program);
                command
            }),
            _ => [(); 2].map(|()| Command::new(&self.program)),
        };
        for command in &mut commands {
            match (path, wait) {
                // Like with like: where the kernel may not spin, the shim may not either.
                (Path::RdsockLocal | Path::RdsockNodes, Wait::Block) => {
                    command.env(SPIN_BUDGET, "0")
                }
                _ => command.env_remove(SPIN_BUDGET),
            };
        }
        commands
    }
}

/// A command for each side, in the side's namespace where there are two.
pub fn within(veth: Option<&Veth>, program: &std::path::Path) -> [Command; 2] {
    match veth {
        Some(veth) => [veth.in_server(), veth.in_client()].map(|mut command| {
            command.arg(program);
            command
        }),
        None => [(); 2].map(|()| Command::new(program)),
    }
}

/// Whether this process may make namespaces.
pub fn is_root() -> bool {
    // SAFETY: geteuid can't fail and touches no memory.
    unsafe { libc::geteuid() == 0 }
}

/// A program beside `other`, else in PATH.
fn find(name: &str, other: &std::path::Path) -> std::result::Result<PathBuf, String> {
    let beside = other.parent().map(|folder| folder.join(name));
    let search = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&search).map(|folder| folder.join(name));
    beside
        .into_iter()
        .chain(in_path)
        .find(|candidate| candidate.is_file())
        .ok_or(format!(
            "no program {name} beside {} or in PATH",
            other.display()
        ))
}

/// `rdsock`: the one that was named, else beside this program, else in PATH.
fn find_rdsock(
    named: Option<&PathBuf>,
    program: &std::path::Path,
) -> std::result::Result<PathBuf, String> {
    if let Some(named) = named {
        return named
            .is_file()
            .then(|| named.clone())
            .ok_or(format!("{} is not a file", named.display()));
    }
    find("rdsock", program).map_err(|reason| format!("{reason} (name it with --rdsock)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rdsock_is_found_where_it_was_named_or_beside_this_program() {
        let own = std::env::current_exe().unwrap();
        assert_eq!(find_rdsock(Some(&own), &own), Ok(own.clone()));
        assert!(find_rdsock(Some(&"/nonexistent/rdsock".into()), &own).is_err());
        let name = own.file_name().unwrap().to_str().unwrap();
        assert_eq!(find(name, &own), Ok(own.clone()));
        assert!(
            find("no-such-program", &own)
                .unwrap_err()
                .contains("no-such-program")
        );
    }
}
