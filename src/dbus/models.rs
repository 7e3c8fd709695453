//! `org.opengateway.Gateway1.Models`: what can be asked, and the files and engine behind it on this machine.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use zbus::Connection;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;

use super::access::Action;
use super::catalogue::{self, Offered};
use super::details::{Details, micros, put, text};
use super::errors::Error;
use super::guard::Readers;
use super::options::{self, Raw};
use super::shared::Shared;
use super::{stream, transfer};
use crate::api::names::ErrorName;
use crate::api::stream::Step;
use crate::domain::node::{ModelState, NodeId};
use crate::models::{Local, Progress, Verified, hex};

/// Steps of a copy that may wait to be told.
const STEPS: usize = 16;

/// Beside the manager on the root object.
#[derive(Debug)]
pub(super) struct Models(pub Arc<Shared>);

impl Readers for Models {}

impl Models {
    /// Every model that can be asked for: of the members of a cluster and of this machine.
    fn offered(&self, cluster: &str) -> Result<Vec<Offered>, Error> {
        let shared = &self.0;
        let mut offered = shared.own_models();
        let id = match shared.joined(cluster) {
            Err(error) if cluster.is_empty() && shared.net.snapshot().clusters.is_empty() => {
                drop(error);
                return Ok(offered);
            }
            joined => joined?,
        };
        let snapshot = shared.net.snapshot();
        let members = snapshot.clusters.get(&id).map(|view| view.members.as_slice()).unwrap_or_default();
        for member in members.iter().filter(|member| member.serving && !member.draining) {
            offered.extend(member.models.iter().map(|model| Offered {
                id: member.id.clone(),
                node: member.name.clone(),
                local: false,
                free_slots: Some(member.free_slots),
                model: model.clone(),
                problem: None,
                tokens_per_second: shared.dispatch.speed(&member.id, &model.name),
            }));
        }
        Ok(offered)
    }

    async fn require(&self, connection: &Connection, header: &Header<'_>) -> Result<(), Error> {
        self.0.access.require(connection, header, Action::Manage).await.map(drop)
    }

    fn permit(&self) -> Result<OwnedSemaphorePermit, Error> {
        let permit = Arc::clone(&self.0.transfers).try_acquire_owned();
        permit.map_err(|_| Error::new(ErrorName::Busy, "too many models are being added or verified; try again in a moment"))
    }
}

impl Shared {
    /// The models of this machine: those that it offers, and the files that it cannot offer now.
    fn own_models(&self) -> Vec<Offered> {
        let offer = self.serve.offer().borrow().clone();
        let files = self.models.list();
        let me = self.net.snapshot().peer_id.clone().unwrap_or_else(|| NodeId::new(""));
        let own = |model, file: Option<&Local>| Offered {
            id: me.clone(),
            node: self.node_name.clone(),
            local: true,
            free_slots: Some(offer.free_slots),
            problem: file.and_then(|file| file.problem.clone()),
            tokens_per_second: file.and_then(|file| file.tokens_per_second),
            model,
        };
        let mut offered: Vec<Offered> = Vec::new();
        for model in &offer.models {
            let mut one = own(model.clone(), files.iter().find(|file| file.name == model.name));
            one.tokens_per_second = one.tokens_per_second.or_else(|| self.dispatch.speed(&me, &model.name));
            offered.push(one);
        }
        let rest = files.iter().filter(|file| offer.models.iter().all(|model| model.name != file.name));
        offered.extend(rest.map(|file| own(catalogue::offer_of(file), Some(file))));
        offered
    }

    /// Whether this installation has an engine that is switched on.
    pub(super) fn has_engine(&self) -> bool {
        let settings = self.engine.borrow();
        settings.enabled && settings.program.is_file()
    }
}

/// How many of them are loaded.
pub(super) fn loaded(models: &[Local]) -> u32 {
    u32::try_from(models.iter().filter(|model| model.state == ModelState::Ready).count()).unwrap_or(u32::MAX)
}

/// How many there are.
pub(super) fn count(models: &[Local]) -> u32 {
    u32::try_from(models.len()).unwrap_or(u32::MAX)
}

fn added(model: Local) -> Step {
    Step::End { digest: model.digest.as_ref().map(hex), name: model.name, size: Some(model.size), expected: None, intact: None }
}

fn verified(name: String, found: &Verified) -> Step {
    Step::End {
        name,
        size: None,
        digest: Some(hex(&found.digest)),
        expected: found.expected.as_ref().map(hex),
        intact: found.expected.map(|expected| expected == found.digest),
    }
}

#[zbus::interface(name = "org.opengateway.Gateway1.Models", introspection_docs = false)]
impl Models {
    #[zbus(out_args("models"))]
    async fn list_models(&self, cluster_id: String, options: Raw) -> Result<Vec<(String, Details)>, Error> {
        let wanted = options::list_models(options)?;
        Ok(catalogue::of_cluster(self.offered(&cluster_id)?, wanted.as_deref()))
    }

