//! A control group of a test's own, with a memory limit.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Removed when it is dropped, once its programs have ended.
#[derive(Debug)]
pub struct Cgroup {
    folder: PathBuf,
}

/// Where trees of control groups are mounted by custom, and the file that limits memory there.
const TREES: [(&str, &str); 2] = [
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ("/sys/fs/cgroup", "memory.max"),
];

impl Cgroup {
    /// One with this limit; why there is none where the machine has no control groups for memory, or the test may make none.
    pub fn limited(name: &str, bytes: u64) -> Result<Self, String> {
        let mut why = "no control groups for memory are mounted".to_owned();
        for (tree, limit) in TREES {
            let tree = Path::new(tree);
            if !tree.join("cgroup.procs").exists() {
                continue;
            }
            // Of the first kind each group has a limit, of the second one where the group above says so.
            let _ = fs::write(tree.join("cgroup.subtree_control"), "+memory");
            let folder = tree.join(format!("rdsock-{name}-{}", std::process::id()));
            if let Err(error) = fs::create_dir(&folder) {
                why = format!("{}: {error}", folder.display());
                continue;
            }
            let group = Cgroup { folder };
            match fs::write(group.folder.join(limit), bytes.to_string()) {
                Ok(()) => return Ok(group),
                Err(error) => why = format!("{}: {error}", group.folder.join(limit).display()),
            }
        }
        Err(why)
    }

    /// A process joins by writing 0 here.
    pub fn door(&self) -> PathBuf {
        self.folder.join("cgroup.procs")
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its programs were killed just now.
        let end = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.folder).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
