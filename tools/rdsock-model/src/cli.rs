//! The flags, as they are given.

use clap::Parser;
use std::path::PathBuf;

/// Devices of several nodes, wired to each other, each served over a vfio-user socket.
///
/// It runs until it is ended by SIGINT or SIGTERM, and then removes the sockets. SIGUSR1 has it print what the devices
/// did; SIGUSR2 takes the devices away, as if they were pulled out: their registers read all ones from then on.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Flags {
    /// A device and the socket that serves it; once for each node. ID names it in what is printed; the device
    /// itself has the id that its driver gives it
    #[arg(long = "node", value_name = "ID=SOCKET", required = true, value_parser = node)]
    pub nodes: Vec<(u16, PathBuf)>,
    /// Queue sets of each device: a power of two up to 256
    #[arg(long, default_value_t = 4)]
    pub queue_sets: usize,
    /// Make each access to a queue page a message, and so count it, as on the bus of a real device
    #[arg(long)]
    pub trapped: bool,
    /// Spin without work, too, rather than look every 50 µs
    #[arg(long)]
    pub busy: bool,
    /// Print what the devices did, as one line of JSON for each: at the end, and every SECONDS if that is not 0
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "0")]
    pub stats: Option<u64>,
    /// Seed of the faults below
    #[arg(long, default_value_t = 0, help_heading = "Faults")]
    pub seed: u64,
    /// Operations wait in their lanes for up to so many microseconds
    #[arg(long, value_name = "US", default_value_t = 0, help_heading = "Faults")]
    pub delay_us: u64,
    /// Serve lanes in a random order
    #[arg(long, help_heading = "Faults")]
    pub reorder: bool,
    /// Of a million operations on a region, so many are refused
    #[arg(long, value_name = "PPM", default_value_t = 0, help_heading = "Faults")]
    pub refuse_ppm: u32,
    /// Of a million looks at a message queue, so many find it full
    #[arg(long, value_name = "PPM", default_value_t = 0, help_heading = "Faults")]
    pub full_ppm: u32,
    /// Of a million steps, so many take a link down
    #[arg(long, value_name = "PPM", default_value_t = 0, help_heading = "Faults")]
    pub link_ppm: u32,
    /// For up to so many microseconds
    #[arg(
        long,
        value_name = "US",
        default_value_t = 1000,
        help_heading = "Faults"
    )]
    pub link_down_us: u64,
}

fn node(text: &str) -> Result<(u16, PathBuf), String> {
    let expected = "expected ID=SOCKET, such as 1=/run/rdsock/a.sock";
    let (id, path) = text.split_once('=').ok_or(expected)?;
    let id = id.parse().map_err(|_| expected)?;
    if path.is_empty() {
        return Err(expected.into());
    }
    Ok((id, path.into()))
}
