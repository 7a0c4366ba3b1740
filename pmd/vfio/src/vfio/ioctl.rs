//! Calls of the kernel's VFIO and iommufd (`linux/vfio.h`, `linux/iommufd.h`) that the crate `vfio-ioctls` lacks, or whose
//! errors it does not tell.
//!
//! Opts into `unsafe` for the calls. A structure that is passed is as long as it says, and lives until the call returns.

use crate::capabilities::{Area, Malformed, chain, sparse_areas};
use iommufd_bindings::iommufd::*;
use nix::errno::Errno;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd};
use vfio_bindings::bindings::vfio::*;

/// `_IO(';', nr)`: all calls of VFIO and iommufd are numbered so.
const fn io(nr: u32) -> u32 {
    (b';' as u32) << 8 | nr
}

const GET_DEVICE_INFO: u32 = io(VFIO_BASE + 7);
const GET_REGION_INFO: u32 = io(VFIO_BASE + 8);
const GET_IRQ_INFO: u32 = io(VFIO_BASE + 9);
const SET_IRQS: u32 = io(VFIO_BASE + 10);
const DEVICE_RESET: u32 = io(VFIO_BASE + 11);
const IOMMU_GET_INFO: u32 = io(VFIO_BASE + 12);
const IOMMU_MAP_DMA: u32 = io(VFIO_BASE + 13);
const BIND_IOMMUFD: u32 = io(VFIO_BASE + 18);
const ATTACH_IOMMUFD_PT: u32 = io(VFIO_BASE + 19);

/// Most bytes of an answer with capabilities that make sense.
const MOST: u32 = 64 << 10;

/// Makes a call; what it returns.
///
/// # Safety
/// `argument` points to what the call expects, as long as its first field says.
unsafe fn call<T>(fd: BorrowedFd<'_>, request: u32, argument: *mut T) -> Result<u32, Errno> {
    // SAFETY: the caller's promise. The type of a request differs between C libraries.
    let returned = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) };
    Errno::result(returned).map(|returned| returned as u32)
}

/// Flags of a device, and its number of interrupt indices.
pub fn device_info(device: BorrowedFd<'_>) -> Result<vfio_device_info, Errno> {
    let mut info = vfio_device_info {
        argsz: size_of::<vfio_device_info>() as u32,
        ..Default::default()
    };
    // SAFETY: the structure that the call fills in.
    unsafe { call(device, GET_DEVICE_INFO, &raw mut info) }?;
    Ok(info)
}

/// A region, as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    pub size: u64,
    /// Where it is in the device's file.
    pub offset: u64,
    /// What of it can be mapped.
    pub areas: Vec<Area>,
}

/// Asks for a structure that says itself, in its first field, how long it is with its capabilities; all its bytes.
fn with_capabilities(fd: BorrowedFd<'_>, request: u32, bytes: &[u8]) -> Result<Vec<u8>, Errno> {
    let mut asked = bytes.to_vec();
    // It grows when there is more to say than there was room for.
    for _ in 0..4 {
        let mut answer = asked.clone();
        // SAFETY: the first field says how many bytes there are.
        unsafe { call(fd, request, answer.as_mut_ptr()) }?;
        let needed = answer
            .first_chunk()
            .map_or(0, |argsz| u32::from_ne_bytes(*argsz));
        if needed as usize <= answer.len() {
            return Ok(answer);
        }
        if needed > MOST {
            return Err(Errno::E2BIG);
        }
        asked.resize(needed as usize, 0);
        if let Some(argsz) = asked.first_chunk_mut() {
            *argsz = needed.to_ne_bytes();
        }
    }
    Err(Errno::EAGAIN)
}

/// Field of a structure; 0 where there is none.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
    field.map_or(0, |field| u32::from_ne_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
    field.map_or(0, |field| u64::from_ne_bytes(*field))
}

/// A region of a device.
pub fn region(device: BorrowedFd<'_>, index: u32) -> Result<Region, Errno> {
    let mut asked = vec![0; size_of::<vfio_region_info>()];
    asked[..4].copy_from_slice(&(size_of::<vfio_region_info>() as u32).to_ne_bytes());
    asked[8..12].copy_from_slice(&index.to_ne_bytes());
    let answer = with_capabilities(device, GET_REGION_INFO, &asked)?;
    read_region(&answer).map_err(|_| Errno::EBADMSG)
}

