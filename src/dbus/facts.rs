//! From the facts and findings of the doctor to the `a{sv}` of the bus: every fact, as `dbus/*Network.xml` spells it.

use std::time::Duration;

use zbus::Variant;

use super::details::{Details, micros, put, text, texts};
use crate::domain::doctor::{Finding, Host};
use crate::domain::network::{
    Attempt, BootstrapFacts, ClusterFacts, DialOutcome, Facts, GreetOutcome, Greeting, InterfaceFacts, Link, MdnsFacts,
    PeerFacts, Pinged, ReachFacts, Relay, ReservationFacts,
};

fn span(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn list<T>(items: &[T], item: impl Fn(&T) -> Details) -> Variant<'static> {
    items.iter().map(item).collect::<Vec<Details>>().into()
}

fn lines(items: &[String]) -> Variant<'static> {
    texts(items.iter().map(String::as_str))
}

pub(super) fn finding(finding: &Finding) -> Details {
    let mut details = Details::from([
        ("Code", finding.code.into()),
        ("Severity", finding.severity.as_str().into()),
        ("Sentence", text(&finding.sentence)),
    ]);
    put(&mut details, "Remedy", finding.remedy.as_deref().map(text));
    put(&mut details, "Peer", finding.peer.as_ref().map(|peer| text(peer.as_str())));
    put(&mut details, "Cluster", finding.cluster.as_ref().map(|cluster| text(cluster.as_str())));
    details
}

pub(super) fn facts(facts: &Facts, host: &Host, peers: &[&PeerFacts]) -> Details {
    let reason = |(address, reason): &(String, String)| Details::from([("Address", text(address)), ("Reason", text(reason))]);
    let mdns = Details::from([
        ("Enabled", facts.mdns_enabled.into()),
        ("Flooded", facts.mdns_flooded.into()),
        ("Interfaces", list(&facts.mdns, mdns_on)),
    ]);
    let mut dht = Details::from([("Server", facts.dht.server.into()), ("Peers", count(facts.dht.peers).into())]);
    put(&mut dht, "AnsweredUSec", facts.dht.answered_ago.map(span));
    let mut details = Details::from([
        ("At", micros(facts.at).into()),
        ("PeerId", text(facts.id.as_str())),
        ("Listening", lines(&facts.listening)),
        ("NotListening", list(&facts.not_listening, reason)),
        ("Interfaces", list(&facts.interfaces, interface)),
        ("Mdns", mdns.into()),
        ("Bootstrap", list(&facts.bootstrap, bootstrap)),
        ("Reach", reach(&facts.reach).into()),
        ("Dht", dht.into()),
        ("Clusters", list(&facts.clusters, cluster)),
        ("Versions", versions(facts.versions)),
        ("Peers", peers.iter().map(|facts| peer(facts)).collect::<Vec<Details>>().into()),
        ("SameIdentity", lines(&facts.same_identity)),
        ("Connections", count(facts.connections.0).into()),
        ("MaxConnections", count(facts.connections.1).into()),
        ("SuspendedUSec", host.suspended_s.saturating_mul(1_000_000).into()),
    ]);
    let refused = facts.refused.as_ref().map(|refused| {
        Details::from([("Count", refused.count.into()), ("AgoUSec", span(refused.ago).into()), ("Reason", text(&refused.reason))])
    });
    put(&mut details, "Refused", refused);
    put(&mut details, "Firewall", host.firewall.as_deref().map(text));
    put(&mut details, "ClockSynchronised", host.clock_synchronised);
    details
}

fn cluster(facts: &ClusterFacts) -> Details {
    Details::from([
        ("Id", text(facts.id.as_str())),
        ("JoinedUSec", span(facts.joined_ago).into()),
        ("Members", count(facts.members).into()),
        ("Known", count(facts.known).into()),
        ("Serving", count(facts.serving).into()),
        ("Serves", facts.serves.into()),
        ("Announced", facts.announced.into()),
    ])
}

fn versions((oldest, newest): (u16, u16)) -> Variant<'static> {
    vec![u32::from(oldest), u32::from(newest)].into()
}

fn interface(facts: &InterfaceFacts) -> Details {
    Details::from([
        ("Name", text(&facts.name)),
        ("Up", facts.up.into()),
        ("Multicast", facts.multicast.into()),
        ("Addresses", lines(&facts.addresses)),
    ])
}

fn mdns_on(facts: &MdnsFacts) -> Details {
    let mut details = Details::from([
        ("Interface", text(&facts.interface)),
        ("Family", if facts.ipv6 { "ipv6" } else { "ipv4" }.into()),
        ("Sent", facts.sent.into()),
        ("Heard", facts.heard.into()),
        ("Nodes", facts.nodes.into()),
        ("Failed", facts.failed.into()),
    ]);
    put(&mut details, "HeardUSec", facts.heard_ago.map(span));
    put(&mut details, "Problem", facts.problem.as_deref().map(text));
    details
}

