//! The model tiers of the specification as data, and who qualifies for them.

use super::resources::Resources;

/// One row of the table. Its GB are 10^9 bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tier {
    /// Also the name of a cluster.
    pub name: &'static str,
    /// Usable cores.
    pub cores: u32,
    /// Bytes of memory, in all.
    pub memory: u64,
    /// Bytes of video memory; `None` where it is optional.
    pub vram: Option<u64>,
    /// Bytes of storage: free, and what models already take.
    pub storage: u64,
}

/// What can be short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Usable cores.
    Cores,
    /// Memory.
    Memory,
    /// Video memory.
    Vram,
    /// Storage.
    Storage,
}

/// One thing that is short.
#[derive(Debug, Clone, PartialEq)]
pub struct Unmet {
    /// What.
    pub need: Need,
    /// How much is missing: cores, or bytes.
    pub missing: f64,
    /// A sentence for people.
    pub sentence: String,
}

/// Whether a machine qualifies, and why not.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// For what.
    pub tier: &'static Tier,
    /// What is short; empty means that the machine qualifies.
    pub unmet: Vec<Unmet>,
    /// Whether what is free now covers the tier's memory; `None` when unknown.
    pub fits_now: Option<bool>,
}

const GB: u64 = 1_000_000_000;

const fn tier(name: &'static str, cores: u32, memory_gb: u64, vram_gb: Option<u64>, storage_gb: u64) -> Tier {
    let vram = match vram_gb {
        Some(gb) => Some(gb * GB),
        None => None,
    };
    Tier { name, cores, memory: memory_gb * GB, vram, storage: storage_gb * GB }
}

/// The table of the specification, in its order, smallest first. "Llama-3.2-1.5B" is kept as it stands there, although
/// Meta publishes 1B and 3B.
pub static TIERS: [Tier; 10] = [
    tier("SmolLM-360M", 1, 1, None, 2),
    tier("Qwen2-0.5B", 1, 2, None, 3),
    tier("SmolLM-1.7B", 1, 4, None, 5),
    tier("TinyLlama-1.1B", 2, 1, None, 2),
    tier("Phi-2-2.7B", 2, 2, None, 3),
    tier("Llama-3.2-1.5B", 2, 4, None, 5),
    tier("Llama-3.2-3B", 4, 8, None, 20),
    tier("Llama-3.1-8B", 4, 12, Some(8), 30),
    tier("Llama-3.1-70B", 8, 32, Some(24), 150),
    tier("Llama-3.1-405B", 16, 64, Some(48), 500),
];

/// The tier called `name`, without regard to case.
pub fn find(name: &str) -> Option<&'static Tier> {
    TIERS.iter().find(|tier| tier.name.eq_ignore_ascii_case(name))
}

/// The names of the tiers that a machine qualifies for, in the order of the table.
pub fn qualified(resources: &Resources) -> Vec<String> {
    TIERS.iter().filter(|tier| assess(tier, resources).unmet.is_empty()).map(|tier| tier.name.to_owned()).collect()
}

/// The names of the tiers that members are told: those that the machine qualifies for, and whose models it has the memory to
/// load. The table alone would promise a 405B to a machine with 64 GB.
pub fn servable(resources: &Resources) -> Vec<String> {
    let serves = |tier: &&Tier| super::estimate::estimate(tier).is_none_or(|needs| super::estimate::can_load(&needs, resources));
    let qualified = TIERS.iter().filter(|tier| assess(tier, resources).unmet.is_empty());
    qualified.filter(serves).map(|tier| tier.name.to_owned()).collect()
}

