//! The one task that owns the swarm: its loop, its commands, its agenda, and the snapshot that it publishes.
//!
//! `membership` (sessions and members), `discovery` (candidates, dials, Kademlia), `bootstrap`, `listen`, `joining`,
//! `publish` and `events` (the swarm's events) are further parts of the same `Task`. Nothing in the loop waits for I/O;
//! what takes time is a task of its own that reports back through a bounded channel.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use libp2p::identity::Keypair;
use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId, StreamProtocol, Swarm};
use tokio::sync::{Notify, broadcast, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use futures::StreamExt as _;

use super::agenda::Agenda;
use super::alarm::Alarm;
use super::answer::Permits;
use super::behaviour::{Behaviour, Parts};
use super::book::Book;
use super::config::{Config, Remembered};
use super::dedup::Seen;
use super::dial::Policy;
use super::gate::Gate;
use super::guard::Bans;
use super::handle::{Command, Directory, Event, JoinOptions, LeaveError, Service, Snapshot};
use super::known::Known;
use super::lanes::{Lane, NoLane, Pool};
use super::ledger::Ledger;
use super::links::Ground;
use super::lobby::Door;
use super::mdns::{self, Mdns};
use super::members::Members;
use super::meter::Meters;
use super::nat::Reach;
use super::ping::Pings;
use super::recover::{Probed, Recovery};
use super::remember::Recollection;
use super::room::Rooms;
use super::session::{Generation, Outgoing, Report};
use super::streams::{Inbound, OpenError};
use super::transport;
use crate::domain::cluster::ClusterId;
use crate::domain::node::Offer;
use crate::wire::control::ByeReason;
use crate::wire::keys::Root;
use crate::wire::version::INFERENCE_PROTOCOL;

/// Clusters that a node may be in at once: each costs a membership stream to every member.
pub const MAX_CLUSTERS: usize = 16;
/// Streams that other nodes opened and nobody took yet; one more is reset.
const INBOUND_QUEUE: usize = 256;
/// Reports of sessions that wait for the loop; a session that finds it full waits.
const REPORT_QUEUE: usize = 1024;
/// Between two looks for idle lanes, while there are some.
const TRIM: Duration = Duration::from_secs(60);
/// How long the swarm is driven after the goodbyes, so that they leave the machine.
const FAREWELL: Duration = Duration::from_millis(200);

/// What is due later.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Due {
    /// Heartbeats to the members whose turn it is.
    Heartbeat,
    /// Details of this node's models to the members that understand them.
    Models,
    /// Heartbeats to all members because a slot became free or the last one was taken.
    Beat,
    /// Look for members that are silent.
    Expire,
    /// Exchange views with the members.
    Views,
    /// Tell the members what is new about others.
    News,
    /// Look whether this node has too few members at its side, or too many.
    Mesh,
    /// Give up reaching members that are only known.
    Reach,
    /// Decide between two machines with one identity.
    Contest,
    /// Dial candidates.
    Dial,
    /// Say in the DHT that this node is in the cluster.
    Announce(ClusterId),
    /// Ask the DHT who is in the cluster.
    Lookup(ClusterId),
    /// Greet a connected peer in a cluster, unless it did.
    Hello(PeerId, ClusterId),
    /// Look whether two connections to a peer are one too many.
    Duplicates(PeerId),
    /// Dial a bootstrap address that names no peer.
    Bootstrap(usize),
    /// Ask relays for places.
    Places,
    /// Try to reach a peer directly that is connected through a relay.
    Direct(PeerId),
    /// The network changed: try what there is.
    Recover,
    /// Ask the older ones of several connections to a peer for a sign of life.
    Older(PeerId),
    /// Tell who waits to ping a peer that it did not connect in time.
    Ping(PeerId),
    /// Start mDNS anew after it has failed.
    Mdns,
    /// Close idle lanes.
    Trim,
    /// Publish what has changed.
    Publish,
    /// Tell the log who the members are.
    Names,
    /// Finish leaving: the time for running prompts is over.
    Leave(ClusterId),
}

/// A joined cluster.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub id: ClusterId,
    pub root: Root,
    pub reference: [u8; 16],
    pub serve: bool,
    /// Looks into the DHT since it was reached.
    pub looks: u32,
    pub joined_at: SystemTime,
    pub joined: Instant,
    pub announcements: u32,
    pub announced: bool,
    pub leaving: Option<Leaving>,
}

/// A cluster that is being left: prompts may end until then.
#[derive(Debug)]
pub(crate) struct Leaving {
    pub until: Instant,
    pub replies: Vec<oneshot::Sender<Result<(), LeaveError>>>,
}

