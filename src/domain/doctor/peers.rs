//! Peers: as members, or why they are none.

use std::time::Duration;

use super::bootstrap::no_way;
use super::dials::{self, Verdict, verdict};
use super::words::{self, Place};
use super::{Finding, Severity};
use crate::domain::cluster::ClusterId;
use crate::domain::network::{Facts, GreetOutcome, Greeting, PeerFacts};
use crate::domain::node::FoundBy;

/// Peers with trouble that are told of when nobody asked about one.
const MOST: usize = 20;
/// mDNS repeats itself within this time.
const HEARD_LATELY: Duration = Duration::from_secs(120);

/// Peers that are not as they should be.
pub(super) fn in_trouble(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut more = 0;
    for peer in &facts.peers {
        // Bootstrap nodes have findings of their own.
        let found = if peer.member_of.is_empty() {
            if peer.bootstrap && peer.links.is_empty() { Vec::new() } else { why_missing(facts, peer, None, Severity::Warning) }
        } else {
            let trouble = |finding: &Finding| finding.severity > Severity::Info || finding.code == "peer-relayed";
            as_member(peer).into_iter().filter(trouble).collect()
        };
        if findings.len() < MOST {
            findings.extend(found);
        } else {
            more += usize::from(!found.is_empty());
        }
    }
    if more > 0 {
        findings.push(self::more(more));
    }
    findings
}

pub(super) fn more(number: usize) -> Finding {
    let sentence = format!("there is something to say about {} more", words::count(number, "peer", "peers"));
    Finding::info("more-peers", sentence).mend("ogctl doctor PEER, with the name or id of one of them")
}

/// What a user hears who asks about one peer, by id or name.
pub(super) fn about(facts: &Facts, wanted: &str) -> Vec<Finding> {
    if facts.id.as_str() == wanted {
        return vec![Finding::info("peer-self", format!("{wanted} is this node itself")).mend("ogctl doctor")];
    }
    let meant: Vec<&PeerFacts> =
        facts.peers.iter().filter(|peer| peer.id.as_str() == wanted || peer.name.as_deref() == Some(wanted)).collect();
    if meant.is_empty() {
        return vec![unknown(facts, wanted)];
    }
    let mut findings = Vec::new();
    for peer in meant {
        if peer.member_of.is_empty() {
            findings.extend(why_missing(facts, peer, None, Severity::Error));
        } else {
            findings.extend(as_member(peer));
            for cluster in facts.clusters.iter().filter(|cluster| !peer.member_of.contains(&cluster.id)) {
                findings.extend(greeted(facts, peer, Some(&cluster.id), Severity::Info));
            }
        }
        findings.extend(history(peer));
    }
    findings
}

fn unknown(facts: &Facts, wanted: &str) -> Finding {
    let mut looked: Vec<String> = Vec::new();
    if facts.mdns_enabled && !facts.mdns_flooded {
        let mut on: Vec<String> = facts.mdns.iter().map(|mdns| words::quoted(&mdns.interface)).collect();
        on.dedup();
        looked.push(if on.is_empty() { "mDNS".to_owned() } else { format!("mDNS on {}", words::list(&on)) });
    }
    if !facts.bootstrap.is_empty() {
        looked.push(format!("the DHT, through {}", words::count(facts.bootstrap.len(), "bootstrap node", "bootstrap nodes")));
    }
    if facts.clusters.iter().any(|cluster| cluster.members > 0) {
        looked.push("what members tell".to_owned());
    }
    let looked = match looked.as_slice() {
        [] => "there is no way to look for it".to_owned(),
        looked => format!("it was looked for by {}", words::list(looked)),
    };
    let wanted = words::quoted(wanted);
    let cluster = words::some_cluster(facts);
    let paste = words::our_address(facts, None)
        .map_or_else(String::new, |address| format!("; or there: ogctl connect {cluster} --bootstrap {address}"));
    Finding::error("peer-unknown", format!("nothing was ever heard of {wanted}; {looked}"))
        .mend(format!("on that node: ogctl doctor{paste}"))
}

