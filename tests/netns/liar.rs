//! A member of cluster red that asks for blue: it derives blue's reference from the public name and sends a prompt with it.
//!
//! Two swarms with one key: the library's own, which is an honest member of red, and bare connections that say what no
//! honest node would.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures::{AsyncReadExt as _, AsyncWriteExt as _};
use libp2p::core::Endpoint;
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt as _};
use libp2p::core::transport::{DialOpts, PortUse};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::{Multiaddr, Transport as _, noise, tcp, yamux};
use opengateway::domain::cluster::ClusterId;
use opengateway::domain::node::{NodeId, Offer};
use opengateway::domain::prompt::{Ask, Failure, FailureKind, Text};
use opengateway::net::identity::Identity;
use opengateway::net::{AnswerNow, Config, ConnectionCaps, InboundPrompt, JoinOptions, Service, Timings, start};
use opengateway::wire::infer;
use opengateway::wire::keys::Root;
use opengateway::wire::version::{INFERENCE_PROTOCOL, Versions};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::common::node::DEADLINE;
use crate::roles::tell;

/// Long enough for any answer to come that is going to come.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves nobody.
#[derive(Debug)]
pub struct Nothing(pub watch::Receiver<Offer>);

impl Nothing {
    pub fn new() -> Self {
        Self(watch::channel(Offer::default()).1)
    }
}

impl Service for Nothing {
    fn answer_now(&self, _: &NodeId, _: &Ask) -> Option<Result<AnswerNow, Failure>> {
        None
    }

    fn submit(&self, _: InboundPrompt) -> Result<(), Failure> {
        Err(Failure::new(FailureKind::BackendFailed, "a liar"))
    }

    fn offer(&self) -> watch::Receiver<Offer> {
        self.0.clone()
    }
}

/// Addresses over TCP of nodes to lie to, as `NAME=MULTIADDR` with spaces between.
pub const VICTIMS: &str = "OPENGATEWAY_NETNS_VICTIMS";

/// Joins red, waits for `peers` members, then asks every victim in red and in blue. Tells for each how many bytes came.
pub async fn play() {
    let victims = std::env::var(VICTIMS).unwrap();
    let victims: Vec<(&str, Multiaddr)> =
        victims.split(' ').map(|victim| victim.split_once('=').unwrap()).map(|(name, at)| (name, at.parse().unwrap())).collect();
    let identity = Identity::generate();
    let keypair = Keypair::from_protobuf_encoding(&identity.encode().unwrap()).unwrap();
    let config = Config {
        node_name: "Liar".to_owned(),
        version: "test".to_owned(),
        listen: vec!["/ip4/0.0.0.0/tcp/0".to_owned()],
        any_port: false,
        bootstrap: victims.iter().map(|(_, at)| at.to_string()).collect(),
        mdns: false,
        timings: Timings::default(),
        caps: ConnectionCaps::default(),
        versions: Versions::OURS,
        ..Config::default()
    };
    let (net, _running) = start(config, &identity, Arc::new(Nothing::new())).await.unwrap();
    let red = ClusterId::new("red").unwrap();
    net.join(red.clone(), JoinOptions::default()).await.unwrap();
    let mut state = net.watch();
    let member =
        |snapshot: &Arc<opengateway::net::Snapshot>| snapshot.clusters.get(&red).is_some_and(|view| !view.members.is_empty());
    timeout(DEADLINE, state.wait_for(member)).await.expect("the liar is a member of red").unwrap();
    for (name, at) in victims {
        let mut connection = Connection::open(&keypair, at).await;
        for cluster in ["red", "blue"] {
            let bytes = connection.ask(cluster).await;
            tell(&format!("{name} {cluster} {bytes}"));
        }
    }
    tell("done");
    std::future::pending::<()>().await;
}

/// A connection without a swarm: what libp2p would send by itself is not sent.
struct Connection {
    muxer: StreamMuxerBox,
}

impl Connection {
    async fn open(keypair: &Keypair, at: Multiaddr) -> Self {
        let mut transport = tcp::tokio::Transport::new(tcp::Config::default())
            .upgrade(Version::V1)
            .authenticate(noise::Config::new(keypair).unwrap())
            .multiplex(yamux::Config::default())
            .boxed();
        let at = at.iter().filter(|part| !matches!(part, libp2p::multiaddr::Protocol::P2p(_))).collect();
        let dial = transport.dial(at, DialOpts { role: Endpoint::Dialer, port_use: PortUse::New }).unwrap();
        let (_, muxer) = timeout(DEADLINE, dial).await.expect("connected in time").unwrap();
        Self { muxer }
    }

    /// Sends a prompt in `cluster` and gives the number of bytes that came after the negotiation.
    async fn ask(&mut self, cluster: &str) -> usize {
        let mut stream = poll_fn(|cx| self.muxer.poll_outbound_unpin(cx)).await.unwrap();
        let reference = Root::public(&ClusterId::new(cluster).unwrap()).cluster_ref();
        let asking = async move {
            negotiate(&mut stream).await?;
            let mut request = Vec::new();
            let ask = Ask { prompt: Text::new("let me in"), ..Ask::default() };
            infer::encode_request(&mut request, &uuid::Uuid::new_v4(), &reference, &ask, DEADLINE).unwrap();
            stream.write_all(&request).await?;
            stream.flush().await?;
            stream.read(&mut [0; 4096]).await
        };
        // The connection moves only when it is polled; streams that the other side opens are dropped.
        let driving = poll_fn(|cx| {
            while let Poll::Ready(Ok(_)) = self.muxer.poll_inbound_unpin(cx) {}
            while let Poll::Ready(Ok(_)) = self.muxer.poll_unpin(cx) {}
            Poll::<()>::Pending
        });
        tokio::select! {
            // An end or a reset is no byte, at whichever step it comes; neither is silence.
            bytes = timeout(PATIENCE, asking) => bytes.map_or(0, |bytes| bytes.unwrap_or(0)),
            () = driving => 0,
        }
    }
}

/// multistream-select by hand: lines with their length before them, which is below 128 here and so one byte.
async fn negotiate(stream: &mut libp2p::core::muxing::SubstreamBox) -> std::io::Result<()> {
    let mut expected = Vec::new();
    for line in ["/multistream/1.0.0", INFERENCE_PROTOCOL] {
        expected.push(u8::try_from(line.len() + 1).unwrap());
        expected.extend_from_slice(line.as_bytes());
        expected.push(b'\n');
    }
    stream.write_all(&expected).await?;
    stream.flush().await?;
    let mut echoed = vec![0; expected.len()];
    stream.read_exact(&mut echoed).await?;
    assert_eq!(echoed, expected, "the protocol is spoken");
    Ok(())
}
