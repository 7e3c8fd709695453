//! What a machine has. Bytes everywhere; what is unknown is `None`, never 0.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// One measurement of this machine; also the content of `resources.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Resources {
    /// Version of this layout in `resources.json`.
    pub schema: u32,
    /// Microseconds since the epoch; 0 as long as nothing but processors and memory was looked at.
    pub measured_at: u64,
    /// Processors.
    pub cpu: Cpu,
    /// Main memory.
    pub memory: Memory,
    /// The file system of the models.
    pub storage: Storage,
    /// Every graphics processor that was seen.
    pub gpus: Vec<Gpu>,
    /// What could not be read and why, a sentence each.
    pub warnings: Vec<String>,
}

/// Processors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// Logical processors online.
    pub logical: u32,
    /// What may be used of them after affinity and cgroup quota: 1.5 is one and a half cores.
    pub usable: f64,
    /// As `/proc/cpuinfo` names it.
    pub model: Option<String>,
    /// "x86_64", "aarch64".
    pub arch: String,
    /// Load average over one minute.
    pub load1: Option<f64>,
}

/// Main memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// `MemTotal`, or the cgroup limit when that is less.
    pub total: Option<u64>,
    /// `MemAvailable`, or what the cgroup leaves when that is less.
    pub available: Option<u64>,
    /// The cgroup limit, when there is one below `MemTotal`.
    pub limit: Option<u64>,
}

/// The file system that holds the models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Storage {
    /// The models directory, or its nearest existing parent.
    pub path: PathBuf,
    /// Size of the file system.
    pub total: Option<u64>,
    /// Free for this daemon's user.
    pub available: Option<u64>,
    /// Bytes that models already take there.
    pub models: Option<u64>,
}

/// One graphics processor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    /// Order in which its vendor's interface lists it.
    pub index: u32,
    /// "nvidia", "amd", "intel".
    pub vendor: String,
    /// Product name.
    pub name: Option<String>,
    /// As the driver gives it.
    pub uuid: Option<String>,
    /// Video memory in all.
    pub vram_total: Option<u64>,
    /// Video memory that is free.
    pub vram_free: Option<u64>,
    /// Driver version.
    pub driver: Option<String>,
    /// "0000:01:00.0".
    pub pci_address: Option<String>,
}

/// What the owner lends at most; `None` lends all.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Lent {
    /// Cores.
    pub cores: Option<f64>,
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Bytes of storage.
    pub storage: Option<u64>,
    /// Bytes of video memory.
    pub vram: Option<u64>,
}

/// What moves less is not told.
const CHANGE: f64 = 0.05;

/// The parts of which a total or an availability moved by 5 % or more, by their keys on the bus.
pub fn moved(before: &Resources, now: &Resources) -> Vec<&'static str> {
    fn apart(before: Option<f64>, now: Option<f64>) -> bool {
        match (before, now) {
            (Some(before), Some(now)) => (before - now).abs() > CHANGE * before.abs().max(now.abs()),
            (None, None) => false,
            _ => true,
        }
    }
    let bytes = |before: Option<u64>, now: Option<u64>| apart(before.map(|bytes| bytes as f64), now.map(|bytes| bytes as f64));
    let gpus = before.gpus.len() != now.gpus.len()
        || before.gpus.iter().zip(&now.gpus).any(|(before, now)| {
            before.uuid != now.uuid || bytes(before.vram_total, now.vram_total) || bytes(before.vram_free, now.vram_free)
        });
    let parts = [
        ("Cpu", apart(Some(before.cpu.usable), Some(now.cpu.usable)) || before.cpu.logical != now.cpu.logical),
        ("Memory", bytes(before.memory.total, now.memory.total) || bytes(before.memory.available, now.memory.available)),
        ("Storage", bytes(before.storage.total, now.storage.total) || bytes(before.storage.available, now.storage.available)),
        ("Gpus", gpus),
    ];
    parts.into_iter().filter(|(_, moved)| *moved).map(|(part, _)| part).collect()
}

/// What others may use of a machine: what it has, cut down to what its owner lends.
pub fn lendable(resources: &Resources, lent: &Lent) -> Resources {
    let least = |has: Option<u64>, most: Option<u64>| match (has, most) {
        (Some(has), Some(most)) => Some(has.min(most)),
        (has, None) => has,
        // Unknown stays unknown: a limit is no measurement.
        (None, Some(_)) => None,
    };
    let mut cut = resources.clone();
    cut.cpu.usable = lent.cores.map_or(cut.cpu.usable, |cores| cut.cpu.usable.min(cores));
    cut.memory.total = least(cut.memory.total, lent.memory);
    cut.memory.available = least(cut.memory.available, lent.memory);
    cut.storage.available = least(cut.storage.available, lent.storage);
    for gpu in &mut cut.gpus {
        gpu.vram_total = least(gpu.vram_total, lent.vram);
        gpu.vram_free = least(gpu.vram_free, lent.vram);
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Resources {
        Resources {
            schema: 1,
            measured_at: 0,
            cpu: Cpu { logical: 4, usable: 4.0, model: None, arch: "x86_64".to_owned(), load1: None },
            memory: Memory { total: Some(2000), available: Some(1000), limit: None },
            storage: Storage { path: "/".into(), total: None, available: None, models: None },
            gpus: Vec::new(),
            warnings: Vec::new(),
        }
    }

    #[test]
    fn five_percent_is_told_with_the_part_that_moved_and_less_is_not() {
        let before = plain();
        let mut now = before.clone();
        now.cpu.load1 = Some(9.5);
        for (available, told) in [(Some(950), false), (Some(949), true), (Some(1052), false), (Some(1060), true), (None, true)] {
            now.memory.available = available;
            assert_eq!(moved(&before, &now), if told { vec!["Memory"] } else { vec![] }, "{available:?}");
        }
        now.storage.total = Some(7);
        assert_eq!(moved(&before, &now), ["Memory", "Storage"]);
    }
}