/// A member: by which path, and whether it is well.
pub(super) fn as_member(peer: &PeerFacts) -> Vec<Finding> {
    let name = words::name(peer);
    let clusters = words::list(&peer.member_of.iter().map(ToString::to_string).collect::<Vec<_>>());
    let mut findings = Vec::new();
    if peer.suspect {
        findings.push(
            Finding::warning(
                "peer-suspect",
                format!("{name} is silent: it gets no new prompts, and is given up if nothing is heard of it for 15 s"),
            )
            .mend(format!("ogctl ping {name}")),
        );
    }
    if peer.banned {
        findings.push(banned(&name, Severity::Warning));
    }
    let direct: Vec<&'static str> = peer.links.iter().filter(|link| link.relay.is_none()).map(|link| link.transport).collect();
    match (peer.links.first(), direct.is_empty()) {
        (Some(link), true) => {
            let relay = link
                .relay
                .as_ref()
                .map_or_else(String::new, |relay| relay.name.as_deref().map_or_else(|| relay.id.to_string(), words::quoted));
            findings.push(
                Finding::info(
                    "peer-relayed",
                    format!(
                        "{name} is a member of {clusters}, reached through relay {relay}: no direct connection could be made"
                    ),
                )
                .mend("forward a port at one of the two routers; what this node knows of its own: ogctl doctor"),
            );
        }
        (Some(link), false) => {
            let side = if link.dialed { "this node dialled it" } else { "it dialled this node" };
            findings.push(Finding::info(
                "peer-member",
                format!("{name} is a member of {clusters}, connected directly over {} ({side})", link.transport.to_uppercase()),
            ));
        }
        (None, _) => findings.push(
            Finding::info(
                "peer-known",
                format!("{name} is a member of {clusters} that others tell of; it is connected when a prompt needs it"),
            )
            .mend(format!("ogctl ping {name}")),
        ),
    }
    if !direct.is_empty() {
        findings.extend(one_way(peer, &name));
        if dials::only_tcp(&peer.attempts, &direct) {
            let places: Vec<Place> = peer
                .attempts
                .iter()
                .filter_map(|attempt| Place::of(&attempt.address))
                .filter(|place| place.carrier == "udp")
                .collect();
            findings.push(
                Finding::warning(
                    "peer-no-quic",
                    format!(
                        "{name} is reached over TCP only: its UDP port does not answer, so QUIC, which is faster, is not used"
                    ),
                )
                .mend(words::open_there(&places)),
            );
        }
    }
    findings.into_iter().map(|finding| finding.of(&peer.id)).collect()
}

/// It is connected because it dialled us: the other way nothing gets through.
fn one_way(peer: &PeerFacts, name: &str) -> Option<Finding> {
    let inbound = !peer.links.is_empty() && peer.links.iter().all(|link| !link.dialed);
    let Some(Verdict::TimedOut(addresses)) = verdict(&peer.attempts) else { return None };
    let places: Vec<Place> = addresses.iter().filter_map(|address| Place::of(address)).collect();
    inbound.then(|| {
        Finding::warning(
            "peer-one-way",
            format!(
                "{name} reaches this node, and this node does not reach it: what is sent to {} is dropped on the way, by a \
                 firewall as a rule",
                words::list(&shown(&addresses))
            ),
        )
        .mend(words::open_there(&places))
    })
}

fn shown(addresses: &[&str]) -> Vec<String> {
    addresses.iter().map(|address| words::quoted(address)).collect()
}

fn banned(name: &str, severity: Severity) -> Finding {
    Finding::new(severity, "peer-banned", format!("{name} broke the protocol three times and is not let in for ten minutes"))
        .mend("compare on both: ogctl version; if they are the same, please report it with the log: journalctl -u opengatewayd")
}

