//! Opens the device that the configuration names, and joins the fabric.

use super::config::{Device, FabricConfig};
use rdsock_model::Chaos;
use rdsock_node::{Fabric, StartError};
use rdsock_rde::{Management, Rde};
use rdsock_vfio::user::UserDevice;
use rdsock_vfio::vfio::PciDevice;
use rdsock_vfio::{Space, model::ModelDevice};
use std::sync::Arc;
use std::time::Duration;

/// How long something for a node that does not take it is kept.
const STALL: Duration = Duration::from_millis(100);

/// The device, and the model to be stepped when it is one in this process.
pub fn open(config: &FabricConfig) -> Result<(Rde, Option<Fabric>), StartError> {
    let (device, fabric): (Arc<dyn rdsock_vfio::Device>, _) = match &config.device {
        Device::Model(directory) => {
            let fabric = Fabric::new(Chaos::default());
            let sets = config.poll_cores.len().max(1);
            let device = ModelDevice::linked(&fabric, directory, config.node, sets)?;
            (Arc::new(device), Some(fabric))
        }
        Device::VfioUser(socket) => (Arc::new(UserDevice::connect(socket)?), None),
        Device::Vfio(address) => (Arc::new(PciDevice::open(address)?), None),
    };
    let rde = Rde::open(Space::new(device))?;
    if matches!(config.device, Device::Vfio(_)) && !rde.management().is_kept() {
        let device = rde.space().device().name();
        tracing::warn!(%device, "no kernel module keeps the management page: who takes this daemon over can be any node \
            (bind the device to rdsock-vfio, kmod-minimal)");
    }
    join(&rde.management(), config)?;
    Ok((rde, fabric))
}

/// Joins the fabric, unless whoever keeps the management page has done that. Either way the device is the node that the
/// configuration says.
fn join(management: &Management, config: &FabricConfig) -> Result<(), StartError> {
    if management.node() == 0 {
        let peers: Vec<u16> = config.nodes.iter().map(|node| node.id).collect();
        management.set_stall_timeout(STALL);
        management.join(config.node, &peers);
    }
    match management.node() {
        found if found == u32::from(config.node) => Ok(()),
        found => Err(StartError::OtherNode {
            found,
            configured: config.node,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use rdsock_vfio::serve::{Server, Serving};

    fn config(device: &str) -> FabricConfig {
        let text = format!(
            "[fabric]\nnode = 3\ndevice = \"{device}\"\n\
             [[fabric.nodes]]\nid = 3\naddresses = [\"10.0.0.3\"]\n"
        );
        Config::parse(&text).unwrap().fabric.unwrap()
    }

    #[test]
    fn a_device_that_is_another_node_is_refused() {
        let fabric = Fabric::new(Chaos::default());
        let device = Arc::new(ModelDevice::new(&fabric, 1));
        let rde = Rde::open(Space::new(device)).unwrap();
        let config = config("model:/x");
        // Nobody has set it up: it becomes the node.
        join(&rde.management(), &config).unwrap();
        assert_eq!(rde.management().node(), 3);
        // It was set up: it is left as it is.
        join(&rde.management(), &config).unwrap();
        rde.management().join(7, &[]);
        let refused = join(&rde.management(), &config).unwrap_err();
        assert!(matches!(
            refused,
            StartError::OtherNode {
                found: 7,
                configured: 3
            }
        ));
        assert_eq!(rde.management().node(), 7);
    }

    #[test]
    fn a_device_behind_a_socket_joins() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("a.sock");
        let config = config(&format!("vfio-user:{}", socket.display()));
        assert!(matches!(open(&config), Err(StartError::Bus(_))));
        let fabric = Fabric::new(Chaos::default());
        let serving = Serving {
            queue_sets: 1,
            trapped: false,
        };
        let _server = Server::start(&fabric, &socket, serving).unwrap();
        let (rde, none) = open(&config).unwrap();
        assert!(none.is_none());
        assert!(rde.management().status().link_up());
        assert_eq!(rde.space().device().name(), config.device.to_string());
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let error = open(&config("vfio:ffff:ff:1f.7")).unwrap_err().to_string();
        assert!(error.contains("ffff:ff:1f.7"), "{error}");
    }
}
