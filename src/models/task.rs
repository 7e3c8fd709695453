//! The owner of the models: keeps the list in step with the directories, an engine in the queue for each file that can be
//! used, and answers requests. What blocks or takes time runs beside it and reports back.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use futures::future::join_all;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::digest::{self, Digests};
use super::entry::{Entry, Serving, Settings};
use super::library::{Library, SETTLED, Scan, Stamp};
use super::notice::Notice;
use super::requests::Reply;
use super::store::{self, Added};
use super::{Handle, Local, ModelError, Request, Verified, memory};
use crate::domain::prompt::{Failure, FailureKind};
use crate::serve::engine::{Engine, MayStart};
use crate::{gauge, serve};

/// The list is told at most this often.
const TELL: Duration = Duration::from_millis(50);
/// Engines have this long to end with the daemon.
const GOODBYE: Duration = Duration::from_secs(3);

/// What the task is told at its start.
#[derive(Debug)]
pub struct Config {
    /// Of the configuration, as a reload changes it.
    pub settings: watch::Receiver<Settings>,
    /// Where digests are kept.
    pub state_dir: PathBuf,
    /// Where engines serve.
    pub serve: serve::Handle,
    /// Whether there is memory.
    pub gauge: gauge::Handle,
}

/// The task from outside.
#[derive(Debug)]
pub struct Models {
    /// For the bus.
    pub handle: Handle,
    /// What is wrong with the directories and the installation, for `status`.
    pub problems: watch::Receiver<Vec<String>>,
    stop: oneshot::Sender<oneshot::Sender<()>>,
}

impl Models {
    /// Ends all engines. Resolves when they are gone, or after 3 s.
    pub async fn stop(self) {
        let (reply, stopped) = oneshot::channel();
        if self.stop.send(reply).is_ok() {
            let _ = timeout(GOODBYE, stopped).await;
        }
    }
}

/// What a job beside the task came to.
pub(super) enum Outcome {
    Scanned(Library, Scan),
    Hashed(PathBuf, Stamp, Option<[u8; 32]>),
    Added(String, Result<Added, ModelError>, Reply<Local>),
    Removed(String, Result<(), ModelError>, Reply<()>),
    Verified(PathBuf, Result<([u8; 32], Stamp), ModelError>, Reply<Verified>),
    Saved,
}

pub(super) struct Task {
    pub settings: watch::Receiver<Settings>,
    pub serve: serve::Handle,
    gauge: gauge::Handle,
    permits: mpsc::Sender<MayStart>,
    engines: watch::Sender<Vec<Arc<Engine>>>,
    changed: Arc<Notify>,
    pub models: BTreeMap<String, Entry>,
    publish: watch::Sender<Vec<Local>>,
    problems: watch::Sender<Vec<String>>,
    scan_problems: Vec<String>,
    digests: Digests,
    pub jobs: JoinSet<Outcome>,
    /// `None` while a scan runs.
    library: Option<Library>,
    look_again: bool,
    look_at: Option<Instant>,
    /// Digests that changed and are not written yet.
    unsaved: bool,
    saving: bool,
    hashing: bool,
    pub busy: usize,
    /// Those who added a model and wait for the scan that sees it.
    added: Vec<(String, Reply<Local>)>,
    trusted: Vec<Stamp>,
    over: Arc<AtomicBool>,
    tell_at: Option<Instant>,
}

/// Starts the task.
pub fn spawn(config: Config) -> Models {
    let Config { settings, state_dir, serve, gauge } = config;
    let (handle, requests, publish) = Handle::new(Vec::new());
    let (problem_sender, problems) = watch::channel(Vec::new());
    let (engines, running) = watch::channel(Vec::new());
    let (stop, stopped) = oneshot::channel();
    let directories = settings.borrow().directories();
    let task = Task {
        permits: memory::start(gauge.clone(), running),
        settings,
        serve,
        gauge,
        engines,
        changed: Arc::new(Notify::new()),
        models: BTreeMap::new(),
        publish,
        problems: problem_sender,
        scan_problems: Vec::new(),
        digests: Digests::load(&state_dir),
        jobs: JoinSet::new(),
        library: Some(Library::new(directories)),
        look_again: false,
        look_at: None,
        unsaved: false,
        saving: false,
        hashing: false,
        busy: 0,
        added: Vec::new(),
        trusted: Vec::new(),
        over: Arc::new(AtomicBool::new(false)),
        tell_at: None,
    };
    tokio::spawn(task.run(requests, stopped));
    Models { handle, problems, stop }
}