/// Why a peer is no member (of `cluster`, or of any), the most telling reason first. `severity` is that of a reason that hinders.
pub(super) fn why_missing(facts: &Facts, peer: &PeerFacts, cluster: Option<&ClusterId>, severity: Severity) -> Vec<Finding> {
    let name = words::name(peer);
    let told = if peer.banned {
        vec![banned(&name, severity)]
    } else if !peer.links.is_empty() {
        greeted(facts, peer, cluster, severity)
    } else {
        let said = newest_greeting(peer, cluster).map(|greeting| greeting.ago);
        let tried = peer.attempts.iter().map(|attempt| attempt.ago).min();
        let answered = matches!(verdict(&peer.attempts), Some(Verdict::Connected(_)) | None);
        // A node that is in none of our clusters is let go after a while; what it said counts until a dial says otherwise.
        match (said, tried) {
            (Some(said), Some(tried)) if answered || said <= tried => greeted(facts, peer, cluster, severity),
            (Some(_), None) => greeted(facts, peer, cluster, severity),
            _ => not_reached(facts, peer, &name, severity),
        }
    };
    told.into_iter().map(|finding| finding.of(&peer.id)).collect()
}

fn newest_greeting<'a>(peer: &'a PeerFacts, cluster: Option<&ClusterId>) -> Option<&'a Greeting> {
    peer.greetings.iter().filter(|greeting| cluster.is_none_or(|id| greeting.cluster == *id)).min_by_key(|greeting| greeting.ago)
}

/// What came of greeting it: in `cluster`, or where it matters most.
fn greeted(facts: &Facts, peer: &PeerFacts, cluster: Option<&ClusterId>, severity: Severity) -> Vec<Finding> {
    let name = words::name(peer);
    let joined = |greeting: &&Greeting| facts.clusters.iter().any(|known| known.id == greeting.cluster);
    let wanted = |greeting: &&Greeting| cluster.is_none_or(|id| greeting.cluster == *id);
    let greetings: Vec<&Greeting> = peer.greetings.iter().filter(joined).filter(wanted).collect();
    let mut findings = Vec::new();
    let refused: Vec<String> = greetings
        .iter()
        .filter(|greeting| greeting.outcome == GreetOutcome::Refused)
        .map(|greeting| greeting.cluster.to_string())
        .collect();
    for greeting in &greetings {
        // A stranger that came and went, and that nobody would look for, is no trouble; nor is a bootstrap node that may be in no
        // cluster, and lets go of every hello.
        let passing =
            severity == Severity::Warning && (peer.bootstrap || (peer.addresses.is_empty() && peer.attempts.is_empty()));
        let severity = if passing && greeting.outcome == GreetOutcome::Failed { Severity::Info } else { severity };
        if let Some(finding) = one_greeting(facts, &name, greeting, severity) {
            findings.push(finding.within(&greeting.cluster));
        }
    }
    if let Some(first) = refused.first() {
        // Where others were found it is nothing but a neighbour that is elsewhere; where nobody was, a name may be misspelt.
        let lonely = |id: &String| facts.clusters.iter().any(|cluster| cluster.id.to_string() == *id && cluster.members == 0);
        let severity = if severity == Severity::Warning && !refused.iter().any(lonely) { Severity::Info } else { severity };
        let sentence =
            format!("{name} is reached, and is not in cluster {} (or calls it by another name)", words::list(&refused));
        findings.push(
            Finding::new(severity, "peer-other-cluster", sentence)
                .mend(format!("there: ogctl clusters; and: ogctl connect {first}")),
        );
    }
    if findings.is_empty() {
        findings.push(if peer.links.is_empty() {
            Finding::info("peer-seen", format!("{name} is known and not connected; nothing is wrong with it as far as is known"))
        } else if facts.clusters.is_empty() {
            Finding::info(
                "peer-connected",
                format!("{name} is connected; this node is in no cluster that it could be a member of"),
            )
        } else {
            Finding::info("peer-connected", format!("{name} is connected and is being greeted"))
        });
    }
    findings
}

