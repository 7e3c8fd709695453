//! How others reach this node: address translation, relays, the distributed hash table.

use super::words::{self, Place};
use super::{Finding, Severity};
use crate::domain::network::{Facts, Nat, Relay, ReservationFacts};

/// Somebody outside of this network is meant to be found at all.
fn wants_more_than_a_lan(facts: &Facts) -> bool {
    !facts.bootstrap.is_empty()
}

/// Somebody who dialled this node got through.
fn is_dialled(facts: &Facts) -> bool {
    facts.peers.iter().flat_map(|peer| &peer.links).any(|link| !link.dialed && link.relay.is_none())
}

fn relay_name(relay: &Relay) -> String {
    relay.name.as_deref().map_or_else(|| relay.id.to_string(), words::quoted)
}

fn is_full(reservation: &ReservationFacts) -> bool {
    let problem = reservation.problem.as_deref().unwrap_or_default().to_lowercase();
    ["full", "limit", "resource"].iter().any(|word| problem.contains(word))
}

fn ports(facts: &Facts) -> String {
    let ports: Vec<String> =
        words::our_ports(facts).iter().map(|(carrier, port)| format!("{} {port}", carrier.to_uppercase())).collect();
    words::list(&ports)
}

/// Places at relays, held and lost, and those that this node holds for others.
pub(super) fn relays(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let held = facts.reach.reservations.iter().any(|reservation| reservation.accepted);
    for reservation in &facts.reach.reservations {
        let name = relay_name(&reservation.relay);
        let finding = if reservation.accepted {
            Finding::info("relay-held", format!("relay {name} holds a place for this node"))
        } else {
            let needed = !held && matches!(facts.reach.nat, Nat::Cone | Nat::Symmetric);
            let severity = if needed { Severity::Warning } else { Severity::Info };
            let problem = reservation.problem.as_deref().map_or_else(|| "it does not answer".to_owned(), words::quoted);
            let (code, sentence) = if is_full(reservation) {
                ("relay-full", format!("relay {name} has no place left for this node: {problem}"))
            } else {
                ("relay-lost", format!("relay {name} holds no place for this node: {problem}"))
            };
            Finding::new(severity, code, sentence).mend(format!("ogctl ping {name}"))
        };
        findings.push(finding.of(&reservation.relay.id));
    }
    findings
}

/// What lies between this node and the world.
pub(super) fn nat(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let held = facts.reach.reservations.iter().any(|reservation| reservation.accepted);
    let seen = facts.reach.observed.first().map_or_else(String::new, |seen| format!(" (others see {})", words::quoted(seen)));
    let forward = || format!("let your router forward {} to this machine", ports(facts));
    match facts.reach.nat {
        Nat::None => findings.push(Finding::info("reachable", format!("others reach this node directly{seen}"))),
        Nat::Unknown if wants_more_than_a_lan(facts) && facts.reach.announced.is_empty() && !is_dialled(facts) => {
            findings.push(
                Finding::info("nat-unknown", "whether others can dial this node is not known yet: nobody has told")
                    .mend("wait half a minute, or add a bootstrap node that is reachable from everywhere"),
            );
        }
        Nat::Unknown => {}
        Nat::Cone => {
            findings.push(
                Finding::info(
                    "behind-nat",
                    format!("this node is behind address translation that keeps ports{seen}: holes can be punched"),
                )
                .mend(forward()),
            );
        }
        Nat::Symmetric => {
            let severity = if held { Severity::Info } else { Severity::Warning };
            let what = if held { "a relay carries instead" } else { "a relay has to carry, and there is none" };
            findings.push(
                Finding::new(
                    severity,
                    "nat-symmetric",
                    format!("this node is behind address translation that changes ports{seen}: no hole can be punched, {what}"),
                )
                .mend(forward()),
            );
        }
    }
    if matches!(facts.reach.nat, Nat::Cone | Nat::Symmetric) && facts.reach.reservations.is_empty() {
        findings.push(
            Finding::warning(
                "no-relay",
                "this node is behind address translation and no relay holds a place for it: it reaches others, nobody new \
                 reaches it",
            )
            .mend(
                "on a node that is reachable from everywhere: [relay] enabled = true in /etc/opengateway/opengatewayd.toml; \
                 then name it as bootstrap here",
            ),
        );
    }
    for (address, reason) in &facts.reach.unreachable {
        let (shown, reason) = (words::quoted(address), words::quoted(reason));
        let sentence = format!("another node dialled this one at {shown} and did not get through: {reason}");
        let severity =
            if held || is_dialled(facts) || !facts.reach.announced.is_empty() { Severity::Info } else { Severity::Warning };
        let port = Place::of(address)
            .map_or_else(forward, |place| format!("let {} in at the router and at this machine", place.port_name()));
        findings.push(Finding::new(severity, "address-unreachable", sentence).mend(port));
    }
    if let Some(relaying) = facts.reach.relaying {
        let carried = format!(
            "this node is a relay: it holds {} and carries {}",
            words::count(relaying.reservations as usize, "place", "places"),
            words::count(relaying.circuits as usize, "connection", "connections")
        );
        findings.push(Finding::info("relaying", carried));
        if relaying.refused > 0 {
            let sentence = format!(
                "this node, a relay, has turned away {} requests since its start because its budget was spent",
                relaying.refused
            );
            findings.push(
                Finding::warning("relay-busy", sentence)
                    .mend("raise reservations and circuits under [relay] in /etc/opengateway/opengatewayd.toml"),
            );
        }
    }
    findings
}

/// The table in which nodes of different networks find each other: of no use on a LAN alone.
pub(super) fn dht(facts: &Facts) -> Vec<Finding> {
    if !wants_more_than_a_lan(facts) {
        return Vec::new();
    }
    if facts.dht.peers == 0 {
        let alone = facts.clusters.iter().all(|cluster| cluster.members == 0);
        let severity = if alone { Severity::Warning } else { Severity::Info };
        let sentence =
            "no node of the distributed hash table is known: members on other networks are found through known ones only";
        return vec![Finding::new(severity, "dht-empty", sentence).mend("ogctl doctor, once a bootstrap node is connected")];
    }
    let nodes = words::count(facts.dht.peers, "node", "nodes");
    if facts.dht.server {
        return vec![Finding::info(
            "dht-server",
            format!("the distributed hash table is reached through {nodes}; this node answers in it"),
        )];
    }
    vec![Finding::info(
        "dht-client",
        format!(
            "the distributed hash table is reached through {nodes}; this node only asks, since it is not known to be reachable"
        ),
    )]
}
