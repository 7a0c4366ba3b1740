//! Files that are generated into a folder, which may be one where others can write.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Has files written into a new folder of this user's in `dir`, and moves them to `dir`. What has their names there is
/// replaced; a link is not followed, so nothing elsewhere is written. On the way to `dir`, a link of another user is not
/// followed either.
pub fn fill(dir: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    // By open folders: their names may lead elsewhere at any time, where others can write.
    let dir = rdsock_files::open_directory(dir, 0o755)?;
    let name = format!(".rdsock-{}", std::process::id());
    let fresh = rdsock_files::make_fresh(&dir, &name, 0o700)?;
    let moved = make(&inside(&fresh, "")).and_then(|()| {
        for entry in fs::read_dir(inside(&fresh, ""))? {
            let entry = entry?;
            fs::rename(entry.path(), inside(&dir, entry.file_name()))?;
        }
        Ok(())
    });
    let removed = fs::remove_dir_all(inside(&dir, &name));
    moved.and(removed)
}

/// The path of something in a folder that is open, whatever becomes of the folder's name.
fn inside(dir: &OwnedFd, name: impl AsRef<Path>) -> PathBuf {
    let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    path.join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_in_the_folder_is_replaced_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (precious, page) = (dir.path().join("precious"), dir.path().join("man/page"));
        fs::write(&precious, "precious").unwrap();
        fs::create_dir(dir.path().join("man")).unwrap();
        std::os::unix::fs::symlink(&precious, &page).unwrap();
        fill(&dir.path().join("man"), |to| {
            fs::write(to.join("page"), "new")
        })
        .unwrap();
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
        assert!(fs::symlink_metadata(&page).unwrap().is_file());
        assert_eq!(fs::read(&page).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path().join("man")).unwrap().count(), 1);
    }

    #[test]
    fn no_folder_is_made_or_filled_behind_somebody_elses_link() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        fs::create_dir(&target).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let fill_at = |to: &Path| fill(to, |to| fs::write(to.join("page"), "new"));
        fill_at(&link.join("own/man")).unwrap();
        assert!(target.join("own/man/page").is_file());
        if std::os::unix::fs::lchown(&link, Some(64001), None).is_err() {
            use std::io::Write;
            let why = b"SKIPPED, NOTHING WAS CHECKED: only root can make another user's link\n";
            return std::io::stderr().write_all(why).unwrap();
        }
        for name in ["new/man", "own/man", ""] {
            let error = fill_at(&link.join(name)).unwrap_err().to_string();
            assert!(error.contains("belongs to user 64001"), "{error}");
        }
        assert!(!target.join("new").exists() && !target.join("page").exists());
    }
}
