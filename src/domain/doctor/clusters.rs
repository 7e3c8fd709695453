//! Joined clusters: who is there, who serves, who is missing.

use std::time::Duration;

use super::{Finding, Severity, peers, words};
use crate::domain::cluster::ClusterId;
use crate::domain::network::{ClusterFacts, Facts, PeerFacts};

/// So long it may take to find the first member.
const PATIENCE: Duration = Duration::from_secs(10);
/// Missing members that are told of, each with its reason.
const MOST: usize = 20;

/// A node that is in no cluster has nothing to find.
pub(super) fn none(facts: &Facts) -> Vec<Finding> {
    if !facts.clusters.is_empty() {
        return Vec::new();
    }
    vec![Finding::warning("no-cluster", "this node is in no cluster: it looks for nobody").mend("ogctl connect gatewayai-poc")]
}

/// One joined cluster.
pub(super) fn about(facts: &Facts, cluster: &ClusterFacts) -> Vec<Finding> {
    let id = &cluster.id;
    let finding = if cluster.members == 0 {
        alone(facts, cluster)
    } else if cluster.serving == 0 && !cluster.serves {
        let members = words::count(cluster.members, "member", "members");
        Finding::warning(
            "no-serving-member",
            format!("cluster {id} has {members} besides this node and none of them takes prompts"),
        )
        .mend(format!("on one of them: ogctl connect {id} --serve; who is there: ogctl peers {id}"))
    } else {
        let members = words::count(cluster.members, "member", "members");
        let known = match cluster.known {
            0 => String::new(),
            known => format!(" ({known} of them known through others)"),
        };
        let serving = if cluster.serves { cluster.serving + 1 } else { cluster.serving };
        Finding::info("cluster", format!("cluster {id} has {members} besides this node{known}; {} prompts", takes(serving)))
    };
    vec![finding.within(id)]
}

fn takes(serving: usize) -> String {
    if serving == 1 { "one node takes".to_owned() } else { format!("{serving} nodes take") }
}

fn alone(facts: &Facts, cluster: &ClusterFacts) -> Finding {
    let id = &cluster.id;
    if cluster.joined_ago < PATIENCE {
        let joined = words::ago(cluster.joined_ago);
        return Finding::info("alone", format!("cluster {id} was joined {joined} and nobody else was found yet"));
    }
    let since = words::span(cluster.joined_ago);
    let met = facts.peers.iter().filter(|peer| peer.member_of.is_empty()).count();
    let met = match met {
        0 => "nobody was heard of at all".to_owned(),
        met => format!("{} heard of and is no member", words::count(met, "node was", "nodes were")),
    };
    let remedy = words::paste_there(facts, &id.to_string(), None).unwrap_or_else(|| words::paste_here(&id.to_string()));
    Finding::warning("alone", format!("this node is alone in cluster {id} since {since}; {met}")).mend(remedy)
}

/// What a user hears who asks about one cluster.
pub(super) fn asked_about(facts: &Facts, id: &ClusterId) -> Vec<Finding> {
    let Some(cluster) = facts.clusters.iter().find(|cluster| cluster.id == *id) else {
        let sentence = format!("this node is not in cluster {id}");
        return vec![Finding::error("cluster-not-joined", sentence).within(id).mend(format!("ogctl connect {id}"))];
    };
    let mut findings = about(facts, cluster);
    for member in facts.peers.iter().filter(|peer| peer.member_of.contains(id)) {
        findings.extend(peers::as_member(member));
    }
    let missing: Vec<&PeerFacts> = facts.peers.iter().filter(|peer| is_missing(peer)).collect();
    for peer in missing.iter().take(MOST) {
        findings.extend(peers::why_missing(facts, peer, Some(id), Severity::Warning));
    }
    if missing.len() > MOST {
        findings.push(peers::more(missing.len() - MOST));
    }
    findings
}

/// It might be a member and is none. Whoever is a member elsewhere is where it wants to be, and bootstrap nodes that are not
/// reached have findings of their own.
fn is_missing(peer: &PeerFacts) -> bool {
    peer.member_of.is_empty() && !(peer.bootstrap && peer.links.is_empty())
}
