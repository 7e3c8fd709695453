//! Real swarms against a rogue peer that speaks the transport and nothing else by itself: what this node does when
//! others break the rules, hang, flood, lie, or come back from the dead.

mod conduct;
mod dht;
mod doctor;
mod door;
mod lanes;
mod mesh;
mod nat;
mod ping;
mod recover;
mod rivals;
mod rogue;
mod versions;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::identity::Identity;
use super::{
    AnswerEvent, AnswerNow, AnswerStream, Config, ConnectionCaps, Event, Handle, InboundPrompt, JoinOptions, Mesh, Relaying,
    Remembered, Service, Snapshot, Timings, start,
};
use crate::domain::cluster::ClusterId;
use crate::domain::node::{Member, ModelOffer, NodeId, Offer};
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, Text, Usage};
use crate::wire::version::Versions;

const DEADLINE: Duration = Duration::from_secs(30);
const QUIC: &str = "/ip4/127.0.0.1/udp/0/quic-v1";
const TCP: &str = "/ip4/127.0.0.1/tcp/0";

/// Plays `serve`: hands every prompt to the test, or echoes it when there is nobody to hand it to.
#[derive(Debug)]
struct Stub {
    offer: watch::Receiver<Offer>,
    prompts: Option<mpsc::Sender<InboundPrompt>>,
}

fn done() -> Done {
    Done { finish: FinishReason::Stop, usage: Usage { prompt_tokens: 1, completion_tokens: 1 } }
}

impl Service for Stub {
    fn answer_now(&self, _: &NodeId, ask: &Ask) -> Option<Result<AnswerNow, Failure>> {
        let pieces = vec![ask.prompt.clone()];
        self.prompts.is_none().then(|| Ok(AnswerNow { model: "echo".to_owned(), pieces, done: done() }))
    }

    fn submit(&self, prompt: InboundPrompt) -> Result<(), Failure> {
        let prompts = self.prompts.as_ref().ok_or_else(|| Failure::new(FailureKind::BackendFailed, "none"))?;
        prompts.try_send(prompt).map_err(|_| Failure::busy("full", Duration::from_secs(1)))
    }

    fn offer(&self) -> watch::Receiver<Offer> {
        self.offer.clone()
    }
}

/// How a node is made.
struct Plan {
    name: &'static str,
    identity: Identity,
    listen: String,
    bootstrap: Vec<String>,
    remembered: Vec<Remembered>,
    interactive: bool,
    timings: Timings,
    caps: ConnectionCaps,
    versions: Versions,
    models: Vec<ModelOffer>,
    relaying: Relaying,
    mesh: Mesh,
}

fn plan(name: &'static str) -> Plan {
    Plan {
        name,
        identity: Identity::generate(),
        listen: QUIC.to_owned(),
        bootstrap: Vec::new(),
        remembered: Vec::new(),
        interactive: false,
        timings: Timings { views: Duration::from_millis(300), patience: Duration::from_millis(100), ..Timings::default() },
        caps: ConnectionCaps { memory_bytes: usize::MAX, ..ConnectionCaps::default() },
        versions: Versions::OURS,
        models: vec![ModelOffer::named("echo")],
        relaying: Relaying::default(),
        mesh: Mesh::default(),
    }
}

impl Plan {
    async fn start(self) -> Node {
        let offer = Offer { models: self.models, tiers: Vec::new(), free_slots: 4, queued: 0, draining: false };
        let (offer_of, offer) = watch::channel(offer);
        let (sender, prompts) = mpsc::channel(512);
        let stub: Arc<dyn Service> = Arc::new(Stub { offer, prompts: self.interactive.then_some(sender) });
        let config = Config {
            node_name: self.name.to_owned(),
            version: "test".to_owned(),
            listen: vec![self.listen],
            any_port: false,
            bootstrap: self.bootstrap,
            mdns: false,
            timings: self.timings,
            caps: self.caps,
            versions: self.versions,
            relaying: self.relaying,
            remembered: self.remembered,
            mesh: self.mesh,
            ..Config::default()
        };
        let (handle, _) = start(config, &self.identity, stub).await.unwrap();
        Node { handle, prompts, offer: offer_of }
    }
}

struct Node {
    handle: Handle,
    prompts: mpsc::Receiver<InboundPrompt>,
    offer: watch::Sender<Offer>,
}

fn id(name: &str) -> ClusterId {
    ClusterId::new(name).unwrap()
}

impl Node {
    /// Waits until a snapshot is as wanted.
    async fn until(&self, what: &str, wanted: impl FnMut(&Arc<Snapshot>) -> bool) -> Arc<Snapshot> {
        let mut state = self.handle.watch();
        match timeout(DEADLINE, state.wait_for(wanted)).await {
            Ok(snapshot) => snapshot.unwrap().clone(),
            Err(_) => panic!("{what}: not within {DEADLINE:?}; it is {:?}", self.handle.snapshot()),
        }
    }

    /// Where it listens, without the peer id.
    async fn bare_address(&self) -> String {
        self.until("an address", |snapshot| !snapshot.listen_addresses.is_empty()).await.listen_addresses[0].clone()
    }

    async fn address(&self) -> String {
        format!("{}/p2p/{}", self.bare_address().await, self.id())
    }

    fn id(&self) -> NodeId {
        self.handle.snapshot().peer_id.clone().unwrap()
    }

    async fn join(&self, cluster: &str, serve: bool, bootstrap: &[String]) {
        self.handle.join(id(cluster), JoinOptions { bootstrap: bootstrap.to_vec(), serve }).await.unwrap();
    }

    async fn sees(&self, cluster: &str, names: &[&str]) -> Vec<Arc<Member>> {
        let snapshot = self.until(&format!("{names:?} in {cluster}"), |snapshot| listed(snapshot, cluster) == names).await;
        snapshot.clusters[&id(cluster)].members.clone()
    }

    fn ask(&self, cluster: &str, member: &NodeId, prompt: &str) -> Result<AnswerStream, Failure> {
        let ask = Ask { prompt: Text::new(prompt), ..Ask::default() };
        self.handle.ask(id(cluster), member.clone(), ask, Duration::from_secs(20))
    }

    async fn prompt(&mut self) -> InboundPrompt {
        timeout(DEADLINE, self.prompts.recv()).await.expect("a prompt").unwrap()
    }
}

fn listed(snapshot: &Snapshot, cluster: &str) -> Vec<String> {
    let Some(view) = snapshot.clusters.get(&id(cluster)) else { return Vec::new() };
    let mut names: Vec<String> = view.members.iter().map(|member| member.name.clone()).collect();
    names.sort_unstable();
    names
}

/// The outcome of an answer: its text, or why not.
async fn whole(stream: &mut AnswerStream) -> Result<String, Failure> {
    let mut text = String::new();
    loop {
        match timeout(DEADLINE, stream.next()).await.expect("an outcome within the deadline") {
            Some(AnswerEvent::Queued { .. } | AnswerEvent::Started { .. }) => {}
            Some(AnswerEvent::Text(more)) => text.push_str(&more),
            Some(AnswerEvent::End(outcome)) => return outcome.map(|_| text),
            None => panic!("no outcome"),
        }
    }
}

/// Membership events that have come so far.
fn drained(events: &mut tokio::sync::broadcast::Receiver<Event>) -> Vec<Event> {
    std::iter::from_fn(|| events.try_recv().ok()).collect()
}
