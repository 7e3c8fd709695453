//! What is asked of the task: each request is checked here and done by a job beside it.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::entry::Entry;
use super::task::{Outcome, Task};
use super::{ModelError, Progress, Request, Verified, store};
use crate::domain::prompt::{Failure, FailureKind};
use crate::serve::engine::Engine;

/// Copies and checks at once.
const JOBS: usize = 2;

/// Where an outcome goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, ModelError>>;

impl Task {
    pub(super) fn on_request(&mut self, request: Request) {
        match request {
            Request::Add { name, file, digest, progress, reply } => {
                if let Some(reply) = self.begin_job(reply) {
                    let directory = self.settings.borrow().directory.clone();
                    self.jobs.spawn_blocking(move || {
                        let added = store::add(&directory, &name, file, digest, &progress);
                        Outcome::Added(name, added, reply)
                    });
                }
            }
            Request::Verify { name, progress, reply } => self.verify(&name, progress, reply),
            Request::Remove(name, reply) => self.remove(name, reply),
            Request::Load(name, reply) => {
                self.with_engine(&name, reply, |engine| async move { engine.load().await.map_err(ModelError::Refused) });
            }
            Request::Unload(name, reply) => self.with_engine(&name, reply, |engine| async move {
                engine.unload().await;
                Ok(())
            }),
        }
    }

    fn begin_job<T>(&mut self, reply: Reply<T>) -> Option<Reply<T>> {
        if self.busy >= JOBS {
            let _ = reply.send(Err(ModelError::Busy));
            return None;
        }
        self.busy += 1;
        Some(reply)
    }

    fn verify(&mut self, name: &str, progress: mpsc::Sender<Progress>, reply: Reply<Verified>) {
        let Some(entry) = self.models.get(name) else {
            let _ = reply.send(Err(ModelError::NoSuchModel(name.to_owned())));
            return;
        };
        let path = entry.found.path.clone();
        if let Some(reply) = self.begin_job(reply) {
            self.jobs.spawn_blocking(move || {
                let verified = store::verify(&path, &progress);
                Outcome::Verified(path, verified, reply)
            });
        }
    }

    fn remove(&mut self, name: String, reply: Reply<()>) {
        let Some(entry) = self.models.get_mut(&name) else {
            let _ = reply.send(Err(ModelError::NoSuchModel(name)));
            return;
        };
        let directory = self.settings.borrow().directory.clone();
        let busy = entry.serving.as_ref().map_or(0, |serving| serving.engine.status().busy);
        let refused = match entry.found.path.display() {
            _ if entry.leaving => Some("it is being removed just now".to_owned()),
            path if !entry.found.own => {
                Some(format!("{path} is not in {}, where models are added and removed", directory.display()))
            }
            _ if busy > 0 => Some(format!(
                "{name} answers {busy} prompt{} now; try again when they have ended",
                if busy == 1 { "" } else { "s" }
            )),
            _ => None,
        };
        if let Some(why) = refused {
            let _ = reply.send(Err(ModelError::Refused(why)));
            return;
        }
        entry.leaving = true;
        let serving = entry.serving.take();
        let serve = self.serve.clone();
        self.jobs.spawn(async move {
            if let Some(serving) = serving {
                serve.remove(serving.backend).await;
                serving.engine.stop(Failure::new(FailureKind::ModelUnavailable, "the model is being removed")).await;
            }
            let leaving = name.clone();
            let outcome = tokio::task::spawn_blocking(move || store::remove(&directory, &leaving)).await;
            let outcome = outcome.unwrap_or_else(|error| Err(ModelError::Storage(error.to_string())));
            Outcome::Removed(name, outcome, reply)
        });
    }

    fn with_engine<F>(&self, name: &str, reply: Reply<()>, what: impl FnOnce(Arc<Engine>) -> F)
    where
        F: Future<Output = Result<(), ModelError>> + Send + 'static,
    {
        let refused = match self.models.get(name) {
            None => ModelError::NoSuchModel(name.to_owned()),
            Some(Entry { serving: Some(serving), .. }) => {
                let doing = what(Arc::clone(&serving.engine));
                tokio::spawn(async move { reply.send(doing.await) });
                return;
            }
            Some(entry) => match (&entry.found.header, self.absent()) {
                (Err(why), _) => ModelError::Invalid(format!("{name}: {why}")),
                (Ok(_), Some(absent)) => ModelError::NoEngine(absent),
                (Ok(_), None) => ModelError::Refused("it is being removed just now".to_owned()),
            },
        };
        let _ = reply.send(Err(refused));
    }
}
