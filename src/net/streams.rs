//! A behaviour that opens and accepts plain negotiated streams, and does nothing else.
//!
//! `net::Task` asks for an outbound stream on a connection of its choice and gets it through a oneshot; inbound
//! streams go to one bounded queue. It never dials, never reads a byte of a stream, and knows no cluster.
//!
//! Why not `libp2p-stream`: it picks a random connection, negotiates one outbound stream at a time and drops inbound
//! streams silently (<https://github.com/libp2p/rust-libp2p/issues/5651>).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{InboundUpgrade, OutboundUpgrade, UpgradeInfo};
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::derive_prelude::{ConnectionClosed, ConnectionEstablished};
use libp2p::swarm::handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound};
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler,
    Stream, StreamProtocol, StreamUpgradeError, SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};
use tokio::sync::{mpsc, oneshot};

use super::address;
use super::meter::{Meter, Meters};

/// Negotiations that may run at once on one connection; more are refused. Half of the stream limit, so that a burst
/// of openings cannot use up all streams of a connection.
const MAX_NEGOTIATING: usize = 32;
/// Inbound streams of one connection that may wait to be taken; one more is reset.
const MAX_WAITING: usize = 16;
/// A negotiation is one round trip; ten seconds is five lost packets on a slow path.
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(10);

/// A stream that the other side opened.
#[derive(Debug)]
#[allow(dead_code, reason = "the place is given back by dropping it")]
pub(crate) struct Inbound {
    pub peer: PeerId,
    pub connection: ConnectionId,
    pub protocol: StreamProtocol,
    pub stream: Stream,
    /// Its place among the waiting streams of its connection.
    waiting: Arc<()>,
}

/// Why there is no stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("not connected")]
    NotConnected,
    #[error("too many streams are being opened on this connection")]
    Busy,
    #[error("the peer does not speak {0}")]
    Unsupported(StreamProtocol),
    #[error("the peer did not answer the negotiation within {NEGOTIATION_TIMEOUT:?}")]
    TimedOut,
    #[error("the connection failed while the stream was opened: {0}")]
    Io(String),
}

impl Inbound {
    /// The stream alone: it was taken, its place among the waiting ones is free.
    pub(crate) fn into_stream(self) -> Stream {
        self.stream
    }
}

type Reply = oneshot::Sender<Result<Stream, OpenError>>;

/// One established connection.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    pub id: ConnectionId,
    /// Address of the other end: as dialled, or as seen.
    pub remote: Multiaddr,
    /// We dialled it.
    pub dialed: bool,
    pub relayed: bool,
    /// Who carries it, when it is relayed and that is known.
    pub relay: Option<PeerId>,
    /// What it carried, when it is relayed.
    pub meter: Option<Arc<Meter>>,
    /// Over QUIC; of a relayed one, the way to the relay.
    pub quic: bool,
    pub since: Instant,
    /// It may lead nowhere any more: that is being found out.
    pub doubted: bool,
}

impl Connection {
    /// Order of preference: no doubt before doubt, direct before relayed, QUIC before TCP, then the oldest.
    fn rank(&self) -> (bool, bool, bool, Instant) {
        (self.doubted, self.relayed, !self.quic, self.since)
    }
}

#[derive(Debug)]
pub(crate) struct Open {
    protocol: StreamProtocol,
    reply: Reply,
}

#[derive(Debug)]
pub(crate) struct Behaviour {
    protocols: Vec<StreamProtocol>,
    inbound: mpsc::Sender<Inbound>,
    meters: Meters,
    /// Established connections only: one that a sibling behaviour denied never gets here.
    connections: HashMap<PeerId, Vec<Connection>>,
    actions: VecDeque<(PeerId, ConnectionId, Open)>,
    waker: Option<std::task::Waker>,
}

impl Behaviour {
    /// Accepts streams of `protocols`; they arrive at `inbound`, and are reset when it is full.
    pub(crate) fn new(protocols: Vec<StreamProtocol>, inbound: mpsc::Sender<Inbound>, meters: Meters) -> Self {
        Self { protocols, inbound, meters, connections: HashMap::new(), actions: VecDeque::new(), waker: None }
    }