fn one_greeting(facts: &Facts, name: &str, greeting: &Greeting, severity: Severity) -> Option<Finding> {
    let id = &greeting.cluster;
    let ago = words::ago(greeting.ago);
    let finding = match greeting.outcome {
        GreetOutcome::Member | GreetOutcome::Refused => return None,
        GreetOutcome::VersionMismatch => {
            let range = |(min, max): (u16, u16)| {
                if min == max { format!("version {min}") } else { format!("versions {min} to {max}") }
            };
            let theirs = greeting.versions.map_or_else(|| "another version".to_owned(), range);
            let sentence = format!(
                "{name} is in cluster {id} and speaks {theirs} of the membership protocol, this node {}",
                range(facts.versions)
            );
            let newer = greeting.versions.is_some_and(|(min, _)| min > facts.versions.1);
            let mend = if newer {
                "update OpenGateway on this machine; its version: ogctl version"
            } else {
                "update OpenGateway on the older one of the two; on both: ogctl version"
            };
            Finding::new(severity, "peer-version", sentence).mend(mend)
        }
        GreetOutcome::Violation => Finding::new(
            severity,
            "peer-violation",
            format!("{name} broke the protocol when it was greeted in cluster {id} {ago}"),
        )
        .mend("compare on both: ogctl version"),
        GreetOutcome::Failed => Finding::new(
            severity,
            "peer-no-greeting",
            format!("{name} was connected and did not finish the greeting in cluster {id} {ago}"),
        )
        .mend(format!("ogctl ping {name}; and there: ogctl doctor")),
        GreetOutcome::Left => Finding::info("peer-left", format!("{name} left cluster {id} {ago}")),
        GreetOutcome::SameIdentity => Finding::new(
            severity.max(Severity::Warning),
            "duplicate-identity",
            format!("two machines use the identity of {name} in cluster {id}: one of them was copied from the other"),
        )
        .mend(
            "on the copy: sudo systemctl stop opengatewayd && sudo rm /var/lib/opengateway/identity.key \
             /var/lib/opengateway/identity.pub && sudo systemctl start opengatewayd",
        ),
    };
    Some(finding)
}

/// No connection, and none that told more.
fn not_reached(facts: &Facts, peer: &PeerFacts, name: &str, severity: Severity) -> Vec<Finding> {
    let Some(verdict) = verdict(&peer.attempts) else { return vec![untried(facts, peer, name)] };
    let finding = match verdict {
        Verdict::Connected(_) => Finding::info("peer-seen", format!("{name} was connected and is not now")),
        Verdict::WrongPeer(address, other) => {
            let new = facts.peers.iter().find(|known| known.id == *other).map_or_else(|| other.to_string(), words::name);
            Finding::new(
                severity,
                "peer-wrong-id",
                format!(
                    "another node answers at {} of {name}: {new}; the address was given to another machine, or its identity \
                     was made anew",
                    words::quoted(address)
                ),
            )
            .mend(format!("there: ogctl status; what is known of the one that answers: ogctl doctor {other}"))
        }
        Verdict::Ourselves(address) => {
            Finding::info("peer-wrong-id", format!("the address {} of {name} is one of this node itself", words::quoted(address)))
        }
        Verdict::Denied(address, reason) => Finding::new(
            severity,
            "peer-denied",
            format!("no connection to {name} at {}: {}", words::quoted(address), words::quoted(reason)),
        )
        .mend("here and there: ogctl doctor; max_connections in /etc/opengateway/opengatewayd.toml sets the limit"),
        Verdict::Refused(address) => {
            let port = Place::of(address).map_or_else(
                || "its port".to_owned(),
                |place| format!("{} of {}", place.port_name(), words::quoted(&place.host)),
            );
            Finding::new(
                severity,
                "peer-refused",
                format!("{name} is not reached: {port} is refused, so the machine is there and no node listens on it"),
            )
            .mend("there: sudo systemctl start opengatewayd")
        }
        Verdict::TimedOut(addresses) => timed_out(peer, name, &addresses, severity),
        Verdict::Unreachable(addresses) => {
            let places: Vec<Place> = addresses.iter().filter_map(|address| Place::of(address)).collect();
            let (reason, remedy) = no_way(facts, &places);
            Finding::new(severity, "peer-unreachable", format!("{name} is not reached: {reason}")).mend(remedy)
        }
        Verdict::Other(address, reason) => Finding::new(
            severity,
            "peer-failed",
            format!("{name} is not reached at {}: {}", words::quoted(address), words::quoted(reason)),
        )
        .mend("there: ogctl doctor"),
    };
    vec![finding]
}

