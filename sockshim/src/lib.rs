//! The preload shim.
