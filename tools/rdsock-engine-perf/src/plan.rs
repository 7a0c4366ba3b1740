//! A plan that can be carried out, made of flags that may not.

use crate::cli::{Devices, Flags, Test};
use clap::ValueEnum;
use core_affinity::CoreId;
use std::time::Duration;

/// Most bytes of one operation.
const MAX_SIZE: u32 = 1 << 20;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    pub tests: Vec<Test>,
    pub size: u32,
    pub until: Until,
    pub warmup: u64,
    pub devices: Devices,
    pub core: Option<CoreId>,
    pub device_core: Option<CoreId>,
    /// This process is the far end of another one.
    pub far: Option<std::path::PathBuf>,
    pub json: bool,
}

/// When a measurement ends.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After so many operations.
    Count(u64),
    /// After this time.
    Passed(Duration),
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--size must be 1 to {MAX_SIZE}, not {0}")]
    Size(u32),
    #[error("--count must be at least 1")]
    Count,
    #[error("--seconds must be above 0 and at most 86400, not {0}")]
    Seconds(f64),
    #[error("there is no core {0} for this process (it has {1:?})")]
    Core(usize, Vec<usize>),
    #[error("--device-core needs --devices thread or linked")]
    NoDeviceThread,
    #[error("with --devices linked, give --core and --device-core or neither")]
    OneCore,
    #[error(transparent)]
    Output(#[from] rdsock_output::OutputError),
    #[error("cannot open the device: {0}")]
    Open(#[from] rdsock_rde::OpenError),
    #[error("cannot allocate: {0}")]
    Bus(#[from] rdsock_vfio::BusError),
    #[error("the device has failed: {0}")]
    Failed(#[from] rdsock_rde::DeviceFailed),
    #[error("cannot post: {0}")]
    NotPosted(#[from] rdsock_rde::NotPosted),
    #[error("an operation failed with status {0:?}")]
    Status(rdsock_rde::spec::Status),
    #[error("nothing came back within a second")]
    Silence,
    #[error("cannot start the devices' thread: {0}")]
    Thread(std::io::Error),
    #[error("cannot start the far end: {0}")]
    Far(std::io::Error),
    #[error("cannot link the devices: {0}")]
    Link(#[from] rdsock_vfio::link::LinkError),
}

impl Plan {
    /// Checks the flags.
    pub fn check(flags: Flags) -> Result<Self, Error> {
        if flags.size == 0 || flags.size > MAX_SIZE {
            return Err(Error::Size(flags.size));
        }
        if flags.count == 0 {
            return Err(Error::Count);
        }
        let until = match flags.seconds {
            None => Until::Count(flags.count),
            Some(seconds) if seconds > 0.0 && seconds <= 86_400.0 => {
                Until::Passed(Duration::from_secs_f64(seconds))
            }
            Some(seconds) => return Err(Error::Seconds(seconds)),
        };
        if flags.device_core.is_some() && flags.devices == Devices::Inline {
            return Err(Error::NoDeviceThread);
        }
        if flags.devices == Devices::Linked && flags.core.is_some() != flags.device_core.is_some() {
            return Err(Error::OneCore);
        }
        let tests = match &flags.tests[..] {
            [] => Test::value_variants().to_vec(),
            tests => tests.to_vec(),
        };
        Ok(Plan {
            tests,
            size: flags.size,
            until,
            warmup: flags.warmup,
            devices: flags.devices,
            core: core(flags.core)?,
            device_core: core(flags.device_core)?,
            far: flags.far,
            json: flags.json,
        })
    }
}

fn core(wanted: Option<usize>) -> Result<Option<CoreId>, Error> {
    let Some(wanted) = wanted else {
        return Ok(None);
    };
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let found = cores.iter().find(|core| core.id == wanted).copied();
    let ids = || cores.iter().map(|core| core.id).collect();
    Ok(Some(found.ok_or_else(|| Error::Core(wanted, ids()))?))
}