fn timed_out(peer: &PeerFacts, name: &str, addresses: &[&str], severity: Severity) -> Finding {
    let places: Vec<Place> = addresses.iter().filter_map(|address| Place::of(address)).collect();
    let at = words::list(&shown(addresses));
    if let Some(ago) = peer.mdns_ago.filter(|ago| *ago < HEARD_LATELY) {
        let ago = words::ago(ago);
        return Finding::new(
            severity,
            "peer-one-way",
            format!(
                "{name} is awake on this network, it was heard by mDNS {ago}, and nothing comes back from {at}: its \
                 firewall drops what this node sends"
            ),
        )
        .mend(words::open_there(&places));
    }
    Finding::new(
        severity,
        "peer-timeout",
        format!(
            "{name} is not reached: nothing comes back from {at}; it is switched off, has another address now, or a firewall \
             drops what we send"
        ),
    )
    .mend(words::open_there(&places))
}

fn untried(facts: &Facts, peer: &PeerFacts, name: &str) -> Finding {
    if facts.clusters.is_empty() {
        return Finding::info("peer-seen", format!("{name} is known; nobody is dialled as long as this node is in no cluster"))
            .mend("ogctl connect gatewayai-poc");
    }
    match (peer.next_dial, peer.addresses.is_empty()) {
        (Some(next), false) => Finding::info(
            "peer-seen",
            format!("{name} is known and is dialled within {}", words::span(next.max(Duration::from_secs(1)))),
        ),
        (_, true) => {
            Finding::info("peer-no-address", format!("{name} was heard of and no address of it that this node could dial"))
                .mend("there: ogctl status, whose address goes after --bootstrap here")
        }
        (None, false) => Finding::info("peer-seen", format!("{name} is known and was not dialled yet")),
    }
}

fn source(found: FoundBy) -> &'static str {
    match found {
        FoundBy::Mdns => "mDNS",
        FoundBy::Kademlia => "the DHT",
        FoundBy::Bootstrap => "the bootstrap list",
        FoundBy::View => "a member",
        FoundBy::Inbound => "its own dial",
        FoundBy::Remembered => "the memory of the last run",
    }
}

/// All that is known besides, for a user who asked about this peer.
fn history(peer: &PeerFacts) -> Vec<Finding> {
    let name = words::name(peer);
    let mut findings = Vec::new();
    let sources: Vec<String> = peer.sources.iter().map(|&found| source(found).to_owned()).collect();
    let ago = peer.heard_ago.map_or_else(String::new, |ago| format!(", the last time {}", words::ago(ago)));
    if !sources.is_empty() {
        findings.push(Finding::info("peer-heard", format!("{name} was heard of by {}{ago}", words::list(&sources))));
    }
    for attempt in &peer.attempts {
        let sentence =
            format!("{}: {} ({})", words::quoted(&attempt.address), dials::phrase(&attempt.outcome), words::ago(attempt.ago));
        findings.push(Finding::info("peer-address", sentence));
    }
    let tried = |address: &String| peer.attempts.iter().any(|attempt| attempt.address == *address);
    for address in peer.addresses.iter().filter(|address| !tried(address)) {
        findings.push(Finding::info("peer-address", format!("{}: not dialled", words::quoted(address))));
    }
    if let Some(next) = peer.next_dial.filter(|_| peer.links.is_empty() && !peer.attempts.is_empty()) {
        findings.push(Finding::info("peer-next-dial", format!("{name} is dialled again in {}", words::span(next))));
    }
    findings.into_iter().map(|finding| finding.of(&peer.id)).collect()
}