/// A running session.
#[derive(Debug)]
pub(crate) struct Session {
    pub cluster: ClusterId,
    pub peer: PeerId,
    /// Version that was agreed on.
    pub protocol: u16,
    pub connection: ConnectionId,
    pub opened_by_lower: bool,
    /// Names the run of the node at the other end; from version 3 on.
    pub run: Option<u64>,
    /// The number of the last news that it was told.
    pub told: u64,
    /// Members that it lists, by its own word.
    pub listed: usize,
    pub since: std::time::Instant,
    pub outbox: mpsc::Sender<Outgoing>,
    /// Cancelled with the member, and with it its prompts.
    pub gone: CancellationToken,
    /// When it was last sent a heartbeat, and when it is to get the next.
    pub beaten: Instant,
    pub beat_at: Instant,
}

/// What survives a restart of the swarm: kept by the supervisor.
#[derive(Debug)]
pub(crate) struct Lasting {
    pub keypair: Keypair,
    pub config: Config,
    pub joined: BTreeMap<ClusterId, (JoinOptions, SystemTime)>,
    pub publish: watch::Sender<Arc<Snapshot>>,
    pub events: broadcast::Sender<Event>,
    pub pool: Pool,
    pub directory: watch::Sender<Arc<Directory>>,
    /// Who was a member last, and what others are told of it.
    pub recollection: Recollection,
    pub remembered: watch::Sender<Arc<[Remembered]>>,
    pub service: Arc<dyn Service>,
    pub next_generation: Generation,
    /// Names this run of the node in its hellos.
    pub run: u64,
}

/// Why the loop ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It was asked to, or all handles are gone.
    Stopped,
    /// A connection task of the swarm panicked: build a new swarm.
    Panicked,
}

pub(crate) struct Task<'a> {
    pub(super) lasting: &'a mut Lasting,
    pub(super) swarm: Swarm<Behaviour>,
    pub(super) local: PeerId,
    pub(super) clusters: BTreeMap<ClusterId, Cluster>,
    pub(super) members: Members,
    /// Members that this node is not connected to.
    pub(super) known: Known,
    pub(super) mesh: super::mesh::State,
    pub(super) rivals: super::rivals::Rivals,
    pub(super) sessions: HashMap<Generation, Session>,
    /// Hellos in flight, to bound them per peer and to not greet twice.
    pub(super) hellos: HashMap<Generation, (PeerId, Option<ClusterId>)>,
    /// Clusters that a connected peer was found not to be in, and when.
    pub(super) refused: HashMap<(ConnectionId, ClusterId), super::membership::Refusal>,
    pub(super) book: Book,
    pub(super) policy: Policy,
    pub(super) bans: Bans,
    pub(super) door: Door,
    /// What prompts of members may take.
    pub(super) rooms: Rooms,
    /// What came of dials and greetings, for the doctor.
    pub(super) ledger: Ledger,
    /// How others reach this node.
    pub(super) reach: Reach,
    /// When this swarm was built.
    pub(super) begun: Instant,
    pub(super) pings: Pings,
    pub(super) recovery: Recovery,
    /// Configured addresses that could not be listened on, with the reason.
    pub(super) not_listening: Vec<(String, String)>,
    /// Discovery on the local network, while it runs, and what it tells.
    pub(super) mdns: Option<Mdns>,
    pub(super) mdns_events: mpsc::Sender<mdns::Event>,
    /// Addresses of other machines that say they are this node, and when they said so.
    pub(super) twins: BTreeMap<std::net::IpAddr, Instant>,
    pub(super) agenda: Agenda<Due>,
    pub(super) permits: watch::Sender<Arc<Permits>>,
    pub(super) seen: Arc<Mutex<Seen>>,
    /// Prompts of members that are being answered.
    pub(super) working: Arc<AtomicUsize>,
    /// The same, for each connection that carried one.
    pub(super) serving: HashMap<ConnectionId, Arc<AtomicUsize>>,
    pub(super) last_offer: Option<Offer>,
    pub(super) models_told: Instant,
    pub(super) reports: mpsc::Sender<Report>,
    pub(super) violations: mpsc::Sender<PeerId>,
    pub(super) resolved: mpsc::Sender<(usize, Vec<Multiaddr>)>,
    pub(super) offer: watch::Receiver<Offer>,
    pub(super) state_version: u32,
    pub(super) heartbeat_seq: u64,
    pub(super) last_free: bool,
    pub(super) last_beat: Instant,
    pub(super) lookups: HashMap<libp2p::kad::QueryId, ClusterId>,
    pub(super) announces: HashMap<libp2p::kad::QueryId, ClusterId>,
    pub(super) bootstrap: Vec<super::bootstrap::Bootstrap>,
    pub(super) problems: BTreeMap<&'static str, String>,
    pub(super) networks: Vec<super::address::Network>,
    pub(super) membership_changed: bool,
    pub(super) dirty: bool,
    pub(super) pace: super::publish::Pace,
    stopping: Option<oneshot::Sender<()>>,
    /// Cancelled when this task ends, by whatever way: a stream that anybody still holds keeps its connection and the
    /// socket of the old swarm alive, and the next swarm could not have its port.
    pub(super) over: CancellationToken,
    _over: DropGuard,
}

