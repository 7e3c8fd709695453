//! Findings and facts as text: the worst finding first, each with what to do; then this node, then the peers.

use super::Diagnosis;
use super::view::{Attempt, Bootstrap, Facts, Finding, Greeting, Link, MdnsOn, Peer, Reach};
use crate::args::Doctor;
use crate::render::{Style, Tone, ago, fields, list, relayed, short_id, span};
use crate::term::line;
use std::fmt::Write as _;
use std::time::Duration;

/// Peers that are told of when nobody asked for one: more is no reading.
const MAX_PEERS: usize = 20;

/// All of it.
pub fn of(diagnosis: &Diagnosis, asked: &Doctor, style: &Style) -> String {
    let mut text = String::new();
    for found in &diagnosis.findings {
        text.push_str(&finding(found, style));
    }
    if !diagnosis.findings.iter().any(|finding| finding.severity != "info") {
        writeln!(text, "{} nothing is wrong", style.paint(Tone::Good, "✓")).expect("writing to a String does not fail");
    }
    let facts = &diagnosis.facts;
    if asked.peer.is_none() {
        text.push('\n');
        text.push_str(&node(facts, style));
    }
    text.push_str(&peers(&facts.peers, asked, style));
    text
}

/// Mark, sentence, code; and on a line of its own the command that mends it.
fn finding(finding: &Finding, style: &Style) -> String {
    let (tone, mark) = match finding.severity.as_str() {
        "error" => (Tone::Bad, "✗"),
        "warning" => (Tone::Warn, "!"),
        _ => (Tone::Plain, "·"),
    };
    let mut text = format!("{} {} [{}]\n", style.paint(tone, mark), line(&finding.sentence), line(&finding.code));
    if let Some(remedy) = &finding.remedy {
        writeln!(text, "    {}", style.paint(Tone::Bold, &line(remedy))).expect("writing to a String does not fail");
    }
    text
}

fn lines(items: impl IntoIterator<Item = String>) -> String {
    items.into_iter().collect::<Vec<_>>().join("\n")
}

fn number(number: Option<u64>) -> String {
    number.map_or_else(|| "?".to_owned(), |number| number.to_string())
}

/// "3 members", "1 member".
fn some(count: Option<u64>, one: &str) -> String {
    format!("{} {one}{}", number(count), if count == Some(1) { "" } else { "s" })
}

fn node(facts: &Facts, style: &Style) -> String {
    let interfaces = facts.interfaces.iter().map(|interface| {
        let state = if interface.up { "" } else { ", down" };
        let multicast = if interface.multicast { "" } else { ", no multicast" };
        format!("{}: {}{state}{multicast}", line(&interface.name), list(&interface.addresses))
    });
    let refused = facts.not_listening.iter().map(|one| format!("not on {}: {}", line(&one.address), line(&one.reason)));
    let clusters = facts.clusters.iter().map(|cluster| {
        let known = cluster.known.filter(|&known| known > 0).map_or_else(String::new, |known| format!(" ({known} only known)"));
        let role = if cluster.serves { "this node serves" } else { "this node only asks" };
        format!("{}: {}{known}, {} serving, {role}", line(&cluster.id), some(cluster.members, "member"), number(cluster.serving))
    });
    let dht = format!(
        "{}, {} in its table{}",
        if facts.dht.server { "server" } else { "client (it only asks)" },
        some(facts.dht.peers, "node"),
        facts.dht.answered_us.map_or_else(|| ", no answer yet".to_owned(), |us| format!(", last answer {}", ago(us)))
    );
    let kept_out = facts.refused.as_ref().map_or_else(String::new, |refused| {
        let when = refused.ago_us.map_or_else(String::new, |us| format!(", the last {}", ago(us)));
        format!("; {} kept out{when}: {}", number(refused.count), line(&refused.reason))
    });
    fields(
        style,
        &[
            ("Peer id", line(&facts.peer_id)),
            ("Interfaces", lines(interfaces)),
            ("Listens on", lines(facts.listening.iter().map(|address| line(address)).chain(refused))),
            ("Reached", reach(&facts.reach)),
            ("Relays", relays(&facts.reach)),
            ("DHT", dht),
            ("mDNS", mdns(facts)),
            ("Bootstrap", lines(facts.bootstrap.iter().map(bootstrap))),
            ("Clusters", lines(clusters)),
            ("Connections", format!("{} of {}{kept_out}", number(facts.connections), number(facts.max_connections))),
            ("Same identity", lines(facts.same_identity.iter().map(|address| line(address)))),
            ("Machine", machine(facts)),
        ],
    )
}