fn read_region(bytes: &[u8]) -> Result<Region, Malformed> {
    let (flags, first) = (u32_at(bytes, 4), u32_at(bytes, 12));
    let (size, offset) = (u64_at(bytes, 16), u64_at(bytes, 24));
    let mut areas = Vec::new();
    if flags & VFIO_REGION_INFO_FLAG_MMAP != 0 && size != 0 {
        areas.push(Area { offset: 0, size });
        if flags & VFIO_REGION_INFO_FLAG_CAPS != 0
            && let Some(sparse) = sparse_areas(bytes, first)?
        {
            areas = sparse;
        }
    }
    let inside = |area: &Area| (area.offset.checked_add(area.size)).is_some_and(|end| end <= size);
    if !areas.iter().all(inside) {
        return Err(Malformed);
    }
    Ok(Region {
        size,
        offset,
        areas,
    })
}

/// Number of vectors of an interrupt index.
pub fn vectors(device: BorrowedFd<'_>, index: u32) -> Result<u32, Errno> {
    let mut info = vfio_irq_info {
        argsz: size_of::<vfio_irq_info>() as u32,
        flags: 0,
        index,
        count: 0,
    };
    // SAFETY: the structure that the call fills in.
    unsafe { call(device, GET_IRQ_INFO, &raw mut info) }?;
    Ok(info.count)
}

/// Has vectors from `start` on add 1 to these eventfds, or (-1) to none. 0, or the number of vectors that can be had,
/// where that is less: then nothing was set.
pub fn set_eventfds(
    device: BorrowedFd<'_>,
    index: u32,
    start: u32,
    eventfds: &[i32],
) -> Result<u32, Errno> {
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    let mut bytes = irq_set(flags, index, start, eventfds);
    // SAFETY: the first field says how many bytes there are.
    unsafe { call(device, SET_IRQS, bytes.as_mut_ptr()) }
}

/// Ends all interrupts of an index.
pub fn disable_irqs(device: BorrowedFd<'_>, index: u32) -> Result<(), Errno> {
    let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    let mut bytes = irq_set(flags, index, 0, &[]);
    // SAFETY: as above.
    unsafe { call(device, SET_IRQS, bytes.as_mut_ptr()) }.map(|_| ())
}

/// `struct vfio_irq_set`: argsz, flags, index, start, count, data.
fn irq_set(flags: u32, index: u32, start: u32, eventfds: &[i32]) -> Vec<u8> {
    let argsz = (20 + 4 * eventfds.len()) as u32;
    let fields = [argsz, flags, index, start, eventfds.len() as u32];
    let fields = fields.into_iter().flat_map(u32::to_ne_bytes);
    let fds = eventfds.iter().flat_map(|fd| fd.to_ne_bytes());
    fields.chain(fds).collect()
}

/// Resets the function.
pub fn reset(device: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: a call without an argument.
    unsafe { call(device, DEVICE_RESET, std::ptr::null_mut::<u8>()) }.map(|_| ())
}

/// I/O virtual addresses that a container translates.
pub fn container_ranges(container: BorrowedFd<'_>) -> Result<Vec<RangeInclusive<u64>>, Errno> {
    let mut asked = vec![0; size_of::<vfio_iommu_type1_info>()];
    asked[..4].copy_from_slice(&(size_of::<vfio_iommu_type1_info>() as u32).to_ne_bytes());
    let answer = with_capabilities(container, IOMMU_GET_INFO, &asked)?;
    read_ranges(&answer).map_err(|_| Errno::EBADMSG)
}

/// `struct vfio_iommu_type1_info` and its capabilities: argsz, flags, iova_pgsizes, cap_offset.
fn read_ranges(bytes: &[u8]) -> Result<Vec<RangeInclusive<u64>>, Malformed> {
    let mut ranges = Vec::new();
    if u32_at(bytes, 4) & VFIO_IOMMU_INFO_CAPS == 0 {
        // Kernels before 5.4 do not say. What every x86 IOMMU has: 39 bits, less the window of interrupts.
        return Ok(vec![0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff]);
    }
    for (id, body) in chain(bytes, u32_at(bytes, 16))? {
        if u32::from(id) != VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE {
            continue;
        }
        // nr_iovas, reserved, then pairs of first and last address.
        let pairs = body.get(8..).ok_or(Malformed)?;
        let count = u32_at(body, 0) as usize;
        let pairs = pairs.get(..count.checked_mul(16).ok_or(Malformed)?);
        for pair in pairs.ok_or(Malformed)?.as_chunks::<16>().0 {
            ranges.push(u64_at(pair, 0)..=u64_at(pair, 8));
        }
    }
    Ok(ranges)
}

