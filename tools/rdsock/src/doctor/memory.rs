//! Memory and processors.

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::{Finding, Health};
use crate::show::bytes;

/// All of it.
pub fn look() -> Vec<Finding> {
    vec![
        cores(),
        huge_pages(),
        transparent_huge_pages(),
        locked_memory(),
        descriptors(),
    ]
}

fn cores() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    match cores {
        1 => Finding::new(
            "cores",
            Health::Weak,
            "1",
            "with one core the two ends take turns: rings save copies, but spinning gains nothing",
        ),
        _ => Finding::good("cores", cores.to_string()),
    }
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn huge_pages() -> Finding {
    const DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let what = "huge pages";
    let read = |name: &str| number(&format!("{DIR}/{name}"));
    let (Some(all), Some(free), Some(reserved)) = (
        read("nr_hugepages"),
        read("free_hugepages"),
        read("resv_hugepages"),
    ) else {
        return Finding::new(
            what,
            Health::Weak,
            "this kernel has none of 2 MiB",
            "streams use ordinary pages, which costs a little speed in bulk transfers",
        );
    };
    let available = free.saturating_sub(reserved);
    let found = format!("{available} of {all} available (2 MiB each)");
    // A stream with the default rings of 4 MiB takes five.
    match available {
        0..5 => Finding::new(
            what,
            Health::Weak,
            found,
            "streams use ordinary pages, which costs a little speed in bulk transfers; reserve \
             five for each stream that matters: sysctl vm.nr_hugepages=N",
        ),
        _ => Finding::good(what, found),
    }
}

fn transparent_huge_pages() -> Finding {
    let what = "huge pages for shared memory";
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let Ok(text) = fs::read_to_string(path) else {
        return Finding::good(what, "this kernel has no transparent ones");
    };
    let chosen = text.split(['[', ']']).nth(1).unwrap_or("?").to_owned();
    match chosen.as_str() {
        "never" | "deny" => Finding::new(
            what,
            Health::Weak,
            chosen,
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled lets large rings use \
             them without a reservation",
        ),
        _ => Finding::good(what, chosen),
    }
}

fn limit(resource: Resource) -> (u64, u64) {
    getrlimit(resource).unwrap_or((0, 0))
}

fn locked_memory() -> Finding {
    let (soft, _) = limit(Resource::RLIMIT_MEMLOCK);
    let found = if soft == RLIM_INFINITY {
        "unlimited".into()
    } else {
        bytes(soft)
    };
    // Same-host streams lock nothing; the limit counts for devices.
    Finding::good(
        "locked memory",
        format!("{found} (streams on one host lock none)"),
    )
}

fn descriptors() -> Finding {
    let what = "descriptors";
    let (soft, hard) = limit(Resource::RLIMIT_NOFILE);
    let found = format!("{soft}, the daemon raises it to {hard}");
    // Three for each stream, four for each program.
    match hard {
        0..4096 => Finding::new(
            what,
            Health::Weak,
            found,
            "the daemon needs three for each stream: raise the hard limit (ulimit -Hn, or \
             LimitNOFILE= in its unit)",
        ),
        _ => Finding::good(what, found),
    }
}
