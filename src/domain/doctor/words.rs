//! How findings speak: addresses taken apart, ages, names of strangers made harmless, commands for a firewall.

use std::net::IpAddr;
use std::time::Duration;

use super::Host;
use crate::domain::network::{Facts, PeerFacts};

/// Longest sentence or remedy; what is quoted in one has limits of its own, this is the last of them.
const MAX_CHARS: usize = 600;
/// Longest reason or name of somebody else in a sentence.
const MAX_QUOTED: usize = 160;
/// The port that a node listens on where nobody chose another.
const USUAL_PORT: u16 = 4001;
/// The port of mDNS.
const MDNS_PORT: u16 = 5353;

/// Characters that move the cursor, hide, or turn the direction of writing: names of nodes are their own words.
fn is_harmful(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// One line without control characters, of bounded length.
pub(super) fn clean(text: &str) -> String {
    let mut clean: String = text.chars().map(|c| if is_harmful(c) { '\u{fffd}' } else { c }).take(MAX_CHARS).collect();
    if text.chars().nth(MAX_CHARS).is_some() {
        clean.push('…');
    }
    clean
}

/// What somebody else said, shortened.
pub(super) fn quoted(text: &str) -> String {
    let short: String = text.chars().take(MAX_QUOTED).collect();
    if short.len() < text.len() { format!("{short}…") } else { short }
}

/// How a peer is called: by its name where it told one, else by its id.
pub(super) fn name(peer: &PeerFacts) -> String {
    match peer.name.as_deref().map(str::trim) {
        Some(name) if !name.is_empty() => quoted(name),
        _ => peer.id.to_string(),
    }
}

/// "3 s", "2 min", "5 h", "3 days".
pub(super) fn span(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

/// "just now", "3 s ago".
pub(super) fn ago(time: Duration) -> String {
    if time.as_secs() == 0 { "just now".to_owned() } else { format!("{} ago", span(time)) }
}

/// "one", "2", …: for counts in the flow of a sentence.
pub(super) fn count(number: usize, one: &str, many: &str) -> String {
    if number == 1 { format!("one {one}") } else { format!("{number} {many}") }
}

/// "a", "a and b", "a, b and c", of many the first ones.
pub(super) fn list(items: &[String]) -> String {
    const MOST: usize = 6;
    let shown = &items[..items.len().min(MOST)];
    let rest = items.len() - shown.len();
    match (shown, rest) {
        ([], _) => String::new(),
        ([one], 0) => one.clone(),
        ([first @ .., last], 0) => format!("{} and {last}", first.join(", ")),
        (shown, rest) => format!("{} and {rest} more", shown.join(", ")),
    }
}

/// Where an address leads: the first hop of a relayed one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// An IP address or a name.
    pub host: String,
    /// "udp" or "tcp".
    pub carrier: &'static str,
    pub port: u16,
}

impl Place {
    /// Takes `/ip4/192.0.2.1/udp/4001/quic-v1` apart.
    pub(super) fn of(address: &str) -> Option<Self> {
        let mut parts = address.split('/').skip(1);
        let (kind, host) = (parts.next()?, parts.next()?);
        matches!(kind, "ip4" | "ip6" | "dns" | "dns4" | "dns6").then_some(())?;
        let carrier = match parts.next()? {
            "udp" => "udp",
            "tcp" => "tcp",
            _ => return None,
        };
        Some(Self { host: host.to_owned(), carrier, port: parts.next()?.parse().ok()? })
    }

    pub(super) fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }

    /// "UDP port 4001".
    pub(super) fn port_name(&self) -> String {
        format!("{} port {}", self.carrier.to_uppercase(), self.port)
    }
}

/// Of use to other machines: neither of this machine alone nor of one cable alone.
pub(super) fn is_for_others(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_unspecified() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unspecified() && !ip.is_unicast_link_local(),
    }
}

