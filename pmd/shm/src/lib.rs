//! Shared memory of rdsock.
