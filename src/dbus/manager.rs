//! `org.opengateway.Gateway1.Manager`: the node. Every method authorises, translates, and delegates.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, MatchRule, MessageStream, OwnedObjectPath};

use super::access::{Access, Action, Caller};
use super::catalogue;
use super::control::Control;
use super::details::{self, Details, TierEntry, micros};
use super::errors::{Error, without_nul};
use super::guard::{Guarded, Readers};
use super::job::{Job, Jobs, Record};
use super::options::{self, Raw};
use super::stream::{self, Progress};
use crate::api::keys::prompt_option;
use crate::api::names::ErrorName;
use crate::api::path;
use crate::dispatch;
use crate::domain::cluster::ClusterId;
use crate::domain::node::{ClusterState, ModelState};
use crate::domain::prompt::MAX_PROMPT_BYTES;
use crate::domain::tier;
use crate::{gauge, http, net, serve};

/// Ended jobs can be looked at for this long.
const KEEP: Duration = Duration::from_secs(30);
/// A prompt that is done within this time is not worth a subscription to its caller's departure.
const SHORT: Duration = Duration::from_millis(200);
/// Reading a prompt from a descriptor takes at most this long.
const READ_PROMPT: Duration = Duration::from_secs(10);

/// What the objects are made of.
#[derive(Debug)]
pub(super) struct Shared {
    pub net: net::Handle,
    pub serve: serve::Handle,
    pub dispatch: dispatch::Handle,
    pub models: crate::models::Handle,
    pub engine: watch::Receiver<crate::models::Settings>,
    pub gauge: gauge::Handle,
    pub http: http::Handle,
    pub control: Control,
    pub access: Arc<Access>,
    pub jobs: Jobs,
    pub version: String,
    pub node_name: String,
    pub features: Vec<String>,
    pub started_at: SystemTime,
    pub stopping: AtomicBool,
    /// Asks the publisher to tell at once what has changed.
    pub announce: mpsc::Sender<oneshot::Sender<()>>,
    /// Prompts that are being read from descriptors of callers.
    pub reading: Arc<Semaphore>,
    /// Models that are being added or verified.
    pub transfers: Arc<Semaphore>,
}

impl Shared {
    /// The state of the node in one word.
    pub(super) fn state(&self) -> &'static str {
        if self.stopping.load(Ordering::Relaxed) || self.control.state().stopping {
            return "stopping";
        }
        let snapshot = self.net.snapshot();
        let mut states = snapshot.clusters.values().map(|view| view.state).peekable();
        if snapshot.peer_id.is_none() {
            "starting"
        } else if states.peek().is_none() {
            "idle"
        } else {
            let states: Vec<ClusterState> = states.collect();
            if states.contains(&ClusterState::Connected) {
                "online"
            } else if states.contains(&ClusterState::Degraded) {
                "degraded"
            } else {
                "joining"
            }
        }
    }

    /// The joined cluster that is meant; "" means the only one, or the default one.
    pub(super) fn joined(&self, text: &str) -> Result<ClusterId, Error> {
        let snapshot = self.net.snapshot();
        if text.is_empty() {
            return dispatch::default_cluster(snapshot.clusters.keys()).cloned().ok_or_else(|| {
                let what = if snapshot.clusters.is_empty() {
                    "this node is in no cluster"
                } else {
                    "this node is in several clusters: name one"
                };
                Error::new(ErrorName::NotConnected, what)
            });
        }
        let id = ClusterId::new(text)?;
        if snapshot.clusters.contains_key(&id) {
            return Ok(id);
        }
        if self.control.state().saved.iter().any(|saved| saved.id == id) {
            return Err(Error::new(ErrorName::NotConnected, format!("this node is not in cluster {id}")));
        }
        Err(Error::new(ErrorName::NoSuchCluster, format!("no cluster {id} is known")))
    }

    /// Where a prompt goes: a joined cluster, or to this machine alone when it is in none, none is named, and it has more
    /// than the echo.
    fn asked_in(&self, text: &str) -> Result<Option<ClusterId>, Error> {
        let alone = text.is_empty() && self.net.snapshot().clusters.is_empty();
        if alone && self.serve.offer().borrow().models.iter().any(|model| model.rank().0 > 0) {
            return Ok(None);
        }
        self.joined(text).map(Some)
    }

    /// Resolves when every change so far is announced: what is read right after the reply, from a cache too, is fresh.
    async fn announced(&self) {
        let (reply, told) = oneshot::channel();
        if self.announce.send(reply).await.is_ok() {
            let _ = told.await;
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = self.control.state().problems;
        problems.extend(self.net.snapshot().problems.iter().cloned());
        problems.extend(self.serve.backends().1.into_iter().map(without_nul));
        let failed = self.models.list().into_iter().filter(|model| model.state == ModelState::Failed);
        problems.extend(failed.map(|model| {
            let why = model.problem.unwrap_or_else(|| "it cannot be loaded".to_owned());
            without_nul(format!("model {}: {why}; see: ogctl models --local", model.name))
        }));
        problems.extend(self.http.problems().into_iter().map(without_nul));
        for view in self.net.snapshot().clusters.values() {
            if view.state == ClusterState::Degraded {
                problems.push(format!("no member of cluster {} can serve; see: ogctl peers {}", view.id, view.id));
            }
        }
        problems
    }
}

