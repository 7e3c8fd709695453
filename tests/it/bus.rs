//! The D-Bus service on a private bus, with everything below it played by the test: network, dispatcher, gauge, daemon.

mod errors;
mod jobs;
mod models;
mod network;
mod panics;
mod signals;
mod slow;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opengateway::api::stream::Line;
use opengateway::dbus::control::{Control, ControlState, Request, SavedCluster};
use opengateway::dbus::{self, Mode, Service};
use opengateway::dispatch::{self, JobEvent, ServedBy, Start};
use opengateway::domain::cluster::ClusterId;
use opengateway::domain::node::{ClusterState, ClusterView, FoundBy, Liveness, Member, ModelOffer, NodeId};
use opengateway::domain::resources::{Cpu, Memory, Resources, Storage};
use opengateway::gauge;
use opengateway::net::{self, Scripted, Snapshot};
use opengateway::serve::{self, Echo};
use tokio::sync::{mpsc, watch};
use zbus::{Connection, Message, OwnedObjectPath, OwnedVariant, Variant};

use crate::common::bus::{Bus, bus_or_skip};
use crate::common::node::{DEADLINE, NAME};
use crate::daemon::{MANAGER, Options, ROOT, call};

/// The service and the other ends of all that it stands on.
struct Played {
    bus: Bus,
    service: Service,
    net: Scripted,
    serve: serve::Handle,
    starts: mpsc::Receiver<Start>,
    measures: mpsc::Receiver<gauge::Command>,
    measured: watch::Sender<Arc<Resources>>,
    requests: mpsc::Receiver<Request>,
    /// What is asked of the models of this machine, and their list.
    models: (mpsc::Receiver<opengateway::models::Request>, watch::Sender<Vec<opengateway::models::Local>>),
    control: watch::Sender<ControlState>,
}

fn resources() -> Resources {
    let measured_at = SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros();
    Resources {
        schema: 1,
        measured_at: u64::try_from(measured_at).unwrap(),
        cpu: Cpu { logical: 4, usable: 4.0, model: None, arch: "x86_64".to_owned(), load1: None },
        memory: Memory { total: Some(8_000_000_000), available: Some(4_000_000_000), limit: None },
        storage: Storage { path: "/".into(), total: Some(1 << 40), available: Some(1 << 39), models: None },
        gpus: Vec::new(),
        warnings: Vec::new(),
    }
}

fn no_engine() -> opengateway::models::Settings {
    opengateway::models::Settings {
        directory: "/nowhere".into(),
        also: Vec::new(),
        enabled: true,
        program: "/nowhere/opengateway-engine".into(),
        threads: None,
        context: None,
        slots: None,
        keep: Vec::new(),
        idle: None,
        file_template: false,
        gpu_layers: None,
    }
}

fn id(name: &str) -> ClusterId {
    ClusterId::new(name).unwrap()
}

fn member(number: usize, name: &str) -> Arc<Member> {
    Arc::new(Member {
        id: NodeId::new(format!("12D3KooW{number:05}")),
        name: name.to_owned(),
        version: "0.1.0".to_owned(),
        protocol: 1,
        addresses: vec!["/ip4/192.0.2.1/udp/4001/quic-v1".to_owned()],
        found_by: FoundBy::Mdns,
        direct: true,
        relay: None,
        transport: "quic",
        connected_at: SystemTime::now(),
        last_seen: SystemTime::now(),
        latency_us: None,
        serving: true,
        draining: false,
        free_slots: 1,
        queued: 0,
        models: vec![ModelOffer::named("echo")],
        tiers: Vec::new(),
        liveness: Liveness::Alive,
    })
}

fn snapshot(clusters: &[(&str, &[Arc<Member>])]) -> Arc<Snapshot> {
    let view = |name: &str, members: &[Arc<Member>]| ClusterView {
        id: id(name),
        state: if members.is_empty() { ClusterState::Discovering } else { ClusterState::Connected },
        serving: true,
        joined_at: SystemTime::UNIX_EPOCH,
        announced: true,
        discovery: vec!["mdns"],
        members: members.to_vec(),
    };
    let clusters: BTreeMap<ClusterId, Arc<ClusterView>> =
        clusters.iter().map(|(name, members)| (id(name), Arc::new(view(name, members)))).collect();
    Arc::new(Snapshot { peer_id: Some(NodeId::new("12D3KooWself")), clusters, ..Snapshot::default() })
}