/// A number with at most `digits` decimals, and none that say nothing.
fn plain(number: f64, digits: usize) -> String {
    let text = format!("{number:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Bytes as people say them. The table counts in 10^9 bytes, so a shortage is told in the same.
fn gb(bytes: f64) -> String {
    match bytes {
        0.0 => "none".to_owned(),
        // Rounded to one decimal a little would look like nothing.
        bytes if bytes < GB as f64 / 10.0 => format!("{} MB", plain(bytes / 1e6, 1)),
        bytes => format!("{} GB", plain(bytes / GB as f64, 1)),
    }
}

/// Compares a machine with a tier: memory and video memory by their totals (video memory of the largest GPU), storage by what
/// is free and what models already take. What is optional never fails; what is required and unknown does.
pub fn assess(tier: &'static Tier, resources: &Resources) -> Verdict {
    let mut unmet = Vec::new();
    let mut compare = |need: Need, name: &str, required: u64, has: Option<u64>| {
        let missing = required.saturating_sub(has.unwrap_or(0)) as f64;
        if missing > 0.0 {
            let required = gb(required as f64);
            let sentence = match has {
                Some(has) => format!("needs {required} of {name}, has {}: {} missing", gb(has as f64), gb(missing)),
                None => format!("needs {required} of {name}, and how much there is is unknown"),
            };
            unmet.push(Unmet { need, missing, sentence });
        }
    };
    let vram = resources.gpus.iter().filter_map(|gpu| gpu.vram_total).max();
    let storage = resources.storage.available.map(|free| free.saturating_add(resources.storage.models.unwrap_or(0)));
    compare(Need::Memory, "memory", tier.memory, resources.memory.total);
    if let Some(required) = tier.vram {
        // No GPU at all is known, not unknown: there is none.
        compare(Need::Vram, "video memory", required, if resources.gpus.is_empty() { Some(0) } else { vram });
    }
    compare(Need::Storage, "storage", tier.storage, storage);
    let cores = f64::from(tier.cores) - resources.cpu.usable;
    if cores > 1e-9 {
        let sentence = format!(
            "needs {} core{}, {} usable: {} missing",
            tier.cores,
            if tier.cores == 1 { "" } else { "s" },
            plain(resources.cpu.usable, 2),
            plain(cores, 2)
        );
        unmet.insert(0, Unmet { need: Need::Cores, missing: cores, sentence });
    }
    let fits_now = resources.memory.available.map(|free| free >= tier.memory);
    Verdict { tier, unmet, fits_now }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::resources::{Cpu, Gpu, Memory, Storage};

    fn machine(cores: f64, memory: u64, vram: Option<u64>, storage: u64) -> Resources {
        let gpu = |vram_total| Gpu {
            index: 0,
            vendor: "nvidia".to_owned(),
            name: None,
            uuid: None,
            vram_total: Some(vram_total),
            vram_free: None,
            driver: None,
            pci_address: None,
        };
        Resources {
            schema: 1,
            measured_at: 0,
            cpu: Cpu { logical: 64, usable: cores, model: None, arch: "x86_64".to_owned(), load1: None },
            memory: Memory { total: Some(memory), available: Some(memory / 2), limit: None },
            storage: Storage { path: "/".into(), total: None, available: Some(storage), models: Some(0) },
            gpus: vram.map(gpu).into_iter().collect(),
            warnings: Vec::new(),
        }
    }

    fn needs(verdict: &Verdict) -> Vec<Need> {
        verdict.unmet.iter().map(|unmet| unmet.need).collect()
    }

    #[test]
    fn every_tier_is_met_exactly_at_its_row_and_not_one_byte_below() {
        for tier in &TIERS {
            let exact = || machine(f64::from(tier.cores), tier.memory, tier.vram, tier.storage);
            assert_eq!(assess(tier, &exact()).unmet, [], "{}", tier.name);
            let mut short = exact();
            short.memory.total = Some(tier.memory - 1);
            assert_eq!(needs(&assess(tier, &short)), [Need::Memory]);
            let mut short = exact();
            short.storage.available = Some(tier.storage - 1);
            assert_eq!(needs(&assess(tier, &short)), [Need::Storage]);
            let mut short = exact();
            short.cpu.usable -= 0.01;
            assert_eq!(needs(&assess(tier, &short)), [Need::Cores]);
            if let Some(vram) = tier.vram {
                let mut short = exact();
                short.gpus[0].vram_total = Some(vram - 1);
                assert_eq!(needs(&assess(tier, &short)), [Need::Vram]);
            }
        }
    }

    #[test]
    fn members_are_told_what_can_be_loaded_and_not_all_that_the_table_allows() {
        let huge = |memory| machine(64.0, memory, Some(48 * GB), 500 * GB);
        assert_eq!(qualified(&huge(64 * GB)).len(), 10);
        let served = servable(&huge(64 * GB));
        assert!(served.contains(&"Llama-3.1-70B".to_owned()) && !served.contains(&"Llama-3.1-405B".to_owned()), "{served:?}");
        assert!(servable(&huge(300 * GB)).contains(&"Llama-3.1-405B".to_owned()));
        // Phi-2 with its cache is more than the 2 GB of its row.
        let row = machine(2.0, 2 * GB, None, 3 * GB);
        assert!(qualified(&row).contains(&"Phi-2-2.7B".to_owned()) && !servable(&row).contains(&"Phi-2-2.7B".to_owned()));
        for tier in servable(&row) {
            assert!(qualified(&row).contains(&tier), "{tier}");
        }
    }

    #[test]
    fn the_tiers_are_those_of_the_specification() {
        let table = "
            SmolLM-360M    |  1 |  1 |  - |   2
            Qwen2-0.5B     |  1 |  2 |  - |   3
            SmolLM-1.7B    |  1 |  4 |  - |   5
            TinyLlama-1.1B |  2 |  1 |  - |   2
            Phi-2-2.7B     |  2 |  2 |  - |   3
            Llama-3.2-1.5B |  2 |  4 |  - |   5
            Llama-3.2-3B   |  4 |  8 |  - |  20
            Llama-3.1-8B   |  4 | 12 |  8 |  30
            Llama-3.1-70B  |  8 | 32 | 24 | 150
            Llama-3.1-405B | 16 | 64 | 48 | 500";
        let rows: Vec<[&str; 5]> =
            table.trim().lines().map(|row| row.split('|').map(str::trim).collect::<Vec<_>>().try_into().unwrap()).collect();
        assert_eq!(rows.len(), TIERS.len());
        for ([name, cores, memory, vram, storage], tier) in rows.into_iter().zip(&TIERS) {
            let bytes = |gb: &str| gb.parse::<u64>().unwrap() * 1_000_000_000;
            let vram = (vram != "-").then(|| bytes(vram));
            let expected =
                Tier { name: tier.name, cores: cores.parse().unwrap(), memory: bytes(memory), vram, storage: bytes(storage) };
            assert_eq!((name, expected), (tier.name, *tier));
        }
    }

    #[test]
    fn optional_video_memory_never_fails_and_a_required_one_counts_from_the_first_byte() {
        for tier in &TIERS {
            for vram in [None, Some(0), Some(1), tier.vram] {
                let found = machine(f64::from(tier.cores), tier.memory, vram, tier.storage);
                let unmet = assess(tier, &found).unmet;
                match tier.vram {
                    Some(required) if vram != tier.vram => {
                        assert_eq!((unmet.len(), unmet[0].need), (1, Need::Vram), "{} with {vram:?}", tier.name);
                        assert_eq!(unmet[0].missing, (required - vram.unwrap_or(0)) as f64);
                    }
                    _ => assert_eq!(unmet, [], "{} with {vram:?}", tier.name),
                }
            }
        }
    }

    #[test]
    fn what_is_missing_is_told_in_whole_and_in_the_order_of_the_table() {
        let nothing = machine(0.25, 0, None, 0);
        for tier in &TIERS {
            let unmet = assess(tier, &nothing).unmet;
            let missing: Vec<(Need, f64)> = unmet.iter().map(|unmet| (unmet.need, unmet.missing)).collect();
            let mut expected = vec![(Need::Cores, f64::from(tier.cores) - 0.25), (Need::Memory, tier.memory as f64)];
            expected.extend(tier.vram.map(|vram| (Need::Vram, vram as f64)));
            expected.push((Need::Storage, tier.storage as f64));
            assert_eq!(missing, expected, "{}", tier.name);
        }
        assert_eq!(assess(&TIERS[0], &nothing).unmet[0].sentence, "needs 1 core, 0.25 usable: 0.75 missing");
    }

    #[test]
    fn a_machine_with_8_gib_of_modules_passes_the_8_gb_row() {
        let verdict = assess(find("llama-3.2-3b").unwrap(), &machine(4.0, 8_100_000_000, None, 100 * GB));
        assert_eq!(verdict.unmet, []);
        assert_eq!(verdict.fits_now, Some(false));
    }

    #[test]
    fn unknown_is_unmet_where_it_is_required_and_says_so() {
        let mut unknown = machine(16.0, 64 * GB, Some(0), 500 * GB);
        unknown.gpus[0].vram_total = None;
        let verdict = assess(find("Llama-3.1-8B").unwrap(), &unknown);
        assert!(verdict.unmet[0].sentence.contains("unknown"), "{verdict:?}");
        assert_eq!(assess(find("Llama-3.2-3B").unwrap(), &unknown).unmet, [], "optional video memory never fails");
    }

    #[test]
    fn models_that_are_there_already_count_as_storage() {
        let mut full = machine(4.0, 8 * GB, None, 5 * GB);
        full.storage.models = Some(15 * GB);
        assert_eq!(assess(find("Llama-3.2-3B").unwrap(), &full).unmet, []);
    }

    #[test]
    fn the_largest_gpu_counts() {
        let mut two = machine(8.0, 32 * GB, Some(8 * GB), 150 * GB);
        let mut second = two.gpus[0].clone();
        second.vram_total = Some(24 * GB);
        two.gpus.push(second);
        assert_eq!(assess(find("Llama-3.1-70B").unwrap(), &two).unmet, []);
    }
}
