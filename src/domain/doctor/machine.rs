//! This machine: listeners, interfaces, mDNS on them, firewall, connections, clock.

use std::net::IpAddr;
use std::time::Duration;

use super::words;
use super::{Finding, Host, Severity};
use crate::domain::network::{Facts, InterfaceFacts, MdnsFacts};

/// A connection that was kept out longer ago is no news.
const RECENT: Duration = Duration::from_secs(600);
/// mDNS has asked by then, and whoever is there has answered.
const PATIENCE: Duration = Duration::from_secs(10);

/// Addresses that are listened on, and those that are not.
pub(super) fn listeners(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if facts.listening.is_empty() {
        let reason = facts.not_listening.first().map_or_else(String::new, |(address, reason)| {
            format!(": {} fails, {}", words::quoted(address), words::quoted(reason))
        });
        findings.push(
            Finding::error("not-listening", format!("this node listens on no address{reason}; nobody can connect to it"))
                .mend("sudo systemctl restart opengatewayd, after \"listen\" in /etc/opengateway/opengatewayd.toml was checked"),
        );
        return findings;
    }
    for (address, reason) in &facts.not_listening {
        let sentence = format!("this node does not listen on {}: {}", words::quoted(address), words::quoted(reason));
        findings.push(Finding::info("not-listening", sentence).mend("ss -lntup, which shows who has the port"));
    }
    findings
}

/// Where others can connect to.
pub(super) fn listening(facts: &Facts) -> Vec<Finding> {
    if facts.listening.is_empty() {
        return Vec::new();
    }
    let ports = words::our_ports(facts).into_iter().map(|(carrier, port)| format!("{} {port}", carrier.to_uppercase()));
    let ports = words::list(&ports.collect::<Vec<_>>());
    if words::our_address(facts, None).is_some() {
        return vec![Finding::info("listening", format!("this node listens on {ports}"))];
    }
    // Several nodes on one machine without a network are fine.
    let found = facts.clusters.iter().any(|cluster| cluster.members > 0);
    let severity = if found { Severity::Info } else { Severity::Warning };
    let sentence = format!("this node listens on {ports} of this machine alone: no other machine can connect to it");
    vec![
        Finding::new(severity, "loopback-only", sentence).mend(
            "ip address, which shows whether this machine has a network; and \"listen\" in /etc/opengateway/opengatewayd.toml",
        ),
    ]
}

/// What hinders mDNS as long as nothing changes.
pub(super) fn mdns(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let found = facts.clusters.iter().any(|cluster| cluster.members > 0);
    if !facts.mdns_enabled {
        if facts.bootstrap.is_empty() && !facts.clusters.is_empty() && !found && facts.reach.announced.is_empty() {
            findings.push(
                Finding::warning(
                    "no-bootstrap-no-mdns",
                    "this node has no way to find others: discovery on the local network is switched off, and no bootstrap \
                     node is known",
                )
                .mend(words::paste_here(&words::some_cluster(facts))),
            );
        } else {
            findings.push(
                Finding::info("mdns-off", "discovery on the local network is switched off")
                    .mend("mdns = true in /etc/opengateway/opengatewayd.toml, then: sudo systemctl restart opengatewayd"),
            );
        }
        return findings;
    }
    if facts.mdns_flooded {
        findings.push(
            Finding::warning("mdns-flooded", "discovery on the local network is paused: it is flooded with mDNS records")
                .mend("sudo tcpdump -ni any udp port 5353, which shows who sends them"),
        );
    }
    for (mdns, problem) in facts.mdns.iter().filter(|mdns| mdns.failed).filter_map(|mdns| Some((mdns, mdns.problem.as_ref()?))) {
        let family = if mdns.ipv6 { "IPv6" } else { "IPv4" };
        let sentence = format!(
            "discovery on the local network does not work on {} over {family}: {}",
            words::quoted(&mdns.interface),
            words::quoted(problem)
        );
        // One family is enough to be found by.
        let other = facts.mdns.iter().any(|other| other.interface == mdns.interface && other.problem.is_none());
        let severity = if other { Severity::Info } else { Severity::Warning };
        findings.push(
            Finding::new(severity, "mdns-failed", sentence)
                .mend(format!("ip address show dev {}", words::quoted(&mdns.interface))),
        );
    }
    findings
}

