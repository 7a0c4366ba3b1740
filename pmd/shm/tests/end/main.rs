//! One end of a stream as it ships, over an anchor that is a queue of bytes: each operation by itself, and any order of them
//! against a model that is nothing but the bytes.
#![cfg(not(loom))]

mod contradictions;
mod holders;
mod hostile;
mod in_place;
mod leaving;
mod nap;
mod operations;
mod pair;
mod random;
mod shut;
mod state;
