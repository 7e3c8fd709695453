//! Which requests have a slot: the one fact that the reader, the preparer and the scheduler share.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use opengateway_engine_protocol::ErrorKind;

use crate::prepare::Prepared;

/// Whether the batch that is being computed should be stopped. llama.cpp looks here between any two operations.
static ABORT: AtomicBool = AtomicBool::new(false);

/// Whether llama.cpp should stop computing.
pub fn should_abort() -> bool {
    ABORT.load(Ordering::Relaxed)
}

/// The requests that were admitted and have not ended.
#[derive(Debug, Default)]
pub struct Requests {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// 0 until the model is loaded.
    slots: usize,
    admitted: HashSet<u64>,
    cancelled: HashSet<u64>,
    /// Those that wait for the batch.
    computing: Vec<u64>,
    /// Whether a cancel of one of them stops the batch, or only that of all.
    stops_for_one: bool,
    prepared: Vec<Prepared>,
}

impl State {
    fn should_abort(&self) -> bool {
        let cancelled = |id| self.cancelled.contains(id);
        let all = !self.computing.is_empty() && self.computing.iter().all(cancelled);
        all || (self.stops_for_one && self.computing.iter().any(cancelled))
    }
}

/// What the scheduler has to do next.
#[derive(Debug)]
pub struct Orders {
    /// Requests to be begun.
    pub begin: Vec<Prepared>,
    /// Requests to be ended, begun or not.
    pub cancel: Vec<u64>,
}

impl Requests {
    /// From now on as many are admitted.
    pub fn open(&self, slots: usize) {
        self.lock().slots = slots;
    }

    /// Gives a request its slot.
    ///
    /// # Errors
    /// There is none, or the number is in use.
    pub fn admit(&self, id: u64) -> Result<(), (ErrorKind, &'static str)> {
        let mut state = self.lock();
        if state.slots == 0 {
            return Err((ErrorKind::Busy, "the model is still being loaded"));
        }
        if state.admitted.contains(&id) {
            return Err((ErrorKind::Invalid, "a request with this id is running"));
        }
        if state.admitted.len() >= state.slots {
            return Err((ErrorKind::Busy, "all slots are taken"));
        }
        state.admitted.insert(id);
        Ok(())
    }

    /// Takes the slot back; before the end of the request is told, so that the daemon may fill it at once.
    pub fn release(&self, id: u64) {
        let mut state = self.lock();
        state.admitted.remove(&id);
        state.cancelled.remove(&id);
    }

    /// Marks a request that should end. Those that are unknown have ended already.
    pub fn cancel(&self, id: u64) {
        let mut state = self.lock();
        if state.admitted.contains(&id) {
            state.cancelled.insert(id);
            ABORT.store(state.should_abort(), Ordering::Relaxed);
        }
    }

    /// A batch is going to be computed while these wait. It is stopped when one of them is cancelled, or only when all are.
    pub fn computing(&self, ids: impl Iterator<Item = u64>, stops_for_one: bool) {
        let mut state = self.lock();
        state.stops_for_one = stops_for_one;
        state.computing.clear();
        state.computing.extend(ids);
        ABORT.store(state.should_abort(), Ordering::Relaxed);
    }

    /// The batch is done: whether it was, or might have been, stopped in the middle.
    pub fn aborted(&self) -> bool {
        self.lock().computing.clear();
        ABORT.swap(false, Ordering::Relaxed)
    }

    /// Passes on a request that is ready to be computed.
    pub fn deliver(&self, prepared: Prepared) {
        self.lock().prepared.push(prepared);
        self.changed.notify_one();
    }

    /// What there is to do; with nothing else to do, waits for it.
    pub fn orders(&self, idle: bool) -> Orders {
        let mut state = self.lock();
        while idle && state.prepared.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Orders { begin: std::mem::take(&mut state.prepared), cancel: state.cancelled.iter().copied().collect() }
    }

    /// How many have a slot.
    pub fn running(&self) -> u32 {
        u32::try_from(self.lock().admitted.len()).unwrap_or(u32::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic ends the process: nobody sees a poisoned lock for long.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_admitted_as_there_are_slots() {
        let requests = Requests::default();
        assert_eq!(requests.admit(1).unwrap_err().0, ErrorKind::Busy);
        requests.open(2);
        requests.admit(1).unwrap();
        requests.admit(2).unwrap();
        assert_eq!(requests.admit(2).unwrap_err().0, ErrorKind::Invalid);
        assert_eq!(requests.admit(3).unwrap_err().0, ErrorKind::Busy);
        requests.release(1);
        requests.admit(3).unwrap();
        assert_eq!(requests.running(), 2);
    }

    #[test]
    fn a_batch_is_stopped_when_nobody_wants_it() {
        let requests = Requests::default();
        requests.open(3);
        (1..4).for_each(|id| requests.admit(id).unwrap());
        requests.computing([1, 2].into_iter(), false);
        requests.cancel(3);
        requests.cancel(1);
        assert!(!should_abort());
        requests.cancel(2);
        assert!(should_abort() && requests.aborted());
        assert!(!should_abort());
        // Cancelled between batches, and what is not computed stops nothing.
        requests.cancel(3);
        assert!(!should_abort());
        requests.computing([3].into_iter(), false);
        assert!(requests.aborted());
    }

    #[test]
    fn a_batch_that_can_be_repeated_is_stopped_for_one() {
        let requests = Requests::default();
        requests.open(3);
        (1..4).for_each(|id| requests.admit(id).unwrap());
        requests.computing([1, 2].into_iter(), true);
        requests.cancel(3);
        assert!(!should_abort());
        requests.cancel(2);
        assert!(should_abort() && requests.aborted());
        // A cancel between batches, of one that has not ended yet.
        requests.computing([1, 2].into_iter(), true);
        assert!(requests.aborted());
        requests.release(2);
        requests.computing([1].into_iter(), true);
        assert!(!requests.aborted());
    }

    #[test]
    fn a_cancel_holds_until_the_request_ends() {
        let requests = Requests::default();
        requests.open(1);
        requests.cancel(1);
        requests.admit(1).unwrap();
        assert!(requests.orders(false).cancel.is_empty());
        requests.cancel(1);
        assert_eq!(requests.orders(false).cancel, [1]);
        assert_eq!(requests.orders(false).cancel, [1]);
        requests.release(1);
        assert!(requests.orders(false).cancel.is_empty());
    }
}