/// What the engine's program needs a look at, too: it may be installed later.
fn watched(settings: &Settings) -> Vec<PathBuf> {
    let mut watched = settings.directories();
    watched.extend(settings.program.parent().map(Path::to_owned));
    watched
}

impl Task {
    async fn run(mut self, mut requests: mpsc::Receiver<Request>, mut stopped: oneshot::Receiver<oneshot::Sender<()>>) {
        let changed = Arc::clone(&self.changed);
        let mut settings = self.settings.clone();
        let directory = settings.borrow_and_update().directory.clone();
        let _ = tokio::task::spawn_blocking(move || {
            // Below the state directory, mostly; where it cannot be made it is said when something is to be added. What is
            // above it may be a disk that is not mounted yet, or a place of which a node for one prompt leaves nothing.
            if directory.parent().is_some_and(Path::is_dir) {
                let _ = store::make(&directory);
            }
            store::remove_leftovers(&directory);
        })
        .await;
        let mut notice = Notice::of(watched(&settings.borrow()));
        self.look();
        let stopping = loop {
            let (look_at, tell_at) = (self.look_at, self.tell_at);
            tokio::select! {
                reply = &mut stopped => break reply.ok(),
                Some(request) = requests.recv() => self.on_request(request),
                Some(outcome) = self.jobs.join_next() => match outcome {
                    Ok(outcome) => self.on_outcome(outcome).await,
                    Err(error) => tracing::error!(%error, "a job of the models ended: {error}"),
                },
                () = notice.changed() => self.look(),
                () = changed.notified() => self.tell_soon(),
                Ok(()) = settings.changed() => {
                    let now = settings.borrow_and_update().clone();
                    notice = Notice::of(watched(&now));
                    self.on_settings(&now).await;
                }
                () = sleep_until(look_at.unwrap_or_else(Instant::now)), if look_at.is_some() => {
                    self.look_at = None;
                    self.look();
                }
                () = sleep_until(tell_at.unwrap_or_else(Instant::now)), if tell_at.is_some() => self.tell(),
            }
        };
        self.over.store(true, Ordering::Relaxed);
        let why = Failure::new(FailureKind::ShuttingDown, "this node is stopping");
        let engines: Vec<_> = self.models.values_mut().filter_map(|entry| entry.serving.take()).collect();
        join_all(engines.iter().map(|serving| serving.engine.stop(why.clone()))).await;
        if let Some(reply) = stopping {
            let _ = reply.send(());
        }
    }

    fn cores(&self) -> f64 {
        self.gauge.latest().cpu.usable
    }

    /// Why nothing is computed here at all.
    pub(super) fn absent(&self) -> Option<String> {
        let settings = self.settings.borrow();
        if !settings.enabled {
            return Some("the engine is switched off ([engine] enabled = false)".to_owned());
        }
        let is_there = fs::metadata(&settings.program).is_ok_and(|found| found.is_file());
        (!is_there).then(|| {
            let program = settings.program.display();
            format!("the engine is not installed: there is no {program}; it comes with the package opengateway, or name it: [engine] program")
        })
    }

    /// Begins a scan, or one more after the one that runs.
    fn look(&mut self) {
        let Some(mut library) = self.library.take() else {
            self.look_again = true;
            return;
        };
        self.look_again = false;
        library.trust(std::mem::take(&mut self.trusted));
        self.jobs.spawn_blocking(move || {
            let scan = library.scan(SystemTime::now());
            Outcome::Scanned(library, scan)
        });
    }

    async fn on_settings(&mut self, now: &Settings) {
        for (name, entry) in &self.models {
            if let Some(serving) = &entry.serving {
                serving.policy.send_replace(now.policy(name));
            }
        }
        match &mut self.library {
            Some(library) => library.set_directories(now.directories()),
            // The one that scans now has the old ones.
            None => self.look_again = true,
        }
        self.look();
    }

