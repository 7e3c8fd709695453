//! `org.opengateway.Gateway1.Job`: one prompt in progress, from `StartPrompt` until 30 s after its end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use zbus::message::Header;
use zbus::names::OwnedUniqueName;
use zbus::object_server::SignalEmitter;

use super::access::{Access, Action};
use super::details::{Details, micros};
use super::errors::{Error, failure_name};
use super::guard::Readers;
use crate::api::names::ErrorName;
use crate::api::stream::{JobLine, JobNow, ServedBy};
use crate::domain::prompt::{Done, Failure, FailureKind, Usage};

/// Prompts that one user may have in progress at once.
pub(super) const MAX_PER_UID: usize = 16;
/// Ended jobs that are kept for a look; the oldest goes first.
const MAX_ENDED: usize = 256;
/// Changes of jobs that a watcher may be behind; it is told how many it missed.
const CHANGES: usize = 256;

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Queued,
    Running,
    Done,
    Cancelled,
    Failed,
}

impl State {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }

    const fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Cancelled | Self::Failed)
    }
}

/// What has become of a job, for whoever watches those of its user.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub uid: u32,
    /// As it is written to the watcher.
    pub line: Arc<[u8]>,
}

/// How a job ended.
#[derive(Debug, Clone, Copy)]
struct End {
    after: std::time::Duration,
    usage: Option<Usage>,
    error: Option<ErrorName>,
}

/// No position was told.
const UNKNOWN: u32 = u32::MAX;

/// What is known of one job.
#[derive(Debug)]
pub(super) struct Record {
    pub id: u64,
    pub cluster: String,
    pub uid: u32,
    pub created: SystemTime,
    begun: Instant,
    state: Mutex<State>,
    pub tokens: AtomicU32,
    /// Prompts before it where it waits; [`UNKNOWN`] as long as nobody said so.
    position: AtomicU32,
    /// The model that answers and who does, once it was taken up.
    taken: Mutex<Option<(String, ServedBy)>>,
    end: Mutex<Option<End>>,
    changes: broadcast::Sender<Change>,
    pub cancel: CancellationToken,
    /// It is cancelled because the daemon stops.
    stopping: AtomicBool,
}

impl Record {
    pub(super) fn state(&self) -> State {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The serving node says how many are before it.
    pub(super) fn waits(&self, position: u32) {
        let position = position.min(UNKNOWN - 1);
        if self.position.swap(position, Ordering::Relaxed) != position {
            self.tell();
        }
    }

    /// Prompts before it, as long as it waits and that is known.
    pub(super) fn position(&self) -> Option<u32> {
        let position = self.position.load(Ordering::Relaxed);
        (self.state() == State::Queued && position != UNKNOWN).then_some(position)
    }

    /// A node has taken it up.
    pub(super) fn started(&self, model: &str, by: &ServedBy) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = Some((model.to_owned(), by.clone()));
        if self.set_state(State::Running) {
            self.tell();
        }
    }

    /// The model that answers and who does, once it was taken up.
    pub(super) fn taken(&self) -> Option<(String, ServedBy)> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What a job that was cancelled ends with.
    pub(super) fn cancelled(&self) -> Failure {
        if self.stopping.load(Ordering::Relaxed) {
            Failure::new(FailureKind::ShuttingDown, "the daemon is stopping")
        } else {
            Failure::new(FailureKind::Cancelled, "the prompt was cancelled")
        }
    }

    /// It is over; the first end counts.
    pub(super) fn end(&self, outcome: &Result<Done, Failure>) {
        let error = outcome.as_ref().err().map(|failure| failure_name(failure.kind));
        let state = match error {
            None => State::Done,
            Some(ErrorName::Cancelled) => State::Cancelled,
            Some(_) => State::Failed,
        };
        let usage = outcome.as_ref().ok().map(|done| done.usage);
        let end = End { after: self.begun.elapsed(), usage, error };
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
        if self.set_state(state) {
            self.tell();
        }
    }

    /// Moves on; a job that is over stays as it is. True when it moved.
    fn set_state(&self, state: State) -> bool {
        let mut now = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let moves = !now.is_over();
        if moves {
            *now = state;
        }
        moves
    }

    /// How it is now, as its watchers are told: no text of it.
    pub(super) fn now(&self) -> JobNow {
        let end = *self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let (model, served_by) = self.taken().unzip();
        let tokens = self.tokens.load(Ordering::Relaxed);
        let usage = end.and_then(|end| end.usage);
        let after = end.map_or_else(|| self.begun.elapsed(), |end| end.after);
        JobNow {
            id: self.id,
            cluster: self.cluster.clone(),
            uid: self.uid,
            state: self.state().as_str().to_owned(),
            position: self.position(),
            model,
            served_by,
            prompt_tokens: usage.map(|usage| usage.prompt_tokens),
            completion_tokens: usage.map_or(tokens, |usage| usage.completion_tokens),
            duration_us: u64::try_from(after.as_micros()).unwrap_or(u64::MAX),
            error: end.and_then(|end| end.error).map(|name| name.as_str().to_owned()),
        }
    }

    /// Tells the watchers, if there are any: most prompts have none, and must not pay for them.
    fn tell(&self) {
        if self.changes.receiver_count() > 0 {
            let line = JobLine::Job(self.now()).to_bytes().into();
            let _ = self.changes.send(Change { uid: self.uid, line });
        }
    }
}

