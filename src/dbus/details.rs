//! From our data to the `a{sv}` of the bus. Keys are those of `dbus/*.xml`; what is unknown is absent, never 0.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use zbus::Variant;

use super::errors::without_nul;
use super::facts::put_relay;
use crate::domain::estimate;
use crate::domain::node::{ClusterView, Liveness, Member};
use crate::domain::resources::{Gpu, Lent, Resources};
use crate::domain::tier::{Need, Verdict};

/// The `a{sv}` of a reply or a signal.
pub(super) type Details = HashMap<&'static str, Variant<'static>>;

/// Microseconds since the epoch.
pub(super) fn micros(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

/// Text of elsewhere as it may go over the bus.
pub(super) fn text(text: &str) -> Variant<'static> {
    without_nul(text.to_owned()).into()
}

pub(super) fn texts<'a>(list: impl IntoIterator<Item = &'a str>) -> Variant<'static> {
    list.into_iter().map(|text| without_nul(text.to_owned())).collect::<Vec<String>>().into()
}

pub(super) fn put<T: Into<Variant<'static>>>(details: &mut Details, key: &'static str, value: Option<T>) {
    if let Some(value) = value {
        details.insert(key, value.into());
    }
}

/// Model names of a cluster: what can be asked here, each once.
pub(super) fn models(view: &ClusterView) -> Vec<String> {
    let mut names: Vec<String> = view
        .members
        .iter()
        .filter(|member| member.serving && !member.draining)
        .flat_map(|member| member.models.iter().map(|model| without_nul(model.name.clone())))
        .collect();
    names.sort();
    names.dedup();
    names
}

pub(super) fn member(member: &Member) -> Details {
    let liveness = match member.liveness {
        Liveness::Alive => "alive",
        Liveness::Suspect => "suspect",
        Liveness::Known => "known",
    };
    let mut details = Details::from([
        ("Name", text(&member.name)),
        ("Addresses", texts(member.addresses.iter().map(String::as_str))),
        ("Via", member.found_by.as_str().into()),
        ("Version", text(&member.version)),
        ("ProtocolVersion", member.protocol.to_string().into()),
        ("Compatible", true.into()),
        ("LastSeen", micros(member.last_seen).into()),
        ("Serving", member.serving.into()),
        ("Draining", member.draining.into()),
        ("Models", texts(member.models.iter().map(|model| model.name.as_str()))),
        ("TierIds", texts(member.tiers.iter().map(String::as_str))),
        ("Liveness", liveness.into()),
    ]);
    put(&mut details, "LatencyUSec", member.latency_us);
    // Of one that is only known there is no connection, and it has told nothing itself.
    if member.liveness != Liveness::Known {
        details.insert("Direct", member.direct.into());
        details.insert("ConnectedAt", micros(member.connected_at).into());
        details.insert("FreeSlots", u32::from(member.free_slots).into());
        details.insert("Queued", u32::from(member.queued).into());
        put(&mut details, "Transport", Some(member.transport).filter(|transport| !transport.is_empty()));
        put_relay(&mut details, member.relay.as_ref());
    }
    details
}

/// How many members are connected, and how many there are, those included that are only known.
pub(super) fn counts(view: &ClusterView) -> (u32, u32) {
    let connected = view.members.iter().filter(|member| member.liveness != Liveness::Known).count();
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    (count(connected), count(view.members.len()))
}

pub(super) fn resources(resources: &Resources, lent: &Lent) -> Details {
    let mut cpu = Details::from([
        ("Logical", resources.cpu.logical.into()),
        ("Usable", resources.cpu.usable.into()),
        ("Arch", text(&resources.cpu.arch)),
    ]);
    put(&mut cpu, "Model", resources.cpu.model.as_deref().map(text));
    put(&mut cpu, "Load1", resources.cpu.load1);
    let mut memory = Details::new();
    put(&mut memory, "Total", resources.memory.total);
    put(&mut memory, "Available", resources.memory.available);
    put(&mut memory, "Limit", resources.memory.limit);
    let mut storage = Details::from([("Path", resources.storage.path.to_string_lossy().into_owned().into())]);
    put(&mut storage, "Total", resources.storage.total);
    put(&mut storage, "Available", resources.storage.available);
    let mut limits = Details::new();
    put(&mut limits, "Cores", lent.cores);
    put(&mut limits, "Memory", lent.memory);
    put(&mut limits, "Storage", lent.storage);
    put(&mut limits, "Vram", lent.vram);
    Details::from([
        ("Cpu", cpu.into()),
        ("Memory", memory.into()),
        ("Storage", storage.into()),
        ("Gpus", resources.gpus.iter().map(gpu).collect::<Vec<Details>>().into()),
        ("Lent", limits.into()),
        ("MeasuredAt", resources.measured_at.into()),
        ("Warnings", texts(resources.warnings.iter().map(String::as_str))),
    ])
}

