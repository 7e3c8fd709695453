//! How much one user, and all users together, can make this daemon do at once. Who has no turn is told, never queued.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Turns that are given out and come back.
#[derive(Debug)]
pub(super) struct Turns {
    per_user: usize,
    in_all: usize,
    held: Arc<Mutex<HashMap<u32, usize>>>,
}

/// A turn, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    held: Arc<Mutex<HashMap<u32, usize>>>,
    uid: u32,
}

/// There is no turn now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// This user has as many as one may have.
    OfUser(usize),
    /// All users together have as many as there are.
    InAll(usize),
}

impl Turns {
    pub(super) fn new(per_user: usize, in_all: usize) -> Self {
        Self { per_user, in_all, held: Arc::default() }
    }

    /// A turn for `uid`.
    ///
    /// # Errors
    /// [`Full`]: who has them, and how many there are.
    pub(super) fn take(&self, uid: u32) -> Result<Turn, Full> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.get(&uid).is_some_and(|&count| count >= self.per_user) {
            return Err(Full::OfUser(self.per_user));
        }
        if held.values().sum::<usize>() >= self.in_all {
            return Err(Full::InAll(self.in_all));
        }
        *held.entry(uid).or_default() += 1;
        Ok(Turn { held: Arc::clone(&self.held), uid })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.uid);
            }
        }
    }
}

impl Full {
    /// "2 pings of user 1000 are running, which is the limit; try again in a moment".
    pub(super) fn sentence(self, what: &str, uid: u32, do_what: &str) -> String {
        let (limit, whose) = match self {
            Self::OfUser(limit) => (limit, format!(" of user {uid}")),
            Self::InAll(limit) => (limit, String::new()),
        };
        format!("{limit} {what}{whose} {do_what}, which is the limit; try again in a moment")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_so_many_turns_and_not_one_more() {
        let turns = Turns::new(2, 3);
        let mut held: Vec<Turn> = (0..2).map(|_| turns.take(1000).unwrap()).collect();
        assert_eq!(turns.take(1000).unwrap_err(), Full::OfUser(2));
        let other = turns.take(1001).expect("another user's are counted apart");
        assert_eq!(turns.take(1002).unwrap_err(), Full::InAll(3));
        held.pop();
        assert!(turns.take(1002).is_ok(), "a turn that is dropped is there again");
        drop((held, other));
        assert!(turns.held.lock().unwrap().is_empty());
        let said = Full::OfUser(2).sentence("pings", 1000, "are running");
        assert_eq!(said, "2 pings of user 1000 are running, which is the limit; try again in a moment");
    }
}