/// Maps memory in a container.
///
/// # Safety
/// As [`crate::Device::map`].
pub unsafe fn container_map(
    container: BorrowedFd<'_>,
    iova: u64,
    host: *mut u8,
    len: usize,
    writable: bool,
) -> Result<(), Errno> {
    let write = if writable { VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
    let mut map = vfio_iommu_type1_dma_map {
        argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
        flags: VFIO_DMA_MAP_FLAG_READ | write,
        vaddr: host.expose_provenance() as u64,
        iova,
        size: len as u64,
    };
    // SAFETY: the structure that the call expects; for the memory, the caller's promise.
    unsafe { call(container, IOMMU_MAP_DMA, &raw mut map) }.map(|_| ())
}

/// Binds a device's character device to an iommufd, and attaches it to an address space there.
pub fn bind_iommufd(
    device: BorrowedFd<'_>,
    iommufd: BorrowedFd<'_>,
    ioas: u32,
) -> Result<(), Errno> {
    let mut bind = vfio_device_bind_iommufd {
        argsz: size_of::<vfio_device_bind_iommufd>() as u32,
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: the structure that the call expects.
    unsafe { call(device, BIND_IOMMUFD, &raw mut bind) }?;
    let mut attach = vfio_device_attach_iommufd_pt {
        argsz: size_of::<vfio_device_attach_iommufd_pt>() as u32,
        pt_id: ioas,
        ..Default::default()
    };
    // SAFETY: the structure that the call expects.
    unsafe { call(device, ATTACH_IOMMUFD_PT, &raw mut attach) }.map(|_| ())
}

/// Makes an address space in an iommufd: its id.
pub fn ioas_alloc(iommufd: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut alloc = iommu_ioas_alloc {
        size: size_of::<iommu_ioas_alloc>() as u32,
        ..Default::default()
    };
    let request = io(IOMMUFD_CMD_IOAS_ALLOC);
    // SAFETY: the structure that the call expects.
    unsafe { call(iommufd, request, &raw mut alloc) }?;
    Ok(alloc.out_ioas_id)
}

/// I/O virtual addresses that an address space translates, once a device is attached to it.
pub fn ioas_ranges(iommufd: BorrowedFd<'_>, ioas: u32) -> Result<Vec<RangeInclusive<u64>>, Errno> {
    let request = io(IOMMUFD_CMD_IOAS_IOVA_RANGES);
    let mut ranges = vec![iommu_iova_range::default(); 16];
    for _ in 0..4 {
        let mut asked = iommu_ioas_iova_ranges {
            size: size_of::<iommu_ioas_iova_ranges>() as u32,
            ioas_id: ioas,
            num_iovas: ranges.len() as u32,
            allowed_iovas: ranges.as_mut_ptr().expose_provenance() as u64,
            ..Default::default()
        };
        // SAFETY: the structure that the call expects, which says how many ranges there is room for.
        match unsafe { call(iommufd, request, &raw mut asked) } {
            Err(Errno::EMSGSIZE) => {
                let needed = asked.num_iovas.min(MOST) as usize;
                ranges.resize(needed, iommu_iova_range::default());
            }
            Err(errno) => return Err(errno),
            Ok(_) => {
                let found = ranges.iter().take(asked.num_iovas as usize);
                return Ok(found.map(|range| range.start..=range.last).collect());
            }
        }
    }
    Err(Errno::EAGAIN)
}

/// Maps memory in an address space.
///
/// # Safety
/// As [`crate::Device::map`].
pub unsafe fn ioas_map(
    (iommufd, ioas): (BorrowedFd<'_>, u32),
    iova: u64,
    host: *mut u8,
    len: usize,
    writable: bool,
) -> Result<(), Errno> {
    let write = match writable {
        true => iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
        false => 0,
    };
    let mut map = iommu_ioas_map {
        size: size_of::<iommu_ioas_map>() as u32,
        flags: iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
            | iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
            | write,
        ioas_id: ioas,
        user_va: host.expose_provenance() as u64,
        length: len as u64,
        iova,
        ..Default::default()
    };
    let request = io(IOMMUFD_CMD_IOAS_MAP);
    // SAFETY: the structure that the call expects; for the memory, the caller's promise.
    unsafe { call(iommufd, request, &raw mut map) }.map(|_| ())
}

/// Unmaps it: how many bytes were.
pub fn ioas_unmap(
    (iommufd, ioas): (BorrowedFd<'_>, u32),
    iova: u64,
    len: usize,
) -> Result<u64, Errno> {
    let mut unmap = iommu_ioas_unmap {
        size: size_of::<iommu_ioas_unmap>() as u32,
        ioas_id: ioas,
        iova,
        length: len as u64,
    };
    let request = io(IOMMUFD_CMD_IOAS_UNMAP);
    // SAFETY: the structure that the call expects.
    unsafe { call(iommufd, request, &raw mut unmap) }?;
    Ok(unmap.length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn longs(longs: &[u64]) -> Vec<u8> {
        longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
    }

    /// `struct vfio_region_info` with what follows it.
    fn region_info(flags: u32, first: u32, size: u64, capabilities: &[u8]) -> Vec<u8> {
        let argsz = 32 + capabilities.len() as u32;
        let head = words(&[argsz, flags, 0, first]);
        [&head[..], &longs(&[size, 0x100_0000]), capabilities].concat()
    }

    #[test]
    fn calls_have_the_numbers_of_the_kernel() {
        let numbers = [
            GET_DEVICE_INFO,
            GET_REGION_INFO,
            GET_IRQ_INFO,
            SET_IRQS,
            DEVICE_RESET,
        ];
        assert_eq!(numbers, [0x3b6b, 0x3b6c, 0x3b6d, 0x3b6e, 0x3b6f]);
        assert_eq!([IOMMU_GET_INFO, IOMMU_MAP_DMA], [0x3b70, 0x3b71]);
        assert_eq!([BIND_IOMMUFD, ATTACH_IOMMUFD_PT], [0x3b76, 0x3b77]);
        assert_eq!(
            [io(IOMMUFD_CMD_IOAS_ALLOC), io(IOMMUFD_CMD_IOAS_UNMAP)],
            [0x3b81, 0x3b86]
        );
    }

    #[test]
    fn a_region_is_mapped_as_a_whole_or_where_it_says() {
        let whole = Area {
            offset: 0,
            size: 0x4000,
        };
        let region = |info: &[u8]| read_region(info).map(|region| region.areas);
        assert_eq!(
            region(&region_info(0b0111, 0, 0x4000, &[])),
            Ok(vec![whole])
        );
        assert_eq!(region(&region_info(0b0011, 0, 0x4000, &[])), Ok(vec![]));
        // MSIX_MAPPABLE alone.
        let msix = [words(&[1 << 16 | 3]), words(&[0])].concat();
        assert_eq!(
            region(&region_info(0b1111, 32, 0x4000, &msix)),
            Ok(vec![whole])
        );
        // All but the first page, as a module has it that keeps that for itself.
        let sparse = |offset: u64, size: u64| {
            [words(&[1 << 16 | 1, 0, 1, 0]), longs(&[offset, size])].concat()
        };
        let rest = Area {
            offset: 0x1000,
            size: 0x3000,
        };
        let info = region_info(0b1111, 32, 0x4000, &sparse(0x1000, 0x3000));
        assert_eq!(region(&info), Ok(vec![rest]));
        assert_eq!(
            read_region(&info).map(|region| region.offset),
            Ok(0x100_0000)
        );
        for (offset, size) in [(0x1000, 0x3001), (u64::MAX, 2)] {
            let info = region_info(0b1111, 32, 0x4000, &sparse(offset, size));
            assert_eq!(region(&info), Err(Malformed));
        }
    }

    #[test]
    fn ranges_are_read_from_the_capability() {
        let head =
            |flags, first| [words(&[0, flags]), longs(&[0x1000]), words(&[first, 0])].concat();
        let capability = |count| {
            let pairs = longs(&[0, 0xfedf_ffff, 0xfef0_0000, 0xffff_ffff_ffff]);
            [words(&[1 << 16 | 1, 0, count, 0]), pairs].concat()
        };
        let read = |bytes: Vec<u8>| read_ranges(&bytes);
        let available = [words(&[1 << 16 | 3, 36, 65535])].concat();
        let info = [head(3, 24), available, capability(2)].concat();
        assert_eq!(
            read(info),
            Ok(vec![0..=0xfedf_ffff, 0xfef0_0000..=0xffff_ffff_ffff])
        );
        assert_eq!(read([head(3, 24), capability(3)].concat()), Err(Malformed));
        assert_eq!(
            read([head(3, 24), capability(u32::MAX)].concat()),
            Err(Malformed)
        );
        // A kernel that does not say.
        assert_eq!(read(head(1, 0)).map(|ranges| ranges.len()), Ok(2));
    }

    #[test]
    fn eventfds_stand_behind_the_structure() {
        let bytes = irq_set(
            VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
            2,
            1,
            &[7, -1],
        );
        assert_eq!(bytes, words(&[28, 0b10_0100, 2, 1, 2, 7, u32::MAX]));
        assert_eq!(size_of::<vfio_irq_set>(), 20);
    }
}
