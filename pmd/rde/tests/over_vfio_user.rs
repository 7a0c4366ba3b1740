//! The tests of engine and mailbox once more, with each model behind a vfio-user socket: queue pages are memory that
//! driver and model share, other registers are messages, and DMA goes to files.

#[path = "back_pressure.rs"]
mod back_pressure;
#[path = "faulty_device.rs"]
mod faulty_device;
#[path = "operations.rs"]
mod operations;
#[path = "protection.rs"]
mod protection;