/// The root object.
#[derive(Debug, Clone)]
pub(super) struct Manager(pub Arc<Shared>);

impl Readers for Manager {}

impl Manager {
    async fn require(&self, connection: &Connection, header: &Header<'_>, action: Action) -> Result<Caller, Error> {
        self.0.access.require(connection, header, action).await
    }

    fn start(
        &self,
        caller: &Caller,
        cluster: &str,
        options: options::PromptOptions,
    ) -> Result<(dispatch::Job, Arc<Record>, Vec<u64>), Error> {
        if self.0.stopping.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorName::ShuttingDown, "the daemon is stopping"));
        }
        options::check_whole(&options.ask)?;
        let id = self.0.asked_in(cluster)?;
        let (record, surplus) = self.0.jobs.enter(caller.uid, id.as_ref().map(ClusterId::as_str).unwrap_or_default())?;
        let job = match id {
            Some(id) => self.0.dispatch.start(caller.uid, id, options.ask, options.options),
            None => self.0.dispatch.start_here(caller.uid, options.ask, options.options),
        };
        match job {
            Ok(job) => Ok((job, record, surplus)),
            Err(failure) => {
                self.0.jobs.forget(record.id);
                Err(failure.into())
            }
        }
    }
}

#[zbus::interface(name = "org.opengateway.Gateway1.Manager", introspection_docs = false)]
impl Manager {
    #[zbus(out_args("status"))]
    async fn get_status(&self) -> Result<Details, Error> {
        let shared = &self.0;
        let snapshot = shared.net.snapshot();
        let peer_id = snapshot.peer_id.as_ref().map_or_else(String::new, ToString::to_string);
        let clusters: Vec<Details> = snapshot
            .clusters
            .values()
            .map(|view| {
                Details::from([
                    ("Id", view.id.as_str().to_owned().into()),
                    ("State", view.state.as_str().into()),
                    ("PeerCount", u32::try_from(view.members.len()).unwrap_or(u32::MAX).into()),
                    ("Serving", view.serving.into()),
                ])
            })
            .collect();
        let pasteable: Vec<String> =
            snapshot.dialable_addresses.iter().map(|address| format!("{address}/p2p/{peer_id}")).collect();
        Ok(Details::from([
            ("Version", shared.version.clone().into()),
            ("NodeName", shared.node_name.clone().into()),
            ("PeerId", peer_id.into()),
            ("State", shared.state().into()),
            ("Sharing", shared.control.state().sharing.into()),
            ("StartedAt", micros(shared.started_at).into()),
            ("ListenAddresses", snapshot.listen_addresses.clone().into()),
            ("Addresses", pasteable.into()),
            ("Clusters", clusters.into()),
            ("Jobs", self.active_jobs().into()),
            ("Peers", u32::try_from(snapshot.connected_peers).unwrap_or(u32::MAX).into()),
            ("HttpAddresses", shared.http.addresses().into()),
            ("Backend", without_nul(shared.serve.backends().0).into()),
            ("Models", shared.models.list().iter().map(catalogue::in_short).collect::<Vec<Details>>().into()),
            ("EngineInstalled", shared.has_engine().into()),
            ("Problems", shared.problems().into()),
        ]))
    }