fn is_usable(interface: &InterfaceFacts) -> bool {
    let for_others = |address: &String| address.parse::<IpAddr>().is_ok_and(words::is_for_others);
    interface.up && interface.addresses.iter().any(for_others)
}

/// Cables, and links that carry no multicast.
pub(super) fn interfaces(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if facts.interfaces.is_empty() {
        return findings; // not looked at
    }
    let usable = facts.interfaces.iter().filter(|interface| is_usable(interface)).count();
    if usable == 0 {
        findings.push(
            Finding::error("no-network", "this machine has no network: no interface is up with an address that others can use")
                .mend("ip address; and: ip link set INTERFACE up, or the network settings of the desktop"),
        );
    }
    for interface in &facts.interfaces {
        let name = words::quoted(&interface.name);
        let addressed = interface.addresses.iter().filter_map(|address| address.parse().ok()).any(words::is_for_others);
        if !interface.up && addressed {
            let addresses = words::list(&interface.addresses);
            findings.push(
                Finding::warning(
                    "interface-down",
                    format!("interface {name} ({addresses}) is down or has no cable: nobody is reached through it"),
                )
                .mend(format!("ip link show dev {name}; and: sudo ip link set {name} up")),
            );
        }
        let mdns_works = facts.mdns.iter().any(|mdns| mdns.interface == interface.name && mdns.heard > 0);
        if interface.up && addressed && !interface.multicast && facts.mdns_enabled && !mdns_works {
            let cluster = words::some_cluster(facts);
            let remedy =
                words::paste_there(facts, &cluster, Some(&interface.addresses)).unwrap_or_else(|| words::paste_here(&cluster));
            let reached = facts.peers.iter().any(|peer| !peer.member_of.is_empty());
            let severity = if reached { Severity::Info } else { Severity::Warning };
            let sentence = format!(
                "interface {name} carries no multicast, as is usual for a VPN: nodes behind it are not found by themselves, \
                 they have to be named"
            );
            findings.push(Finding::new(severity, "interface-no-multicast", sentence).mend(remedy));
        }
    }
    if findings.is_empty() {
        let names: Vec<String> =
            facts.interfaces.iter().filter(|interface| is_usable(interface)).map(|i| words::quoted(&i.name)).collect();
        findings.push(Finding::info("network", format!("this machine is on the network through {}", words::list(&names))));
    }
    findings
}

/// Interfaces on which there is no mDNS, as it should be.
pub(super) fn idle(facts: &Facts) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for mdns in facts.mdns.iter().filter(|mdns| facts.mdns_enabled && !facts.mdns_flooded && !mdns.failed) {
        let Some(problem) = &mdns.problem else { continue };
        let sentence = format!("no mDNS on {}: {}", words::quoted(&mdns.interface), words::quoted(problem));
        // Once for both families.
        if !findings.iter().any(|finding| finding.sentence == words::clean(&sentence)) {
            findings.push(Finding::info("mdns-idle", sentence));
        }
    }
    findings
}

