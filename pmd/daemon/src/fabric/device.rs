//! Opens the device that the configuration names, and joins the fabric.

use super::config::{Device, FabricConfig};
use rdsock_model::Chaos;
use rdsock_node::{Fabric, StartError};
use rdsock_rde::Rde;
use rdsock_vfio::{Space, model::ModelDevice};
use std::sync::Arc;
use std::time::Duration;

/// How long something for a node that does not take it is kept.
const STALL: Duration = Duration::from_millis(100);

/// The device, and the model to be stepped when it is one in this process.
pub fn open(config: &FabricConfig) -> Result<(Rde, Option<Fabric>), StartError> {
    let (device, fabric) = match &config.device {
        Device::Model(directory) => {
            let fabric = Fabric::new(Chaos::default());
            let sets = config.poll_cores.len().max(1);
            let device = ModelDevice::linked(&fabric, directory, config.node, sets)?;
            (Arc::new(device), Some(fabric))
        }
    };
    let rde = Rde::open(Space::new(device))?;
    let peers: Vec<u16> = config.nodes.iter().map(|node| node.id).collect();
    rde.management().set_stall_timeout(STALL);
    rde.management().join(config.node, &peers);
    Ok((rde, fabric))
}