    #[zbus(out_args("clusters"))]
    async fn list_clusters(&self) -> Result<Vec<(String, OwnedObjectPath, Details)>, Error> {
        let snapshot = self.0.net.snapshot();
        let saved = self.0.control.state().saved;
        let mut ids: Vec<&ClusterId> = snapshot.clusters.keys().chain(saved.iter().map(|saved| &saved.id)).collect();
        ids.sort();
        ids.dedup();
        ids.into_iter()
            .map(|id| {
                let view = snapshot.clusters.get(id);
                let kept = saved.iter().find(|saved| saved.id == *id);
                let discovery: Vec<String> =
                    view.map(|view| view.discovery.iter().map(|&way| way.to_owned()).collect()).unwrap_or_default();
                let details = Details::from([
                    ("Name", id.as_str().to_owned().into()),
                    ("State", super::cluster::state(view.map(AsRef::as_ref)).into()),
                    ("PeerCount", view.map_or(0, |view| u32::try_from(view.members.len()).unwrap_or(u32::MAX)).into()),
                    ("Models", view.map(|view| details::models(view)).unwrap_or_default().into()),
                    ("Configured", kept.is_some().into()),
                    ("AutoConnect", kept.is_some_and(|saved| saved.auto_connect).into()),
                    ("Private", false.into()),
                    ("Serving", view.is_some_and(|view| view.serving).into()),
                    ("Discovery", discovery.into()),
                    ("Via", "configuration".into()),
                ]);
                Ok((id.as_str().to_owned(), object_path(path::cluster_path(id.key()))?, details))
            })
            .collect()
    }

    #[zbus(out_args("cluster"))]
    async fn connect(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        cluster_id: String,
        options: Raw,
    ) -> Result<OwnedObjectPath, Error> {
        let (id, options) = (ClusterId::new(&cluster_id)?, options::connect(options)?);
        self.require(connection, &header, Action::Connect).await?;
        self.0.control.connect(id.clone(), options).await?;
        super::publish::ensure_cluster(connection, &self.0, &id).await;
        self.0.announced().await;
        object_path(path::cluster_path(id.key()))
    }

    async fn disconnect(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        cluster_id: String,
        options: Raw,
    ) -> Result<(), Error> {
        let (id, (forget, drain)) = (ClusterId::new(&cluster_id)?, options::disconnect(options)?);
        self.require(connection, &header, Action::Disconnect).await?;
        self.0.control.disconnect(id, forget, drain).await?;
        self.0.announced().await;
        Ok(())
    }

    #[zbus(out_args("resources"))]
    async fn get_resources(&self, options: Raw) -> Result<Details, Error> {
        let measured = if options::resources(options)? { self.0.gauge.fresh().await } else { self.0.gauge.recent().await };
        Ok(details::resources(&measured, &self.0.control.state().lent))
    }

