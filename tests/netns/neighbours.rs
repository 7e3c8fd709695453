//! Who else may be on a local network: nodes without a bus that tell what they know (`neighbour`), another libp2p program
//! (`stranger`), and somebody who forges mDNS answers (`forger`).

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use futures::StreamExt as _;
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::swarm::{self, NetworkBehaviour, SwarmEvent};
use libp2p::{PeerId, Swarm, Transport as _, noise, tcp, yamux};
use opengateway::domain::cluster::ClusterId;
use opengateway::domain::network::{Facts, MdnsFacts};
use opengateway::net::identity::Identity;
use opengateway::net::{Config, JoinOptions, start};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::common::node::DEADLINE;
use crate::lab::Lab;
use crate::liar::Nothing;
use crate::roles::{Role, tell};

/// The cluster that a neighbour is in.
const IN_CLUSTER: &str = "OPENGATEWAY_NETNS_CLUSTER";
/// How many answers to forge, and from which addresses of the host, with spaces between.
const FORGED: &str = "OPENGATEWAY_NETNS_FORGED";
const SOURCES: &str = "OPENGATEWAY_NETNS_SOURCES";

/// A node as it says of itself.
#[derive(Debug)]
pub struct Neighbour {
    role: Role,
    pub id: String,
}

impl Neighbour {
    /// Starts a node with mDNS in `cluster`, and waits until it listens.
    pub async fn start(lab: &Lab, host: &str, cluster: &str) -> Self {
        let mut role = Role::start(lab, host, "neighbour", &[(IN_CLUSTER, cluster)]);
        let id = role.told().await;
        Self { role, id }
    }

    /// What it knows now.
    pub async fn facts(&mut self) -> Value {
        self.role.say("facts");
        serde_json::from_str(&self.role.told().await).unwrap()
    }

