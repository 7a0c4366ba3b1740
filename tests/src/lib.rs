//! What the end-to-end tests share: a daemon of their own, programs that run plain or preloaded
//! and end with the test, and the answers of `rdsock why`.
//!
//! The tests run the built binaries as a user would, and know of the crates only the control
//! socket's question for counters, and for the node that lies the driver. Nothing here is used outside `tests/`.

pub mod daemon;
pub mod folder;
pub mod namespaces;
pub mod nodes;
pub mod place;
pub mod program;
pub mod site;
pub mod why;

pub use daemon::Daemon;
pub use folder::Folder;
pub use namespaces::Namespaces;
pub use nodes::Nodes;
pub use program::{Program, Running};
pub use site::{LOWEST, Mode, Site};
