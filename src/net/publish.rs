//! The part of the network task that lets others see its state: snapshots for readers, permits for the serving lanes, a
//! directory for those who ask.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::answer::{self, Permits};
use super::handle::{Directory, Snapshot};
use super::task::{Due, Task};
use crate::domain::cluster::ClusterId;
use crate::domain::doctor;
use crate::domain::node::{ClusterState, ClusterView, Member, NodeId};

/// Names of members in one log line; more are counted.
const NAMES: usize = 32;
/// Between two snapshots, while one change follows the other: members may send 64 frames a second each, and each may change
/// something.
const PACE: Duration = Duration::from_millis(50);
/// And so much more for each member that is listed: where hundreds start together, everybody's list changes all the time, and
/// each snapshot tells of all.
const PACE_PER_MEMBER: Duration = Duration::from_millis(1);
/// Members beyond which nobody waits longer.
const MOST_PACED: u32 = 1000;
/// Between two log lines with the list of members, while one change follows the other, for each member in it above `FEW`. The
/// log takes a line a second for ever; what it had to leave out would be the last one, which people take for what is.
const LINE_PER_MEMBER: Duration = Duration::from_millis(10);
/// Members of which the log is told at once.
const FEW: u32 = 10;
/// The longest pause between two of those lines.
const LONGEST_LINE: Duration = Duration::from_secs(1);
/// When a member was heard last is no news; a snapshot that tells nothing else is as old as this before there is another.
const REFRESH: Duration = Duration::from_secs(1);

/// When the next snapshot may be published.
#[derive(Debug, Default)]
pub(super) struct Pace {
    last: Option<Instant>,
    /// Members in it.
    listed: u32,
    /// When the log may tell of the members again.
    next_line: Option<Instant>,
    /// Somebody is about to be told of what has changed, and must find it in the snapshot.
    pub at_once: bool,
}

impl Pace {
    /// `None` when that is now.
    fn waits_until(&self, now: Instant) -> Option<Instant> {
        self.last.map(|last| last + PACE + PACE_PER_MEMBER * self.listed).filter(|&next| next > now && !self.at_once)
    }

    /// Whether readers would learn from a new one when members were heard last.
    pub fn is_old(&self, now: Instant) -> bool {
        self.last.is_none_or(|last| now.duration_since(last) >= REFRESH)
    }

    fn published(&mut self, now: Instant, listed: usize) {
        self.last = Some(now);
        self.listed = u32::try_from(listed).unwrap_or(u32::MAX).min(MOST_PACED);
        self.at_once = false;
    }

    fn logged(&mut self, now: Instant) {
        self.next_line = Some(now + (LINE_PER_MEMBER * self.listed.saturating_sub(FEW)).min(LONGEST_LINE));
    }
}

/// The names of the members. Put together only when a line with them is really written.
struct Names<'a>(&'a ClusterView);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&names(self.0))
    }
}

fn names(view: &ClusterView) -> String {
    let mut names: Vec<String> = view.members.iter().map(|member| super::membership::loggable(&member.name)).collect();
    if names.is_empty() {
        return "none".to_owned();
    }
    names.sort();
    let more = names.len().saturating_sub(NAMES);
    names.truncate(NAMES);
    let listed = names.join(", ");
    if more > 0 { format!("{listed} and {more} more") } else { listed }
}

/// A listener tells its addresses a moment after it was opened: until then it is no problem that there are none.
const LISTENERS: Duration = Duration::from_secs(2);