/// Ports that this node listens on: ("udp", 4001), ….
pub(super) fn our_ports(facts: &Facts) -> Vec<(&'static str, u16)> {
    let mut ports: Vec<(&'static str, u16)> =
        facts.listening.iter().filter_map(|address| Place::of(address)).map(|place| (place.carrier, place.port)).collect();
    ports.sort_by_key(|(carrier, port)| (*port, std::cmp::Reverse(*carrier)));
    ports.dedup();
    ports
}

/// The address of this node that another one is told best, on the interface with `ip` if one is given. IPv4 before IPv6,
/// QUIC before TCP.
pub(super) fn our_address(facts: &Facts, on: Option<&[String]>) -> Option<String> {
    let usable = |address: &&String| {
        let ip = Place::of(address).and_then(|place| place.ip());
        !address.contains("/p2p-circuit")
            && ip.is_some_and(is_for_others)
            && on.is_none_or(|on| ip.is_some_and(|ip| on.iter().any(|own| own.parse() == Ok(ip))))
    };
    let rank = |address: &&String| (address.starts_with("/ip6/"), address.contains("/tcp/"));
    let best = facts.reach.announced.iter().filter(usable).min_by_key(rank);
    let best = best.or_else(|| facts.listening.iter().filter(usable).min_by_key(rank))?;
    let bare = best.split("/p2p/").next().unwrap_or(best);
    Some(format!("{bare}/p2p/{}", facts.id))
}

/// What to type on another node, so that it dials this one.
pub(super) fn paste_there(facts: &Facts, cluster: &str, on: Option<&[String]>) -> Option<String> {
    our_address(facts, on).map(|address| format!("on the other node: ogctl connect {cluster} --bootstrap {address}"))
}

/// What to type here, when the address of another node is not known.
pub(super) fn paste_here(cluster: &str) -> String {
    format!("ogctl connect {cluster} --bootstrap ADDRESS, where ADDRESS is what \"ogctl status\" shows on the other node")
}

/// A joined cluster for an example; the user's own word where there is none.
pub(super) fn some_cluster(facts: &Facts) -> String {
    facts.clusters.first().map_or_else(|| "CLUSTER".to_owned(), |cluster| cluster.id.to_string())
}

fn firewalld(ports: &[(&str, u16)], mdns: bool) -> String {
    let mut command = "sudo firewall-cmd --permanent".to_owned();
    if mdns {
        command.push_str(" --add-service=mdns");
    }
    for (carrier, port) in ports {
        command.push_str(&format!(" --add-port={port}/{carrier}"));
    }
    command + " && sudo firewall-cmd --reload"
}

fn ufw(ports: &[(&str, u16)], mdns: bool) -> String {
    let mdns = mdns.then_some(("udp", MDNS_PORT));
    let allow = |(carrier, port): (&str, u16)| format!("sudo ufw allow {port}/{carrier}");
    ports.iter().copied().chain(mdns).map(allow).collect::<Vec<_>>().join(" && ")
}

/// The command that lets this node's ports in, in the words of the firewall that is here.
pub(super) fn open_here(facts: &Facts, host: &Host) -> String {
    let ports = our_ports(facts);
    // The rules of the packages are for the port that they configure.
    let named = host.firewall_rule && ports.iter().all(|(_, port)| *port == USUAL_PORT);
    match host.firewall.as_deref() {
        Some("firewalld") if named => {
            "sudo firewall-cmd --permanent --add-service=opengateway && sudo firewall-cmd --reload".to_owned()
        }
        Some("ufw") if named => "sudo ufw allow OpenGateway".to_owned(),
        Some("firewalld") => firewalld(&ports, true),
        Some("ufw") => ufw(&ports, true),
        _ => {
            let all = ports.iter().copied().chain([("udp", MDNS_PORT)]);
            let all: Vec<String> = all.map(|(carrier, port)| format!("{} {port}", carrier.to_uppercase())).collect();
            format!("let {} in; the rules show: sudo nft list ruleset", list(&all))
        }
    }
}

/// The same for another machine, whose firewall is not known.
pub(super) fn open_there(places: &[Place]) -> String {
    let mut ports: Vec<(&str, u16)> = places.iter().map(|place| (place.carrier, place.port)).collect();
    ports.sort_by_key(|(carrier, port)| (*port, std::cmp::Reverse(*carrier)));
    ports.dedup();
    ports.truncate(4);
    if ports.is_empty() {
        return "on the other node: ogctl doctor".to_owned();
    }
    format!("on the other node: {}; or with firewalld: {}", ufw(&ports, false), firewalld(&ports, false))
}
