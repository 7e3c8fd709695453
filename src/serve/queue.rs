//! The queue in front of one backend: bounded, fair by requester and by what its prompts take, pure. It decides; the worker
//! acts.

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

/// What a prompt is reckoned to take, in tokens: those of its text and those that it may answer with.
pub(crate) type Cost = u64;

/// One asker at this backend, for as long as it has prompts here.
#[derive(Debug, Default, Clone)]
struct Share {
    running: usize,
    waiting: VecDeque<(Ticket, Cost)>,
    /// Where it stands on the queue's clock: what it was given so far, in tokens.
    given: Cost,
}

/// Start-time fair queueing (Goyal, Vin and Cheng 1996): whoever was given least is next, and who comes anew stands where
/// the queue stands, so that nobody saves up by being away.
#[derive(Debug, Clone)]
pub(crate) struct Queue {
    limits: Limits,
    shares: HashMap<Requester, Share>,
    /// Requesters that wait, in the order in which they began to.
    turns: Vec<Requester>,
    /// What the one that was last let in had been given.
    clock: Cost,
    total_running: usize,
    total_waiting: usize,
}

impl Queue {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, shares: HashMap::new(), turns: Vec::new(), clock: 0, total_running: 0, total_waiting: 0 }
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
    pub(crate) fn admit(&mut self, requester: &Requester, ticket: Ticket, cost: Cost) -> Admission {
        if self.total_waiting == 0 && self.total_running < self.limits.slots {
            self.begin(requester, cost);
            return Admission::Run;
        }
        if self.total_waiting >= self.limits.queued {
            return Admission::Full;
        }
        if self.shares.get(requester).map_or(0, |share| share.waiting.len()) >= self.limits.queued_per_peer {
            return Admission::OverShare;
        }
        let share = self.shares.entry(requester.clone()).or_default();
        if share.waiting.is_empty() {
            share.given = share.given.max(self.clock);
            self.turns.push(requester.clone());
        }
        share.waiting.push_back((ticket, cost));
        self.total_waiting += 1;
        Admission::Wait(self.total_waiting - 1)
    }

    fn begin(&mut self, requester: &Requester, cost: Cost) {
        let share = self.shares.entry(requester.clone()).or_default();
        self.clock = self.clock.max(share.given);
        share.given = self.clock.saturating_add(cost);
        share.running += 1;
        self.total_running += 1;
    }

    /// A running prompt of `requester` ended. It was reckoned to take `cost` and took `used`, where that is known.
    pub(crate) fn finished(&mut self, requester: &Requester, cost: Cost, used: Option<Cost>) {
        let Some(share) = self.shares.get_mut(requester).filter(|share| share.running > 0) else { return };
        share.running -= 1;
        share.given = share.given.saturating_sub(cost).saturating_add(used.unwrap_or(cost));
        self.total_running -= 1;
        self.forget(requester);
    }

    fn forget(&mut self, requester: &Requester) {
        if self.shares.get(requester).is_some_and(|share| share.running == 0 && share.waiting.is_empty()) {
            self.shares.remove(requester);
        }
    }

    /// A waiting prompt was cancelled or its deadline passed. False when it does not wait (any more).
    pub(crate) fn withdraw(&mut self, requester: &Requester, ticket: Ticket) -> bool {
        let Some(share) = self.shares.get_mut(requester) else { return false };
        let before = share.waiting.len();
        share.waiting.retain(|(waiting, _)| *waiting != ticket);
        if share.waiting.len() == before {
            return false;
        }
        self.total_waiting -= 1;
        if share.waiting.is_empty() {
            self.turns.retain(|turn| turn != requester);
        }
        self.forget(requester);
        true
    }

    /// The next prompt to begin, when there is a slot for it. Call until `None`.
    pub(crate) fn next(&mut self) -> Option<(Requester, Ticket)> {
        if self.total_running >= self.limits.slots {
            return None;
        }
        let requester = self.turns.get(self.choose()?)?.clone();
        let share = self.shares.get_mut(&requester)?;
        let (ticket, cost) = share.waiting.pop_front()?;
        if share.waiting.is_empty() {
            self.turns.retain(|turn| *turn != requester);
        }
        self.total_waiting -= 1;
        self.begin(&requester, cost);
        Some((requester, ticket))
    }

    /// Whose turn it is: this machine's own users up to a quarter of the slots, then those below their share of running
    /// prompts; when all are above, a slot is not left empty. Among them, who was given least.
    fn choose(&self) -> Option<usize> {
        let is_local = |requester: &Requester| matches!(requester, Requester::Local(_));
        let local_running: usize =
            self.shares.iter().filter(|(requester, _)| is_local(requester)).map(|(_, share)| share.running).sum();
        let locals_first = local_running < self.limits.slots.div_ceil(4);
        let order = |requester: &Requester| {
            let share = self.shares.get(requester);
            let above = share.is_some_and(|share| share.running >= self.limits.running_per_peer);
            (!(locals_first && is_local(requester)), above, share.map_or(0, |share| share.given))
        };
        self.turns.iter().enumerate().min_by_key(|(_, requester)| order(requester)).map(|(at, _)| at)
    }

    /// What waits, in the order in which it would begin if nothing else came and every prompt took what it is reckoned to.
    pub(crate) fn order(&self) -> Vec<Ticket> {
        let mut rest = self.clone();
        let mut order = Vec::with_capacity(rest.total_waiting);
        // Each that begins takes the slot of one that ends; of whom, is not known: the shares of running stay out of it.
        rest.limits.slots = usize::MAX;
        rest.limits.running_per_peer = usize::MAX;
        while let Some((_, ticket)) = rest.next() {
            order.push(ticket);
        }
        order
    }

    /// Takes everything that waits, to refuse it.
    pub(crate) fn drain(&mut self) -> Vec<Ticket> {
        self.turns.clear();
        self.total_waiting = 0;
        let tickets = self.shares.values_mut().flat_map(|share| share.waiting.drain(..)).map(|(ticket, _)| ticket).collect();
        self.shares.retain(|_, share| share.running > 0);
        tickets
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
            (0..11_u64).zip(names.iter().cycle()).map(|(ticket, name)| queue.admit(name, ticket, 1)).collect();
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
            assert!(matches!(queue.admit(&greedy, ticket, 1), Admission::Run | Admission::Wait(_)));
        }
        assert_eq!(queue.admit(&greedy, 6, 1), Admission::OverShare);
        assert_eq!(queue.admit(&peer("polite"), 7, 1), Admission::Wait(4));
    }

    #[test]
    fn a_polite_peer_gets_its_share_beside_a_greedy_one() {
        let limits = Limits { slots: 2, queued: 200, running_per_peer: 1, queued_per_peer: 100 };
        let mut queue = Queue::new(limits);
        let (greedy, polite) = (peer("greedy"), peer("polite"));
        let mut running = Vec::new();
        for ticket in 0..100 {
            if queue.admit(&greedy, ticket, 1) == Admission::Run {
                running.push(greedy.clone());
            }
        }
        for ticket in 100..150 {
            queue.admit(&polite, ticket, 1);
        }
        let mut served = 0;
        for _ in 0..60 {
            queue.finished(&running.remove(0), 1, None);
            while let Some((requester, _)) = queue.next() {
                served += usize::from(requester == polite);
                running.push(requester);
            }
        }
        assert!(served >= 27, "{served} of 60 prompts, half would be 30");
    }

    /// Runs prompts of these askers, each always with some that wait, and gives the tokens that each was given.
    fn rounds(costs: &[(Requester, Cost)], rounds: usize) -> Vec<Cost> {
        let limits = Limits { slots: 1, queued: 64, running_per_peer: 1, queued_per_peer: 4 };
        let mut queue = Queue::new(limits);
        let mut given = vec![0; costs.len()];
        let mut running = None;
        for ticket in 0..rounds {
            for (requester, cost) in costs {
                while matches!(queue.admit(requester, ticket as Ticket, *cost), Admission::Run | Admission::Wait(_)) {
                    running.get_or_insert_with(|| requester.clone());
                }
            }
            let ended = running.take().unwrap();
            let at = costs.iter().position(|(requester, _)| *requester == ended).unwrap();
            given[at] += costs[at].1;
            queue.finished(&ended, costs[at].1, None);
            running = queue.next().map(|(requester, _)| requester);
        }
        given
    }

    #[test]
    fn shares_are_of_tokens_not_of_prompts() {
        let given =
            rounds(&[(peer("long"), 4000), (peer("short"), 100), (Requester::Local(1), 1000), (Requester::Local(2), 500)], 4000);
        // With one slot this machine's users come first: the quarter of it is that slot.
        assert!(given[0] <= 4000 && given[1] == 0, "{given:?}");
        assert!(given[2].abs_diff(given[3]) <= 1000, "{given:?}");
        let given = rounds(&[(peer("long"), 4000), (peer("short"), 100)], 4000);
        assert!(given[0].abs_diff(given[1]) <= 4100, "{given:?}");
    }

    #[test]
    fn what_was_really_used_is_what_counts() {
        let mut queue = Queue::new(Limits { slots: 1, queued: 8, running_per_peer: 8, queued_per_peer: 8 });
        let (modest, liar) = (peer("modest"), peer("liar"));
        queue.admit(&liar, 0, 1);
        for ticket in 0..3 {
            queue.admit(&modest, 10 + ticket, 100);
            queue.admit(&liar, 20 + ticket, 1);
        }
        // The liar said 1 and took 1000: it is behind until the others had as much.
        queue.finished(&liar, 1, Some(1000));
        for expected in [10, 11, 12] {
            assert_eq!(queue.next(), Some((modest.clone(), expected)));
            queue.finished(&modest, 100, None);
        }
        assert_eq!(queue.next(), Some((liar, 20)));
    }

    #[test]
    fn who_was_away_has_nothing_saved_up() {
        let mut queue = Queue::new(Limits { slots: 1, queued: 64, running_per_peer: 8, queued_per_peer: 32 });
        let (busy, back) = (peer("busy"), peer("back"));
        queue.admit(&busy, 0, 100);
        for ticket in 1..=10 {
            queue.admit(&busy, ticket, 100);
            queue.finished(&busy, 100, None);
            assert!(queue.next().is_some());
        }
        for ticket in 11..=20 {
            queue.admit(&busy, ticket, 100);
            queue.admit(&back, 100 + ticket, 100);
        }
        let mut running = busy.clone();
        let turns: Vec<bool> = (0..8)
            .map(|_| {
                queue.finished(&running, 100, None);
                running = queue.next().unwrap().0;
                running == back
            })
            .collect();
        assert!((3..=5).contains(&turns.iter().filter(|&&turn| turn).count()), "{turns:?}");
    }

    #[test]
    fn the_order_told_is_the_order_in_which_they_begin() {
        let mut queue = Queue::new(Limits { slots: 1, queued: 64, running_per_peer: 8, queued_per_peer: 32 });
        queue.admit(&peer("x"), 0, 10);
        for ticket in 1..=4 {
            queue.admit(&peer("a"), ticket, 10);
        }
        queue.admit(&peer("b"), 5, 10);
        let order = queue.order();
        assert_eq!(order, [1, 5, 2, 3, 4]);
        let mut running = peer("x");
        for expected in order {
            queue.finished(&running, 10, None);
            let (requester, ticket) = queue.next().unwrap();
            assert_eq!(ticket, expected);
            running = requester;
        }
    }

    #[test]
    fn a_lone_requester_uses_all_slots() {
        let mut queue = Queue::new(Limits { slots: 4, queued: 8, running_per_peer: 1, queued_per_peer: 8 });
        let lone = peer("lone");
        for ticket in 0..8 {
            queue.admit(&lone, ticket, 1);
        }
        assert_eq!(queue.running(), 4);
        queue.finished(&lone, 1, None);
        assert!(queue.next().is_some(), "a slot is not left empty");
    }

    #[test]
    fn the_owner_of_the_machine_comes_first_up_to_a_quarter() {
        let mut queue = Queue::new(Limits { slots: 4, queued: 8, running_per_peer: 4, queued_per_peer: 8 });
        for ticket in 0..6 {
            queue.admit(&peer("p"), ticket, 1);
        }
        queue.admit(&Requester::Local(1000), 9, 1);
        queue.admit(&Requester::Local(1000), 10, 1);
        queue.finished(&peer("p"), 1, None);
        assert_eq!(queue.next(), Some((Requester::Local(1000), 9)));
        queue.finished(&peer("p"), 1, None);
        assert_eq!(queue.next(), Some((peer("p"), 4)));
    }

    #[test]
    fn withdrawn_prompts_never_start() {
        let mut queue = Queue::new(Limits { slots: 1, ..LIMITS });
        queue.admit(&peer("a"), 0, 1);
        queue.admit(&peer("b"), 1, 1);
        assert!(queue.withdraw(&peer("b"), 1));
        assert!(!queue.withdraw(&peer("b"), 1));
        queue.finished(&peer("a"), 1, None);
        assert_eq!(queue.next(), None);
    }

    #[test]
    fn nothing_is_kept_of_who_neither_runs_nor_waits() {
        let mut queue = Queue::new(Limits { slots: 1, queued: 8, running_per_peer: 1, queued_per_peer: 0 });
        assert_eq!(queue.admit(&peer("first"), 0, 1), Admission::Run);
        for ticket in 1..100 {
            assert_eq!(queue.admit(&peer(&ticket.to_string()), ticket, 1), Admission::OverShare);
        }
        assert!(queue.shares.len() == 1 && queue.turns.is_empty());
        queue.finished(&peer("first"), 1, None);
        assert!(queue.shares.is_empty());
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
                    0 => match queue.admit(&requester, ticket, u64::from(who) * 100) {
                        Admission::Run => running.push(requester),
                        Admission::Wait(_) => waiting.push((requester, ticket)),
                        Admission::Full | Admission::OverShare => {}
                    },
                    1 => if let Some(ended) = running.pop() { queue.finished(&ended, 100, Some(7)) },
                    _ => if let Some((requester, ticket)) = waiting.pop() { prop_assert!(queue.withdraw(&requester, ticket)) },
                }
                while let Some((requester, ticket)) = queue.next() {
                    waiting.retain(|(_, waiting)| *waiting != ticket);
                    running.push(requester);
                }
                prop_assert!(queue.running() <= limits.slots && queue.waiting() <= limits.queued);
                prop_assert_eq!((queue.running(), queue.waiting()), (running.len(), waiting.len()));
                let mut order = queue.order();
                order.sort_unstable();
                let mut tickets: Vec<Ticket> = waiting.iter().map(|(_, ticket)| *ticket).collect();
                tickets.sort_unstable();
                prop_assert_eq!(order, tickets);
                prop_assert!(waiting.is_empty() || running.len() == limits.slots, "a slot was left empty");
            }
            for ended in running { queue.finished(&ended, 100, Some(7)); }
            while let Some((requester, _)) = queue.next() { queue.finished(&requester, 100, None); }
            prop_assert_eq!((queue.running(), queue.waiting()), (0, 0));
            prop_assert!(queue.shares.is_empty() && queue.turns.is_empty());
        }
    }
}
