//! The name of the calling thread, as it stands in a stream's table of sleepers: asked of the kernel once, and kept in the thread's own
//! storage. It is needed at each sleep, where the two calls would be felt.

use super::{getpid, gettid};

unsafe extern "C" {
    /// Where the calling thread keeps its name; zero at first.
    fn rdsock_thread_name() -> *mut u64;
}

/// Process (upper half) and thread. `process` is who this one is: a forked child finds its parent's name, and asks again. A `vfork`
/// child goes by the name of its parent, which lives and waits as long as it does.
pub fn thread_name(process: u32) -> u64 {
    // SAFETY: the address of a word of this thread's own.
    let kept = unsafe { rdsock_thread_name() };
    // SAFETY: as above. A handler that comes in between writes the same.
    let name = unsafe { kept.read_volatile() };
    if (name >> 32) as u32 == process {
        return name;
    }
    let name = u64::from(getpid()) << 32 | u64::from(gettid());
    // SAFETY: as above.
    unsafe { kept.write_volatile(name) };
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_has_its_name_and_a_child_another_one() {
        let name = || thread_name(getpid());
        let real = || u64::from(getpid()) << 32 | u64::from(gettid());
        assert_eq!([name(), name()], [real(), real()]);
        let of_another = std::thread::spawn(move || (name(), real()));
        let (other, others) = of_another.join().unwrap_or_default();
        assert_eq!(other, others);
        assert_ne!(other, name());
        // As a forked child finds it: kept by another process.
        // SAFETY: this thread's own word.
        unsafe { rdsock_thread_name().write(1 << 32 | 7) };
        assert_eq!(name(), real());
    }
}