/// Interfaces on which mDNS is sent and nothing comes back.
pub(super) fn silence(facts: &Facts, host: &Host) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !facts.mdns_enabled || facts.mdns_flooded {
        return findings;
    }
    let mut names: Vec<&String> = facts.mdns.iter().filter(|mdns| mdns.problem.is_none()).map(|mdns| &mdns.interface).collect();
    names.sort();
    names.dedup();
    let found = facts.clusters.iter().any(|cluster| cluster.members > 0);
    let waited = facts.clusters.iter().any(|cluster| cluster.joined_ago >= PATIENCE);
    for name in names {
        let on: Vec<&MdnsFacts> = facts.mdns.iter().filter(|mdns| mdns.interface == *name).collect();
        let sent: u64 = on.iter().fold(0, |sum, mdns| sum.saturating_add(mdns.sent));
        let heard: u64 = on.iter().fold(0, |sum, mdns| sum.saturating_add(mdns.heard));
        let nodes = on.iter().map(|mdns| mdns.nodes).max().unwrap_or(0);
        let shown = words::quoted(name);
        let down = facts.interfaces.iter().any(|interface| interface.name == *name && !interface.up);
        if heard > 0 {
            let last = on
                .iter()
                .filter_map(|mdns| mdns.heard_ago)
                .min()
                .map_or_else(String::new, |ago| format!(", the last time {}", words::ago(ago)));
            let nodes = match nodes {
                0 => "no node among them".to_owned(),
                nodes => words::count(nodes as usize, "node among them", "nodes among them"),
            };
            findings.push(Finding::info("mdns-heard", format!("other machines are heard by mDNS on {shown}{last}; {nodes}")));
        } else if sent > 0 && !down {
            let severity = if found || !waited { Severity::Info } else { Severity::Warning };
            let cluster = words::some_cluster(facts);
            let sentence = format!(
                "mDNS is sent on {shown} ({sent} packets) and nothing of another machine is heard there: no other node is on \
                 that network, or the network drops multicast (a firewall, a guest Wi-Fi, a VPN)"
            );
            let remedy = match host.firewall {
                Some(_) => words::open_here(facts, host),
                None => {
                    let addresses = facts
                        .interfaces
                        .iter()
                        .find(|interface| interface.name == *name)
                        .map(|interface| interface.addresses.as_slice());
                    words::paste_there(facts, &cluster, addresses).unwrap_or_else(|| words::paste_here(&cluster))
                }
            };
            findings.push(Finding::new(severity, "mdns-silent", sentence).mend(remedy));
        }
    }
    findings
}

/// A firewall is no fault; where nobody gets in it is the first suspect.
pub(super) fn firewall(facts: &Facts, host: &Host) -> Vec<Finding> {
    let Some(firewall) = &host.firewall else { return Vec::new() };
    let firewall = words::quoted(firewall);
    let dialled = facts.peers.iter().flat_map(|peer| &peer.links).any(|link| !link.dialed && link.relay.is_none());
    if dialled {
        return vec![Finding::info(
            "firewall-active",
            format!("the firewall {firewall} is active, and others get through to this node"),
        )];
    }
    let alone = facts.clusters.iter().any(|cluster| cluster.members == 0);
    let severity = if alone { Severity::Warning } else { Severity::Info };
    let sentence = format!("the firewall {firewall} is active and nobody has connected to this node: it may keep others out");
    vec![Finding::new(severity, "firewall-active", sentence).mend(words::open_here(facts, host))]
}

/// How many connections there are, and may be.
pub(super) fn connections(facts: &Facts) -> Vec<Finding> {
    let (open, most) = facts.connections;
    let raise = "raise max_connections in /etc/opengateway/opengatewayd.toml, then: sudo systemctl restart opengatewayd";
    if let Some(refused) = facts.refused.as_ref().filter(|refused| refused.ago < RECENT) {
        let sentence = format!(
            "this node has turned {} away since its start, the last one {}: {}",
            words::count(usize::try_from(refused.count).unwrap_or(usize::MAX), "connection", "connections"),
            words::ago(refused.ago),
            words::quoted(&refused.reason)
        );
        return vec![Finding::warning("at-connection-limit", sentence).mend(raise)];
    }
    if open >= most {
        return vec![
            Finding::warning(
                "at-connection-limit",
                format!("this node has {open} connections and may have {most}: nobody else is let in"),
            )
            .mend(raise),
        ];
    }
    Vec::new()
}

/// The clock, and what the machine slept through.
pub(super) fn clock(host: &Host) -> Vec<Finding> {
    let mut findings = Vec::new();
    match host.clock_synchronised {
        Some(true) => findings.push(Finding::info("clock-synchronised", "the clock of this machine is synchronised")),
        Some(false) => findings.push(
            Finding::warning(
                "clock-unsynchronised",
                "the clock of this machine is not synchronised: certificates of servers may be taken for invalid, and times \
                 in logs of two nodes do not fit",
            )
            .mend("sudo timedatectl set-ntp true"),
        ),
        None => {}
    }
    if host.suspended_s > 0 {
        let slept = words::span(Duration::from_secs(host.suspended_s));
        findings.push(Finding::info(
            "suspended",
            format!("this machine slept {slept} since the daemon started: nobody could reach it then"),
        ));
    }
    findings
}