    #[zbus(out_args("tiers"))]
    async fn list_eligible(&self, options: Raw) -> Result<Vec<TierEntry>, Error> {
        let (wanted, fresh) = options::eligible(options)?;
        let measured = if fresh { self.0.gauge.fresh().await } else { self.0.gauge.recent().await };
        let lent = crate::domain::resources::lendable(&measured, &self.0.control.state().lent);
        match wanted {
            None => Ok(tier::TIERS.iter().map(|tier| details::tier(&tier::assess(tier, &lent), &lent)).collect()),
            Some(name) => {
                let tier = tier::find(&name).ok_or_else(|| {
                    Error::invalid(format!("there is no tier {:?}", name.chars().take(options::MAX_SHOWN).collect::<String>()))
                })?;
                Ok(vec![details::tier(&tier::assess(tier, &lent), &lent)])
            }
        }
    }

    #[zbus(out_args("peers"))]
    async fn list_peers(&self, cluster_id: String, options: Raw) -> Result<Vec<(String, Details)>, Error> {
        let (limit, after) = options::peers(options)?;
        let id = self.0.joined(&cluster_id)?;
        let snapshot = self.0.net.snapshot();
        let members = snapshot.clusters.get(&id).map(|view| view.members.as_slice()).unwrap_or_default();
        Ok(members
            .iter()
            .filter(|member| after.as_deref().is_none_or(|after| member.id.as_str() > after))
            .take(limit)
            .map(|member| (member.id.to_string(), details::member(member)))
            .collect())
    }

    #[zbus(out_args("text", "details"))]
    async fn prompt(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        cluster_id: String,
        prompt: String,
        options: Raw,
    ) -> Result<(String, Details), Error> {
        let options = options::prompt(&prompt, options, prompt_option::PROMPT)?;
        let caller = self.require(connection, &header, Action::Prompt).await?;
        let (job, record, _) = self.start(&caller, &cluster_id, options)?;
        let watcher = watch_caller(connection.clone(), caller, Arc::clone(&record));
        let mut progress = Progress::new();
        let outcome = stream::collect(job, &record, &mut progress).await;
        watcher.abort();
        self.0.jobs.forget(record.id);
        self.0.jobs.over(outcome.as_ref().ok().map(|(_, done)| done.usage));
        let (text, done) = outcome?;
        Ok((text, progress.reply(&done)))
    }

    #[zbus(out_args("job", "stream"))]
    async fn start_prompt(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        cluster_id: String,
        prompt: String,
        options: Raw,
    ) -> Result<(OwnedObjectPath, zbus::OwnedFd), Error> {
        let mut options = options::prompt(&prompt, options, prompt_option::START_PROMPT)?;
        let caller = self.require(connection, &header, Action::Prompt).await?;
        if let Some(fd) = options.prompt_fd.take() {
            if !prompt.is_empty() {
                return Err(Error::invalid("with option PromptFd the prompt argument is empty"));
            }
            let permit = Arc::clone(&self.0.reading).try_acquire_owned();
            let permit = permit.map_err(|_| {
                Error::new(ErrorName::Busy, "too many prompts are being read from descriptors; try again in a moment")
            })?;
            options.ask.prompt = read_prompt(fd, permit).await?;
        }
        let (job, record, surplus) = self.start(&caller, &cluster_id, options)?;
        let (read, write) = stream::pipe()?;
        let object = object_path(path::job_path(record.id))?;
        let server = connection.object_server();
        for old in surplus {
            if let Ok(old) = object_path(path::job_path(old)) {
                let _ = server.remove::<Guarded<Job>, _>(old).await;
            }
        }
        // The work begins now; what is told of its end waits until there is an object to tell it of. Dropped on return.
        let (_registered, ready) = oneshot::channel();
        let name = caller.name.clone();
        tokio::spawn(run(self.0.clone(), connection.clone(), caller, job, Arc::clone(&record), write, ready));
        let job = Job { record, caller: name, access: Arc::clone(&self.0.access) };
        let _ = server.at(&object, Guarded(job)).await;
        Ok((object, zbus::OwnedFd::from(read)))
    }

