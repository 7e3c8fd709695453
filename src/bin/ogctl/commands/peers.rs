//! `ogctl peers`: who is in a cluster.

use super::default_cluster;
use crate::bus::Bus;
use crate::details::Read as _;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::render::{Style, Table, Tone, cell, latency, list, relayed, short_id, tone_of_state};
use crate::term;
use opengateway::api::keys::peers_option;
use opengateway::api::proxy::{Details, Options};
use serde::Serialize;
use zbus::Variant;

#[derive(Debug, Serialize)]
struct Peers {
    cluster: String,
    peers: Vec<Peer>,
}

#[derive(Debug, Serialize)]
struct Peer {
    peer_id: String,
    name: String,
    addresses: Vec<String>,
    /// How it was found.
    via: String,
    /// False when relayed, null when unknown.
    direct: Option<bool>,
    /// Who carries the connection; null when it is direct.
    relay: Option<Relay>,
    transport: Option<String>,
    liveness: Option<String>,
    latency_us: Option<u64>,
    serving: Option<bool>,
    draining: bool,
    free_slots: Option<u64>,
    queued: Option<u64>,
    models: Vec<String>,
    tiers: Vec<String>,
    version: String,
    protocol_version: String,
    /// Whether this node can work with it.
    compatible: bool,
    connected_at: Option<u64>,
    last_seen: Option<u64>,
}

/// The node between.
#[derive(Debug, Serialize)]
struct Relay {
    peer_id: String,
    name: Option<String>,
}

/// Most pages of one listing: more members than any cluster has are not worth an endless loop.
const MAX_PAGES: usize = 64;

/// Members of `cluster`, page by page.
async fn all_peers(bus: &mut Bus, cluster: &str) -> Result<Vec<Peer>, Failure> {
    let mut peers: Vec<Peer> = Vec::new();
    for _ in 0..MAX_PAGES {
        let after = peers.last().map(|peer| peer.peer_id.clone());
        let mut options = Options::new();
        if let Some(after) = &after {
            options.insert(peers_option::AFTER, Variant::from(after.as_str()));
        }
        let page = bus.ask(async |manager| manager.list_peers(cluster, &options).await).await?;
        let whole = page.len() < peers_option::MAX_LIMIT as usize;
        peers.extend(page.into_iter().map(peer));
        if whole {
            break;
        }
    }
    Ok(peers)
}

fn peer((peer_id, details): (String, Details)) -> Peer {
    Peer {
        peer_id,
        name: details.text_or_empty("Name"),
        addresses: details.texts("Addresses"),
        via: details.text_or_empty("Via"),
        direct: details.flag("Direct"),
        relay: details.text("Relay").map(|peer_id| Relay { peer_id, name: details.text("RelayName") }),
        transport: details.text("Transport"),
        liveness: details.text("Liveness"),
        latency_us: details.number("LatencyUSec"),
        serving: details.flag("Serving"),
        draining: details.flag("Draining").unwrap_or(false),
        free_slots: details.number("FreeSlots"),
        queued: details.number("Queued"),
        models: details.texts("Models"),
        tiers: details.texts("TierIds"),
        version: details.text_or_empty("Version"),
        protocol_version: details.text_or_empty("ProtocolVersion"),
        compatible: details.flag("Compatible").unwrap_or(true),
        connected_at: details.number("ConnectedAt"),
        last_seen: details.number("LastSeen"),
    }
}

async fn named_or_default(bus: &mut Bus, cluster: Option<String>) -> Result<String, Failure> {
    match cluster {
        Some(cluster) => Ok(cluster),
        None => default_cluster(bus).await,
    }
}

/// Prints the members of a cluster.
pub async fn peers(bus: &mut Bus, out: &Output, cluster: Option<String>) -> Result<(), Stop> {
    let cluster = named_or_default(bus, cluster).await?;
    let peers = all_peers(bus, &cluster).await?;
    out.view(Peers { cluster, peers }, peers_text)
}

fn peers_text(view: &Peers, style: &Style) -> String {
    if view.peers.is_empty() {
        return format!("No other nodes in {} yet.\n", term::line(&view.cluster));
    }
    let mut table = Table::new(&["NAME", "ID", "STATE", "PATH", "LATENCY", "FREE", "MODELS", "VERSION", "ADDRESSES"]);
    for peer in &view.peers {
        // On a terminal the end of the id tells peers apart; scripts get all of it.
        let id = if style.width.is_some() { short_id(&peer.peer_id) } else { term::line(&peer.peer_id) };
        table.row(vec![
            cell(term::line(&peer.name)),
            cell(id),
            state(peer),
            path(peer),
            cell(latency(peer.latency_us)),
            cell(peer.free_slots.map_or_else(|| "-".into(), |slots| slots.to_string())),
            cell(list(&peer.models)),
            cell(term::line(&peer.version)),
            cell(list(&peer.addresses)),
        ]);
    }
    table.render(style)
}

fn state(peer: &Peer) -> (String, Tone) {
    let state = peer.liveness.as_deref().unwrap_or("-");
    match peer {
        Peer { compatible: false, .. } => ("incompatible".into(), Tone::Bad),
        Peer { draining: true, .. } => ("draining".into(), Tone::Warn),
        _ => (term::line(state), tone_of_state(state)),
    }
}

fn path(peer: &Peer) -> (String, Tone) {
    let transport = peer.transport.as_deref().map_or_else(String::new, |transport| format!(" {}", term::line(transport)));
    match peer.direct {
        Some(true) => (format!("direct{transport}"), Tone::Plain),
        Some(false) => {
            let by = peer.relay.as_ref().map(|relay| relay.name.clone().unwrap_or_else(|| short_id(&relay.peer_id)));
            (relayed(by.as_deref()), Tone::Warn)
        }
        None => ("-".into(), Tone::Plain),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(id: &str, models: &[&str]) -> Peer {
        let mut sample = peer((id.into(), Details::new()));
        sample.models = models.iter().map(|&model| model.to_owned()).collect();
        sample
    }

    #[test]
    fn the_way_is_direct_or_names_the_relay_and_of_one_that_is_only_known_there_is_none() {
        let mut peer = sample("id", &[]);
        assert_eq!(path(&peer).0, "-");
        (peer.direct, peer.transport) = (Some(true), Some("quic".into()));
        assert_eq!(path(&peer).0, "direct quic");
        peer.direct = Some(false);
        peer.relay = Some(Relay { peer_id: "12D3KooWabcdefgh12345678".into(), name: Some("Node\u{1b}[2JW".into()) });
        assert_eq!(path(&peer).0, "relayed via NodeW");
        peer.relay = Some(Relay { peer_id: "12D3KooWabcdefgh12345678".into(), name: None });
        assert_eq!(path(&peer).0, "relayed via …12345678");
    }

    #[test]
    fn what_a_peer_says_of_itself_steers_no_terminal() {
        let mut evil = sample("id", &["\u{1b}[2Jm"]);
        evil.name = "\u{1b}]0;owned\u{07}evil\nsecond line".into();
        let text = peers_text(&Peers { cluster: "c".into(), peers: vec![evil] }, &Style::default());
        assert!(!text.contains('\u{1b}') && !text.contains("owned"));
        assert_eq!(text.lines().count(), 2, "{text}");
    }
}
