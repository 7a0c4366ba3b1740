//! What a device can reach: what was mapped for it, as long as it is mapped, and nothing else.
//!
//! The entries of the region table are written past the driver, which would not name memory that it does not have: this
//! plays a driver that was taken over.

use crate::node::{Node, Place};
use crate::{Outcome, check, test};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rdsock_rde::Remote;
use rdsock_rde::spec::{Key, REGION_SIZE, REGION_TABLE, Status, region, status};
use rdsock_vfio::{Access, Device};
use std::ffi::c_void;
use std::io::{BufRead, BufReader};
use std::num::NonZero;
use std::process::{Command, Stdio};
use std::ptr::NonNull;

/// An entry of the region table that the driver does not use.
const ENTRY: u64 = 1000;
const LEN: usize = 64 << 10;
/// An address that nothing is mapped at.
const FREE: u64 = 0x5000_0000_0000;

/// Registers whatever an address stands for, with all rights.
fn forge(node: &Node, addr: u64, len: u64) -> Result<Key, Box<dyn std::error::Error>> {
    let bar0 = node.device.registers(0)?;
    let at = REGION_TABLE + ENTRY * REGION_SIZE;
    bar0.write32(at + region::REGION_CONTROL, 0);
    bar0.write32(at + region::REGION_TAG, 1);
    bar0.write64(at + region::REGION_ADDR, addr);
    bar0.write64(at + region::REGION_LENGTH, len);
    bar0.write32(at + region::REGION_SOURCE, 0);
    bar0.write32(at + region::REGION_CONTROL, 7);
    check(bar0.read64(at + region::REGION_ADDR) == addr, || {
        "the region table does not hold what is stored".into()
    })?;
    Ok(Key(ENTRY as u32 | 1 << 16))
}

fn refused(is: Status) -> Outcome {
    check(is == Status(status::TARGET_ACCESS), || {
        format!("it ended with {is:?}")
    })
}

fn allowed(is: Status) -> Outcome {
    check(is.is_ok(), || format!("it ended with {is:?}"))
}

/// Memory of this process, each word 0x5a5a…
struct Memory(NonNull<c_void>);

impl Memory {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let len = NonZero::new(LEN).ok_or("no length")?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE;
        // SAFETY: new memory, at an address that the kernel chooses.
        let memory = unsafe {
            mmap_anonymous(
                None,
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                flags,
            )?
        };
        // SAFETY: `LEN` bytes that were just mapped; nobody else knows them.
        unsafe { memory.cast::<u8>().write_bytes(0x5a, LEN) };
        Ok(Memory(memory))
    }

    fn is_untouched(&self) -> bool {
        let words = self.0.cast::<u64>();
        // SAFETY: inside the mapping, and aligned. Volatile, since a device may have written it.
        (0..LEN / 8).all(|i| unsafe { words.add(i).read_volatile() } == 0x5a5a_5a5a_5a5a_5a5a)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; nobody keeps a pointer into it.
        let _ = unsafe { munmap(self.0, LEN) };
    }
}

