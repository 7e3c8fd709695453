//! `ogctl resources` and `ogctl eligible`: what the machine has, and for which tiers it is enough.
//!
//! JSON has bytes under the names that `resources.json` uses; text has GiB.

use crate::bus::Bus;
use crate::details::Read as _;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::render::{Style, Table, Tone, cell, fields, file_size, gib};
use crate::term;
use opengateway::api::keys::resources_option;
use opengateway::api::names::{ErrorName, exit};
use opengateway::api::proxy::{Details, Options, TierEntry};
use serde::Serialize;
use zbus::Variant;

#[derive(Debug, Serialize)]
struct Resources {
    measured_at: Option<u64>,
    cpu: Cpu,
    memory: Memory,
    storage: Storage,
    gpus: Vec<Gpu>,
    lent: Amounts,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Cpu {
    logical: Option<u64>,
    usable: Option<f64>,
    model: Option<String>,
    arch: Option<String>,
    load1: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Memory {
    total: Option<u64>,
    available: Option<u64>,
    limit: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Storage {
    path: Option<String>,
    total: Option<u64>,
    available: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Gpu {
    index: Option<u64>,
    vendor: Option<String>,
    name: Option<String>,
    uuid: Option<String>,
    vram_total: Option<u64>,
    vram_free: Option<u64>,
    driver: Option<String>,
    pci_address: Option<String>,
}

/// Amounts of each kind; what is absent is unknown, unlimited or not short, as the place says.
#[derive(Debug, Serialize)]
struct Amounts {
    cores: Option<f64>,
    memory: Option<u64>,
    storage: Option<u64>,
    vram: Option<u64>,
}

/// Prints what the machine has.
pub async fn resources(bus: &mut Bus, out: &Output, fresh: bool) -> Result<(), Stop> {
    let options = options(fresh, None);
    let details = bus.ask(async |manager| manager.get_resources(&options).await).await?;
    out.view(resources_view(&details), resources_text)
}

fn options(fresh: bool, tier: Option<&str>) -> Options<'_> {
    let mut options = Options::new();
    if fresh {
        options.insert(resources_option::FRESH, Variant::from(true));
    }
    if let Some(tier) = tier {
        options.insert(resources_option::TIER, Variant::from(tier));
    }
    options
}

fn resources_view(details: &Details) -> Resources {
    let (cpu, memory, storage) = (details.inner("Cpu"), details.inner("Memory"), details.inner("Storage"));
    let gpu = |gpu: &Details| Gpu {
        index: gpu.number("Index"),
        vendor: gpu.text("Vendor"),
        name: gpu.text("Name"),
        uuid: gpu.text("Uuid"),
        vram_total: gpu.number("VramTotal"),
        vram_free: gpu.number("VramFree"),
        driver: gpu.text("Driver"),
        pci_address: gpu.text("PciAddress"),
    };
    Resources {
        measured_at: details.number("MeasuredAt"),
        cpu: Cpu {
            logical: cpu.number("Logical"),
            usable: cpu.real("Usable"),
            model: cpu.text("Model"),
            arch: cpu.text("Arch"),
            load1: cpu.real("Load1"),
        },
        memory: Memory { total: memory.number("Total"), available: memory.number("Available"), limit: memory.number("Limit") },
        storage: Storage { path: storage.text("Path"), total: storage.number("Total"), available: storage.number("Available") },
        gpus: details.inners("Gpus").iter().map(gpu).collect(),
        lent: amounts(&details.inner("Lent"), ""),
        warnings: details.texts("Warnings"),
    }
}

/// Amounts under keys with `prefix`: `Cores`, `RequiredCores`, …
fn amounts(details: &Details, prefix: &str) -> Amounts {
    let key = |kind: &str| format!("{prefix}{kind}");
    Amounts {
        cores: details.real(&key("Cores")),
        memory: details.number(&key("Memory")),
        storage: details.number(&key("Storage")),
        vram: details.number(&key("Vram")),
    }
}

fn cores(cores: Option<f64>) -> String {
    cores.map_or_else(|| "-".to_owned(), |cores| format!("{}", (cores * 100.0).round() / 100.0))
}

fn resources_text(view: &Resources, style: &Style) -> String {
    let text = |text: &Option<String>| text.as_deref().map(term::line);
    let cpu = [
        Some(format!(
            "{} cores usable of {}",
            cores(view.cpu.usable),
            view.cpu.logical.map_or_else(|| "-".into(), |n| n.to_string())
        )),
        text(&view.cpu.model),
        text(&view.cpu.arch),
        view.cpu.load1.map(|load| format!("load {load:.2}")),
    ];
    let limit = view.memory.limit.map_or_else(String::new, |limit| format!(", limited to {}", gib(Some(limit))));
    let gpu = |gpu: &Gpu| {
        let name = text(&gpu.name).or_else(|| text(&gpu.vendor)).unwrap_or_else(|| "unknown GPU".into());
        let driver = text(&gpu.driver).map_or_else(String::new, |driver| format!(", driver {driver}"));
        format!("{name}: {} VRAM, {} free{driver}", gib(gpu.vram_total), gib(gpu.vram_free))
    };
    let gpus = if view.gpus.is_empty() { "none".into() } else { view.gpus.iter().map(gpu).collect::<Vec<_>>().join("\n") };
    let lent = [
        view.lent.cores.map(|lent| format!("{} cores", cores(Some(lent)))),
        view.lent.memory.map(|lent| format!("{} memory", gib(Some(lent)))),
        view.lent.storage.map(|lent| format!("{} storage", gib(Some(lent)))),
        view.lent.vram.map(|lent| format!("{} VRAM", gib(Some(lent)))),
    ];
    let lent: Vec<String> = lent.into_iter().flatten().collect();
    let storage = format!("{} free of {}", gib(view.storage.available), gib(view.storage.total));
    let mut shown = fields(
        style,
        &[
            ("CPU", cpu.into_iter().flatten().collect::<Vec<_>>().join(", ")),
            ("Memory", format!("{} total, {} available{limit}", gib(view.memory.total), gib(view.memory.available))),
            ("GPU", gpus),
            ("Storage", format!("{storage}{}", text(&view.storage.path).map_or_else(String::new, |path| format!(" at {path}")))),
            ("Lends at most", if lent.is_empty() { String::new() } else { lent.join(", ") }),
        ],
    );
    for warning in &view.warnings {
        shown.push_str(&format!("{} {}\n", style.paint(Tone::Warn, "!"), term::line(warning)));
    }
    shown
}

#[derive(Debug, Serialize)]
struct Eligible {
    tiers: Vec<Tier>,
}

#[derive(Debug, Serialize)]
struct Tier {
    tier: String,
    eligible: bool,
    /// Whether it would fit into the memory that is free now; null when unknown.
    fits_now: Option<bool>,
    unmet: Vec<Unmet>,
    required: Amounts,
    available: Amounts,
    /// What is short, and by how much.
    missing: Amounts,
    /// What a model of the tier takes; null of a daemon that does not say.
    estimate: Option<Estimate>,
}

/// What a model of a tier takes, by its shape: nothing of it is measured.
#[derive(Debug, Serialize)]
struct Estimate {
    quantisation: String,
    bits_per_weight: Option<f64>,
    /// Bytes of the file.
    weights: u64,
    /// Tokens that the cache is for.
    context: u64,
    /// Bytes, for one prompt of that length.
    kv_cache: u64,
    /// Bytes in all.
    needed: u64,
    /// What these may be off.
    error_percent: Option<u64>,
    /// Null when it is not known what is free.
    fits_now: Option<bool>,
    /// Members are told that this machine serves the tier.
    advertised: Option<bool>,
}

fn estimate(details: &Details) -> Option<Estimate> {
    Some(Estimate {
        quantisation: details.text("Quantisation")?,
        bits_per_weight: details.real("BitsPerWeight"),
        weights: details.number("Weights")?,
        context: details.number("Context")?,
        kv_cache: details.number("KvCache")?,
        needed: details.number("Needed")?,
        error_percent: details.number("ErrorPercent"),
        fits_now: details.flag("FitsNow"),
        advertised: details.flag("Advertised"),
    })
}

#[derive(Debug, Serialize)]
struct Unmet {
    code: String,
    message: String,
}

/// Prints every tier: yes or no, and why.
pub async fn eligible(bus: &mut Bus, out: &Output, fresh: bool, tier: Option<&str>, explain: bool) -> Result<(), Stop> {
    let options = options(fresh, tier);
    let tiers = bus.ask(async |manager| manager.list_eligible(&options).await).await;
    let tiers = tiers.map_err(|failure| {
        // The one argument that can be wrong is the tier's name.
        if failure.name == ErrorName::InvalidArgs.short() && tier.is_some() {
            Failure::new("NoSuchTier", failure.message, "see all of them with: ogctl eligible", exit::NOT_FOUND)
        } else {
            failure
        }
    })?;
    out.view(Eligible { tiers: tiers.into_iter().map(tier_view).collect() }, |view, style| {
        let mut text = eligible_text(view, style);
        if explain {
            text.push('\n');
            text.push_str(&estimates_text(view, style));
        }
        text
    })
}

fn tier_view((tier, eligible, unmet, details): TierEntry) -> Tier {
    let required = amounts(&details, "Required");
    let now = details.number("MemoryNow");
    Tier {
        tier,
        eligible,
        fits_now: now.zip(required.memory).map(|(now, needed)| now >= needed),
        unmet: unmet.into_iter().map(|(code, message)| Unmet { code, message }).collect(),
        available: amounts(&details, "Available"),
        missing: amounts(&details.inner("Missing"), ""),
        estimate: estimate(&details),
        required,
    }
}

fn estimates_text(view: &Eligible, style: &Style) -> String {
    let mut table = Table::new(&["TIER", "QUANT", "BITS", "WEIGHTS", "CONTEXT", "KV CACHE", "IN ALL", "FITS NOW", "ADVERTISED"]);
    let word = |flag: Option<bool>| match flag {
        Some(true) => ("yes".to_owned(), Tone::Good),
        Some(false) => ("no".to_owned(), Tone::Warn),
        None => cell("-"),
    };
    let mut error = None;
    for tier in &view.tiers {
        let Some(estimate) = &tier.estimate else { continue };
        error = error.max(estimate.error_percent);
        table.row(vec![
            cell(term::line(&tier.tier)),
            cell(term::line(&estimate.quantisation)),
            cell(estimate.bits_per_weight.map_or_else(|| "-".to_owned(), |bits| format!("{bits:.2}"))),
            cell(file_size(Some(estimate.weights))),
            cell(estimate.context.to_string()),
            cell(file_size(Some(estimate.kv_cache))),
            cell(file_size(Some(estimate.needed))),
            word(estimate.fits_now),
            word(estimate.advertised),
        ]);
    }
    let within = error.map_or_else(String::new, |percent| format!(", within {percent} %"));
    let mut text = table.render(style);
    text.push_str(&format!(
        "Estimates from the shape of each model{within}: its weights at the usual quantisation, the cache of one prompt with\n\
         that context, and in all also what the engine computes with and a tenth for what is not seen. Members are told the\n\
         tiers that are advertised: those that this machine is eligible for and has the memory to load.\n"
    ));
    text
}

/// What a tier asks for, in the 10^9 bytes in which the table of tiers counts: a reader finds the row again.
fn gb(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "?".to_owned(), |bytes| format!("{} GB", bytes.div_ceil(1_000_000_000)))
}

fn eligible_text(view: &Eligible, style: &Style) -> String {
    let mut table = Table::new(&["TIER", "ELIGIBLE", "FITS NOW", "NEEDS", "WHY NOT"]).wrapping();
    for tier in &view.tiers {
        let count = cores(tier.required.cores);
        let mut needs = format!("{count} {}, {} RAM", if count == "1" { "core" } else { "cores" }, gb(tier.required.memory));
        if let Some(vram) = tier.required.vram {
            needs.push_str(&format!(", {} VRAM", gb(Some(vram))));
        }
        needs.push_str(&format!(", {} disk", gb(tier.required.storage)));
        let why = tier.unmet.iter().map(|unmet| term::line(&unmet.message)).collect::<Vec<_>>().join("; ");
        table.row(vec![
            cell(term::line(&tier.tier)),
            if tier.eligible { ("yes".into(), Tone::Good) } else { ("no".into(), Tone::Bad) },
            cell(match tier.fits_now {
                Some(true) => "yes",
                Some(false) => "no",
                None => "-",
            }),
            cell(needs),
            cell(why),
        ]);
    }
    table.render(style)
}