fn gpu(gpu: &Gpu) -> Details {
    let mut details = Details::from([("Index", gpu.index.into()), ("Vendor", text(&gpu.vendor))]);
    put(&mut details, "Name", gpu.name.as_deref().map(text));
    put(&mut details, "Uuid", gpu.uuid.as_deref().map(text));
    put(&mut details, "VramTotal", gpu.vram_total);
    put(&mut details, "VramFree", gpu.vram_free);
    put(&mut details, "Driver", gpu.driver.as_deref().map(text));
    put(&mut details, "PciAddress", gpu.pci_address.as_deref().map(text));
    details
}

/// One entry of `ListEligible`: tier, whether this machine qualifies, what is unmet, details.
pub(super) type TierEntry = (String, bool, Vec<(&'static str, String)>, Details);

const fn code(need: Need) -> &'static str {
    match need {
        Need::Cores => "cores",
        Need::Memory => "memory",
        Need::Vram => "vram",
        Need::Storage => "storage",
    }
}

/// A number of bytes: whole, and exact in an f64 up to 8 PiB.
#[allow(clippy::cast_possible_truncation)]
const fn bytes(amount: f64) -> u64 {
    amount as u64
}

pub(super) fn tier(verdict: &Verdict, resources: &Resources) -> TierEntry {
    let tier = verdict.tier;
    let mut missing = Details::new();
    for unmet in &verdict.unmet {
        let (key, amount): (&'static str, Variant<'static>) = match unmet.need {
            Need::Cores => ("Cores", unmet.missing.into()),
            Need::Memory => ("Memory", bytes(unmet.missing).into()),
            Need::Vram => ("Vram", bytes(unmet.missing).into()),
            Need::Storage => ("Storage", bytes(unmet.missing).into()),
        };
        missing.insert(key, amount);
    }
    let storage = &resources.storage;
    let mut details = Details::from([
        ("RequiredCores", tier.cores.into()),
        ("RequiredMemory", tier.memory.into()),
        ("RequiredStorage", tier.storage.into()),
        ("AvailableCores", resources.cpu.usable.into()),
        ("Missing", missing.into()),
    ]);
    put(&mut details, "RequiredVram", tier.vram);
    put(&mut details, "AvailableMemory", resources.memory.total);
    put(&mut details, "AvailableVram", resources.gpus.iter().filter_map(|gpu| gpu.vram_total).max());
    put(&mut details, "AvailableStorage", storage.available.map(|free| free + storage.models.unwrap_or(0)));
    put(&mut details, "MemoryNow", resources.memory.available);
    if let Some(estimate) = estimate::estimate(tier) {
        details.extend([
            ("Quantisation", estimate::QUANTISATION.into()),
            ("BitsPerWeight", estimate.bits_per_weight.into()),
            ("Weights", estimate.weights.into()),
            ("Context", estimate.context.into()),
            ("KvCache", estimate.kv_cache.into()),
            ("Needed", estimate.needed.into()),
            ("ErrorPercent", estimate::ERROR_PERCENT.into()),
            ("Advertised", (verdict.unmet.is_empty() && estimate::can_load(&estimate, resources)).into()),
        ]);
        put(&mut details, "FitsNow", estimate::fits_now(&estimate, resources));
    }
    let unmet = verdict.unmet.iter().map(|unmet| (code(unmet.need), unmet.sentence.clone())).collect();
    (tier.name.to_owned(), verdict.unmet.is_empty(), unmet, details)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_estimate_is_for_the_context_that_the_engine_takes() {
        assert_eq!(crate::domain::estimate::CONTEXT, crate::models::DEFAULT_MAX_CONTEXT);
    }
}
