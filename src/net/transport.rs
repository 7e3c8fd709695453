//! Transports and the swarm: QUIC, TCP and circuits of relays (Noise, Yamux), every limit set by hand because the defaults of libp2p are
//! made for other programs (`docs/protocol.md`, "Limits"). Names are resolved in `net::resolve`, by the system.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, OptionalTransport};
use libp2p::core::upgrade;
use libp2p::identity::Keypair;
use libp2p::swarm::{self, NetworkBehaviour};
use libp2p::{PeerId, Swarm, Transport as _, noise, quic, relay, tcp, yamux};
use tokio::sync::Notify;

use super::hasty::Hasty;
use super::lobby::{Door, Lobby};
use super::meter::Meters;
use super::persistent::persistent;

/// A connection that nobody uses is closed after this; an open stream counts as use.
const IDLE: Duration = Duration::from_secs(30);
/// Set-up of a TCP connection, Noise and Yamux included: slow-loris peers are gone after it.
const TCP_SETUP: Duration = Duration::from_secs(10);
/// The same through a relay: the way is twice as long, and the relay may have to be dialled first.
const CIRCUIT_SETUP: Duration = Duration::from_secs(15);
/// QUIC handshake: the library's five seconds allow about three tries, too few at 30 % loss.
const QUIC_HANDSHAKE: Duration = Duration::from_secs(15);
/// Streams that the other side may have open on one connection: membership streams of 16 clusters and 48 prompts.
pub(crate) const MAX_STREAMS: u32 = 64;
/// Yamux counts the streams of both directions together.
const MAX_YAMUX_STREAMS: usize = 2 * MAX_STREAMS as usize;
/// Inbound streams that may negotiate at once on one connection (the library's default is 128).
const MAX_NEGOTIATING: usize = 32;

fn quic_config(keypair: &Keypair) -> quic::Config {
    let mut config = quic::Config::new(keypair);
    config.handshake_timeout = QUIC_HANDSHAKE;
    config.max_idle_timeout = 10_000;
    // Members hear each other every five seconds anyway. This is above the heartbeat, so that a connection between
    // members never sends a keep-alive of its own (each one wakes two machines); others are kept until IDLE.
    config.keep_alive_interval = Duration::from_millis(6_500);
    config.max_concurrent_stream_limit = MAX_STREAMS;
    config.max_stream_data = 256 * 1024;
    config.max_connection_data = 1024 * 1024;
    config
}

/// What makes circuits through relays possible: the transport that belongs to the relay client among the behaviours, and
/// where the meters of its connections go.
pub(crate) type Circuits = (relay::client::Transport, Meters);

/// QUIC, TCP and, where wanted, circuits, all authenticated by the peer's key.
///
/// # Errors
/// The Noise keys could not be made.
fn transport(
    keypair: &Keypair,
    (door, pending): (&Door, u32),
    circuits: Option<Circuits>,
) -> Result<Boxed<(PeerId, StreamMuxerBox)>, noise::Error> {
    let mut mux = yamux::Config::default();
    mux.set_max_num_streams(MAX_YAMUX_STREAMS);
    let noise = noise::Config::new(keypair)?;
    // Noise and Yamux go end to end, inside the circuit: the relay sees neither, and alters nothing unnoticed.
    let circuits = circuits.map(|(circuits, meters)| {
        circuits
            .map(move |stream, point| meters.measure(stream, &point))
            .upgrade(upgrade::Version::V1)
            .authenticate(noise.clone())
            .multiplex(mux.clone())
            .timeout(CIRCUIT_SETUP)
            .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)))
    });
    let circuits = circuits.map_or_else(OptionalTransport::none, OptionalTransport::some);
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true))
        .map(|stream, _| persistent(stream))
        .upgrade(upgrade::Version::V1)
        .authenticate(noise)
        .multiplex(mux)
        .timeout(TCP_SETUP)
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(Hasty::new(muxer))))
        .boxed();
    let quic = quic::tokio::Transport::new(quic_config(keypair));
    let quic = quic.map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer))).boxed();
    // A room for each: a flood of first packets over UDP, whose sources anybody can forge, leaves TCP open.
    let lobby = |transport| Lobby::new(transport, door.clone(), pending);
    let direct = lobby(quic).with_sieve().or_transport(lobby(tcp)).map(|either, _| either.into_inner());
    Ok(circuits.or_transport(direct).map(|either, _| either.into_inner()).boxed())
}

/// Builds the swarm; the `lobby` has a door and, for each transport, so many places for those who still prove who they are.
/// `panicked` is notified when one of its connection tasks panics: the swarm is then unfit for use.
///
/// # Errors
/// The Noise keys could not be made.
pub(crate) fn swarm<B: NetworkBehaviour>(
    keypair: &Keypair,
    behaviour: B,
    lobby: (&Door, u32),
    circuits: Option<Circuits>,
    panicked: Arc<Notify>,
) -> Result<Swarm<B>, noise::Error> {
    let spawn = move |task: Pin<Box<dyn Future<Output = ()> + Send>>| {
        let panicked = Arc::clone(&panicked);
        tokio::spawn(async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                panicked.notify_one();
            }
        });
    };
    let config = swarm::Config::with_executor(spawn)
        // V1Lazy lost data of closed streams over QUIC (an ADD_PROVIDER never arrived), so the default V1 stays.
        .with_idle_connection_timeout(IDLE)
        .with_max_negotiating_inbound_streams(MAX_NEGOTIATING)
        .with_smart_dial();
    Ok(Swarm::new(transport(keypair, lobby, circuits)?, behaviour, keypair.public().to_peer_id(), config))
}
