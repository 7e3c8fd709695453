//! `WatchJobs`: how jobs go, told on a pipe to whoever may see them.
//!
//! A pipe and no signals: it has one reader, the one that was authorised; closing it ends the telling; and a reader that is
//! slow is behind by itself alone, where a queue of the bus would grow for it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::time::Instant;

use super::job::{Change, Jobs};
use super::stream::Lines;
use super::turns::Turn;
use crate::api::stream::JobLine;

/// Watchers of one user, and of all of them.
pub(super) const MAX_PER_UID: usize = 8;
pub(super) const MAX_IN_ALL: usize = 32;
/// Lines that one watcher is told in a second: more is no reading for anybody, and costs the prompts themselves.
const MAX_LINES: u32 = 200;
const SECOND: Duration = Duration::from_secs(1);

/// One reader of the changes.
#[derive(Debug)]
struct Watcher {
    lines: Lines,
    /// Whose jobs it may see; `None` is everybody's.
    uid: Option<u32>,
    second: Instant,
    told: u32,
    skipped: u64,
}

/// Tells until nobody reads any more. Holds `turn` as long.
pub(super) async fn run(jobs: &Jobs, uid: Option<u32>, write: OwnedFd, turn: Turn) {
    let _turn = turn;
    let Ok(lines) = Lines::new(write) else { return };
    let (running, changes) = jobs.watch();
    let mut watcher = Watcher { lines, uid, second: Instant::now(), told: 0, skipped: 0 };
    for record in running {
        if !watcher.may_see(record.uid) {
            continue;
        }
        watcher.lines.push_bytes(&JobLine::Job(record.now()).to_bytes());
    }
    watcher.lines.try_flush();
    watcher.follow(changes).await;
}

impl Watcher {
    fn may_see(&self, uid: u32) -> bool {
        self.uid.is_none_or(|own| own == uid)
    }

    async fn follow(mut self, mut changes: Receiver<Change>) {
        loop {
            let (unwritten, behind) = (!self.lines.is_empty(), self.skipped > 0);
            tokio::select! {
                biased;
                () = self.lines.closed() => return,
                () = self.lines.writable(), if unwritten => drop(self.lines.try_flush()),
                change = changes.recv() => match change {
                    Ok(change) => self.on_change(&change),
                    Err(RecvError::Lagged(missed)) => self.skipped += missed,
                    Err(RecvError::Closed) => return,
                },
                () = tokio::time::sleep_until(self.second + SECOND), if behind && !unwritten => self.own_up(),
            }
        }
    }

    fn on_change(&mut self, change: &Change) {
        if !self.may_see(change.uid) {
            return;
        }
        let now = Instant::now();
        if self.skipped == 0 && now.duration_since(self.second) >= SECOND {
            (self.second, self.told) = (now, 0);
        }
        if self.skipped > 0 || self.told >= MAX_LINES || !self.lines.is_empty() {
            self.skipped += 1;
            return;
        }
        self.told += 1;
        self.lines.push_bytes(&change.line);
        self.lines.try_flush();
    }

    /// Says how many changes were not told, and begins anew.
    fn own_up(&mut self) {
        self.lines.push_bytes(&JobLine::Skipped { count: std::mem::take(&mut self.skipped) }.to_bytes());
        self.lines.try_flush();
        (self.second, self.told) = (Instant::now(), 0);
    }
}
