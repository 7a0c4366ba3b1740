//! The bus vfio-user against servers, and the server against clients, that do what they may not; each against the other,
//! and against somebody else's.

mod hostile_client;
mod hostile_server;
mod strangers;
mod wire;
