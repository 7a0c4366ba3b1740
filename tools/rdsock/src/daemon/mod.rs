//! The daemon as the tool sees it: where it is, how to ask it, how to start one.

mod find;
mod start;

pub use find::find;
pub use start::start;