pub fn tests(one: &mut Node, two: &mut Node) {
    test("dma_to_what_is_not_mapped_is_refused", || {
        // An address of this process, one of the machine's memory, nothing at all.
        let local = [0u64; 8];
        for addr in [FREE, local.as_ptr() as u64, 0x1000_0000] {
            let key = forge(two, addr & !7, 4096)?;
            let to = Remote { key, offset: 0 };
            refused(one.write(2, to)?)?;
            refused(one.read(2, to)?.0)?;
        }
        check(local == [0; 8], || "memory was written".into())
    });
    test("dma_past_the_end_is_refused", || {
        let memory = Memory::new()?;
        // SAFETY: unmapped below, before the memory goes.
        unsafe {
            two.device
                .map(FREE, memory.0.cast(), LEN, Access::ReadWrite)?
        };
        let key = forge(two, FREE, 2 * LEN as u64)?;
        let past = one.write(
            2,
            Remote {
                key,
                offset: LEN as u64,
            },
        );
        let across = one.write(
            2,
            Remote {
                key,
                offset: LEN as u64 - 8,
            },
        );
        let inside = one.write(
            2,
            Remote {
                key,
                offset: LEN as u64 - 64,
            },
        );
        two.device.unmap(FREE, LEN)?;
        allowed(inside?)?;
        refused(past?)?;
        refused(across?)
    });
    test("dma_to_read_only_memory_is_refused", || {
        let memory = Memory::new()?;
        // SAFETY: unmapped below, before the memory goes.
        unsafe { two.device.map(FREE, memory.0.cast(), LEN, Access::Read)? };
        let key = forge(two, FREE, LEN as u64)?;
        let to = Remote { key, offset: 64 };
        let (read, write) = (one.read(2, to), one.write(2, to));
        two.device.unmap(FREE, LEN)?;
        let (status, word) = read?;
        allowed(status)?;
        check(word == 0x5a5a_5a5a_5a5a_5a5a, || {
            format!("it read {word:#x}")
        })?;
        refused(write?)?;
        check(memory.is_untouched(), || "memory was written".into())
    });
    test("dma_after_unmapping_is_refused", || {
        let memory = Memory::new()?;
        // SAFETY: unmapped below, before the memory goes.
        unsafe {
            two.device
                .map(FREE, memory.0.cast(), LEN, Access::ReadWrite)?
        };
        let key = forge(two, FREE, LEN as u64)?;
        let to = Remote { key, offset: 0 };
        let before = one.read(2, to);
        two.device.unmap(FREE, LEN)?;
        allowed(before?.0)?;
        refused(one.write(2, to)?)?;
        refused(one.read(2, to)?.0)?;
        check(memory.is_untouched(), || "memory was written".into())
    });
    test("dma_to_another_devices_memory_is_refused", || {
        let memory = Memory::new()?;
        // SAFETY: unmapped below, before the memory goes.
        unsafe {
            one.device
                .map(FREE, memory.0.cast(), LEN, Access::ReadWrite)?
        };
        let key = forge(two, FREE, LEN as u64)?;
        let write = one.write(2, Remote { key, offset: 0 });
        one.device.unmap(FREE, LEN)?;
        refused(write?)?;
        check(memory.is_untouched(), || "memory was written".into())
    });
    test("the_interrupt_window_cannot_be_mapped", || {
        let memory = Memory::new()?;
        // SAFETY: it fails; else the process ends soon.
        let mapped = unsafe {
            two.device
                .map(0xfee0_0000, memory.0.cast(), LEN, Access::ReadWrite)
        };
        check(mapped.is_err(), || "it was mapped".into())
    });
}

/// A driver that is killed: what it had mapped is not mapped any more.
pub fn killed(one: &mut Node, b: &Place) -> Outcome {
    let [address, way] = b.words();
    let mut victim = Command::new(std::env::current_exe()?)
        .args(["0000:00:00.0", &address, &way, "victim"])
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = victim.stdout.take().ok_or("no pipe")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    let key = Key(line.trim().parse()?);
    let alive = one.read(2, Remote { key, offset: 0 });
    kill(Pid::from_raw(victim.id() as i32), Signal::SIGKILL)?;
    victim.wait()?;
    let (status, word) = alive?;
    allowed(status)?;
    check(word == 0x5a5a_5a5a_5a5a_5a5a, || {
        format!("it read {word:#x}")
    })?;
    // The next owner names the same address, and has nothing there.
    let two = Node::open(b, 2, true)?;
    let key = forge(&two, FREE, LEN as u64)?;
    let to = Remote { key, offset: 0 };
    refused(one.write(2, to)?)?;
    refused(one.read(2, to)?.0)
}

/// Has memory mapped, says by which key it is reached, and waits for its end.
pub fn victim(b: &Place) -> Outcome {
    let node = Node::open(b, 2, true)?;
    let memory = Memory::new()?;
    // SAFETY: the memory stays until the process is killed, and the device is closed with it.
    unsafe {
        node.device
            .map(FREE, memory.0.cast(), LEN, Access::ReadWrite)?;
    }
    println!("{}", forge(&node, FREE, LEN as u64)?.0);
    loop {
        std::thread::park();
    }
}
