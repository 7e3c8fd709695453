//! What of the members is told when it changes: whether they are heard, and the way to them.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::domain::cluster::ClusterId;
use crate::domain::node::Member;

/// The members as they were last looked at, sorted by id as in a snapshot.
#[derive(Debug, Default)]
pub(super) struct Seen(BTreeMap<ClusterId, Vec<Arc<Member>>>);

impl Seen {
    /// Which members are another way than before, and what of them. Who came or went is no change: others tell that.
    pub(super) fn changes(&mut self, id: &ClusterId, now: &[Arc<Member>]) -> Vec<(Arc<Member>, Vec<&'static str>)> {
        let before = self.0.insert(id.clone(), now.to_vec()).unwrap_or_default();
        let mut old = before.iter().peekable();
        let mut changes = Vec::new();
        for member in now {
            while old.peek().is_some_and(|old| old.id.cmp(&member.id) == Ordering::Less) {
                old.next();
            }
            // A snapshot shares members that are as they were.
            let Some(was) = old.peek().filter(|was| was.id == member.id && !Arc::ptr_eq(was, member)) else { continue };
            let differs = differences(was, member);
            if !differs.is_empty() {
                changes.push((Arc::clone(member), differs));
            }
        }
        changes
    }

    /// The cluster is left.
    pub(super) fn forget(&mut self, id: &ClusterId) {
        self.0.remove(id);
    }
}

fn differences(was: &Member, is: &Member) -> Vec<&'static str> {
    let relay = |member: &Member| member.relay.as_ref().map(|relay| relay.id.clone());
    let differs =
        [("Liveness", was.liveness != is.liveness), ("Direct", was.direct != is.direct), ("Relay", relay(was) != relay(is))];
    differs.into_iter().filter_map(|(key, differs)| differs.then_some(key)).collect()
}
