//! The part of the network task that joins clusters and leaves them.

use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::handle::{JoinError, JoinOptions, LeaveError};
use super::session::Generation;
use super::task::{Cluster, Due, Leaving, MAX_CLUSTERS, Task};
use crate::domain::cluster::ClusterId;
use crate::wire::control::ByeReason;
use crate::wire::keys::Root;

/// Between two looks whether the prompts of a cluster that is being left have ended.
const DRAIN_LOOK: Duration = Duration::from_millis(100);

impl Task<'_> {
    pub(super) fn join(&mut self, cluster: ClusterId, options: JoinOptions) -> Result<(), JoinError> {
        if !self.clusters.contains_key(&cluster) && self.clusters.len() >= MAX_CLUSTERS {
            return Err(JoinError::TooMany(MAX_CLUSTERS));
        }
        self.add_bootstrap(&options.bootstrap)?;
        let (entry, joined_at) =
            self.lasting.joined.entry(cluster.clone()).or_insert_with(|| (options.clone(), SystemTime::now()));
        entry.serve = options.serve;
        for address in &options.bootstrap {
            if !entry.bootstrap.contains(address) {
                entry.bootstrap.push(address.clone());
            }
        }
        let joined_at = *joined_at;
        if let Some(joined) = self.clusters.get_mut(&cluster) {
            let back = joined.leaving.take();
            let changed = joined.serve != options.serve || back.is_some();
            joined.serve = options.serve;
            if changed {
                self.state_changed();
            }
            if let Some(Leaving { replies, .. }) = back {
                // In again before it was out: take back what leaving began.
                for reply in replies {
                    let _ = reply.send(Ok(()));
                }
                self.agenda.forget(|due| *due == Due::Leave(cluster.clone()));
                self.publish_record(&cluster);
                self.greet_connected(&cluster);
            }
            self.dirty = true;
            return Ok(());
        }
        self.enter(cluster, &options, joined_at, Instant::now());
        Ok(())
    }

    pub(super) fn enter(&mut self, id: ClusterId, options: &JoinOptions, joined_at: SystemTime, now: Instant) {
        let root = Root::public(&id);
        let reference = root.cluster_ref();
        let cluster = Cluster {
            id: id.clone(),
            root,
            reference,
            serve: options.serve,
            looks: 0,
            joined_at,
            joined: now,
            announcements: 0,
            announced: false,
            leaving: None,
        };
        self.clusters.insert(id.clone(), cluster);
        self.publish_permits();
        tracing::info!(cluster = %id, serve = options.serve, "joined cluster {id}");
        self.dirty = true;
        self.greet_connected(&id);
        self.announce(&id, now);
        self.look_up(&id, now);
        self.agenda.no_later(Due::Dial, now);
    }

    pub(super) fn leave(&mut self, cluster: ClusterId, drain: Duration, reply: oneshot::Sender<Result<(), LeaveError>>) {
        let Some(joined) = self.clusters.get_mut(&cluster) else {
            let _ = reply.send(Err(LeaveError::NotJoined(cluster)));
            return;
        };
        let now = Instant::now();
        let until = now + drain;
        if let Some(leaving) = &mut joined.leaving {
            // Asked twice: both are told, and the more impatient one is followed.
            leaving.until = leaving.until.min(until);
            leaving.replies.push(reply);
        } else {
            joined.leaving = Some(Leaving { until, replies: vec![reply] });
            self.lasting.joined.remove(&cluster);
            self.stop_providing(&cluster);
            self.state_changed();
            self.dirty = true;
        }
        self.agenda.set(Due::Leave(cluster), now);
    }

    /// Leaves as soon as no prompt of a member is being answered any more, or when the time for that is over.
    pub(super) fn try_depart(&mut self, id: &ClusterId, now: Instant) {
        let Some(until) = self.clusters.get(id).and_then(|cluster| cluster.leaving.as_ref()).map(|leaving| leaving.until) else {
            return;
        };
        let busy = self.offer.borrow().queued > 0 || self.working.load(Ordering::Relaxed) > 0;
        if busy && now < until {
            self.agenda.set(Due::Leave(id.clone()), (now + DRAIN_LOOK).min(until));
        } else {
            self.depart(id);
        }
    }

    /// The last act of leaving: goodbye to the members, who are forgotten at once.
    pub(super) fn depart(&mut self, id: &ClusterId) {
        let Some(cluster) = self.clusters.remove(id) else { return };
        let generations: Vec<Generation> =
            self.sessions.iter().filter(|(_, session)| session.cluster == *id).map(|(&generation, _)| generation).collect();
        for generation in generations {
            self.end_session(generation, Some(ByeReason::Leave));
        }
        self.agenda.forget(|due| match due {
            Due::Announce(cluster) | Due::Lookup(cluster) | Due::Hello(_, cluster) | Due::Leave(cluster) => cluster == id,
            _ => false,
        });
        // A query that still runs must not keep a node that comes back at once from asking and announcing anew.
        self.lookups.retain(|_, asked| asked != id);
        self.announces.retain(|_, announced| announced != id);
        self.refused.retain(|(_, refused), _| refused != id);
        self.known.forget(id);
        tracing::info!(cluster = %id, "left cluster {id}");
        self.dirty = true;
        self.publish_first();
        for reply in cluster.leaving.into_iter().flat_map(|leaving| leaving.replies) {
            let _ = reply.send(Ok(()));
        }
    }
}
