//! Each side against somebody else's: the crate `vfio_user`.

use rdsock_model::{Chaos, Fabric};
use rdsock_vfio::serve::{Server, Serving};
use rdsock_vfio::user::UserDevice;
use rdsock_vfio::{Device, EventFd, EventFlags, Space};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

#[test]
fn their_client_drives_our_server() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("sock");
    let serving = Serving {
        queue_sets: 2,
        trapped: false,
    };
    let fabric = Fabric::new(Chaos::default());
    let server = Server::start(&fabric, &socket, serving).unwrap();
    let mut client = vfio_user::Client::new(&socket).unwrap();
    let size = |index| client.region(index).unwrap().size;
    assert_eq!([0, 1, 2, 4, 7].map(size), [0x20000, 0, 8192, 0x10000, 4096]);
    let pages = client.region(2).unwrap();
    assert!(pages.file_offset.is_some());
    assert_eq!(
        (pages.sparse_areas[0].offset, pages.sparse_areas[0].size),
        (0, 8192)
    );
    let mut magic = [0; 8];
    client.region_read(0, 0, &mut magic).unwrap();
    assert_eq!(&magic, b"rdsockRD");
    client.region_write(0, 0x40, &9u32.to_le_bytes()).unwrap();
    let mut id = [0; 4];
    client.region_read(0, 0x40, &mut id).unwrap();
    assert_eq!(u32::from_le_bytes(id), 9);
    let msix = client.get_irq_info(2).unwrap();
    assert_eq!((msix.count, msix.flags), (3, 1));
    let eventfd = EventFd::from_flags(EventFlags::EFD_NONBLOCK).unwrap();
    let by_eventfd = 1 << 2 | 1 << 5;
    client
        .set_irqs(2, by_eventfd, 0, 1, &[eventfd.as_raw_fd()])
        .unwrap();
    // Vector 0 tells of the link, which comes with the fabric.
    client.region_write(0, 0x48, &2u32.to_le_bytes()).unwrap();
    client.region_read(0, 0x44, &mut id).unwrap();
    assert_eq!((u32::from_le_bytes(id), eventfd.read()), (3, Ok(1)));
    client.reset().unwrap();
    client.region_read(0, 0x40, &mut id).unwrap();
    assert_eq!(u32::from_le_bytes(id), 0);
    assert_eq!(server.function().counters().resets, 1);
    client.shutdown().unwrap();
}

/// A device with a register file of 4 KiB in region 0.
struct Backend {
    bytes: Vec<u8>,
    maps: Arc<Mutex<Vec<(u64, u64, bool)>>>,
}

impl vfio_user::ServerBackend for Backend {
    fn region_read(&mut self, _: u32, at: u64, to: &mut [u8]) -> std::io::Result<()> {
        to.copy_from_slice(&self.bytes[at as usize..][..to.len()]);
        Ok(())
    }
    fn region_write(&mut self, _: u32, at: u64, from: &[u8]) -> std::io::Result<()> {
        self.bytes[at as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }
    fn dma_map(
        &mut self,
        _: vfio_user::DmaMapFlags,
        _: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> std::io::Result<()> {
        self.maps
            .lock()
            .unwrap()
            .push((address, size, fd.is_some()));
        Ok(())
    }
    fn dma_unmap(&mut self, _: vfio_user::DmaUnmapFlags, at: u64, _: u64) -> std::io::Result<()> {
        self.maps.lock().unwrap().retain(|map| map.0 != at);
        Ok(())
    }
    fn reset(&mut self) -> std::io::Result<()> {
        self.bytes.fill(0);
        Ok(())
    }
    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, fds: Vec<File>) -> std::io::Result<()> {
        use std::io::Write;
        fds.iter()
            .try_for_each(|mut fd| fd.write_all(&1u64.to_ne_bytes()))
    }
}

#[test]
fn our_client_drives_their_server() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("sock");
    let region = |index| vfio_user::ServerRegion {
        region_info: vfio_bindings::bindings::vfio::vfio_region_info {
            argsz: 32,
            flags: 3,
            index,
            size: if matches!(index, 0 | 7) { 4096 } else { 0 },
            ..Default::default()
        },
        sparse_areas: vec![],
        mmap_fd: None,
    };
    let irq = |index| vfio_user::IrqInfo {
        index,
        flags: 1,
        count: u32::from(index == 2),
    };
    let irqs = (0..5).map(irq).collect();
    let regions = (0..9).map(region).collect();
    let server = vfio_user::Server::new(&socket, true, irqs, regions).unwrap();
    let maps = Arc::new(Mutex::new(Vec::new()));
    let mut backend = Backend {
        bytes: vec![0; 4096],
        maps: maps.clone(),
    };
    let thread = std::thread::spawn(move || server.run(&mut backend).unwrap());
    let device: Arc<dyn Device> = Arc::new(UserDevice::connect(&socket).unwrap());
    let registers = device.registers(0).unwrap();
    registers.write64(64, 0x1122_3344_5566_7788);
    assert_eq!(registers.read32(68), 0x1122_3344);
    let eventfd = Arc::new(EventFd::from_flags(EventFlags::EFD_NONBLOCK).unwrap());
    device.set_interrupt(0, Some(eventfd.clone())).unwrap();
    assert_eq!(eventfd.read(), Ok(1));
    let space = Space::new(device.clone());
    let memory = space.allocate(8192).unwrap();
    assert_eq!(*maps.lock().unwrap(), [(memory.iova(), 8192, true)]);
    drop(memory);
    assert_eq!(*maps.lock().unwrap(), []);
    device.reset().unwrap();
    assert_eq!(registers.read32(68), 0);
    drop((registers, space, device));
    thread.join().unwrap();
}