fn reach(reach: &Reach) -> String {
    let nat = match reach.nat.as_str() {
        "none" => "no address translation in between".to_owned(),
        "cone" => "behind a router that keeps ports: direct connections can be made from both sides at once".to_owned(),
        "symmetric" => "behind a router that changes ports: a relay has to carry what cannot be dialled".to_owned(),
        "unknown" | "" => "not known yet: nobody outside has told".to_owned(),
        other => line(other),
    };
    let told = |what: &str, addresses: &[String]| (!addresses.is_empty()).then(|| format!("{what} {}", list(addresses)));
    let unreachable = reach.unreachable.iter().map(|one| format!("not at {}: {}", line(&one.address), line(&one.reason)));
    let known = [told("seen as", &reach.observed), told("announced:", &reach.announced)];
    lines(std::iter::once(nat).chain(known.into_iter().flatten()).chain(unreachable))
}

fn relays(reach: &Reach) -> String {
    let reserved = reach.reservations.iter().map(|place| {
        let name = place.name.as_deref().map_or_else(|| short_id(&place.peer_id), line);
        let problem = place.problem.as_deref().map_or_else(String::new, |problem| format!(": {}", line(problem)));
        format!("{} {name}{problem}", if place.accepted { "a place at" } else { "no place at" })
    });
    let carries = reach.relaying.as_ref().map(|relaying| {
        format!(
            "carries for others: {}, {}, {} refused",
            some(relaying.reservations, "place"),
            some(relaying.circuits, "circuit"),
            number(relaying.refused)
        )
    });
    lines(reserved.chain(carries))
}

fn mdns(facts: &Facts) -> String {
    if !facts.mdns.enabled {
        return "switched off".to_owned();
    }
    let flooded = facts.mdns.flooded.then(|| "off for a while: it was flooded".to_owned());
    let on = |on: &MdnsOn| {
        let heard = match on.heard_us {
            Some(us) => format!("{} heard from {}, the last {}", number(on.heard), some(on.nodes, "node"), ago(us)),
            None => format!("{} heard", number(on.heard)),
        };
        let problem = on.problem.as_deref().map_or_else(String::new, |problem| format!(" ({})", line(problem)));
        let family = if on.family == "ipv6" { "IPv6" } else { "IPv4" };
        format!("{} {family}: {} sent, {heard}{problem}", line(&on.interface), number(on.sent))
    };
    lines(flooded.into_iter().chain(facts.mdns.interfaces.iter().map(on)))
}

fn bootstrap(node: &Bootstrap) -> String {
    let state = match (&node.problem, node.connected) {
        (_, true) => "connected".to_owned(),
        (Some(problem), false) => line(problem),
        (None, false) => "not connected yet".to_owned(),
    };
    let tried = node.attempts.iter().filter(|_| !node.connected).map(|tried| format!("  {}", attempt(tried)));
    lines(std::iter::once(format!("{}: {state}", line(&node.address))).chain(tried))
}

