//! One model as the task keeps it: its file, its engine, and how both look from outside.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use opengateway_engine_protocol::Load;
use tokio::sync::watch;

use super::Local;
use super::gguf::Header;
use super::library::Found;
use crate::domain::footprint;
use crate::domain::node::{ModelOffer, ModelSource, ModelState, TOY_BYTES};
use crate::serve::BackendId;
use crate::serve::engine::{Engine, Policy, Spec};

/// Context window of a prompt where nothing is configured and the model was trained with more: what it costs grows with it.
pub const DEFAULT_MAX_CONTEXT: u32 = 8192;

/// What the configuration says.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where models are added to.
    pub directory: PathBuf,
    /// Other directories, read only.
    pub also: Vec<PathBuf>,
    /// Models are computed here.
    pub enabled: bool,
    /// The program of the engine.
    pub program: PathBuf,
    /// Threads for computing; `None` lets the engine choose.
    pub threads: Option<u32>,
    /// Context window of a prompt; `None` is what the model was trained with, up to [`DEFAULT_MAX_CONTEXT`].
    pub context: Option<u32>,
    /// Prompts at once; `None` is by the machine and the model.
    pub slots: Option<u32>,
    /// Models that are loaded at the start and stay.
    pub keep: Vec<String>,
    /// The others are unloaded after this time without a prompt; `None` is never.
    pub idle: Option<Duration>,
    /// Use the chat template of the file, which is a program.
    pub file_template: bool,
    /// Layers that go to a GPU; `None` is all.
    pub gpu_layers: Option<u32>,
}

impl Settings {
    /// All directories, the one that is written to first.
    pub(super) fn directories(&self) -> Vec<PathBuf> {
        let mut all = vec![self.directory.clone()];
        for directory in &self.also {
            if !all.contains(directory) {
                all.push(directory.clone());
            }
        }
        all
    }

    pub(super) fn policy(&self, name: &str) -> Policy {
        Policy { keep: self.keep.iter().any(|kept| kept == name), idle: self.idle }
    }

    /// Prompts at once. Batching pays off where there are many cores, and for toys, which one core computes in no time; on
    /// a small machine one prompt after the other is faster for everybody.
    fn slots(&self, size: u64, cores: f64) -> u32 {
        self.slots.unwrap_or(match cores {
            _ if size < TOY_BYTES => 8,
            16.0.. => 8,
            8.0.. => 4,
            _ => 1,
        })
    }

    fn context(&self, header: &Header) -> u32 {
        match (self.context, header.context) {
            (Some(wanted), _) => wanted,
            (None, Some(trained)) => trained.min(DEFAULT_MAX_CONTEXT),
            (None, None) => DEFAULT_MAX_CONTEXT,
        }
    }

    /// How the engine of this file is run.
    fn spec(&self, found: &Found, header: &Header, digest: Option<[u8; 32]>, cores: f64) -> Spec {
        let size = found.stamp.size;
        let slots = self.slots(size, cores);
        let context = self.context(header);
        let load = Load {
            path: found.path.to_string_lossy().into_owned(),
            context: self.context.unwrap_or(0),
            max_context: DEFAULT_MAX_CONTEXT,
            slots,
            threads: self.threads.unwrap_or(0),
            gpu_layers: self.gpu_layers.unwrap_or(u32::MAX),
            file_template: self.file_template,
        };
        let offer = ModelOffer {
            name: found.name.clone(),
            context_tokens: context,
            size: Some(size),
            parameters: Some(header.parameters),
            quantisation: header.quantisation.clone(),
            digest,
            state: ModelState::Available,
            source: ModelSource::Engine,
            slots: u16::try_from(slots).unwrap_or(u16::MAX),
        };
        Spec { program: self.program.clone(), load, offer, needed: footprint::needed(size, &header.shape(), context, slots) }
    }
}

/// An engine that serves.
#[derive(Debug)]
pub(super) struct Serving {
    pub engine: Arc<Engine>,
    pub backend: BackendId,
    pub policy: watch::Sender<Policy>,
}

/// A model.
#[derive(Debug)]
pub(super) struct Entry {
    pub found: Found,
    pub digest: Option<[u8; 32]>,
    pub serving: Option<Serving>,
    /// It is being removed.
    pub leaving: bool,
    /// It could not be read to its end: not tried again for this content.
    pub unreadable: bool,
}

impl Entry {
    pub(super) fn spec(&self, settings: &Settings, cores: f64) -> Option<Spec> {
        let header = self.found.header.as_ref().ok()?;
        // The child is told the path in JSON.
        self.found.path.to_str()?;
        Some(settings.spec(&self.found, header, self.digest, cores))
    }

    /// How it is shown. `absent` says why there is no engine at all.
    pub(super) fn local(&self, settings: &Settings, cores: f64, absent: Option<&str>) -> Local {
        let header = self.found.header.as_ref().ok();
        let spec = self.spec(settings, cores);
        let status = self.serving.as_ref().map(|serving| serving.engine.status());
        let shadow = self.found.shadows.as_ref().map(|path| format!("{} has the same name and is not used", path.display()));
        let file = self.found.header.as_ref().err().cloned();
        let engine = status.as_ref().and_then(|status| status.problem.clone());
        let absent = absent.filter(|_| self.serving.is_none()).map(str::to_owned);
        let problem = file.clone().or(absent).or(engine).or(shadow);
        let estimate = || {
            let (spec, header) = (spec.as_ref()?, header?);
            let (context, slots) = (spec.offer.context_tokens, spec.load.slots);
            let shape = header.shape();
            Some(footprint::kv_bytes(&shape, context, slots).saturating_add(footprint::compute_bytes(&shape, context, slots)))
        };
        let status = status.unwrap_or_default();
        Local {
            name: self.found.name.clone(),
            path: self.found.path.clone(),
            size: self.found.stamp.size,
            digest: self.digest,
            architecture: header.map(|header| header.architecture.clone()),
            parameters: header.map(|header| header.parameters),
            quantisation: header.and_then(|header| header.quantisation.clone()),
            trained_context: header.and_then(|header| header.context),
            context: status.context.or(spec.as_ref().map(|spec| spec.offer.context_tokens)),
            slots: status.slots.or(spec.as_ref().map(|spec| spec.load.slots)).unwrap_or(0),
            state: if self.serving.is_some() { status.state } else { ModelState::Failed },
            progress: status.progress,
            problem,
            memory: status.memory.or_else(estimate),
            device: status.device.filter(|_| status.pid.is_some()),
            engine_pid: status.pid,
            removable: self.found.own,
            answered: status.answered,
            prompt_tokens: status.prompt_tokens,
            completion_tokens: status.completion_tokens,
            tokens_per_second: status.tokens_per_second,
            crashes: status.crashes,
        }
    }
}
