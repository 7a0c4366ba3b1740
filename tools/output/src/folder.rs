//! Files that are generated into a folder, which may be one where others can write.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// Has files written into a new folder of this user's in `dir`, and moves them to `dir`. What has their names there is
/// replaced; a link is not followed, so nothing elsewhere is written.
pub fn fill(dir: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let fresh = dir.join(format!(".rdsock-{}", std::process::id()));
    fs::DirBuilder::new().mode(0o700).create(&fresh)?;
    let moved = make(&fresh).and_then(|()| {
        for entry in fs::read_dir(&fresh)? {
            let entry = entry?;
            fs::rename(entry.path(), dir.join(entry.file_name()))?;
        }
        Ok(())
    });
    let removed = fs::remove_dir_all(&fresh);
    moved.and(removed)
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
}