    /// The established connections to `peer`, best first.
    pub(crate) fn connections(&self, peer: &PeerId) -> &[Connection] {
        self.connections.get(peer).map_or(&[], Vec::as_slice)
    }

    /// A connection may lead nowhere, or is known to lead where it did.
    pub(crate) fn doubt(&mut self, peer: &PeerId, connection: ConnectionId, doubted: bool) {
        let Some(list) = self.connections.get_mut(peer) else { return };
        for known in list.iter_mut().filter(|known| known.id == connection) {
            known.doubted = doubted;
        }
        list.sort_by_key(Connection::rank);
    }

    /// Every established connection, with whom.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&PeerId, &Connection)> {
        self.connections.iter().flat_map(|(peer, list)| list.iter().map(move |connection| (peer, connection)))
    }

    /// Who is at the other end of a connection that was dialled to `address`.
    pub(crate) fn is_connected_to(&self, address: &Multiaddr) -> Option<PeerId> {
        let dialed = |connection: &Connection| connection.dialed && address::without_peer(&connection.remote) == *address;
        self.all().find(|(_, connection)| dialed(connection)).map(|(peer, _)| *peer)
    }

    /// Who carries a circuit: named by its address, or known by the address that the circuit begins with.
    fn relay(&self, circuit: &Multiaddr) -> Option<PeerId> {
        address::relay_of(circuit).or_else(|| {
            let carrier: Multiaddr = circuit.iter().take_while(|part| *part != Protocol::P2pCircuit).collect();
            let leads_there = |known: &Connection| !known.relayed && address::without_peer(&known.remote) == carrier;
            self.all().find(|(_, known)| leads_there(known)).map(|(peer, _)| *peer)
        })
    }

    /// Opens a stream on `connection`, or on the best one.
    pub(crate) fn open(
        &mut self,
        peer: PeerId,
        connection: Option<ConnectionId>,
        protocol: StreamProtocol,
    ) -> oneshot::Receiver<Result<Stream, OpenError>> {
        let (reply, answer) = oneshot::channel();
        let chosen = match connection {
            Some(id) => self.connections(&peer).iter().find(|connection| connection.id == id),
            None => self.connections(&peer).first(),
        };
        match chosen.map(|connection| connection.id) {
            Some(id) => {
                self.actions.push_back((peer, id, Open { protocol, reply }));
                if let Some(waker) = self.waker.take() {
                    waker.wake();
                }
            }
            None => drop(reply.send(Err(OpenError::NotConnected))),
        }
        answer
    }
}

