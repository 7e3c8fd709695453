//! Calls of every method of the bus with whatever a caller may send.

use std::collections::HashMap;
use std::time::Duration;

use zbus::wire::{Structure, StructureBuilder, Variant};

use super::seeded::Seeded;

/// How a call ended: "ok", or the name of the error. What is no answer is a panic.
pub async fn outcome(method: &str, call: impl Future<Output = zbus::Result<zbus::Message>>) -> String {
    match tokio::time::timeout(Duration::from_secs(60), call).await {
        Ok(Ok(_)) => "ok".to_owned(),
        Ok(Err(zbus::Error::MethodError(name, ..))) => name.to_string(),
        Ok(Err(zbus::Error::FDO(error))) => zbus::DBusError::name(&*error).to_string(),
        Ok(Err(error)) => panic!("{method}: {error}"),
        Err(_) => panic!("{method}: no answer"),
    }
}

const MANAGER: &str = "org.opengateway.Gateway1.Manager";
const MODELS: &str = "org.opengateway.Gateway1.Models";
const ROOT: &str = "/org/opengateway/Gateway1";

/// Methods with the types of their arguments.
pub const METHODS: &[(&str, &str, &str)] = &[
    (MANAGER, "GetStatus", ""),
    (MANAGER, "ListClusters", ""),
    (MANAGER, "Connect", "so"),
    (MANAGER, "Disconnect", "so"),
    (MANAGER, "GetResources", "o"),
    (MANAGER, "ListEligible", "o"),
    (MANAGER, "ListPeers", "so"),
    (MANAGER, "Prompt", "sso"),
    (MANAGER, "StartPrompt", "sso"),
    (MANAGER, "ListJobs", ""),
    (MANAGER, "SetSharing", "bo"),
    (MANAGER, "Reload", ""),
    (MODELS, "ListModels", "so"),
    (MODELS, "ListLocal", ""),
    (MODELS, "Add", "sho"),
    (MODELS, "Verify", "so"),
    (MODELS, "Remove", "s"),
    (MODELS, "Load", "s"),
    (MODELS, "Unload", "s"),
    (MODELS, "GetUsage", ""),
    ("org.opengateway.Gateway1.Http", "GetKey", "o"),
    ("org.opengateway.Gateway1.Job", "Cancel", ""),
    ("org.freedesktop.DBus.Properties", "Get", "ss"),
    ("org.freedesktop.DBus.Properties", "Set", "ssv"),
    ("org.freedesktop.DBus.Properties", "GetAll", "s"),
];
fn text(random: &mut Seeded) -> String {
    match random.below(12) {
        0 => String::new(),
        1 => "gatewayai-poc".to_owned(),
        2..=5 => format!("c{}", random.below(24)),
        6 => "/ip4/127.0.0.1/udp/9/quic-v1".to_owned(),
        7 => MANAGER.to_owned(),
        8 => "\u{1b}[2J\u{202e}\u{fffd}é".to_owned(),
        9 => "x".repeat(random.below(70)),
        10 => "x".repeat(random.below(5000)),
        _ => (0..random.below(20))
            .filter_map(|_| char::from_u32(u32::try_from(random.next() % 0x11_0000).unwrap()).filter(|&c| c != '\0'))
            .collect(),
    }
}

fn value(random: &mut Seeded, depth: usize) -> Variant<'static> {
    match random.below(if depth > 3 { 10 } else { 14 }) {
        0 => Variant::from(random.below(2) == 0),
        1 => Variant::from(u8::try_from(random.below(256)).unwrap()),
        2 => Variant::from(u32::try_from(random.next() & 0xffff_ffff).unwrap()),
        3 => Variant::from(random.next()),
        4 => Variant::from(i64::from_le_bytes(random.next().to_le_bytes())),
        5 => Variant::from(f64::from_bits(random.next())),
        6 => Variant::from(u32::try_from(random.below(5)).unwrap()),
        7 => Variant::from(u64::try_from(random.below(3_000_000)).unwrap()),
        8 | 9 => Variant::from(text(random)),
        10 => Variant::from((0..random.below(4)).map(|_| text(random)).collect::<Vec<String>>()),
        11 => Variant::from(options(random, depth + 1)),
        12 => descriptor(random),
        _ => {
            let mut fields = StructureBuilder::new();
            for _ in 0..=random.below(3) {
                fields = fields.append_field(value(random, depth + 1));
            }
            Variant::from(fields.build().unwrap())
        }
    }
}

fn descriptor(random: &mut Seeded) -> Variant<'static> {
    let file = std::fs::File::open(["/dev/null", "/proc/self/exe", "/"][random.below(3)]).unwrap();
    Variant::Fd(std::os::fd::OwnedFd::from(file).into())
}

fn options(random: &mut Seeded, depth: usize) -> HashMap<String, Variant<'static>> {
    const KEYS: &[&str] = &[
        "Model",
        "Tier",
        "MaxTokens",
        "Temperature",
        "Seed",
        "System",
        "Timeout",
        "Peer",
        "Node",
        "LocalFirst",
        "NoLocal",
        "PromptFd",
        "Bootstrap",
        "Secret",
        "AutoConnect",
        "Serve",
        "Forget",
        "Limit",
        "After",
        "Fresh",
        "Cores",
        "Memory",
        "Storage",
        "Vram",
        "Runtime",
        "Messages",
        "Raw",
        "TopP",
        "Stop",
        "Digest",
        "Renew",
    ];
    let entry = |random: &mut Seeded| {
        let key = if random.below(8) == 0 { text(random) } else { KEYS[random.below(KEYS.len())].to_owned() };
        (key, value(random, depth + 1))
    };
    (0..random.below(3)).map(|_| entry(random)).collect()
}

/// Mostly what the method wants, sometimes one wrong, sometimes anything.
pub fn arguments(random: &mut Seeded, types: &str) -> Option<Structure<'static>> {
    let mut fields = StructureBuilder::new();
    let anything = random.below(6) == 0;
    let count = if anything { random.below(5) } else { types.len() };
    let wrong = if random.below(6) == 0 { random.below(types.len() + 1) } else { usize::MAX };
    for (at, wanted) in types.chars().chain(std::iter::repeat('?')).take(count).enumerate() {
        fields = fields.append_field(match wanted {
            _ if anything || at == wrong => value(random, 0),
            's' => Variant::from(text(random)),
            'b' => Variant::from(random.below(2) == 0),
            'v' => Variant::Variant(Box::new(value(random, 0))),
            'h' => descriptor(random),
            'o' => Variant::from(options(random, 0)),
            _ => value(random, 0),
        });
    }
    (count > 0).then(|| fields.build().unwrap())
}

/// An object that a method may be called on: there or not.
pub fn path(random: &mut Seeded, method: &str) -> String {
    match method {
        "Cancel" => format!("{ROOT}/job/{}", random.below(2000)),
        "Get" | "Set" | "GetAll" if random.below(2) == 0 => format!("{ROOT}/cluster/gatewayai_2dpoc"),
        _ => ROOT.to_owned(),
    }
}
