//! A peer that connects, opens and accepts streams when it is told to, and has no manners of its own.

use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncReadExt as _, AsyncWriteExt as _, StreamExt as _};
use libp2p::identity::Keypair;
use libp2p::kad::{self, store::MemoryStore};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, NetworkBehaviour, Stream, SwarmEvent};
use libp2p::{Multiaddr, PeerId, StreamProtocol, identify};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;

use super::super::lobby::Door;
use super::super::session::{self, Context, Outgoing, Report};
use super::super::streams::{self, Inbound, OpenError};
use super::super::transport;
use super::{DEADLINE, id};
use crate::wire::control::{Control, Heartbeat, State};
use crate::wire::keys::Root;
use crate::wire::version::{INFERENCE_PROTOCOL, KAD_PROTOCOL, MEMBER_PROTOCOL, Versions};

#[derive(NetworkBehaviour)]
struct Manners {
    streams: streams::Behaviour,
    identify: identify::Behaviour,
    kad: kad::Behaviour<MemoryStore>,
}

/// What the swarm told.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // a test keeps few of them
pub(super) enum Heard {
    Connected(ConnectionId),
    Closed(ConnectionId),
    NotConnected(String),
    Identified(Box<identify::Info>),
    Query(kad::QueryResult),
}

type Act = Box<dyn FnOnce(&mut kad::Behaviour<MemoryStore>) + Send>;

enum Do {
    Dial(Multiaddr),
    Open(PeerId, ConnectionId, &'static str, oneshot::Sender<oneshot::Receiver<Result<Stream, OpenError>>>),
    Kad(Act),
    Announce(Multiaddr),
    HangUp,
    Leave(PeerId),
}

pub(super) struct Rogue {
    pub peer: PeerId,
    pub keypair: Keypair,
    commands: mpsc::UnboundedSender<Do>,
    pub inbound: mpsc::Receiver<Inbound>,
    pub heard: mpsc::UnboundedReceiver<Heard>,
    pub address: Multiaddr,
}

impl Rogue {
    pub(super) async fn start() -> Self {
        Self::with(Keypair::generate_ed25519()).await
    }

    /// A rogue whose peer id is lower (or higher) than `other`.
    pub(super) async fn beside(other: &super::Node, lower: bool) -> Self {
        let other: PeerId = other.id().as_str().parse().unwrap();
        loop {
            let keypair = Keypair::generate_ed25519();
            if (keypair.public().to_peer_id().to_bytes() < other.to_bytes()) == lower {
                return Self::with(keypair).await;
            }
        }
    }

    pub(super) async fn with(keypair: Keypair) -> Self {
        Self::speaking(keypair, &[MEMBER_PROTOCOL, INFERENCE_PROTOCOL]).await
    }