/// The address that says how a connection goes: of an incoming circuit that is the local one, since the other end has none.
fn path(endpoint: &ConnectedPoint) -> &Multiaddr {
    match endpoint {
        ConnectedPoint::Listener { local_addr, .. } if endpoint.is_relayed() => local_addr,
        _ => endpoint.get_remote_address(),
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = std::convert::Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(Handler::new(peer, connection, self.protocols.clone(), self.inbound.clone()))
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(Handler::new(peer, connection, self.protocols.clone(), self.inbound.clone()))
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, connection_id, endpoint, .. }) => {
                let remote = endpoint.get_remote_address().clone();
                let (relayed, dialed) = (endpoint.is_relayed(), endpoint.is_dialer());
                let path = path(endpoint);
                let connection = Connection {
                    id: connection_id,
                    relayed,
                    relay: if relayed { self.relay(path) } else { None },
                    meter: if relayed { self.meters.take(peer_id, dialed) } else { None },
                    quic: address::is_quic(path),
                    dialed,
                    remote,
                    since: Instant::now(),
                    doubted: false,
                };
                let list = self.connections.entry(peer_id).or_default();
                list.push(connection);
                list.sort_by_key(Connection::rank);
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { peer_id, connection_id, .. }) => {
                if let Some(list) = self.connections.get_mut(&peer_id) {
                    list.retain(|connection| connection.id != connection_id);
                    if list.is_empty() {
                        self.connections.remove(&peer_id);
                    }
                }
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        if let Some((peer_id, connection, event)) = self.actions.pop_front() {
            return Poll::Ready(ToSwarm::NotifyHandler { peer_id, handler: NotifyHandler::One(connection), event });
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// The part that lives with one connection.
#[derive(Debug)]
pub(crate) struct Handler {
    peer: PeerId,
    connection: ConnectionId,
    protocols: Vec<StreamProtocol>,
    inbound: mpsc::Sender<Inbound>,
    wanted: VecDeque<Open>,
    negotiating: usize,
    /// One clone for each inbound stream that nobody took yet.
    waiting: Arc<()>,
}

impl Handler {
    fn new(peer: PeerId, connection: ConnectionId, protocols: Vec<StreamProtocol>, inbound: mpsc::Sender<Inbound>) -> Self {
        Self { peer, connection, protocols, inbound, wanted: VecDeque::new(), negotiating: 0, waiting: Arc::default() }
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Open;
    type ToBehaviour = std::convert::Infallible;
    type InboundProtocol = Upgrade;
    type OutboundProtocol = Upgrade;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = (StreamProtocol, Reply);

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol, Self::InboundOpenInfo> {
        SubstreamProtocol::new(Upgrade(self.protocols.clone()), ()).with_timeout(NEGOTIATION_TIMEOUT)
    }

    fn poll(
        &mut self,
        _: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Self::OutboundOpenInfo, Self::ToBehaviour>> {
        while let Some(Open { protocol, reply }) = self.wanted.pop_front() {
            if reply.is_closed() {
                continue;
            }
            if self.negotiating >= MAX_NEGOTIATING {
                let _ = reply.send(Err(OpenError::Busy));
                continue;
            }
            self.negotiating += 1;
            let upgrade = Upgrade(vec![protocol.clone()]);
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                protocol: SubstreamProtocol::new(upgrade, (protocol, reply)).with_timeout(NEGOTIATION_TIMEOUT),
            });
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, open: Self::FromBehaviour) {
        // The connection task polls the handler after each event, so no waker is kept here.
        self.wanted.push_back(open);
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_, Self::InboundProtocol, Self::OutboundProtocol, Self::InboundOpenInfo, Self::OutboundOpenInfo>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol: (protocol, stream), .. }) => {
                // One connection may not fill the queue of all.
                let too_many = Arc::strong_count(&self.waiting) > MAX_WAITING;
                let waiting = Arc::clone(&self.waiting);
                let stream = Inbound { peer: self.peer, connection: self.connection, protocol, stream, waiting };
                if too_many || self.inbound.try_send(stream).is_err() {
                    // Dropping it resets it: the other side sees an error and may come back.
                    tracing::debug!(peer = %self.peer, "inbound stream refused: too many wait");
                }
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol: (_, stream), info: (_, reply) }) => {
                self.negotiating = self.negotiating.saturating_sub(1);
                let _ = reply.send(Ok(stream));
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info: (protocol, reply), error }) => {
                self.negotiating = self.negotiating.saturating_sub(1);
                let _ = reply.send(Err(match error {
                    StreamUpgradeError::Timeout => OpenError::TimedOut,
                    StreamUpgradeError::NegotiationFailed => OpenError::Unsupported(protocol),
                    StreamUpgradeError::Io(error) => OpenError::Io(error.to_string()),
                    StreamUpgradeError::Apply(never) => match never {},
                }));
            }
            _ => {}
        }
    }
}

/// The upgrade that does nothing: the negotiated stream, and under which name.
#[derive(Debug, Clone)]
pub(crate) struct Upgrade(Vec<StreamProtocol>);

impl UpgradeInfo for Upgrade {
    type Info = StreamProtocol;
    type InfoIter = std::vec::IntoIter<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.clone().into_iter()
    }
}

impl<C: Send + 'static> InboundUpgrade<C> for Upgrade {
    type Output = (StreamProtocol, C);
    type Error = std::convert::Infallible;
    type Future = std::future::Ready<Result<Self::Output, Self::Error>>;

    fn upgrade_inbound(self, stream: C, protocol: Self::Info) -> Self::Future {
        std::future::ready(Ok((protocol, stream)))
    }
}

impl<C: Send + 'static> OutboundUpgrade<C> for Upgrade {
    type Output = (StreamProtocol, C);
    type Error = std::convert::Infallible;
    type Future = std::future::Ready<Result<Self::Output, Self::Error>>;

    fn upgrade_outbound(self, stream: C, protocol: Self::Info) -> Self::Future {
        std::future::ready(Ok((protocol, stream)))
    }
}
