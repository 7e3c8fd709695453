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

/// The table, smallest first, in the order of the specification.
pub static TIERS: [Tier; 1] = [Tier { name: "SmolLM-360M", cores: 1, memory: GB, vram: None, storage: 2 * GB }];

/// The tier called `name`, without regard to case.
pub fn find(name: &str) -> Option<&'static Tier> {
    TIERS.iter().find(|tier| tier.name.eq_ignore_ascii_case(name))
}

/// Compares a machine with a tier.
pub fn assess(tier: &'static Tier, _resources: &Resources) -> Verdict {
    Verdict { tier, unmet: Vec::new(), fits_now: None }
}