/// All jobs of this daemon's life.
#[derive(Debug)]
pub(super) struct Jobs {
    next: AtomicU64,
    records: Mutex<BTreeMap<u64, Arc<Record>>>,
    asked: Mutex<Asked>,
    changes: broadcast::Sender<Change>,
}

impl Default for Jobs {
    fn default() -> Self {
        let (changes, _) = broadcast::channel(CHANGES);
        Self { next: AtomicU64::default(), records: Mutex::default(), asked: Mutex::default(), changes }
    }
}

/// What this machine's users asked over the bus so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asked {
    pub prompts: u64,
    pub failed: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

impl Jobs {
    fn with<T>(&self, change: impl FnOnce(&mut BTreeMap<u64, Arc<Record>>) -> T) -> T {
        change(&mut self.records.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Enters a job; gives the ids of ended ones that had to go for it.
    ///
    /// # Errors
    /// `Busy`: this user has as many prompts in progress as one may have.
    pub(super) fn enter(&self, uid: u32, cluster: &str) -> Result<(Arc<Record>, Vec<u64>), Error> {
        self.with(|records| {
            let own = records.values().filter(|record| record.uid == uid && !record.state().is_over()).count();
            if own >= MAX_PER_UID {
                return Err(Error::new(
                    ErrorName::Busy,
                    format!("user {uid} has {MAX_PER_UID} prompts in progress, which is the limit"),
                ));
            }
            let record = Arc::new(Record {
                id: self.next.fetch_add(1, Ordering::Relaxed) + 1,
                cluster: cluster.to_owned(),
                uid,
                created: SystemTime::now(),
                begun: Instant::now(),
                state: Mutex::new(State::Queued),
                tokens: AtomicU32::new(0),
                position: AtomicU32::new(UNKNOWN),
                taken: Mutex::new(None),
                end: Mutex::new(None),
                changes: self.changes.clone(),
                cancel: CancellationToken::new(),
                stopping: AtomicBool::new(false),
            });
            let ended: Vec<u64> = records.values().filter(|record| record.state().is_over()).map(|record| record.id).collect();
            let surplus: Vec<u64> = ended.iter().copied().take(ended.len().saturating_sub(MAX_ENDED)).collect();
            for id in &surplus {
                records.remove(id);
            }
            records.insert(record.id, Arc::clone(&record));
            record.tell();
            Ok((record, surplus))
        })
    }

    /// Counts a prompt that is over; `None` is one without a whole answer.
    pub(super) fn over(&self, usage: Option<Usage>) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.prompts += 1;
        match usage {
            Some(usage) => {
                asked.prompt_tokens += u64::from(usage.prompt_tokens);
                asked.completion_tokens += u64::from(usage.completion_tokens);
            }
            None => asked.failed += 1,
        }
    }

    /// What was asked so far.
    pub(super) fn asked(&self) -> Asked {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Jobs that are not over, and every change from then on.
    pub(super) fn watch(&self) -> (Vec<Arc<Record>>, broadcast::Receiver<Change>) {
        // Subscribed first: what changes in between is told twice, never not at all.
        let changes = self.changes.subscribe();
        (self.list().into_iter().filter(|record| !record.state().is_over()).collect(), changes)
    }

    pub(super) fn forget(&self, id: u64) {
        self.with(|records| records.remove(&id));
    }

    pub(super) fn list(&self) -> Vec<Arc<Record>> {
        self.with(|records| records.values().cloned().collect())
    }

    pub(super) fn active(&self) -> usize {
        self.with(|records| records.values().filter(|record| !record.state().is_over()).count())
    }

    /// Cancels everything: the daemon stops.
    pub(super) fn cancel_all(&self) {
        self.with(|records| {
            for record in records.values() {
                record.stopping.store(true, Ordering::Relaxed);
                record.cancel.cancel();
            }
        });
    }
}

/// The object of one job.
#[derive(Debug)]
pub(super) struct Job {
    pub record: Arc<Record>,
    /// The connection that it is for.
    pub caller: Option<OwnedUniqueName>,
    pub access: Arc<Access>,
}

/// Its owner, and root. Who manages the node has `ListJobs`.
impl Readers for Job {
    fn may_read(&self, header: Option<&Header<'_>>) -> bool {
        let is_caller = |header: &Header<'_>| {
            let names = header.sender().zip(self.caller.as_ref());
            names.is_some_and(|(sender, caller)| sender.as_str() == caller.as_str())
        };
        header.is_some_and(|header| is_caller(header) || self.access.is_known_as(header, self.record.uid))
    }
}

#[zbus::interface(name = "org.opengateway.Gateway1.Job", introspection_docs = false)]
impl Job {
    async fn cancel(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &zbus::Connection,
    ) -> Result<(), Error> {
        let caller = self.access.caller(connection, &header).await?;
        if caller.uid != self.record.uid {
            let manager = self.access.require(connection, &header, Action::Manage).await;
            manager.map_err(|error| {
                Error::new(error.name, format!("job {} belongs to another user: {}", self.record.id, error.message))
            })?;
        }
        self.record.cancel.cancel();
        Ok(())
    }

    #[zbus(signal)]
    pub(super) async fn finished(emitter: &SignalEmitter<'_>, result: &str, details: Details) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> u64 {
        self.record.id
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn cluster_id(&self) -> String {
        self.record.cluster.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn uid(&self) -> u32 {
        self.record.uid
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn created_at(&self) -> u64 {
        micros(self.record.created)
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn state(&self) -> String {
        self.record.state().as_str().to_owned()
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn completion_tokens(&self) -> u32 {
        self.record.tokens.load(Ordering::Relaxed)
    }
}