    async fn on_outcome(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Scanned(mut library, scan) => {
                library.set_directories(self.settings.borrow().directories());
                self.library = Some(library);
                self.on_scan(scan).await;
            }
            Outcome::Hashed(path, stamp, digest) => {
                self.hashing = false;
                match digest {
                    Some(digest) => self.on_digest(&path, stamp, digest),
                    None => self.on_unreadable(&path, stamp),
                }
            }
            Outcome::Added(name, Ok(added), reply) => {
                self.busy -= 1;
                let path = store::path(&self.settings.borrow().directory, &name);
                tracing::info!(name, "model {name} added: {}", digest::hex(&added.digest));
                self.on_digest(&path, added.stamp, added.digest);
                self.trusted.push(added.stamp);
                self.added.push((name, reply));
                self.look();
            }
            Outcome::Added(_, Err(error), reply) => {
                self.busy -= 1;
                let _ = reply.send(Err(error));
            }
            Outcome::Removed(name, outcome, reply) => {
                if outcome.is_ok() {
                    tracing::info!(name, "model {name} removed");
                    self.models.remove(&name);
                } else if let Some(entry) = self.models.get_mut(&name) {
                    entry.leaving = false;
                }
                self.share().await;
                let _ = reply.send(outcome);
                self.look();
            }
            Outcome::Verified(path, outcome, reply) => {
                self.busy -= 1;
                let outcome = outcome.map(|(digest, stamp)| {
                    let expected = self.digests.get(&path, stamp);
                    if expected.is_none() {
                        self.on_digest(&path, stamp, digest);
                    }
                    Verified { digest, expected }
                });
                let _ = reply.send(outcome);
            }
            Outcome::Saved => self.saving = false,
        }
        self.hash_next();
        self.save();
        self.tell_soon();
    }

    async fn on_scan(&mut self, scan: Scan) {
        self.scan_problems = scan.problems;
        if scan.unsettled {
            self.look_at = Some(Instant::now() + SETTLED);
        }
        let gone: Vec<String> = self
            .models
            .iter()
            .filter(|(name, entry)| {
                !entry.leaving
                    && scan.models.get(*name).is_none_or(|found| {
                        found.stamp != entry.found.stamp || found.path != entry.found.path || found.header != entry.found.header
                    })
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            let kept = scan.models.contains_key(&name);
            tracing::info!(name, "model {name} {}", if kept { "changed" } else { "is gone" });
            if let Some(entry) = self.models.remove(&name)
                && let Some(serving) = entry.serving
            {
                self.end(serving).await;
            }
        }
        let is_there = |path: &Path| scan.models.values().any(|found| found.path == path);
        // While files are being copied one that is known may look as if it were not there.
        self.unsaved |= !scan.unsettled && self.digests.retain(is_there);
        for (name, found) in scan.models {
            if let Some(entry) = self.models.get_mut(&name) {
                entry.found.shadows = found.shadows;
                continue;
            }
            if let Err(why) = &found.header {
                tracing::warn!(name, "model {name} is not used: {why}");
            } else {
                tracing::info!(name, "model {name} found: {}", found.path.display());
            }
            let digest = self.digests.get(&found.path, found.stamp);
            self.models.insert(name, Entry { found, digest, serving: None, leaving: false, unreadable: false });
        }
        self.share().await;
        if self.look_again {
            self.look();
        } else {
            self.settle_added();
        }
    }

    /// A model that was taken away or changed under its engine.
    async fn end(&self, serving: Serving) {
        self.serve.remove(serving.backend).await;
        let why = Failure::new(FailureKind::EngineCrashed, "the file of the model changed or was taken away");
        tokio::spawn(async move { serving.engine.stop(why).await });
    }

    /// Gives each usable file an engine, or takes all engines away when there is no program for them.
    async fn share(&mut self) {
        let absent = self.absent();
        let cores = self.cores();
        let settings = self.settings.borrow().clone();
        let mut ended = Vec::new();
        for (name, entry) in &mut self.models {
            match (&absent, &entry.serving) {
                (Some(_), Some(_)) => ended.extend(entry.serving.take()),
                (None, None) if !entry.leaving => {
                    let Some(spec) = entry.spec(&settings, cores) else { continue };
                    let (policy, receiver) = watch::channel(settings.policy(name));
                    let engine = Engine::start(spec, receiver, self.permits.clone(), Arc::clone(&self.changed));
                    let backend = self.serve.add(Arc::clone(&engine) as Arc<dyn serve::backend::Backend>).await;
                    entry.serving = Some(Serving { engine, backend, policy });
                }
                _ => {}
            }
        }
        for serving in ended {
            self.end(serving).await;
        }
        let engines = self.models.values().filter_map(|entry| entry.serving.as_ref()).map(|serving| Arc::clone(&serving.engine));
        self.engines.send_replace(engines.collect());
    }

    fn settle_added(&mut self) {
        for (name, reply) in std::mem::take(&mut self.added) {
            let local = self.local(&name).ok_or_else(|| ModelError::Storage(format!("{name} was added and is gone again")));
            let _ = reply.send(local);
        }
    }

    fn on_digest(&mut self, path: &Path, stamp: Stamp, digest: [u8; 32]) {
        self.digests.put(path, stamp, digest);
        self.unsaved = true;
        if let Some(entry) = self.models.values_mut().find(|entry| entry.found.path == path && entry.found.stamp == stamp) {
            entry.digest = Some(digest);
            if let Some(serving) = &entry.serving {
                serving.engine.set_digest(digest);
            }
        }
    }

    /// A file that cannot be read to its end would else be read again and again.
    fn on_unreadable(&mut self, path: &Path, stamp: Stamp) {
        let same = |entry: &&mut Entry| entry.found.path == path && entry.found.stamp == stamp;
        if let Some(entry) = self.models.values_mut().find(same) {
            tracing::warn!(path = %path.display(), "{} cannot be read to its end: it has no digest", path.display());
            entry.unreadable = true;
        }
    }

    /// Hashes the next file that has no digest; one at a time, so that a disk full of models is not read at once.
    fn hash_next(&mut self) {
        if self.hashing {
            return;
        }
        let wants = |entry: &&Entry| entry.digest.is_none() && entry.found.header.is_ok() && !entry.leaving && !entry.unreadable;
        let next = self.models.values().find(wants);
        let Some((path, stamp)) = next.map(|entry| (entry.found.path.clone(), entry.found.stamp)) else { return };
        self.hashing = true;
        let over = Arc::clone(&self.over);
        self.jobs.spawn_blocking(move || {
            let file = store::open(&path).and_then(|file| Ok((Stamp::of(&file)?, file)));
            let digest = match file {
                Ok((found, file)) if found == stamp => digest::hash(&file, |_| !over.load(Ordering::Relaxed)).ok().flatten(),
                Ok(_) | Err(_) => None,
            };
            Outcome::Hashed(path, stamp, digest)
        });
    }

    fn save(&mut self) {
        if !self.unsaved || self.saving {
            return;
        }
        (self.unsaved, self.saving) = (false, true);
        let what = self.digests.encode();
        self.jobs.spawn_blocking(move || {
            digest::save(what);
            Outcome::Saved
        });
    }

    fn local(&self, name: &str) -> Option<Local> {
        let absent = self.absent();
        self.models.get(name).map(|entry| entry.local(&self.settings.borrow(), self.cores(), absent.as_deref()))
    }

    fn tell_soon(&mut self) {
        if self.tell_at.is_none() {
            self.tell_at = Some(Instant::now() + TELL);
        }
    }

    fn tell(&mut self) {
        self.tell_at = None;
        let absent = self.absent();
        let (settings, cores) = (self.settings.borrow(), self.cores());
        let locals: Vec<Local> = self.models.values().map(|entry| entry.local(&settings, cores, absent.as_deref())).collect();
        let mut problems = self.scan_problems.clone();
        if let Some(absent) = absent.filter(|_| settings.enabled && !self.models.is_empty()) {
            let count = self.models.len();
            problems.push(format!("{count} model{} cannot be used: {absent}", if count == 1 { "" } else { "s" }));
        }
        let missing = settings.keep.iter().filter(|kept| !self.models.contains_key(*kept));
        problems
            .extend(missing.map(|name| format!("[engine] keep names {name:?}, and no such model is here; see: ogctl models")));
        self.publish.send_if_modified(|known| replace(known, locals));
        self.problems.send_if_modified(|known| replace(known, problems));
    }
}

fn replace<T: PartialEq>(known: &mut T, now: T) -> bool {
    let changed = *known != now;
    *known = now;
    changed
}
