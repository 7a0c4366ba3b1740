//! Model checking of the shared-memory algorithms: every interleaving of a few threads, up to a
//! number of preemptions, and every value that the memory model lets a load return. Run by
//! `.ci/loom`.
#![cfg(loom)]

mod bell;
mod demote;
mod instance;
mod lock;
mod model;
mod nap;
mod promote;
mod queue;
mod ring;
mod wake;