fn machine(facts: &Facts) -> String {
    let clock = facts.clock_synchronised.map(|is| if is { "the clock is right" } else { "the clock is not synchronised" });
    let suspended =
        facts.suspended_us.filter(|&us| us > 0).map(|us| format!("suspended for {}", span(Duration::from_micros(us))));
    let firewall = facts.firewall.as_deref().map(|name| format!("{} is active", line(name)));
    [firewall, clock.map(str::to_owned), suspended].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn peers(peers: &[Peer], asked: &Doctor, style: &Style) -> String {
    let most = if asked.peer.is_some() { usize::MAX } else { MAX_PEERS };
    let mut text = String::new();
    for one in peers.iter().take(most) {
        text.push('\n');
        text.push_str(&peer(one, style));
    }
    if let Some(more) = peers.len().checked_sub(most).filter(|&more| more > 0) {
        writeln!(text, "\n{more} more; see one with: ogctl doctor PEER, all with: ogctl doctor --json")
            .expect("writing to a String does not fail");
    }
    text
}

/// Who, and what each address answered.
fn peer(peer: &Peer, style: &Style) -> String {
    let id = if style.width.is_some() { short_id(&peer.peer_id) } else { line(&peer.peer_id) };
    let who = match peer.name.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => format!("{} ({id})", line(name)),
        None => id,
    };
    let is = [
        (!peer.member_of.is_empty()).then(|| format!("member of {}", list(&peer.member_of))),
        peer.suspect.then(|| "silent".to_owned()),
        peer.banned.then(|| "banned for a while".to_owned()),
        peer.bootstrap.then(|| "bootstrap".to_owned()),
    ];
    let is = is.into_iter().flatten().collect::<Vec<_>>().join(", ");
    let mut text = format!("{}{}\n", style.paint(Tone::Bold, &who), if is.is_empty() { is } else { format!(": {is}") });
    let mut say = |what: String| writeln!(text, "  {what}").expect("writing to a String does not fail");
    peer.links.iter().for_each(|one| say(link(one)));
    // Why it is no member is told by the greetings; of a member they say nothing new.
    peer.greetings.iter().filter(|one| one.outcome != "member").for_each(|one| say(greeting(one)));
    peer.attempts.iter().for_each(|one| say(attempt(one)));
    let untried = peer.addresses.iter().filter(|address| peer.attempts.iter().all(|tried| tried.address != **address));
    untried.for_each(|address| say(format!("{}: not tried", line(address))));
    if !peer.sources.is_empty() {
        say(format!(
            "heard of by {}{}",
            list(&peer.sources),
            peer.heard_us.map_or_else(String::new, |us| format!(" {}", ago(us)))
        ));
    }
    if let Some(us) = peer.next_dial_us {
        say(format!("dialled again in {}", span(Duration::from_micros(us))));
    }
    text
}

fn link(link: &Link) -> String {
    let way = if link.direct { "direct".to_owned() } else { relayed(link.relay_name.as_deref().or(link.relay.as_deref())) };
    let age = link.age_us.map_or_else(String::new, |us| format!(" for {}", span(Duration::from_micros(us))));
    let side = if link.dialed { "dialled" } else { "accepted" };
    format!("connected over {}, {way}{age}: {side} {}", line(&link.transport), line(&link.address))
}

fn greeting(greeting: &Greeting) -> String {
    let what = match greeting.outcome.as_str() {
        "refused" => "it is not in this cluster".to_owned(),
        "version" => match greeting.versions.as_slice() {
            [oldest, newest] => format!("it speaks other versions of the protocol ({oldest} to {newest})"),
            _ => "it speaks another version of the protocol".to_owned(),
        },
        "violation" => "it broke the protocol".to_owned(),
        "failed" => "it did not answer the greeting".to_owned(),
        "left" => "it left".to_owned(),
        "same-identity" => "another machine with its identity is there".to_owned(),
        other => line(other),
    };
    format!("{}: {what}{}", line(&greeting.cluster), greeting.ago_us.map_or_else(String::new, |us| format!(", {}", ago(us))))
}

fn attempt(attempt: &Attempt) -> String {
    let what = match attempt.outcome.as_str() {
        "timed-out" => "timed out".to_owned(),
        "wrong-peer" => "another node answers there".to_owned(),
        "ourselves" => "this node itself answers there".to_owned(),
        other => line(other),
    };
    let detail = attempt.detail.as_deref().map_or_else(String::new, |detail| format!(" ({})", line(detail)));
    let when = attempt.ago_us.map_or_else(String::new, |us| format!(", {}", ago(us)));
    format!("{}: {what}{detail}{when}", line(&attempt.address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::View as _;

    fn asked(peer: Option<&str>) -> Doctor {
        Doctor { peer: peer.map(str::to_owned), cluster: None }
    }

    #[test]
    fn a_finding_has_its_mark_its_code_and_its_remedy_on_a_line_of_its_own() {
        let bad = Finding {
            code: "bootstrap-refused".into(),
            severity: "error".into(),
            sentence: "the bootstrap\u{1b}[2J refuses".into(),
            remedy: Some("systemctl start opengatewayd".into()),
            peer: None,
            cluster: None,
        };
        let shown = finding(&bad, &Style::default());
        assert_eq!(shown, "✗ the bootstrap refuses [bootstrap-refused]\n    systemctl start opengatewayd\n");
    }

    #[test]
    fn an_empty_reply_of_another_version_is_shown_without_inventing_anything() {
        let empty = Facts::read(&opengateway::api::proxy::Details::new());
        let shown = of(&Diagnosis { findings: Vec::new(), facts: empty }, &asked(None), &Style::default());
        assert!(shown.starts_with("✓ nothing is wrong\n"), "{shown}");
        assert!(!shown.contains("Firewall") && !shown.contains("Clusters"), "{shown}");
    }
}
