//! Finds the shim.

use std::path::PathBuf;

const NAME: &str = "librdsock.so";

/// `$RDSOCK_LIB`, else the library beside this program (as built), else the one that `make
/// install` puts beside it.
pub fn find_library() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("RDSOCK_LIB").filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        return path
            .is_file()
            .then(|| std::path::absolute(&path).unwrap_or(path));
    }
    let program = std::env::current_exe().ok()?;
    let dir = program.parent()?;
    [dir.join(NAME), dir.parent()?.join("lib/rdsock").join(NAME)]
        .into_iter()
        .find(|path| path.is_file())
}
