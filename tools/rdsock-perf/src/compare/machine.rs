//! What the figures were measured on.

use serde::Serialize;
use std::fs::read_to_string;

/// The machine, as far as it matters to the figures. Holds no name of host or user.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// Model of the processor.
    pub cpu: String,
    /// How many processors are online.
    pub cpus: usize,
    /// Level-2 cache of one core and last-level cache, as the kernel writes them ("1024K").
    pub l2: Option<String>,
    /// See `l2`.
    pub l3: Option<String>,
    /// Whether it is a virtual machine.
    pub virtual_machine: bool,
    /// Release of the kernel.
    pub kernel: String,
    /// Architecture.
    pub arch: &'static str,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Setting of transparent huge pages for shared memory.
    pub shmem_huge_pages: Option<String>,
}

impl Machine {
    /// Looks around.
    pub fn look() -> Self {
        let cpuinfo = read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = read_to_string("/proc/meminfo").unwrap_or_default();
        let cpu = field(&cpuinfo, "model name")
            .or(field(&cpuinfo, "Processor"))
            .unwrap_or("unknown");
        let kib = field(&meminfo, "MemTotal")
            .and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        Self {
            cpu: cpu.into(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            l2: cache(2),
            l3: cache(3),
            virtual_machine: flags(&cpuinfo).any(|flag| flag == "hypervisor"),
            kernel: file("/proc/sys/kernel/osrelease").unwrap_or_default(),
            arch: std::env::consts::ARCH,
            memory_bytes: kib.unwrap_or(0) << 10,
            shmem_huge_pages: file("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
                .map(|text| chosen(&text)),
        }
    }
}

/// A file of one line.
fn file(path: &str) -> Option<String> {
    Some(read_to_string(path).ok()?.trim().to_owned())
}

/// The value of the first line "name : value".
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim())
}

/// The processor's flags.
fn flags(cpuinfo: &str) -> impl Iterator<Item = &str> {
    field(cpuinfo, "flags")
        .unwrap_or_default()
        .split_whitespace()
}

/// The size of the cache of one level.
fn cache(level: u32) -> Option<String> {
    (0..8).find_map(|index| {
        let folder = format!("/sys/devices/system/cpu/cpu0/cache/index{index}");
        (file(&format!("{folder}/level"))? == level.to_string())
            .then(|| file(&format!("{folder}/size")))?
    })
}

/// The word in brackets of a setting such as "always [never]".
fn chosen(text: &str) -> String {
    let inside = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or(text, |(word, _)| word).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_and_fields() {
        assert_eq!(chosen("always within_size [never] deny"), "never");
        assert_eq!(chosen("odd"), "odd");
        assert_eq!(
            field("a: 1\nmodel name\t: Fast 9\n", "model name"),
            Some("Fast 9")
        );
        assert_eq!(field("a: 1\n", "b"), None);
    }
}