    #[zbus(out_args("models"))]
    async fn list_local(&self) -> Result<Vec<(String, Details)>, Error> {
        let models = self.0.models.list();
        Ok(models.iter().map(|model| (super::errors::without_nul(model.name.clone()), catalogue::local(model))).collect())
    }

    #[zbus(out_args("progress"))]
    async fn add(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: String,
        file: zbus::OwnedFd,
        options: Raw,
    ) -> Result<zbus::OwnedFd, Error> {
        let name = options::model_name(name)?;
        let digest = options::add(options)?;
        let file: OwnedFd = file.into();
        self.require(connection, &header).await?;
        // A pipe may have no end, and nobody would know how far it is. A file of a network may let one wait for its kind.
        let looked = tokio::task::spawn_blocking(move || (rustix::fs::fstat(&file).map(|found| found.st_mode), file)).await;
        let Ok((Ok(mode), file)) = looked else { return Err(Error::invalid("argument file cannot be looked at")) };
        if rustix::fs::FileType::from_raw_mode(mode) != rustix::fs::FileType::RegularFile {
            return Err(Error::invalid("argument file is no file"));
        }
        let permit = self.permit()?;
        let (read, write) = stream::pipe()?;
        let (progress, steps) = mpsc::channel::<Progress>(STEPS);
        let models = self.0.models.clone();
        let work = async move { models.add(name, file, digest, progress).await };
        tokio::spawn(transfer::run(write, steps, work, added, permit));
        Ok(read.into())
    }

    #[zbus(out_args("progress"))]
    async fn verify(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: String,
        options: Raw,
    ) -> Result<zbus::OwnedFd, Error> {
        let name = options::model_name(name)?;
        options::none(options)?;
        self.require(connection, &header).await?;
        let permit = self.permit()?;
        let (read, write) = stream::pipe()?;
        let (progress, steps) = mpsc::channel::<Progress>(STEPS);
        let (models, asked) = (self.0.models.clone(), name.clone());
        let work = async move { models.verify(asked, progress).await };
        tokio::spawn(transfer::run(write, steps, work, move |found| verified(name, &found), permit));
        Ok(read.into())
    }

    async fn remove(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: String,
    ) -> Result<(), Error> {
        let name = options::model_name(name)?;
        self.require(connection, &header).await?;
        Ok(self.0.models.remove(name).await?)
    }

    async fn load(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: String,
    ) -> Result<(), Error> {
        let name = options::model_name(name)?;
        self.require(connection, &header).await?;
        Ok(self.0.models.load(name).await?)
    }

    async fn unload(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: String,
    ) -> Result<(), Error> {
        let name = options::model_name(name)?;
        self.require(connection, &header).await?;
        Ok(self.0.models.unload(name).await?)
    }

    #[zbus(out_args("usage"))]
    async fn get_usage(&self) -> Result<Details, Error> {
        let models = self.0.models.list();
        let sum = |of: fn(&Local) -> u64| models.iter().map(of).fold(0, u64::saturating_add);
        let of_model = |model: &Local| {
            let mut details = Details::from([
                ("Name", text(&model.name)),
                ("Answered", model.answered.into()),
                ("PromptTokens", model.prompt_tokens.into()),
                ("CompletionTokens", model.completion_tokens.into()),
                ("Crashes", model.crashes.into()),
            ]);
            put(&mut details, "TokensPerSecond", model.tokens_per_second.filter(|speed| speed.is_finite()));
            details
        };
        let used = models.iter().filter(|model| model.answered > 0 || model.crashes > 0);
        let asked = self.0.jobs.asked();
        Ok(Details::from([
            ("Since", micros(self.0.started_at).into()),
            ("Answered", sum(|model| model.answered).into()),
            ("PromptTokens", sum(|model| model.prompt_tokens).into()),
            ("CompletionTokens", sum(|model| model.completion_tokens).into()),
            ("Models", used.map(of_model).collect::<Vec<Details>>().into()),
            (
                "Asked",
                Details::from([
                    ("Prompts", asked.prompts.into()),
                    ("Failed", asked.failed.into()),
                    ("PromptTokens", asked.prompt_tokens.into()),
                    ("CompletionTokens", asked.completion_tokens.into()),
                ])
                .into(),
            ),
        ]))
    }

    #[zbus(signal)]
    pub(super) async fn model_changed(emitter: &SignalEmitter<'_>, name: &str, details: Details) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn model_removed(emitter: &SignalEmitter<'_>, name: &str) -> zbus::Result<()>;

    #[zbus(property)]
    fn count(&self) -> u32 {
        count(&self.0.models.list())
    }

    #[zbus(property)]
    fn loaded(&self) -> u32 {
        loaded(&self.0.models.list())
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn engine_installed(&self) -> bool {
        self.0.has_engine()
    }
}
