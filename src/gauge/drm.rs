//! Graphics processors by sysfs: AMD with its memory; Intel by name alone, since it has no portable file for it. NVIDIA cards
//! are left to NVML, which knows more.
//!
//! Reading a card's files may wake it, and hang with a broken driver: it is an errand, with a deadline.

use std::fs;
use std::path::Path;

use crate::domain::resources::Gpu;

const AMD: &str = "0x1002";
const INTEL: &str = "0x8086";

fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Measures. A card that vanishes meanwhile is a card without the values that could not be read.
pub(super) fn probe(sys_root: &Path) -> Vec<Gpu> {
    let mut cards: Vec<(u32, std::path::PathBuf)> = fs::read_dir(sys_root.join("class/drm"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            // "card0", and not its connectors "card0-DP-1".
            let number = entry.file_name().to_str()?.strip_prefix("card")?.parse().ok()?;
            Some((number, entry.path().join("device")))
        })
        .collect();
    cards.sort();
    let mut found = Vec::new();
    for (_, device) in cards {
        let vendor = match text(&device.join("vendor")).as_deref() {
            Some(AMD) => "amd",
            Some(INTEL) => "intel",
            _ => continue,
        };
        let number = |name: &str| text(&device.join(name))?.parse::<u64>().ok();
        // A card without memory of its own has nothing that could be told.
        let total = number("mem_info_vram_total").filter(|total| *total > 0);
        let used = number("mem_info_vram_used");
        let driver = fs::read_link(device.join("driver")).ok().and_then(|link| Some(link.file_name()?.to_str()?.to_owned()));
        let pci = text(&device.join("uevent"))
            .and_then(|uevent| uevent.lines().find_map(|line| line.strip_prefix("PCI_SLOT_NAME=").map(str::to_owned)));
        found.push(Gpu {
            index: u32::try_from(found.len()).unwrap_or(u32::MAX),
            vendor: vendor.to_owned(),
            name: text(&device.join("product_name")),
            uuid: text(&device.join("unique_id")),
            vram_total: total,
            vram_free: total.zip(used).map(|(total, used)| total.saturating_sub(used)),
            driver,
            pci_address: pci,
        });
    }
    found
}
