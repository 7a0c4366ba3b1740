//! A whole driver for a device that nobody here wrote: QEMU's `edu` (its docs/specs/edu.rst). It drives the device
//! through the kernel's VFIO, and checks what it can do and what the IOMMU does not let it do.
//!
//!     edu 0000:00:04.0 [group|iommufd]
//!
//! in a virtual machine with an IOMMU and `-device edu`, the device bound to vfio-pci. Prints a line for each
//! check, and ends with the first that fails. The kernel's log then has the faults that the IOMMU has reported.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdsock_vfio::vfio::{PciAddress, PciDevice, Way};
use rdsock_vfio::{Access, Buffer, Device, EventFd, EventFlags, Registers, Space};
use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;

/// Registers of BAR0: 32 bits wide below 0x80, 64 bits from there on.
mod register {
    pub const IDENTITY: u64 = 0x00;
    pub const LIVENESS: u64 = 0x04;
    pub const FACTORIAL: u64 = 0x08;
    pub const STATUS: u64 = 0x20;
    pub const INTERRUPT_STATUS: u64 = 0x24;
    pub const INTERRUPT_RAISE: u64 = 0x60;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub const DMA_SOURCE: u64 = 0x80;
    pub const DMA_DESTINATION: u64 = 0x88;
    pub const DMA_COUNT: u64 = 0x90;
    pub const DMA_COMMAND: u64 = 0x98;
}
/// Bits of DMA_COMMAND.
const START: u64 = 1;
const TO_MEMORY: u64 = 1 << 1;
const INTERRUPT: u64 = 1 << 2;
/// Why an interrupt came: the DMA is done.
const DMA_DONE: u32 = 0x100;
/// The device's own memory, as its DMA engine names it.
const BUFFER: u64 = 0x40000;
const PAGE: usize = 4096;
/// The device knows only so many bits of an address.
const REACH: u64 = 1 << 28;
/// How long the device may take: its DMA begins after 100 ms.
const PATIENCE_MS: u16 = 20_000;

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => {
            println!("edu: all checks passed");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("edu: FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Outcome {
    let mut words = std::env::args().skip(1);
    let usage = "usage: edu PCI-ADDRESS [group|iommufd]";
    let address: PciAddress = words.next().ok_or(usage)?.parse()?;
    let device = match words.next().as_deref() {
        None => PciDevice::open(&address)?,
        Some("group") => PciDevice::open_by(&address, Way::Group)?,
        Some("iommufd") => PciDevice::open_by(&address, Way::Iommufd)?,
        Some(_) => return Err(usage.into()),
    };
    println!("opened {} by {:?}", device.name(), device.way());
    let device: Arc<dyn Device> = Arc::new(device);
    let edu = Edu::open(&*device)?;
    let space = Space::new(device.clone());
    registers(&edu)?;
    both_ways(&edu, &space)?;
    refused(&edu, &space)
}

/// The driver.
struct Edu {
    registers: Arc<dyn Registers>,
    interrupt: Arc<EventFd>,
}

impl Edu {
    fn open(device: &dyn Device) -> Result<Self, Box<dyn Error>> {
        let registers = device.registers(0)?;
        let identity = registers.read32(register::IDENTITY);
        if identity & 0xffff != 0x00ed {
            return Err(format!("not an edu device: it says {identity:#x}").into());
        }
        let flags = EventFlags::EFD_NONBLOCK | EventFlags::EFD_CLOEXEC;
        let interrupt = Arc::new(EventFd::from_flags(flags)?);
        device.set_interrupt(0, Some(interrupt.clone()))?;
        Ok(Edu {
            registers,
            interrupt,
        })
    }

    /// Waits for an interrupt, and acknowledges it: why it came.
    fn wait(&self) -> Result<u32, Box<dyn Error>> {
        let mut fds = [PollFd::new(self.interrupt.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(PATIENCE_MS))? == 0 {
            return Err("no interrupt has come".into());
        }
        self.interrupt.read()?;
        let why = self.registers.read32(register::INTERRUPT_STATUS);
        self.registers.write32(register::INTERRUPT_ACKNOWLEDGE, why);
        Ok(why)
    }

    /// Moves a page between the device's memory and an I/O virtual address, and waits until it says that it has.
    fn dma(&self, iova: u64, direction: u64) -> Outcome {
        if iova + PAGE as u64 > REACH {
            return Err(format!("the device cannot name the address {iova:#x}").into());
        }
        let (from, to) = match direction {
            TO_MEMORY => (BUFFER, iova),
            _ => (iova, BUFFER),
        };
        let command = START | direction | INTERRUPT;
        self.registers.write64(register::DMA_SOURCE, from);
        self.registers.write64(register::DMA_DESTINATION, to);
        self.registers.write64(register::DMA_COUNT, PAGE as u64);
        self.registers.write64(register::DMA_COMMAND, command);
        match self.wait()? {
            DMA_DONE => Ok(()),
            why => Err(format!("an interrupt for something else than DMA: {why:#x}").into()),
        }
    }

    /// The device reads a buffer. While it has it, nobody else can look at it: that would not compile.
    fn read(&self, buffer: Buffer) -> Result<Buffer, Box<dyn Error>> {
        let lent = buffer.lend();
        let piece = lent.piece(0, PAGE as u32).ok_or("less than a page")?;
        self.dma(piece.iova(), 0)?;
        Ok(lent.reclaim())
    }

    /// The device writes a buffer.
    fn write(&self, buffer: Buffer) -> Result<Buffer, Box<dyn Error>> {
        let lent = buffer.lend();
        let piece = lent.piece(0, PAGE as u32).ok_or("less than a page")?;
        self.dma(piece.iova(), TO_MEMORY)?;
        Ok(lent.reclaim())
    }
}

fn check(what: &str, holds: bool) -> Outcome {
    if !holds {
        return Err(what.into());
    }
    println!("ok: {what}");
    Ok(())
}

/// Bytes that are nowhere by chance.
fn pattern(seed: u8) -> Vec<u8> {
    let byte = |i: usize| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8;
    (0..PAGE).map(byte).collect()
}

fn registers(edu: &Edu) -> Outcome {
    let registers = &edu.registers;
    registers.write32(register::LIVENESS, 0x1234_5678);
    let inverted = registers.read32(register::LIVENESS);
    check(
        "registers: what is stored reads inverted",
        inverted == !0x1234_5678,
    )?;
    registers.write32(register::FACTORIAL, 10);
    while registers.read32(register::STATUS) & 1 != 0 {
        std::thread::yield_now();
    }
    let factorial = registers.read32(register::FACTORIAL);
    check("registers: 10! is computed", factorial == 3_628_800)?;
    registers.write32(register::INTERRUPT_RAISE, 0x40);
    check("interrupt: one that is raised comes", edu.wait()? == 0x40)
}

/// Two buffers of a page.
fn buffers(space: &Space) -> Result<[Buffer; 2], Box<dyn Error>> {
    let buffers = Buffer::divide(space.allocate(2 * PAGE)?, PAGE);
    buffers
        .try_into()
        .map_err(|_| "memory is not divided as asked".into())
}

fn contents(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    assert!(buffer.copy_out(0, &mut bytes), "a page has a page");
    bytes
}

fn both_ways(edu: &Edu, space: &Space) -> Outcome {
    let [mut out, back] = buffers(space)?;
    assert!(out.copy_in(0, &pattern(1)), "a page holds a page");
    let out = edu.read(out)?;
    let back = edu.write(back)?;
    check(
        "DMA: a page goes to the device and comes back",
        contents(&back) == pattern(1) && contents(&out) == pattern(1),
    )
}

/// What lies in the device's memory, fetched by DMA.
fn fetch(edu: &Edu, space: &Space) -> Result<Vec<u8>, Box<dyn Error>> {
    let [buffer, _] = buffers(space)?;
    Ok(contents(&edu.write(buffer)?))
}

/// Puts a pattern into the device's memory.
fn fill(edu: &Edu, space: &Space, seed: u8) -> Outcome {
    let [mut buffer, _] = buffers(space)?;
    assert!(buffer.copy_in(0, &pattern(seed)), "a page holds a page");
    edu.read(buffer).map(|_| ())
}

/// A file in memory, of which the device is given a part.
fn file(pages: usize) -> Result<File, Box<dyn Error>> {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let file = File::from(memfd_create(c"edu", MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len((pages * PAGE) as u64)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;
    Ok(file)
}

fn page_of(file: &File, page: usize) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut bytes = vec![0; PAGE];
    file.read_exact_at(&mut bytes, (page * PAGE) as u64)?;
    Ok(bytes)
}

fn refused(edu: &Edu, space: &Space) -> Outcome {
    let file = file(2)?;
    file.write_all_at(&pattern(2), PAGE as u64)?;
    let memory = space.map_file(&file, PAGE, Access::ReadWrite)?;
    let beyond = memory.iova() + PAGE as u64;

    fill(edu, space, 3)?;
    edu.dma(beyond, TO_MEMORY)?;
    let kept = page_of(&file, 1)? == pattern(2);
    check(
        "IOMMU: a write past the end of what is mapped is refused",
        kept,
    )?;
    edu.dma(beyond, 0)?;
    let secret = fetch(edu, space)? == pattern(2);
    check("IOMMU: a read past the end gets nothing", !secret)?;

    fill(edu, space, 4)?;
    edu.dma(memory.iova(), TO_MEMORY)?;
    let written = page_of(&file, 0)? == pattern(4);
    check("IOMMU: what is mapped can be written", written)?;
    let gone = memory.iova();
    drop(memory);
    fill(edu, space, 5)?;
    edu.dma(gone, TO_MEMORY)?;
    let kept = page_of(&file, 0)? == pattern(4);
    check(
        "IOMMU: a write after the memory was unmapped is refused",
        kept,
    )?;

    let memory = space.map_file(&file, PAGE, Access::Read)?;
    fill(edu, space, 6)?;
    edu.dma(memory.iova(), TO_MEMORY)?;
    let kept = page_of(&file, 0)? == pattern(4);
    check(
        "IOMMU: a write to memory mapped for reading is refused",
        kept,
    )?;
    edu.dma(memory.iova(), 0)?;
    let read = fetch(edu, space)? == pattern(4);
    check("IOMMU: memory mapped for reading can be read", read)
}
