//! `org.opengateway.Gateway1.Job`: one prompt in progress, from `StartPrompt` until 30 s after its end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio_util::sync::CancellationToken;
use zbus::message::Header;
use zbus::names::OwnedUniqueName;
use zbus::object_server::SignalEmitter;

use super::access::{Access, Action};
use super::details::{Details, micros};
use super::errors::Error;
use super::guard::Readers;
use crate::api::names::ErrorName;
use crate::api::stream::ServedBy;
use crate::domain::prompt::{Failure, FailureKind, Usage};

/// Prompts that one user may have in progress at once.
pub(super) const MAX_PER_UID: usize = 16;
/// Ended jobs that are kept for a look; the oldest goes first.
const MAX_ENDED: usize = 256;

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

/// No position was told.
const UNKNOWN: u32 = u32::MAX;

/// What is known of one job.
#[derive(Debug)]
pub(super) struct Record {
    pub id: u64,
    pub cluster: String,
    pub uid: u32,
    pub created: SystemTime,
    pub state: Mutex<State>,
    pub tokens: AtomicU32,
    /// Prompts before it where it waits; [`UNKNOWN`] as long as nobody said so.
    position: AtomicU32,
    /// The model that answers and who does, once it was taken up.
    taken: Mutex<Option<(String, ServedBy)>>,
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
        self.position.store(position.min(UNKNOWN - 1), Ordering::Relaxed);
    }

    /// Prompts before it, as long as it waits and that is known.
    pub(super) fn position(&self) -> Option<u32> {
        let position = self.position.load(Ordering::Relaxed);
        (self.state() == State::Queued && position != UNKNOWN).then_some(position)
    }

    /// A node has taken it up.
    pub(super) fn started(&self, model: &str, by: &ServedBy) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = Some((model.to_owned(), by.clone()));
        self.set_state(State::Running);
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

    /// Moves on; a job that is over stays as it is.
    pub(super) fn set_state(&self, state: State) {
        let mut now = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !now.is_over() {
            *now = state;
        }
    }
}

/// All jobs of this daemon's life.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    next: AtomicU64,
    records: Mutex<BTreeMap<u64, Arc<Record>>>,
    asked: Mutex<Asked>,
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
                state: Mutex::new(State::Queued),
                tokens: AtomicU32::new(0),
                position: AtomicU32::new(UNKNOWN),
                taken: Mutex::new(None),
                cancel: CancellationToken::new(),
                stopping: AtomicBool::new(false),
            });
            let ended: Vec<u64> = records.values().filter(|record| record.state().is_over()).map(|record| record.id).collect();
            let surplus: Vec<u64> = ended.iter().copied().take(ended.len().saturating_sub(MAX_ENDED)).collect();
            for id in &surplus {
                records.remove(id);
            }
            records.insert(record.id, Arc::clone(&record));
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
