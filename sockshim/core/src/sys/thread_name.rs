//! The name of the calling thread, as it stands in a stream's table of sleepers: asked of the kernel once, and kept in the thread's own
//! storage. It is needed at each sleep, where the two calls would be felt.

use super::{getpid, gettid, host};

/// Process (upper half) and thread. `process` is who this one is: a forked child finds its parent's name, and asks again. A `vfork`
/// child goes by the name of its parent, which lives and waits as long as it does.
pub fn thread_name(process: u32) -> u64 {
    thread_name_in((host().word)(), process)
}

/// The name that a thread keeps there, or asks for each time if that is nowhere.
fn thread_name_in(kept: *mut u64, process: u32) -> u64 {
    let asked = || u64::from(getpid()) << 32 | u64::from(gettid());
    if kept.is_null() {
        return asked();
    }
    // SAFETY: a word of this thread's own. A handler that comes in between writes the same.
    let name = unsafe { kept.read_volatile() };
    if (name >> 32) as u32 == process {
        return name;
    }
    let name = asked();
    // SAFETY: as above.
    unsafe { kept.write_volatile(name) };
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_has_its_name_and_a_child_another_one() {
        let mut word = 0;
        let mut name = || thread_name_in(&mut word, getpid());
        let real = || u64::from(getpid()) << 32 | u64::from(gettid());
        assert_eq!([name(), name()], [real(), real()]);
        let others = std::thread::spawn(move || [thread_name(getpid()), real()]);
        let [other, others] = others.join().unwrap_or_default();
        assert_eq!(other, others);
        assert_ne!(other, name());
        // As a forked child finds it: kept by another process.
        word = 1 << 32 | 7;
        assert_eq!(thread_name_in(&mut word, getpid()), real());
    }
}