    /// A rogue that takes streams of these protocols.
    pub(super) async fn speaking(keypair: Keypair, protocols: &[&'static str]) -> Self {
        let (sender, inbound) = mpsc::channel(1024);
        let peer = keypair.public().to_peer_id();
        let protocols = protocols.iter().copied().map(StreamProtocol::new).collect();
        let mut config = kad::Config::new(StreamProtocol::new(KAD_PROTOCOL));
        config.set_query_timeout(Duration::from_secs(5)).set_periodic_bootstrap_interval(None);
        let behaviour = Manners {
            streams: streams::Behaviour::new(protocols, sender, super::super::meter::Meters::default()),
            identify: identify::Behaviour::new(identify::Config::new("rogue/1".to_owned(), keypair.public())),
            kad: kad::Behaviour::with_config(peer, MemoryStore::new(peer), config),
        };
        let lobby = (&Door::default(), 64);
        let mut swarm = transport::swarm(&keypair, behaviour, lobby, None, Arc::new(Notify::new())).unwrap();
        swarm.behaviour_mut().kad.set_mode(Some(kad::Mode::Client));
        swarm.listen_on("/ip4/127.0.0.1/udp/0/quic-v1".parse().unwrap()).unwrap();
        let address = loop {
            if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
                break address;
            }
        };
        let (commands, mut orders) = mpsc::unbounded_channel();
        let (tell, heard) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut rude = false;
            loop {
                tokio::select! {
                    order = orders.recv() => match order {
                        None => return,
                        Some(Do::Dial(address)) => {
                            let options = match address.iter().last() {
                                Some(libp2p::multiaddr::Protocol::P2p(peer)) =>
                                    DialOpts::peer_id(peer).condition(PeerCondition::Always).addresses(vec![address]).build(),
                                _ => DialOpts::unknown_peer_id().address(address).build(),
                            };
                            if let Err(error) = swarm.dial(options) {
                                let _ = tell.send(Heard::NotConnected(error.to_string()));
                            }
                        }
                        Some(Do::Open(peer, connection, protocol, reply)) => {
                            let opening = swarm.behaviour_mut().streams.open(peer, Some(connection), StreamProtocol::new(protocol));
                            let _ = reply.send(opening);
                        }
                        Some(Do::Kad(act)) => act(&mut swarm.behaviour_mut().kad),
                        Some(Do::Announce(address)) => swarm.add_external_address(address),
                        Some(Do::HangUp) => rude = true,
                        Some(Do::Leave(peer)) => drop(swarm.disconnect_peer_id(peer)),
                    },
                    event = swarm.select_next_some() => {
                        if let (true, SwarmEvent::ConnectionEstablished { connection_id, .. }) = (rude, &event) {
                            swarm.close_connection(*connection_id);
                        }
                        let _ = match event {
                            SwarmEvent::ConnectionEstablished { connection_id, .. } => tell.send(Heard::Connected(connection_id)),
                            SwarmEvent::ConnectionClosed { connection_id, .. } => tell.send(Heard::Closed(connection_id)),
                            SwarmEvent::OutgoingConnectionError { error, .. } => tell.send(Heard::NotConnected(error.to_string())),
                            SwarmEvent::Behaviour(MannersEvent::Identify(identify::Event::Received { info, .. })) =>
                                tell.send(Heard::Identified(Box::new(info))),
                            SwarmEvent::Behaviour(MannersEvent::Kad(kad::Event::OutboundQueryProgressed { result, .. })) =>
                                tell.send(Heard::Query(result)),
                            _ => Ok(()),
                        };
                    }
                }
            }
        });
        Self { peer, keypair, commands, inbound, heard, address }
    }

    fn order(&self, order: Do) {
        assert!(self.commands.send(order).is_ok(), "the rogue is gone");
    }

    /// Waits for what is wanted; other news are dropped.
    pub(super) async fn hears<T>(&mut self, what: &str, mut wanted: impl FnMut(Heard) -> Option<T>) -> T {
        let heard = async {
            loop {
                if let Some(found) = wanted(self.heard.recv().await.expect("the rogue lives")) {
                    return found;
                }
            }
        };
        timeout(DEADLINE, heard).await.unwrap_or_else(|_| panic!("{what}: not heard"))
    }

    /// One more connection.
    pub(super) fn dial(&self, address: &str) {
        self.order(Do::Dial(address.parse().unwrap()));
    }

    pub(super) async fn connect(&mut self, address: &str) -> ConnectionId {
        self.dial(address);
        self.hears("a connection", |heard| match heard {
            Heard::Connected(id) => Some(id),
            Heard::NotConnected(error) => panic!("not connected: {error}"),
            _ => None,
        })
        .await
    }

    /// Closes all connections to a node.
    pub(super) fn disconnect(&self, node: &super::Node) {
        self.order(Do::Leave(node.id().as_str().parse().unwrap()));
    }

    pub(super) fn hang_up_on_everybody(&self) {
        self.order(Do::HangUp);
    }

    pub(super) fn kad(&self, act: impl FnOnce(&mut kad::Behaviour<MemoryStore>) + Send + 'static) {
        self.order(Do::Kad(Box::new(act)));
    }

    pub(super) fn announce(&self, address: &str) {
        self.order(Do::Announce(address.parse().unwrap()));
    }

    pub(super) async fn try_open(
        &self,
        to: &super::Node,
        connection: ConnectionId,
        protocol: &'static str,
    ) -> Result<Stream, OpenError> {
        let (reply, opening) = oneshot::channel();
        self.order(Do::Open(to.id().as_str().parse().unwrap(), connection, protocol, reply));
        timeout(DEADLINE, opening.await.unwrap()).await.unwrap().unwrap_or(Err(OpenError::NotConnected))
    }

    pub(super) async fn open(&self, to: &super::Node, connection: ConnectionId, protocol: &'static str) -> Stream {
        self.try_open(to, connection, protocol).await.unwrap()
    }

    /// Greets `node` by the rules; gives the session.
    pub(super) async fn greet(&self, node: &super::Node, connection: ConnectionId, cluster: &str) -> Session {
        let stream = self.open(node, connection, MEMBER_PROTOCOL).await;
        Session::begin(self.peer, node, cluster, stream, true).await
    }

    /// The next stream that a node opened.
    pub(super) async fn accepted(&mut self, protocol: &'static str) -> Inbound {
        loop {
            let inbound = timeout(DEADLINE, self.inbound.recv()).await.expect("an inbound stream").unwrap();
            if inbound.protocol.as_ref() == protocol {
                return inbound;
            }
        }
    }

    /// Answers a greeting of `node` by the rules.
    pub(super) async fn is_greeted(&mut self, node: &super::Node, cluster: &str) -> Session {
        let inbound = self.accepted(MEMBER_PROTOCOL).await;
        Session::begin(self.peer, node, cluster, inbound.stream, false).await
    }
}