impl Task<'_> {
    /// Publishes what has changed: at once after a quiet time, else when the next snapshot may be.
    pub(super) fn publish_in_time(&mut self, now: Instant) {
        if !self.dirty {
            return;
        }
        match self.pace.waits_until(now) {
            Some(next) => self.agenda.no_later(Due::Publish, next),
            None => self.publish(),
        }
    }

    /// Publishes what has changed before somebody is told that it has.
    pub(super) fn publish_first(&mut self) {
        if self.dirty {
            self.publish();
        }
    }

    pub(super) fn publish(&mut self) {
        self.dirty = false;
        let now = Instant::now();
        self.weigh_dht(now);
        let clusters: BTreeMap<ClusterId, Arc<ClusterView>> = self
            .clusters
            .values()
            .map(|cluster| {
                let members = self.members.list(&cluster.id);
                let connected = members.len();
                let state = if cluster.leaving.is_some() {
                    ClusterState::Disconnecting
                } else if members.is_empty() {
                    // Greeting somebody, or greeted and waiting to hear a name.
                    if self.hellos.values().any(|(_, greeted)| greeted.as_ref() == Some(&cluster.id))
                        || self.sessions.values().any(|session| session.cluster == cluster.id)
                    {
                        ClusterState::Connecting
                    } else {
                        ClusterState::Discovering
                    }
                } else if members.iter().any(|member| member.serving) || cluster.serve {
                    ClusterState::Connected
                } else {
                    ClusterState::Degraded
                };
                let members = self.with_known(&cluster.id, members, connected);
                let view = ClusterView {
                    id: cluster.id.clone(),
                    state,
                    serving: cluster.serve,
                    joined_at: cluster.joined_at,
                    announced: cluster.announced,
                    discovery: self.ways_of_discovery(),
                    members,
                };
                (cluster.id.clone(), Arc::new(view))
            })
            .collect();
        self.pace.published(now, clusters.values().map(|view| view.members.len()).sum());
        let snapshot = Snapshot {
            peer_id: Some(NodeId::new(self.local.to_string())),
            listen_addresses: self.own_listeners().map(ToString::to_string).collect(),
            dialable_addresses: self.dialable_addresses(),
            clusters,
            connected_peers: self.swarm.connected_peers().count(),
            connections: self.swarm.behaviour().streams.all().count(),
            problems: self.standing_problems(),
        };
        self.lasting.publish.send_replace(Arc::new(snapshot));
        self.log_members(now);
    }

    /// Writes who the members are into the log, if that changed, or plans to.
    pub(super) fn log_members(&mut self, now: Instant) {
        if !self.membership_changed {
            return;
        }
        if let Some(next) = self.pace.next_line.filter(|&next| next > now) {
            return self.agenda.no_later(Due::Names, next);
        }
        self.membership_changed = false;
        let snapshot = Arc::clone(&self.lasting.publish.borrow());
        for view in snapshot.clusters.values() {
            tracing::info!(cluster = %view.id, "peers: {}", Names(view));
        }
        self.pace.logged(now);
    }

    /// The members at our side and those that are only known, sorted.
    fn with_known(&self, cluster: &ClusterId, mut members: Vec<Arc<Member>>, connected: usize) -> Vec<Arc<Member>> {
        let not_here = self.known.list(cluster).filter(|(peer, _)| self.members.name(cluster, peer).is_none());
        members.extend(not_here.map(|(_, member)| Arc::clone(member)));
        if members.len() > connected {
            members.sort_by(|one, other| one.id.cmp(&other.id));
        }
        members
    }

    /// What the doctor would say first, and what it is not told.
    fn standing_problems(&self) -> Vec<String> {
        // What is wrong with mDNS that runs is among the facts, interface by interface.
        let told = |key: &str| key == super::local::PROBLEM && self.mdns.is_some();
        let others = self.problems.iter().filter(|(key, _)| !told(key)).map(|(_, problem)| problem.clone());
        let facts = self.facts_of_node();
        if facts.listening.is_empty() && self.begun.elapsed() < LISTENERS {
            return others.collect();
        }
        doctor::problems(&facts).into_iter().chain(others).collect()
    }

    /// Rebuilds what serving lanes may read of the member table.
    pub(super) fn publish_permits(&self) {
        let permits: Permits = self
            .sessions
            .iter()
            .filter(|(generation, session)| self.members.generation(&session.cluster, &session.peer) == Some(**generation))
            .filter_map(|(_, session)| {
                let cluster = self.clusters.get(&session.cluster)?;
                let permit = answer::Permit {
                    cluster: session.cluster.clone(),
                    node: self.members.id(&session.cluster, &session.peer)?.clone(),
                    name: self.members.name(&session.cluster, &session.peer).unwrap_or_default().to_owned(),
                    serving: cluster.serve && cluster.leaving.is_none(),
                    gone: session.gone.clone(),
                };
                Some(((session.peer, cluster.reference), permit))
            })
            .collect();
        let directory = Directory {
            clusters: self.clusters.values().map(|cluster| (cluster.id.clone(), cluster.reference)).collect(),
            peers: permits.iter().map(|((peer, _), permit)| (permit.node.clone(), *peer)).collect(),
        };
        self.permits.send_replace(Arc::new(permits));
        self.lasting.directory.send_replace(Arc::new(directory));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_change_after_a_quiet_time_is_published_at_once_and_the_next_ones_together() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert_eq!(pace.waits_until(start), None);
        pace.published(start, 0);
        let next = start + PACE;
        assert_eq!(pace.waits_until(start), Some(next));
        assert_eq!(pace.waits_until(next - Duration::from_nanos(1)), Some(next));
        assert_eq!(pace.waits_until(next), None);
        // Who is told of a member finds it in the snapshot.
        pace.at_once = true;
        assert_eq!(pace.waits_until(start), None);
        pace.published(start, 0);
        assert_eq!(pace.waits_until(start), Some(next));
        for (listed, longer) in [(200, 200), (1_000, 1_000), (1_001, 1_000), (usize::MAX, 1_000)] {
            pace.published(start, listed);
            assert_eq!(pace.waits_until(start), Some(next + Duration::from_millis(longer)), "{listed} members");
        }
    }

    #[test]
    fn the_log_is_told_of_few_members_at_once_and_of_many_once_a_second() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        for (listed, pause) in [(0, 0), (10, 0), (11, 10), (110, 1_000), (111, 1_000), (usize::MAX, 1_000)] {
            pace.published(start, listed);
            pace.logged(start);
            assert_eq!(pace.next_line, Some(start + Duration::from_millis(pause)), "{listed} members");
        }
    }
}