fn bootstrap(facts: &BootstrapFacts) -> Details {
    let mut details = Details::from([
        ("Address", text(&facts.address)),
        ("Connected", facts.connected.into()),
        ("Attempts", list(&facts.attempts, attempt)),
    ]);
    put(&mut details, "PeerId", facts.peer.as_ref().map(|peer| text(peer.as_str())));
    put(&mut details, "Problem", facts.problem.as_deref().map(text));
    details
}

fn reach(facts: &ReachFacts) -> Details {
    let unreachable =
        |(address, reason): &(String, String)| Details::from([("Address", text(address)), ("Reason", text(reason))]);
    let mut details = Details::from([
        ("Nat", facts.nat.as_str().into()),
        ("Observed", lines(&facts.observed)),
        ("Announced", lines(&facts.announced)),
        ("Unreachable", list(&facts.unreachable, unreachable)),
        ("Reservations", list(&facts.reservations, reservation)),
    ]);
    let relaying = facts.relaying.map(|relaying| {
        Details::from([
            ("Reservations", relaying.reservations.into()),
            ("Circuits", relaying.circuits.into()),
            ("Refused", relaying.refused.into()),
        ])
    });
    put(&mut details, "Relaying", relaying);
    details
}

fn reservation(facts: &ReservationFacts) -> Details {
    let mut details = Details::from([("PeerId", text(facts.relay.id.as_str())), ("Accepted", facts.accepted.into())]);
    put(&mut details, "Name", facts.relay.name.as_deref().map(text));
    put(&mut details, "Problem", facts.problem.as_deref().map(text));
    details
}

fn attempt(facts: &Attempt) -> Details {
    let (outcome, detail) = match &facts.outcome {
        DialOutcome::Connected => ("connected", None),
        DialOutcome::Refused => ("refused", None),
        DialOutcome::TimedOut => ("timed-out", None),
        DialOutcome::Unreachable => ("unreachable", None),
        DialOutcome::WrongPeer(peer) => ("wrong-peer", Some(peer.as_str())),
        DialOutcome::Ourselves => ("ourselves", None),
        DialOutcome::Denied(why) => ("denied", Some(why.as_str())),
        DialOutcome::Other(why) => ("other", Some(why.as_str())),
    };
    let mut details =
        Details::from([("Address", text(&facts.address)), ("AgoUSec", span(facts.ago).into()), ("Outcome", outcome.into())]);
    put(&mut details, "Detail", detail.map(text));
    details
}

fn peer(facts: &PeerFacts) -> Details {
    let mut details = Details::from([
        ("PeerId", text(facts.id.as_str())),
        ("Sources", texts(facts.sources.iter().map(|source| source.as_str()))),
        ("Addresses", lines(&facts.addresses)),
        ("Attempts", list(&facts.attempts, attempt)),
        ("Links", list(&facts.links, link)),
        ("Greetings", list(&facts.greetings, greeting)),
        ("MemberOf", texts(facts.member_of.iter().map(|cluster| cluster.as_str()))),
        ("Suspect", facts.suspect.into()),
        ("Banned", facts.banned.into()),
        ("Bootstrap", facts.bootstrap.into()),
    ]);
    put(&mut details, "Name", facts.name.as_deref().map(text));
    put(&mut details, "HeardUSec", facts.heard_ago.map(span));
    put(&mut details, "MdnsUSec", facts.mdns_ago.map(span));
    put(&mut details, "NextDialUSec", facts.next_dial.map(span));
    details
}

fn link(link: &Link) -> Details {
    let mut details = path(link);
    details.insert("Dialed", link.dialed.into());
    details.insert("AgeUSec", span(link.age).into());
    details
}

/// Where a connection goes and who carries it.
fn path(link: &Link) -> Details {
    let mut details = Details::from([
        ("Address", text(&link.address)),
        ("Transport", link.transport.into()),
        ("Direct", link.relay.is_none().into()),
    ]);
    put_relay(&mut details, link.relay.as_ref());
    details
}

/// The node that carries a connection, if one does.
pub(super) fn put_relay(details: &mut Details, relay: Option<&Relay>) {
    put(details, "Relay", relay.map(|relay| text(relay.id.as_str())));
    put(details, "RelayName", relay.and_then(|relay| relay.name.as_deref()).map(text));
}

fn greeting(greeting: &Greeting) -> Details {
    let outcome = match greeting.outcome {
        GreetOutcome::Member => "member",
        GreetOutcome::Refused => "refused",
        GreetOutcome::VersionMismatch => "version",
        GreetOutcome::Violation => "violation",
        GreetOutcome::Failed => "failed",
        GreetOutcome::Left => "left",
        GreetOutcome::SameIdentity => "same-identity",
    };
    let mut details = Details::from([
        ("Cluster", text(greeting.cluster.as_str())),
        ("AgoUSec", span(greeting.ago).into()),
        ("Outcome", outcome.into()),
    ]);
    put(&mut details, "Versions", greeting.versions.map(versions));
    details
}

pub(super) fn pinged(pinged: &Pinged) -> Details {
    let mut details = path(&pinged.link);
    details.insert("PeerId", text(pinged.id.as_str()));
    details.insert("RoundTrips", pinged.round_trips.iter().map(|&time| span(time)).collect::<Vec<u64>>().into());
    put(&mut details, "Name", pinged.name.as_deref().map(text));
    details
}