impl Played {
    /// On a bus of its own, joined to `gatewayai-poc`. `None` where there is no `dbus-daemon`.
    async fn start() -> Option<Self> {
        let bus = bus_or_skip()?;
        let (net, scripted) = net::Handle::scripted();
        scripted.state.send_replace(snapshot(&[("gatewayai-poc", &[])]));
        let (dispatch, starts, _) = dispatch::Handle::scripted();
        let (gauge, measures, measured) = gauge::Handle::scripted(resources());
        let saved = vec![SavedCluster { id: id("gatewayai-poc"), auto_connect: true }];
        let (control, requests, state) = Control::new(ControlState { saved, sharing: true, ..ControlState::default() });
        let (_, tiers) = watch::channel(Vec::new());
        let (serve, _) = serve::spawn(serve::Config { backends: vec![Arc::new(Echo::default())], tiers });
        let (files, asked, list) = opengateway::models::Handle::new(Vec::new());
        let parts = opengateway::http::Parts {
            net: net.clone(),
            serve: serve.clone(),
            dispatch: dispatch.clone(),
            node_name: "played".to_owned(),
            state_dir: bus.dir().to_owned(),
            settings: opengateway::config::HttpSettings::default(),
        };
        let node = dbus::Node {
            doctor: opengateway::diagnosis::Doctor::new(net.clone()),
            net,
            serve: serve.clone(),
            dispatch,
            models: files,
            engine: watch::channel(no_engine()).1,
            gauge,
            http: opengateway::http::start(parts, Vec::new()),
            control,
            version: "0.1.0".to_owned(),
            node_name: "played".to_owned(),
            features: Vec::new(),
            started_at: SystemTime::now(),
            log: opengateway::logging::Log::fixed(),
        };
        let builder = zbus::connection::Builder::address(bus.address());
        let service = dbus::serve(builder, node, Mode::PerUser(rustix::process::geteuid().as_raw())).await.unwrap();
        Some(Self {
            service,
            net: scripted,
            serve,
            starts,
            measures,
            measured,
            requests,
            models: (asked, list),
            control: state,
            bus,
        })
    }

    async fn started(&mut self) -> Start {
        within(self.starts.recv()).await.expect("the service lives")
    }
}

/// What must happen, soon on any machine.
async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("it happens in time")
}

fn taken() -> JobEvent {
    let by = ServedBy { id: NodeId::new("12D3KooWa"), name: "NodeA".to_owned(), local: false };
    JobEvent::Started { model: "echo".to_owned(), by }
}

/// Starts a prompt: its object, and the stream.
async fn start_prompt(connection: &Connection, text: &str) -> (OwnedObjectPath, OwnedFd) {
    let reply = call(connection, "StartPrompt", &("", text, Options::new())).await.unwrap();
    let (job, stream): (OwnedObjectPath, zbus::OwnedFd) = reply.body().deserialize().unwrap();
    (job, stream.into())
}

/// All that is on the stream, line by line; a line that is cut or no JSON is a failure.
async fn lines(stream: OwnedFd) -> Vec<Line> {
    let reading = tokio::task::spawn_blocking(move || {
        use std::io::Read as _;
        let mut bytes = Vec::new();
        std::fs::File::from(stream).read_to_end(&mut bytes).unwrap();
        bytes
    });
    let bytes = reading.await.unwrap();
    assert!(
        bytes.is_empty() || bytes.ends_with(b"\n"),
        "the last line is cut: {:?}",
        String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(80)..])
    );
    bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).map(|line| Line::parse(line).unwrap()).collect()
}

async fn property(connection: &Connection, path: &str, interface: &str, name: &str) -> zbus::Result<OwnedVariant> {
    let reply =
        connection.call_method(Some(NAME), path, Some("org.freedesktop.DBus.Properties"), "Get", &(interface, name)).await?;
    reply.body().deserialize()
}

fn member_of(message: &Message) -> String {
    message.header().member().map(|member| member.to_string()).unwrap_or_default()
}

/// Time that moves only when the test says so. What waits for I/O alone goes on.
struct Frozen(std::sync::mpsc::Sender<()>);

impl Frozen {
    fn now() -> Self {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        // While a blocking task runs, tokio does not skip to the next timer by itself.
        tokio::task::spawn_blocking(move || ended.recv());
        tokio::time::pause();
        Self(end)
    }

    async fn pass(&self, time: Duration) {
        tokio::time::advance(time).await;
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}
