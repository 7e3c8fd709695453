//! `org.opengateway.Gateway1.Manager`: the node. Every method authorises, translates, and delegates.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, OwnedObjectPath};

use super::access::{Action, Caller};
use super::catalogue;
use super::details::{self, Details, TierEntry, micros};
use super::errors::{Error, without_nul};
use super::guard::{Guarded, Readers};
use super::job::Job;
use super::options::{self, Raw};
use super::prompts;
use super::shared::{Shared, object_path};
use super::stream::{self, Progress};
use super::watchers;
use crate::api::keys::prompt_option;
use crate::api::names::ErrorName;
use crate::api::path;
use crate::domain::cluster::ClusterId;
use crate::domain::tier;

/// The root object.
#[derive(Debug, Clone)]
pub(super) struct Manager(pub Arc<Shared>);

impl Readers for Manager {}

impl Manager {
    async fn require(&self, connection: &Connection, header: &Header<'_>, action: Action) -> Result<Caller, Error> {
        self.0.access.require(connection, header, action).await
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
                    ("PeerCount", details::counts(view).0.into()),
                    ("MemberCount", details::counts(view).1.into()),
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
                let (connected, members) = view.map_or((0, 0), |view| details::counts(view));
                let kept = saved.iter().find(|saved| saved.id == *id);
                let discovery: Vec<String> =
                    view.map(|view| view.discovery.iter().map(|&way| way.to_owned()).collect()).unwrap_or_default();
                let details = Details::from([
                    ("Name", id.as_str().to_owned().into()),
                    ("State", super::cluster::state(view.map(AsRef::as_ref)).into()),
                    ("PeerCount", connected.into()),
                    ("MemberCount", members.into()),
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
        let (job, record, _) = self.0.start_prompt(&caller, &cluster_id, options)?;
        let watcher = prompts::watch_caller(connection.clone(), caller, Arc::clone(&record));
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
            options.ask.prompt = prompts::read_prompt(fd, permit).await?;
        }
        let (job, record, surplus) = self.0.start_prompt(&caller, &cluster_id, options)?;
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
        tokio::spawn(prompts::run(self.0.clone(), connection.clone(), caller, job, Arc::clone(&record), write, ready));
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

    #[zbus(out_args("stream"))]
    async fn watch_jobs(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Raw,
    ) -> Result<zbus::OwnedFd, Error> {
        options::none(options)?;
        let caller = self.0.access.caller(connection, &header).await?;
        let all = self.0.access.manages(connection, &header, &caller).await;
        let turn = self.0.watchers.take(caller.uid);
        let turn = turn.map_err(|full| Error::new(ErrorName::Busy, full.sentence("watchers", caller.uid, "are told of jobs")))?;
        let (read, write) = stream::pipe()?;
        let (shared, uid) = (Arc::clone(&self.0), (!all).then_some(caller.uid));
        tokio::spawn(async move { watchers::run(&shared.jobs, uid, write, turn).await });
        Ok(zbus::OwnedFd::from(read))
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