/// An honest membership stream in the rogue's hands.
pub(super) struct Session {
    outbox: mpsc::Sender<Outgoing>,
    pub reports: mpsc::Receiver<Report>,
}

impl Session {
    async fn begin(local: PeerId, node: &super::Node, cluster: &str, stream: Stream, opener: bool) -> Self {
        let (sender, mut reports) = mpsc::channel(256);
        let context = Context {
            generation: 1,
            local,
            peer: node.id().as_str().parse().unwrap(),
            connection: ConnectionId::new_unchecked(0),
            reports: sender,
            // As a node of the first version.
            versions: Versions::only(1),
            run: 7,
        };
        let (cluster, root) = (id(cluster), Root::public(&id(cluster)));
        if opener {
            tokio::spawn(session::open(context, cluster, root, stream));
        } else {
            tokio::spawn(session::accept(context, vec![(cluster, root)], stream));
        }
        loop {
            match timeout(DEADLINE, reports.recv()).await.expect("a hello").unwrap() {
                Report::Up(up, entered) => {
                    let _ = entered.send(());
                    let session = Self { outbox: up.outbox.clone(), reports };
                    // The first frame after the hello.
                    session.says(&Control::Heartbeat(Heartbeat { seq: 1, serving: true, free_slots: 1, ..Heartbeat::default() }));
                    tokio::spawn(async move {
                        let mut beat = Heartbeat { seq: 1, serving: true, free_slots: 1, ..Heartbeat::default() };
                        let mut every = tokio::time::interval(Duration::from_secs(4));
                        every.tick().await;
                        loop {
                            tokio::select! {
                                _ = every.tick() => {}
                                () = up.outbox.closed() => return,
                            }
                            beat.seq += 1;
                            let mut frame = Vec::new();
                            crate::wire::frame::encode(&Control::Heartbeat(beat).encode(), &mut frame);
                            let _ = up.outbox.try_send(Outgoing::Frame(frame));
                        }
                    });
                    return session;
                }
                Report::Down { end, .. } => panic!("no hello: {end:?}"),
                Report::Frame(..) => {}
            }
        }
    }

    pub(super) fn says(&self, control: &Control) {
        let mut frame = Vec::new();
        crate::wire::frame::encode(&control.encode(), &mut frame);
        self.says_raw(frame);
    }

    pub(super) fn says_raw(&self, bytes: Vec<u8>) {
        let _ = self.outbox.try_send(Outgoing::Frame(bytes));
    }

    pub(super) fn leaves(&self) {
        let _ = self.outbox.try_send(Outgoing::Bye(crate::wire::control::ByeReason::Leave));
    }

    pub(super) fn introduces(&self, name: &str) {
        let models = vec![crate::domain::node::ModelOffer::named("m")];
        self.says(&Control::State(State { version: 1, node_name: name.to_owned(), models, ..State::default() }));
    }

    /// How the session ended.
    pub(super) async fn ends(&mut self) -> session::End {
        loop {
            if let Report::Down { end, .. } = timeout(DEADLINE, self.reports.recv()).await.expect("an end").unwrap() {
                return end;
            }
        }
    }
}

/// Writes a frame.
pub(super) async fn put(stream: &mut Stream, body: &[u8]) -> std::io::Result<()> {
    let mut framed = Vec::new();
    crate::wire::frame::encode(body, &mut framed);
    stream.write_all(&framed).await?;
    stream.flush().await
}

/// Everything until the stream ends; what came before a reset counts too.
pub(super) async fn rest(stream: &mut Stream) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = timeout(DEADLINE, stream.read_to_end(&mut all)).await.expect("the stream ends");
    all
}
