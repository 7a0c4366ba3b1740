//! DMA memory on the model bus: what is mapped can be reached, and nothing else.

use rdsock_model::{Chaos, Fabric};
use rdsock_vfio::model::ModelDevice;
use rdsock_vfio::{Access, Buffer, BusError, Device, Shared, Space, Words};
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

fn space() -> Space {
    let fabric = Fabric::new(Chaos::default());
    Space::new(Arc::new(ModelDevice::new(&fabric, 1)))
}

#[test]
fn memory_is_zeroed_and_has_addresses_of_its_own() {
    let space = space();
    let (a, b) = (space.allocate(5000).unwrap(), space.allocate(1).unwrap());
    assert_eq!((a.len(), b.len()), (8192, 4096));
    assert!(a.iova() + 8192 <= b.iova() || b.iova() + 4096 <= a.iova());
    let shared = Shared::new(&Arc::new(a), 0, 8192).unwrap();
    let mut bytes = [1; 8192];
    assert!(shared.copy_out(0, &mut bytes));
    assert_eq!(bytes, [0; 8192]);
}

#[test]
fn large_memory_is_aligned_to_huge_pages_and_its_addresses_are_used_again() {
    let space = space();
    let first = space.allocate(3 << 20).unwrap();
    assert!(first.iova().is_multiple_of(2 << 20));
    assert!(first.len() >= 3 << 20);
    let iova = first.iova();
    drop(first);
    assert_eq!(space.allocate(3 << 20).unwrap().iova(), iova);
}

#[test]
fn views_reach_no_further_than_their_memory() {
    let memory = Arc::new(space().allocate(4096).unwrap());
    assert!(Words::new(&memory, 0, 512).is_some());
    assert!(Words::new(&memory, 8, 512).is_none());
    assert!(Words::new(&memory, 4, 1).is_none());
    assert!(Words::new(&memory, usize::MAX, 1).is_none());
    assert!(Words::new(&memory, 0, usize::MAX).is_none());
    let shared = Shared::new(&memory, 4000, 96).unwrap();
    assert!(Shared::new(&memory, 4000, 97).is_none());
    assert!(shared.copy_in(90, &[1; 6]) && !shared.copy_in(91, &[1; 6]));
    assert!(!shared.copy_out(96, &mut [0]) && !shared.copy_in(usize::MAX, &[0]));
    assert_eq!(shared.piece(90, 7), None);
    assert_eq!(shared.load_word(92), None);
    let piece = shared.piece(8, 16).unwrap();
    assert_eq!((piece.iova(), piece.len()), (memory.iova() + 4008, 16));
}

#[test]
fn a_buffer_comes_back_as_it_was_lent() {
    let mut buffers = Buffer::divide(space().allocate(4096).unwrap(), 1024);
    assert_eq!(buffers.len(), 4);
    let mut buffer = buffers.pop().unwrap();
    assert!(buffer.copy_in(1020, b"last") && !buffer.copy_in(1021, b"last"));
    let lent = buffer.lend();
    assert!(lent.piece(1000, 24).is_some() && lent.piece(1000, 25).is_none());
    let mut back = [0; 4];
    assert!(lent.reclaim().copy_out(1020, &mut back));
    assert_eq!(&back, b"last");
}

#[test]
fn a_shared_file_is_mapped_as_far_as_it_goes() {
    let space = space();
    let fd =
        nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let file = std::fs::File::from(fd);
    file.set_len(8192).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"hello", 4096).unwrap();
    let fd = file.as_fd();
    let memory = Arc::new(space.map_file(&fd, 8192, Access::Read).unwrap());
    let mut bytes = [0; 5];
    assert!(
        Shared::new(&memory, 4096, 5)
            .unwrap()
            .copy_out(0, &mut bytes)
    );
    assert_eq!(&bytes, b"hello");
    for len in [0, 8193] {
        let refused = space.map_file(&fd, len, Access::Read);
        assert!(matches!(refused, Err(BusError::BadLength(_))));
    }
}

#[test]
fn the_bus_refuses_overlaps_and_unmaps_what_was_mapped() {
    let device = ModelDevice::new(&Fabric::new(Chaos::default()), 1);
    let mut memory = vec![0u8; 8192];
    let host = NonNull::new(memory.as_mut_ptr()).unwrap();
    // SAFETY: the vector outlives the device, and is not touched.
    let map = |iova, len| unsafe { device.map(iova, host, len, Access::ReadWrite) };
    map(0x1000, 0x1000).unwrap();
    assert!(map(0x1fff, 0x1000).is_err() && map(0x0, 0x1001).is_err());
    assert!(map(u64::MAX, 2).is_err() && map(0x5000, 0).is_err());
    map(0x2000, 0x1000).unwrap();
    assert!(device.unmap(0x1000, 0x2000).is_err() && device.unmap(0x1800, 0x800).is_err());
    device.unmap(0x1000, 0x1000).unwrap();
    map(0x0, 0x2000).unwrap();
}

#[test]
fn regions_and_vectors_that_are_missing_are_errors() {
    let device = ModelDevice::new(&Fabric::new(Chaos::default()), 3);
    assert_eq!(device.region(0).unwrap().size, 128 << 10);
    assert_eq!(device.region(2).unwrap().size, 3 * 4096);
    assert!(device.region(1).is_err() && device.registers(9).is_err());
    assert_eq!(device.vectors(), 4);
    assert!(device.set_interrupt(3, None).is_ok() && device.set_interrupt(4, None).is_err());
    let registers = device.registers(0).unwrap();
    assert_eq!(registers.read64(0), u64::from_le_bytes(*b"rdsockRD"));
    assert_eq!(registers.read32(0), u32::MAX, "a register of 8 bytes");
    assert_eq!(registers.read64(1 << 40), u64::MAX);
}
