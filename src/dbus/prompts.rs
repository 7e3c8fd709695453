//! Prompts of this machine's users: how one begins, what it reads, who watches over it, and how it ends.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use zbus::object_server::SignalEmitter;
use zbus::{Connection, MatchRule, MessageStream};

use super::access::Caller;
use super::errors::Error;
use super::guard::Guarded;
use super::job::{Job, Record};
use super::options;
use super::shared::{Shared, object_path};
use super::stream::{self, Progress};
use crate::api::names::ErrorName;
use crate::api::path;
use crate::dispatch;
use crate::domain::cluster::ClusterId;
use crate::domain::prompt::{FailureKind, MAX_PROMPT_BYTES, Text};

/// Ended jobs can be looked at for this long.
const KEEP: Duration = Duration::from_secs(30);
/// A prompt that is done within this time is not worth a subscription to its caller's departure.
const SHORT: Duration = Duration::from_millis(200);
/// Reading a prompt from a descriptor takes at most this long.
const READ_PROMPT: Duration = Duration::from_secs(10);

impl Shared {
    /// Begins a prompt: the job, its record, and the ids of ended jobs that had to go for it.
    pub(super) fn start_prompt(
        &self,
        caller: &Caller,
        cluster: &str,
        options: options::PromptOptions,
    ) -> Result<(dispatch::Job, Arc<Record>, Vec<u64>), Error> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorName::ShuttingDown, "the daemon is stopping"));
        }
        options::check_whole(&options.ask)?;
        let id = self.asked_in(cluster)?;
        let (record, surplus) = self.jobs.enter(caller.uid, id.as_ref().map(ClusterId::as_str).unwrap_or_default())?;
        let job = match id {
            Some(id) => self.dispatch.start(caller.uid, id, options.ask, options.options),
            None => self.dispatch.start_here(caller.uid, options.ask, options.options),
        };
        match job {
            Ok(job) => Ok((job, record, surplus)),
            Err(failure) => {
                record.end(&Err(failure.clone()));
                self.jobs.forget(record.id);
                Err(failure.into())
            }
        }
    }
}

/// Reads a prompt from a file of the caller's, from its beginning, bounded in size and time.
///
/// Only files: reading a pipe or a terminal may never end, and a thread would wait in it for as long as its owner likes. A
/// file system that hangs keeps `permit`, so it can hinder nothing but other prompts from descriptors.
pub(super) async fn read_prompt(fd: OwnedFd, permit: OwnedSemaphorePermit) -> Result<Text, Error> {
    let kind = rustix::fs::fstat(&fd).map(|found| rustix::fs::FileType::from_raw_mode(found.st_mode));
    if kind != Ok(rustix::fs::FileType::RegularFile) {
        return Err(Error::invalid("PromptFd is neither a memfd nor a file"));
    }
    let reading = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let file = std::fs::File::from(fd);
        let mut bytes = vec![0; MAX_PROMPT_BYTES + 1];
        let mut length = 0;
        // By position: the descriptor's own is shared with the caller, and stands at the end after it was written.
        while length < bytes.len() {
            match std::os::unix::fs::FileExt::read_at(&file, &mut bytes[length..], length as u64) {
                Ok(0) => break,
                Ok(more) => length += more,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(length);
        Ok(bytes)
    });
    let bytes = match tokio::time::timeout(READ_PROMPT, reading).await {
        Ok(Ok(Ok(bytes))) => bytes,
        Ok(Ok(Err(error))) => return Err(Error::invalid(format!("PromptFd cannot be read: {error}"))),
        Ok(Err(_)) => return Err(Error::invalid("PromptFd cannot be read")),
        Err(_) => return Err(Error::invalid(format!("PromptFd gave no end within {} s", READ_PROMPT.as_secs()))),
    };
    if bytes.len() > MAX_PROMPT_BYTES {
        return Err(Error::invalid(format!("the prompt is longer than the {MAX_PROMPT_BYTES} bytes that are taken")));
    }
    let text = String::from_utf8(bytes)
        .map_err(|error| Error::invalid(format!("the prompt is not UTF-8 from byte {} on", error.utf8_error().valid_up_to())))?;
    options::text_of("the prompt", &text)
}

/// Cancels the job when its caller leaves the bus. Asks only after a while: most prompts are over by then.
pub(super) fn watch_caller(connection: Connection, caller: Caller, record: Arc<Record>) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let Some(name) = caller.name else { return };
        tokio::time::sleep(SHORT).await;
        let rule = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender("org.freedesktop.DBus")
            .interface("org.freedesktop.DBus")
            .member("NameOwnerChanged")
            .arg(0, name.as_str())
            .build();
        let Ok(rule) = rule else { return };
        let Ok(mut changes) = MessageStream::for_match_rule(rule, &connection, None).await else { return };
        // It may have left between its call and the subscription.
        let owned = connection
            .call_method(
                Some("org.freedesktop.DBus"),
                "/org/freedesktop/DBus",
                Some("org.freedesktop.DBus"),
                "NameHasOwner",
                &(name.as_str(),),
            )
            .await;
        if let Ok(reply) = owned
            && let Ok(false) = reply.body().deserialize::<bool>()
        {
            record.cancel.cancel();
            return;
        }
        if changes.next().await.is_some() {
            record.cancel.cancel();
        }
    })
}

/// A streamed prompt from its start to 30 s after its end.
pub(super) async fn run(
    shared: Arc<Shared>,
    connection: Connection,
    caller: Caller,
    job: dispatch::Job,
    record: Arc<Record>,
    write: OwnedFd,
    ready: oneshot::Receiver<()>,
) {
    let watcher = watch_caller(connection.clone(), caller.clone(), Arc::clone(&record));
    let mut progress = Progress::new();
    let (outcome, unread) = stream::write(job, &record, &mut progress, write).await;
    watcher.abort();
    shared.jobs.over(outcome.as_ref().ok().map(|done| done.usage));
    let _ = ready.await;
    let Ok(object) = object_path(path::job_path(record.id)) else { return };
    if let Ok(emitter) = SignalEmitter::new(&connection, object.clone()) {
        let (result, details) = progress.finished(&record, &outcome);
        let unicast = match &caller.name {
            Some(name) => emitter.set_destination(name.clone().into_inner().into()),
            None => emitter,
        };
        let _ = Job::finished(&unicast, result, details).await;
    }
    // Kept for a look, unless its caller is gone.
    let gone = outcome.as_ref().is_err_and(|failure| failure.kind == FailureKind::Cancelled);
    if !gone {
        let until = tokio::time::sleep(KEEP);
        if let Some(mut lines) = unread {
            // A reader that comes back learns why there is no more.
            lines.last_words(KEEP).await;
        }
        until.await;
    }
    shared.jobs.forget(record.id);
    let _ = connection.object_server().remove::<Guarded<Job>, _>(object).await;
}
