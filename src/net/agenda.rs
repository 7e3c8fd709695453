//! What the network task has to do later. One timer serves all of it, so an idle node wakes only when something is due.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

use tokio::time::Instant;

/// Things due, each at most once.
#[derive(Debug)]
pub(crate) struct Agenda<D> {
    order: BTreeSet<(Instant, D)>,
    at: HashMap<D, Instant>,
}

impl<D: Clone + Ord + Hash> Agenda<D> {
    pub(crate) fn new() -> Self {
        Self { order: BTreeSet::new(), at: HashMap::new() }
    }

    /// Plans `due` for `when`; replaces an earlier plan for the same thing.
    pub(crate) fn set(&mut self, due: D, when: Instant) {
        if let Some(old) = self.at.insert(due.clone(), when) {
            self.order.remove(&(old, due.clone()));
        }
        self.order.insert((when, due));
    }

    /// Plans `due` for `when`, unless it is planned for earlier.
    pub(crate) fn no_later(&mut self, due: D, when: Instant) {
        if self.at.get(&due).is_none_or(|&planned| when < planned) {
            self.set(due, when);
        }
    }

    /// Drops what `unwanted` names.
    pub(crate) fn forget(&mut self, unwanted: impl Fn(&D) -> bool) {
        self.order.retain(|(_, due)| !unwanted(due));
        self.at.retain(|due, _| !unwanted(due));
    }

    /// When the next thing is due.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.order.first().map(|&(when, _)| when)
    }

    /// Takes one thing that is due at `now`.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<D> {
        if self.next()? > now {
            return None;
        }
        let (_, due) = self.order.pop_first()?;
        self.at.remove(&due);
        Some(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn things_come_in_order_and_once() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut agenda = Agenda::new();
        agenda.set("b", start + 2 * second);
        agenda.set("a", start + second);
        agenda.set("b", start + 3 * second);
        agenda.no_later("b", start + 9 * second);
        assert_eq!(agenda.pop(start), None);
        assert_eq!(agenda.pop(start + 2 * second), Some("a"));
        assert_eq!(agenda.next(), Some(start + 3 * second));
        agenda.no_later("b", start + second);
        assert_eq!(agenda.pop(start + second), Some("b"));
        assert_eq!(agenda.next(), None);
    }

    #[test]
    fn forgotten_things_never_come() {
        let start = Instant::now();
        let mut agenda = Agenda::new();
        agenda.set(1, start);
        agenda.set(2, start);
        agenda.forget(|&due| due == 1);
        assert_eq!(agenda.pop(start), Some(2));
        assert_eq!(agenda.pop(start), None);
    }
}
