//! The queue in front of one backend: bounded, fair by requester, pure. It decides; the worker acts.

use std::collections::{HashMap, VecDeque};

use super::backend::Limits;
use super::handle::Requester;

/// Names one prompt inside the worker.
pub(crate) type Ticket = u64;

/// What becomes of a prompt that was handed in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// A slot is free: begin.
    Run,
    /// It waits; so many are before it.
    Wait(usize),
    /// No room: all that may wait are waiting.
    Full,
    /// No room for this requester.
    OverShare,
}

#[derive(Debug)]
pub(crate) struct Queue {
    limits: Limits,
    running: HashMap<Requester, usize>,
    total_running: usize,
    waiting: HashMap<Requester, VecDeque<Ticket>>,
    /// Requesters that wait, in the order in which their next prompt starts.
    turns: VecDeque<Requester>,
    total_waiting: usize,
}

impl Queue {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            running: HashMap::new(),
            total_running: 0,
            waiting: HashMap::new(),
            turns: VecDeque::new(),
            total_waiting: 0,
        }
    }

    /// The backend found out that it takes more or less at once. What runs and waits goes on; call [`Queue::next`] after it.
    pub(crate) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    pub(crate) fn free_slots(&self) -> usize {
        self.limits.slots.saturating_sub(self.total_running + self.total_waiting)
    }

    pub(crate) fn waiting(&self) -> usize {
        self.total_waiting
    }

    pub(crate) fn running(&self) -> usize {
        self.total_running
    }

    /// Hands a prompt in.
    pub(crate) fn admit(&mut self, requester: &Requester, ticket: Ticket) -> Admission {
        if self.total_waiting == 0 && self.total_running < self.limits.slots {
            self.begin(requester);
            return Admission::Run;
        }
        if self.total_waiting >= self.limits.queued {
            return Admission::Full;
        }
        if self.waiting.get(requester).map_or(0, VecDeque::len) >= self.limits.queued_per_peer {
            return Admission::OverShare;
        }
        let own = self.waiting.entry(requester.clone()).or_default();
        if own.is_empty() {
            self.turns.push_back(requester.clone());
        }
        own.push_back(ticket);
        self.total_waiting += 1;
        Admission::Wait(self.total_waiting - 1)
    }

    fn begin(&mut self, requester: &Requester) {
        *self.running.entry(requester.clone()).or_default() += 1;
        self.total_running += 1;
    }

    /// A running prompt of `requester` ended.
    pub(crate) fn finished(&mut self, requester: &Requester) {
        let Some(count) = self.running.get_mut(requester) else { return };
        *count -= 1;
        if *count == 0 {
            self.running.remove(requester);
        }
        self.total_running -= 1;
    }

    /// A waiting prompt was cancelled or its deadline passed. False when it does not wait (any more).
    pub(crate) fn withdraw(&mut self, requester: &Requester, ticket: Ticket) -> bool {
        let Some(own) = self.waiting.get_mut(requester) else { return false };
        let before = own.len();
        own.retain(|waiting| *waiting != ticket);
        if own.len() == before {
            return false;
        }
        self.total_waiting -= 1;
        if own.is_empty() {
            self.waiting.remove(requester);
            self.turns.retain(|turn| turn != requester);
        }
        true
    }

    /// The next prompt to begin, when there is a slot for it. Call until `None`.
    pub(crate) fn next(&mut self) -> Option<(Requester, Ticket)> {
        if self.total_running >= self.limits.slots || self.turns.is_empty() {
            return None;
        }
        let turn = self.choose();
        let requester = self.turns.remove(turn)?;
        let own = self.waiting.get_mut(&requester)?;
        let ticket = own.pop_front()?;
        if own.is_empty() {
            self.waiting.remove(&requester);
        } else {
            self.turns.push_back(requester.clone());
        }
        self.total_waiting -= 1;
        self.begin(&requester);
        Some((requester, ticket))
    }

    /// Whose turn it is: this machine's own users up to a quarter of the slots, then round robin over those below their
    /// share of running prompts; when all are above, a slot is not left empty.
    fn choose(&self) -> usize {
        let is_local = |requester: &Requester| matches!(requester, Requester::Local(_));
        let local_running: usize = self.running.iter().filter(|(requester, _)| is_local(requester)).map(|(_, count)| count).sum();
        if local_running < self.limits.slots.div_ceil(4)
            && let Some(local) = self.turns.iter().position(is_local)
        {
            return local;
        }
        let below = |requester: &Requester| self.running.get(requester).copied().unwrap_or(0) < self.limits.running_per_peer;
        self.turns.iter().position(below).unwrap_or(0)
    }

    /// Takes everything that waits, to refuse it.
    pub(crate) fn drain(&mut self) -> Vec<Ticket> {
        self.turns.clear();
        self.total_waiting = 0;
        self.waiting.drain().flat_map(|(_, tickets)| tickets).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::node::NodeId;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits { slots: 2, queued: 8, running_per_peer: 2, queued_per_peer: 4 };

    fn peer(name: &str) -> Requester {
        Requester::Peer(NodeId::new(name))
    }

    #[test]
    fn full_queue_refuses_newest() {
        let mut queue = Queue::new(LIMITS);
        let names = ["a", "b", "c"].map(peer);
        let admitted: Vec<Admission> =
            (0..11_u64).zip(names.iter().cycle()).map(|(ticket, name)| queue.admit(name, ticket)).collect();
        assert_eq!(admitted[..2], [Admission::Run, Admission::Run]);
        assert_eq!(admitted[2], Admission::Wait(0));
        assert_eq!(admitted[9], Admission::Wait(7));
        assert_eq!(admitted[10], Admission::Full);
    }

    #[test]
    fn one_requester_may_not_fill_the_queue() {
        let mut queue = Queue::new(LIMITS);
        let greedy = peer("greedy");
        for ticket in 0..6 {
            assert!(matches!(queue.admit(&greedy, ticket), Admission::Run | Admission::Wait(_)));
        }
        assert_eq!(queue.admit(&greedy, 6), Admission::OverShare);
        assert_eq!(queue.admit(&peer("polite"), 7), Admission::Wait(4));
    }

    #[test]
    fn a_polite_peer_gets_its_share_beside_a_greedy_one() {
        let limits = Limits { slots: 2, queued: 200, running_per_peer: 1, queued_per_peer: 100 };
        let mut queue = Queue::new(limits);
        let (greedy, polite) = (peer("greedy"), peer("polite"));
        let mut running = Vec::new();
        for ticket in 0..100 {
            if queue.admit(&greedy, ticket) == Admission::Run {
                running.push(greedy.clone());
            }
        }
        for ticket in 100..150 {
            queue.admit(&polite, ticket);
        }
        let mut served = 0;
        for _ in 0..60 {
            queue.finished(&running.remove(0));
            while let Some((requester, _)) = queue.next() {
                served += usize::from(requester == polite);
                running.push(requester);
            }
        }
        assert!(served >= 27, "{served} of 60 prompts, half would be 30");
    }

    #[test]
    fn a_lone_requester_uses_all_slots() {
        let mut queue = Queue::new(Limits { slots: 4, queued: 8, running_per_peer: 1, queued_per_peer: 8 });
        let lone = peer("lone");
        for ticket in 0..8 {
            queue.admit(&lone, ticket);
        }
        assert_eq!(queue.running(), 4);
        queue.finished(&lone);
        assert!(queue.next().is_some(), "a slot is not left empty");
    }

    #[test]
    fn the_owner_of_the_machine_comes_first_up_to_a_quarter() {
        let mut queue = Queue::new(Limits { slots: 4, queued: 8, running_per_peer: 4, queued_per_peer: 8 });
        for ticket in 0..6 {
            queue.admit(&peer("p"), ticket);
        }
        queue.admit(&Requester::Local(1000), 9);
        queue.admit(&Requester::Local(1000), 10);
        queue.finished(&peer("p"));
        assert_eq!(queue.next(), Some((Requester::Local(1000), 9)));
        queue.finished(&peer("p"));
        assert_eq!(queue.next(), Some((peer("p"), 4)));
    }

    #[test]
    fn withdrawn_prompts_never_start() {
        let mut queue = Queue::new(Limits { slots: 1, ..LIMITS });
        queue.admit(&peer("a"), 0);
        queue.admit(&peer("b"), 1);
        assert!(queue.withdraw(&peer("b"), 1));
        assert!(!queue.withdraw(&peer("b"), 1));
        queue.finished(&peer("a"));
        assert_eq!(queue.next(), None);
    }

    #[test]
    fn nothing_is_kept_of_who_neither_runs_nor_waits() {
        let mut queue = Queue::new(Limits { slots: 1, queued: 8, running_per_peer: 1, queued_per_peer: 0 });
        assert_eq!(queue.admit(&peer("first"), 0), Admission::Run);
        for ticket in 1..100 {
            assert_eq!(queue.admit(&peer(&ticket.to_string()), ticket), Admission::OverShare);
        }
        assert!(queue.waiting.is_empty() && queue.turns.is_empty());
        queue.finished(&peer("first"));
        assert!(queue.running.is_empty());
    }

    proptest! {
        #[test]
        fn bounds_hold_and_slots_return_to_zero(steps in proptest::collection::vec((0_u8..3, 0_u32..5), 0..300)) {
            let limits = Limits { slots: 3, queued: 6, running_per_peer: 2, queued_per_peer: 3 };
            let mut queue = Queue::new(limits);
            let mut running: Vec<Requester> = Vec::new();
            let mut waiting: Vec<(Requester, Ticket)> = Vec::new();
            for (ticket, (action, who)) in steps.into_iter().enumerate() {
                let (ticket, requester) = (ticket as Ticket, if who == 0 { Requester::Local(0) } else { peer(&who.to_string()) });
                match action {
                    0 => match queue.admit(&requester, ticket) {
                        Admission::Run => running.push(requester),
                        Admission::Wait(_) => waiting.push((requester, ticket)),
                        Admission::Full | Admission::OverShare => {}
                    },
                    1 => if let Some(ended) = running.pop() { queue.finished(&ended) },
                    _ => if let Some((requester, ticket)) = waiting.pop() { prop_assert!(queue.withdraw(&requester, ticket)) },
                }
                while let Some((requester, ticket)) = queue.next() {
                    waiting.retain(|(_, waiting)| *waiting != ticket);
                    running.push(requester);
                }
                prop_assert!(queue.running() <= limits.slots && queue.waiting() <= limits.queued);
                prop_assert_eq!((queue.running(), queue.waiting()), (running.len(), waiting.len()));
                prop_assert!(waiting.is_empty() || running.len() == limits.slots, "a slot was left empty");
            }
            for ended in running { queue.finished(&ended); }
            while let Some((requester, _)) = queue.next() { queue.finished(&requester); }
            prop_assert_eq!((queue.running(), queue.waiting()), (0, 0));
            prop_assert!(queue.running.is_empty() && queue.waiting.is_empty() && queue.turns.is_empty());
        }
    }
}