    #[zbus(out_args("jobs"))]
    async fn list_jobs(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<(u64, OwnedObjectPath, Details)>, Error> {
        let caller = self.0.access.caller(connection, &header).await?;
        let all = self.0.access.manages(connection, &header, &caller).await;
        let own = self.0.jobs.list().into_iter().filter(|record| all || record.uid == caller.uid);
        own.map(|record| {
            let mut details = Details::from([
                ("ClusterId", record.cluster.clone().into()),
                ("State", record.state().as_str().into()),
                ("Uid", record.uid.into()),
                ("CreatedAt", micros(record.created).into()),
                ("CompletionTokens", record.tokens.load(Ordering::Relaxed).into()),
            ]);
            details::put(&mut details, "Position", record.position());
            if let Some((model, by)) = record.taken() {
                details.insert("Model", model.into());
                details.insert("ServedBy", by.peer_id.into());
                details.insert("ServedByName", by.name.into());
            }
            Ok((record.id, object_path(path::job_path(record.id))?, details))
        })
        .collect()
    }

    async fn set_sharing(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        enabled: bool,
        options: Raw,
    ) -> Result<(), Error> {
        let (lent, runtime) = options::sharing(options)?;
        self.require(connection, &header, Action::Configure).await?;
        self.0.control.set_sharing(enabled, lent, runtime).await?;
        self.0.announced().await;
        Ok(())
    }

    async fn reload(&self, #[zbus(header)] header: Header<'_>, #[zbus(connection)] connection: &Connection) -> Result<(), Error> {
        self.require(connection, &header, Action::Configure).await?;
        self.0.control.reload().await?;
        self.0.announced().await;
        Ok(())
    }

    #[zbus(signal)]
    pub(super) async fn cluster_state_changed(
        emitter: &SignalEmitter<'_>,
        cluster_id: &str,
        cluster: OwnedObjectPath,
        state: &str,
        details: Details,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn resources_changed(emitter: &SignalEmitter<'_>, changed: Vec<&str>) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn prepare_for_shutdown(emitter: &SignalEmitter<'_>, start: bool) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> String {
        self.0.version.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn features(&self) -> Vec<String> {
        self.0.features.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn peer_id(&self) -> String {
        self.0.net.snapshot().peer_id.as_ref().map_or_else(String::new, ToString::to_string)
    }

    #[zbus(property)]
    fn node_name(&self) -> String {
        self.0.node_name.clone()
    }

    #[zbus(property)]
    fn state(&self) -> String {
        self.0.state().to_owned()
    }

    #[zbus(property)]
    fn sharing(&self) -> bool {
        self.0.control.state().sharing
    }

    #[zbus(property(emits_changed_signal = "invalidates"))]
    fn listen_addresses(&self) -> Vec<String> {
        self.0.net.snapshot().listen_addresses.clone()
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn active_jobs(&self) -> u32 {
        let served = self.0.serve.running();
        u32::try_from(self.0.jobs.active() + served).unwrap_or(u32::MAX)
    }
}

pub(super) fn object_path(path: String) -> Result<OwnedObjectPath, Error> {
    OwnedObjectPath::try_from(path).map_err(|error| Error::invalid(error.to_string()))
}

/// Reads a prompt from a file of the caller's, from its beginning, bounded in size and time.
///
/// Only files: reading a pipe or a terminal may never end, and a thread would wait in it for as long as its owner likes. A
/// file system that hangs keeps `permit`, so it can hinder nothing but other prompts from descriptors.
async fn read_prompt(fd: OwnedFd, permit: OwnedSemaphorePermit) -> Result<crate::domain::prompt::Text, Error> {
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
fn watch_caller(connection: Connection, caller: Caller, record: Arc<Record>) -> tokio::task::JoinHandle<()> {
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
async fn run(
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
    let gone = outcome.as_ref().is_err_and(|failure| failure.kind == crate::domain::prompt::FailureKind::Cancelled);
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
