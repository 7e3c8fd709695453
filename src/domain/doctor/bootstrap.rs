//! Configured bootstrap nodes: reached, or why not.

use super::dials::{Verdict, verdict};
use super::words::{self, Place};
use super::{Finding, Severity};
use crate::domain::network::{BootstrapFacts, Facts};

pub(super) fn examine(facts: &Facts) -> Vec<Finding> {
    // Where members were found all the same, or another one answers, it is no more than a line to tidy up.
    let well = facts.bootstrap.iter().any(|bootstrap| bootstrap.connected) || facts.clusters.iter().any(|c| c.members > c.known);
    let severity = if well { Severity::Warning } else { Severity::Error };
    facts.bootstrap.iter().map(|bootstrap| one(facts, bootstrap, severity)).collect()
}

fn one(facts: &Facts, bootstrap: &BootstrapFacts, severity: Severity) -> Finding {
    let shown = words::quoted(&bootstrap.address);
    let finding = if bootstrap.connected {
        Finding::info("bootstrap-connected", format!("bootstrap node {shown} is connected"))
    } else {
        let (code, reason, remedy) = why(facts, bootstrap);
        if code == "bootstrap-pending" {
            Finding::info(code, format!("bootstrap node {shown} is being dialled"))
        } else {
            Finding::new(severity, code, format!("bootstrap node {shown} is not reached: {reason}")).mend(remedy)
        }
    };
    match &bootstrap.peer {
        Some(peer) => finding.of(peer),
        None => finding,
    }
}

/// Code, reason and remedy.
fn why(facts: &Facts, bootstrap: &BootstrapFacts) -> (&'static str, String, String) {
    let compare = || "compare with what \"ogctl status\" shows there".to_owned();
    let whole = Place::of(&bootstrap.address);
    match verdict(&bootstrap.attempts) {
        Some(Verdict::Refused(address)) => {
            let place = Place::of(address).or(whole);
            let port = place.map_or_else(|| "its port".to_owned(), |place| place.port_name());
            let reason = format!("{port} is refused, so the machine is there and no node listens on it");
            (
                "bootstrap-refused",
                reason,
                "there: sudo systemctl start opengatewayd; then compare with what \"ogctl status\" shows there".to_owned(),
            )
        }
        Some(Verdict::TimedOut(addresses)) => {
            let places: Vec<Place> = addresses.iter().filter_map(|address| Place::of(address)).collect();
            let hosts = hosts(&places);
            let reason = format!(
                "nothing comes back from {hosts}; it is switched off, has another address now, or a firewall drops what we send"
            );
            ("bootstrap-timeout", reason, format!("{}; and {}", compare(), words::open_there(&places)))
        }
        Some(Verdict::Unreachable(addresses)) => {
            let places: Vec<Place> = addresses.iter().filter_map(|address| Place::of(address)).collect();
            let (reason, remedy) = no_way(facts, &places);
            ("bootstrap-unreachable", reason, remedy)
        }
        Some(Verdict::WrongPeer(address, other)) => {
            let cluster = words::some_cluster(facts);
            let reason = format!("another node answers there, {other}");
            let remedy = format!(
                "if it is the right machine, its identity is new: ogctl connect {cluster} --bootstrap {address}/p2p/{other}"
            );
            ("bootstrap-wrong-peer", reason, remedy)
        }
        Some(Verdict::Ourselves(_)) => {
            let remedy = "take it out of \"bootstrap\" in /etc/opengateway/opengatewayd.toml".to_owned();
            ("bootstrap-self", "it is this node itself".to_owned(), remedy)
        }
        Some(Verdict::Denied(_, reason)) => ("bootstrap-denied", words::quoted(reason), "there: ogctl doctor".to_owned()),
        Some(Verdict::Other(_, reason)) => ("bootstrap-failed", words::quoted(reason), compare()),
        // It was connected, and is not now: the next dial is near.
        Some(Verdict::Connected(_)) => ("bootstrap-pending", String::new(), String::new()),
        None => match (&bootstrap.problem, whole) {
            (Some(_), Some(place)) if place.ip().is_none() => (
                "bootstrap-unresolved",
                "its name is not known here".to_owned(),
                format!("getent hosts {}", words::quoted(&place.host)),
            ),
            (Some(problem), _) => ("bootstrap-failed", words::quoted(problem), compare()),
            (None, _) => ("bootstrap-pending", String::new(), String::new()),
        },
    }
}

fn hosts(places: &[Place]) -> String {
    let mut hosts: Vec<String> = places.iter().map(|place| words::quoted(&place.host)).collect();
    hosts.sort();
    hosts.dedup();
    if hosts.is_empty() { "there".to_owned() } else { words::list(&hosts) }
}

/// Why there is no way to an address, and the command that shows it.
pub(super) fn no_way(facts: &Facts, places: &[Place]) -> (String, String) {
    let hosts = hosts(places);
    let first = places.first().and_then(Place::ip);
    let six = places.iter().filter_map(Place::ip).all(|ip| ip.is_ipv6()) && first.is_some();
    let ours_six = facts
        .interfaces
        .iter()
        .filter(|interface| interface.up)
        .flat_map(|interface| &interface.addresses)
        .filter_map(|address| address.parse().ok())
        .any(|ip: std::net::IpAddr| ip.is_ipv6() && words::is_for_others(ip));
    let reason = if six && !facts.interfaces.is_empty() && !ours_six {
        format!("{hosts} is an IPv6 address, and this machine has none of its own")
    } else {
        format!("this machine has no way to {hosts}")
    };
    let remedy = match first {
        Some(ip) if ip.is_ipv6() => format!("ip -6 route get {ip}"),
        Some(ip) => format!("ip route get {ip}"),
        None => "ip route".to_owned(),
    };
    (reason, remedy)
}