    /// Its facts of mDNS at an interface, as soon as they are as `wanted`.
    pub async fn leg(&mut self, interface: &str, ipv6: bool, wanted: impl Fn(&Value) -> bool) -> Value {
        let begun = std::time::Instant::now();
        loop {
            let facts = self.facts().await;
            let legs = facts["mdns"].as_array().unwrap();
            if let Some(leg) = legs.iter().find(|leg| leg["interface"] == interface && leg["ipv6"] == ipv6 && wanted(leg)) {
                return leg.clone();
            }
            assert!(begun.elapsed() < DEADLINE, "mDNS at {interface}, ipv6 {ipv6}: {facts:#}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// Ends as a service that is stopped, with goodbyes.
    pub async fn stop(mut self) {
        self.role.say("stop");
        assert_eq!(self.role.told().await, "stopped");
    }
}

fn leg(facts: &MdnsFacts) -> Value {
    json!({
        "interface": facts.interface, "ipv6": facts.ipv6, "sent": facts.sent, "heard": facts.heard,
        "nodes": facts.nodes, "problem": facts.problem,
    })
}

fn told(facts: &Facts) -> Value {
    json!({
        "mdns": facts.mdns.iter().map(leg).collect::<Vec<_>>(), "flooded": facts.mdns_flooded,
        "same_identity": facts.same_identity, "members": facts.clusters.iter().map(|cluster| cluster.members).sum::<usize>(),
    })
}

pub async fn neighbour() {
    let identity = Identity::generate();
    let listen = ["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"].map(str::to_owned).to_vec();
    let config = Config { node_name: "Neighbour".to_owned(), listen, any_port: true, mdns: true, ..Config::default() };
    let (net, _running) = start(config, &identity, Arc::new(Nothing::new())).await.unwrap();
    let cluster = ClusterId::new(&std::env::var(IN_CLUSTER).unwrap()).unwrap();
    net.join(cluster, JoinOptions::default()).await.unwrap();
    tell(&net.facts(None).await.unwrap().id.to_string());
    let (sender, mut lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || std::io::stdin().lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    while let Some(line) = lines.recv().await {
        match line.as_str() {
            "facts" => tell(&told(&net.facts(None).await.unwrap()).to_string()),
            _ => {
                net.shutdown().await;
                tell("stopped");
            }
        }
    }
}

/// mDNS as the library has it, for both families.
#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Both {
    ipv4: libp2p_mdns::tokio::Behaviour,
    ipv6: libp2p_mdns::tokio::Behaviour,
}

/// Starts a libp2p program that is no gateway. It tells its id, then `found ID ADDRESS` for each that it finds.
pub async fn stranger_on(lab: &Lab, host: &str) -> (Role, String) {
    let mut role = Role::start(lab, host, "stranger", &[]);
    let id = role.told().await;
    (role, id)
}

pub async fn stranger() {
    let keypair = Keypair::generate_ed25519();
    let local = keypair.public().to_peer_id();
    let transport = tcp::tokio::Transport::new(tcp::Config::default())
        .upgrade(Version::V1)
        .authenticate(noise::Config::new(&keypair).unwrap())
        .multiplex(yamux::Config::default())
        .boxed();
    let mdns = |enable_ipv6| {
        let config = libp2p_mdns::Config { enable_ipv6, ..libp2p_mdns::Config::default() };
        libp2p_mdns::tokio::Behaviour::new(config, local).unwrap()
    };
    let behaviour = Both { ipv4: mdns(false), ipv6: mdns(true) };
    let mut swarm = Swarm::new(transport, behaviour, local, swarm::Config::with_tokio_executor());
    for address in ["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"] {
        swarm.listen_on(address.parse().unwrap()).unwrap();
    }
    tell(&local.to_string());
    loop {
        if let SwarmEvent::Behaviour(BothEvent::Ipv4(event) | BothEvent::Ipv6(event)) = swarm.select_next_some().await
            && let libp2p_mdns::Event::Discovered(found) = event
        {
            for (peer, address) in found {
                tell(&format!("found {peer} {address}"));
            }
        }
    }
}

/// An answer that nobody asked for: `peer` is at `address`, for as long as a record can say.
fn forged(peer: &PeerId, address: IpAddr) -> Vec<u8> {
    let mut packet = vec![0, 0, 0x84, 0, 0, 0, 0, 1, 0, 0, 0, 1];
    let service = b"\x04_p2p\x04_udp\x05local\x00";
    let instance = [&[32][..], &peer.to_string().as_bytes()[..32], &[0]].concat();
    let text = format!("dnsaddr=/ip4/{address}/tcp/4001/p2p/{peer}");
    let text = [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    for (name, kind, data) in [(&service[..], 12_u16, &instance), (&instance, 16, &text)] {
        packet.extend(name);
        packet.extend(kind.to_be_bytes());
        packet.extend([0, 1]);
        packet.extend(u32::MAX.to_be_bytes());
        packet.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        packet.extend(data);
    }
    packet
}

/// Starts somebody who sends so many answers, each for a node of its own, from these addresses in turn. It tells "done".
pub fn forger_on(lab: &Lab, host: &str, answers: usize, sources: &[String]) -> Role {
    Role::start(lab, host, "forger", &[(FORGED, &answers.to_string()), (SOURCES, &sources.join(" "))])
}

pub fn forger() {
    let answers: usize = std::env::var(FORGED).unwrap().parse().unwrap();
    let sources = std::env::var(SOURCES).unwrap();
    let open = |source: &str| {
        let source: IpAddr = source.parse().unwrap();
        (UdpSocket::bind(SocketAddr::new(source, 0)).unwrap(), source)
    };
    let sockets: Vec<(UdpSocket, IpAddr)> = sources.split(' ').map(open).collect();
    for (_, (socket, source)) in (0..answers).zip(sockets.iter().cycle()) {
        // A full buffer makes it wait: none of them is lost here.
        socket.send_to(&forged(&PeerId::random(), *source), "224.0.0.251:5353").unwrap();
    }
    tell("done");
}