/// The receiving ends of the loop.
struct Ends {
    inbound: mpsc::Receiver<Inbound>,
    reports: mpsc::Receiver<Report>,
    violations: mpsc::Receiver<PeerId>,
    resolved: mpsc::Receiver<(usize, Vec<Multiaddr>)>,
    probed: mpsc::Receiver<Probed>,
    ground: watch::Receiver<Ground>,
    mdns: mpsc::Receiver<mdns::Event>,
    panicked: Arc<Notify>,
    alarm: Alarm,
}

/// Why the network could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The Noise keys could not be made from the identity.
    #[error("the keys of the transport could not be made")]
    Keys(#[source] libp2p::noise::Error),
    /// No timer can be had.
    #[error("no timer could be made")]
    Timer(#[source] std::io::Error),
    /// What is configured as an address to listen on is no multiaddr.
    #[error("{address:?} is no address to listen on: {reason}")]
    Address {
        /// What was configured.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// What was configured.
        address: String,
        /// Why not.
        reason: String,
    },
}

/// Runs the network until it is stopped or must be built anew.
///
/// # Errors
/// [`StartError`]: nothing was started.
pub(crate) async fn run(
    lasting: &mut Lasting,
    commands: &mut mpsc::Receiver<Command>,
    wanted: &mut mpsc::Receiver<PeerId>,
    started: impl FnOnce(),
) -> Result<Ended, StartError> {
    let (inbound_sender, inbound) = mpsc::channel(INBOUND_QUEUE);
    let (reports_sender, reports) = mpsc::channel(REPORT_QUEUE);
    let (violations_sender, violations) = mpsc::channel(64);
    let (resolved_sender, resolved) = mpsc::channel(64);
    let (probed_sender, probed) = mpsc::channel(64);
    let ground = super::links::watch();
    let (mdns_events, mdns) = mpsc::channel(64);
    let panicked = Arc::new(Notify::new());
    let keypair = lasting.keypair.clone();
    let local = keypair.public().to_peer_id();
    let (circuits, relay_client) = libp2p::relay::client::new(local);
    let meters = Meters::default();
    let parts = Parts { gate: Gate::default(), inbound: inbound_sender, relay_client, meters: meters.clone() };
    let behaviour = Behaviour::new(&keypair, lasting.config.caps, &lasting.config.relaying, parts);
    let door = Door::default();
    let lobby = (&door, lasting.config.caps.pending_incoming);
    let circuits = Some((circuits, meters));
    let swarm = transport::swarm(&keypair, behaviour, lobby, circuits, Arc::clone(&panicked)).map_err(StartError::Keys)?;
    let offer = lasting.service.offer();
    let alarm = Alarm::new().map_err(StartError::Timer)?;
    let over = CancellationToken::new();
    let mut task = Task {
        swarm,
        local,
        clusters: BTreeMap::new(),
        members: Members::new(lasting.config.timings.suspect, lasting.config.timings.dead),
        known: Known::default(),
        mesh: super::mesh::State::default(),
        rivals: super::rivals::Rivals::default(),
        sessions: HashMap::new(),
        hellos: HashMap::new(),
        refused: HashMap::new(),
        book: Book::new(),
        policy: Policy::new(local, lasting.config.timings.patience_lan, std::time::Instant::now()),
        bans: Bans::default(),
        door,
        rooms: Rooms::default(),
        ledger: Ledger::default(),
        reach: Reach::default(),
        begun: Instant::now(),
        pings: Pings::default(),
        recovery: Recovery::new(probed_sender, Instant::now()),
        not_listening: Vec::new(),
        mdns: None,
        mdns_events,
        twins: BTreeMap::new(),
        agenda: Agenda::new(),
        permits: watch::channel(Arc::default()).0,
        seen: Arc::new(Mutex::new(Seen::new(std::time::Instant::now()))),
        working: Arc::default(),
        serving: HashMap::new(),
        last_offer: None,
        models_told: Instant::now(),
        reports: reports_sender,
        violations: violations_sender,
        resolved: resolved_sender,
        offer,
        state_version: 1,
        heartbeat_seq: 0,
        last_free: false,
        last_beat: Instant::now(),
        lookups: HashMap::new(),
        announces: HashMap::new(),
        bootstrap: Vec::new(),
        problems: BTreeMap::new(),
        networks: Vec::new(),
        membership_changed: false,
        dirty: true,
        pace: super::publish::Pace::default(),
        stopping: None,
        _over: over.clone().drop_guard(),
        over,
        lasting,
    };
    task.start()?;
    task.publish();
    started();
    let ends = Ends { inbound, reports, violations, resolved, probed, ground, mdns, panicked, alarm };
    let ended = task.serve(commands, wanted, ends).await;
    task.abandon();
    Ok(ended)
}

impl Task<'_> {
    fn start(&mut self) -> Result<(), StartError> {
        self.listen()?;
        if self.lasting.config.mdns {
            self.start_mdns();
        }
        self.announce_configured();
        let now = Instant::now();
        self.recall(now);
        self.start_bootstrap();
        for (cluster, (options, joined_at)) in self.lasting.joined.clone() {
            // They were checked when the cluster was joined.
            let _ = self.add_bootstrap(&options.bootstrap);
            self.enter(cluster, &options, joined_at, now);
        }
        self.agenda.set(Due::Views, now + self.lasting.config.timings.views);
        Ok(())
    }

    async fn serve(
        &mut self,
        commands: &mut mpsc::Receiver<Command>,
        wanted: &mut mpsc::Receiver<PeerId>,
        mut ends: Ends,
    ) -> Ended {
        loop {
            if self.dirty {
                self.publish_in_time(Instant::now());
            }
            if let Some(next) = self.agenda.next() {
                // What is due is done first: a peer that keeps the loop busy must not keep it from its heartbeats.
                let now = Instant::now();
                if next <= now {
                    self.on_timer(now);
                    continue;
                }
                ends.alarm.set(next);
            }
            tokio::select! {
                biased; // commands, then our own work, then the network's
                command = commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => return Ended::Stopped,
                },
                Some(peer) = wanted.recv() => self.on_lane_wanted(peer),
                Some(report) = ends.reports.recv() => self.on_report(report),
                Some(stream) = ends.inbound.recv() => self.on_inbound(stream),
                Some(peer) = ends.violations.recv() => self.on_violation(peer),
                Some((index, addresses)) = ends.resolved.recv() => self.on_resolved(index, addresses),
                Some(probed) = ends.probed.recv() => self.on_probed(probed, Instant::now()),
                Ok(()) = ends.ground.changed() => {
                    let ground = *ends.ground.borrow_and_update();
                    self.on_ground(ground, Instant::now());
                }
                Some(event) = ends.mdns.recv() => self.on_mdns(event),
                Ok(()) = self.offer.changed() => self.on_offer(),
                () = ends.panicked.notified() => return Ended::Panicked,
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                () = ends.alarm.rings() => self.on_timer(Instant::now()),
            }
            if self.stopping.is_some() {
                break;
            }
        }
        self.farewell().await;
        Ended::Stopped
    }

    /// Says goodbye and drives the swarm until the goodbyes are out.
    async fn farewell(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        if let Some(mdns) = self.mdns.take() {
            mdns.goodbye();
        }
        let mut outboxes = Vec::new();
        for (_, session) in self.sessions.drain() {
            if session.outbox.try_send(Outgoing::Bye(ByeReason::Shutdown)).is_ok() {
                outboxes.push(session.outbox);
            }
        }
        // A session drops its receiver after the goodbye is written and flushed.
        let written = async {
            for outbox in &outboxes {
                outbox.closed().await;
            }
        };
        tokio::pin!(written);
        let mut all_written = false;
        loop {
            tokio::select! {
                () = &mut written, if !all_written => {
                    all_written = true;
                    let peers: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
                    if peers.is_empty() { break }
                    for peer in peers {
                        let _ = self.swarm.disconnect_peer_id(peer);
                    }
                }
                _ = self.swarm.select_next_some() => if all_written && self.swarm.connected_peers().next().is_none() { break },
                () = tokio::time::sleep_until(deadline) => break,
            }
        }
        if let Some(reply) = self.stopping.take() {
            let _ = reply.send(());
        }
    }

    /// Leaves nothing behind that a new swarm would stumble over.
    fn abandon(&mut self) {
        for session in self.sessions.values() {
            session.gone.cancel();
        }
        let peers: HashSet<PeerId> = self.members.peers().collect();
        for peer in peers {
            self.lasting.pool.forget(peer);
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Join { cluster, options, reply } => {
                let joined = self.join(cluster, options);
                self.publish_first();
                let _ = reply.send(joined);
            }
            Command::Leave { cluster, drain, reply } => {
                self.leave(cluster, drain, reply);
                self.publish_first();
            }
            Command::Ask { events, .. } => {
                // Only scripted handles send this: a real one asks on a lane of its own.
                drop(events);
            }
            Command::Shutdown { reply } => {
                self.stopping = Some(reply);
                self.remember_members(Instant::now());
            }
            Command::Probe { reply } => drop(reply.send(())),
            Command::Facts { about, reply } => drop(reply.send(self.facts(about.as_deref()))),
            Command::Ping { peer, count, reply } => self.ping(peer, count, reply),
            Command::Reach { cluster, member, until, reply } => self.reach(&cluster, &member, until, reply),
            #[cfg(test)]
            Command::Panic => panic!("asked to by a test"),
            #[cfg(test)]
            Command::ChangeNetwork => self.changed("a test", Instant::now()),
        }
    }

    fn on_timer(&mut self, now: Instant) {
        if let Some(due) = self.agenda.next() {
            self.notice_oversleeping(due, now);
        }
        while let Some(due) = self.agenda.pop(now) {
            match due {
                Due::Heartbeat => self.heartbeat(now),
                Due::Beat => self.beat(now, |_, _| true),
                Due::Models => self.tell_models(now),
                Due::Expire => self.expire(now),
                Due::Views => self.exchange_views(now),
                Due::News => self.tell_news(now),
                Due::Mesh => self.tend_mesh(now),
                Due::Reach => self.give_up_reaching(now),
                Due::Contest => self.decide_contests(now),
                Due::Dial => self.dial(now),
                Due::Announce(cluster) => self.announce(&cluster, now),
                Due::Lookup(cluster) => self.look_up(&cluster, now),
                Due::Hello(peer, cluster) => self.greet(peer, &cluster),
                Due::Duplicates(peer) => self.close_duplicates(peer, now),
                Due::Bootstrap(index) => self.dial_bootstrap(index, now),
                Due::Places => self.seek_places(now),
                Due::Direct(peer) => self.seek_direct(peer, now),
                Due::Recover => self.recover(now),
                Due::Older(peer) => self.probe_older(peer),
                Due::Ping(peer) => self.ping_overdue(peer),
                Due::Mdns => self.start_mdns(),
                Due::Trim => self.trim(now),
                Due::Publish => {} // the loop does it, if there is still something to publish
                Due::Names if self.dirty => self.publish(),
                Due::Names => self.log_members(now),
                Due::Leave(cluster) => self.try_depart(&cluster, now),
            }
        }
    }

    fn trim(&mut self, now: Instant) {
        if self.lasting.pool.trim(now.into_std()) {
            self.agenda.no_later(Due::Trim, now + TRIM);
        }
    }

    /// The pool wants a stream: opens it beside the loop and hands it over.
    fn on_lane_wanted(&mut self, peer: PeerId) {
        let best = self.swarm.behaviour().streams.connections(&peer).first();
        let Some((connection, meter)) = best.map(|best| (best.id, best.meter.clone())) else {
            self.lasting.pool.opened(peer, Err(NoLane::NotConnected));
            return;
        };
        let answer = self.swarm.behaviour_mut().streams.open(peer, Some(connection), StreamProtocol::new(INFERENCE_PROTOCOL));
        let pool = self.lasting.pool.clone();
        tokio::spawn(async move {
            let outcome = match answer.await {
                Ok(Ok(stream)) => Ok(Lane::new(connection, stream, meter)),
                Ok(Err(OpenError::NotConnected)) | Err(_) => Err(NoLane::NotConnected),
                Ok(Err(error)) => Err(NoLane::Failed(error.to_string())),
            };
            pool.opened(peer, outcome);
        });
        self.agenda.no_later(Due::Trim, Instant::now() + TRIM);
    }

    pub(super) fn stopping(&self) -> bool {
        self.stopping.is_some()
    }

    /// Runs `work` for as long as this swarm lives, at most.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let over = self.over.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = over.cancelled() => {}
                () = work => {}
            }
        });
    }
}
