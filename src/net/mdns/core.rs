//! What mDNS does, without a socket or a clock: interfaces, packets and moments go in, packets and events come out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};

use super::codec::{self, Instance, Packet, Query};
use super::heard::{Heard, News};
use super::interfaces::{Interface, Net};
use super::leg::{Obstacle, State};
use super::{Event, Leg};
use crate::domain::network::MdnsFacts;
use crate::net::address::{self, Network};
use crate::net::random_below;

/// Sockets at once.
const MAX_LEGS: usize = 32;
/// Seconds for which this node is remembered: a lost question is made good by the next one of anybody, and this outlives
/// two lost ones.
const TTL: u32 = 90;
/// How long a leg that could not be opened is left alone.
const RETRY: Duration = Duration::from_secs(10);
/// The same machine with the identity of this one is told of again after this.
const TWIN_AGAIN: Duration = Duration::from_secs(60);
const MAX_TWINS: usize = 8;
/// Between two looks for who was not heard for long.
const SWEEP: Duration = Duration::from_secs(60);

/// What is to be done outside.
#[derive(Debug, PartialEq)]
pub(super) enum Output {
    /// Open a socket, to send from this address over IPv4, and say how it went with [`Core::opened`].
    Open(Leg, Option<Ipv4Addr>),
    Close(Leg),
    Send(Leg, Vec<u8>),
    /// Join the group or leave it.
    Listen(Leg, bool),
    Tell(Event),
}

#[derive(Debug)]
pub(super) struct Core {
    local: PeerId,
    /// The name under which this node tells of itself: a new one each time, as RFC 6763 wants it unique.
    instance: String,
    /// By it the node knows its own questions again.
    id: u16,
    interfaces: Vec<Interface>,
    legs: BTreeMap<Leg, State>,
    listening: Vec<Multiaddr>,
    networks: Vec<Network>,
    heard: Heard,
    twins: BTreeMap<IpAddr, Instant>,
    problem: Option<String>,
    /// When what is old was looked for last.
    swept: Option<Instant>,
    output: VecDeque<Output>,
}

fn random_name() -> String {
    const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    (0..32).map(|_| char::from(LETTERS[random_below(LETTERS.len())])).collect()
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// RFC 6762 §11: who is not in a subnet of the interface is not on its link. A forged source would make everybody here dial a
/// third machine. Link-local addresses are neighbours by nature, also where the interface has none itself.
fn is_on_link(source: IpAddr, nets: &[Net]) -> bool {
    is_link_local(source) || nets.iter().any(|net| net.contains(source))
}

/// What a socket sends from, over IPv4.
fn source_of(nets: &[Net]) -> Option<Ipv4Addr> {
    nets.iter().find_map(|net| match net.ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    })
}

fn obstacle(interface: &Interface) -> Option<Obstacle> {
    let public = |net: &&Net| address::is_global(&Multiaddr::from(net.ip));
    let told = interface.addresses.iter().filter(|net| !is_link_local(net.ip));
    if !interface.up {
        Some(Obstacle::Down)
    } else if !interface.multicast && !interface.loopback {
        Some(Obstacle::NoMulticast)
    } else if told.clone().count() == told.filter(public).count() {
        Some(Obstacle::Public)
    } else {
        None
    }
}

/// The legs of all interfaces that have an address that others can use, with what keeps each from being used. The loopback
/// counts where there is nothing else: several nodes on a machine without a network.
fn legs_of(interfaces: &[Interface]) -> Vec<(Leg, &Interface, Option<Obstacle>)> {
    let usable = |interface: &&Interface| interface.addresses.iter().any(|net| !is_link_local(net.ip));
    let alone = !interfaces.iter().filter(usable).any(|interface| !interface.loopback && interface.up);
    let mut legs = Vec::new();
    for interface in interfaces.iter().filter(|interface| !interface.loopback || alone) {
        for ipv6 in [false, true] {
            // Over IPv6 the loopback is no place for groups.
            let fits = |net: &Net| net.ip.is_ipv6() == ipv6 && !is_link_local(net.ip) && !(ipv6 && net.ip.is_loopback());
            if interface.addresses.iter().any(fits) {
                legs.push((Leg { index: interface.index, ipv6 }, interface, obstacle(interface)));
            }
        }
    }
    legs.truncate(MAX_LEGS);
    legs
}

impl Core {
    pub(super) fn new(local: PeerId) -> Self {
        Self {
            local,
            instance: random_name(),
            id: u16::try_from(random_below(1 << 16)).unwrap_or(0),
            interfaces: Vec::new(),
            legs: BTreeMap::new(),
            listening: Vec::new(),
            networks: Vec::new(),
            heard: Heard::default(),
            twins: BTreeMap::new(),
            problem: None,
            swept: None,
            output: VecDeque::new(),
        }
    }

    /// What is to be done next outside.
    pub(super) fn output(&mut self) -> Option<Output> {
        self.output.pop_front()
    }

    /// These are the interfaces now.
    pub(super) fn set_interfaces(&mut self, interfaces: &[Interface], now: Instant) {
        let wanted = legs_of(interfaces);
        let there: BTreeSet<Leg> = wanted.iter().map(|(leg, ..)| *leg).collect();
        let gone: Vec<Leg> = self.legs.keys().filter(|leg| !there.contains(leg)).copied().collect();
        for leg in gone {
            self.close(leg);
            self.legs.remove(&leg);
        }
        for (leg, interface, obstacle) in wanted {
            let state = self.legs.entry(leg).or_insert_with(|| State::new(interface.name.clone()));
            let nets: Vec<Net> = interface.addresses.iter().filter(|net| net.ip.is_ipv6() == leg.ipv6).copied().collect();
            let (moved, source) = (state.nets != nets, source_of(&state.nets));
            state.name.clone_from(&interface.name);
            state.nets = nets;
            if obstacle.is_some() {
                state.obstacle = obstacle;
                self.close(leg);
            } else if !state.open || source != source_of(&state.nets) {
                // The address that the socket sends from is another one.
                self.close(leg);
                self.open(leg);
            } else if moved {
                state.begin(now);
            }
        }
        self.interfaces = interfaces.to_vec();
        self.set_records(now);
        self.judge();
    }

    fn open(&mut self, leg: Leg) {
        let Some(state) = self.legs.get_mut(&leg) else { return };
        (state.obstacle, state.retry_at) = (None, None);
        self.output.push_back(Output::Open(leg, source_of(&state.nets)));
    }

    fn close(&mut self, leg: Leg) {
        let Some(state) = self.legs.get_mut(&leg) else { return };
        (state.retry_at, state.deaf_until) = (None, None);
        if std::mem::take(&mut state.open) {
            self.output.push_back(Output::Close(leg));
            self.heard.clear(leg);
        }
    }

    /// A socket was opened, or could not be.
    pub(super) fn opened(&mut self, leg: Leg, outcome: Result<(), String>, now: Instant) {
        let Some(state) = self.legs.get_mut(&leg) else { return };
        match outcome {
            Ok(()) => {
                state.open = true;
                state.begin(now);
            }
            Err(why) => {
                state.obstacle = Some(Obstacle::Failed(why));
                state.retry_at = Some(now + RETRY);
            }
        }
        self.judge();
    }

    /// The socket at `leg` cannot be read any more.
    pub(super) fn broken(&mut self, leg: Leg, why: String, now: Instant) {
        self.close(leg);
        self.opened(leg, Err(why), now);
    }

    /// A packet was sent, or could not be.
    pub(super) fn sent(&mut self, leg: Leg, outcome: Result<(), String>) {
        let Some(state) = self.legs.get_mut(&leg) else { return };
        match outcome {
            Ok(()) => {
                state.sent += 1;
                state.obstacle = None;
            }
            Err(why) => state.obstacle = Some(Obstacle::Failed(why)),
        }
    }

    /// The node listens at these addresses now.
    pub(super) fn set_listening(&mut self, listening: Vec<Multiaddr>, now: Instant) {
        self.networks = address::networks_of(listening.iter());
        self.listening = listening;
        self.set_records(now);
    }

    /// Each leg tells the addresses of its own interface, and none of another: <https://github.com/libp2p/rust-libp2p/pull/6500>.
    fn set_records(&mut self, now: Instant) {
        for state in self.legs.values_mut() {
            let of_leg = |listening: &&Multiaddr| {
                let ip = address::ip_of(listening);
                address::announceable(listening, &self.networks) && state.nets.iter().any(|net| Some(net.ip) == ip)
            };
            let records = self.listening.iter().filter(of_leg).take(codec::MAX_ADDRESSES).cloned().collect();
            state.set_records(records, now);
        }
    }

    /// The network changed: asks and tells as at the start, and tells of everybody anew who is heard.
    pub(super) fn ask_now(&mut self, now: Instant) {
        self.heard.tell_all_again();
        for state in self.legs.values_mut().filter(|state| state.open) {
            state.begin(now);
        }
    }

    /// What this node says last.
    pub(super) fn goodbye(&mut self) {
        for (&leg, state) in self.legs.iter().filter(|(_, state)| state.open && !state.records().is_empty()) {
            let packet = codec::answer(&self.instance, &self.local, state.records(), 0);
            self.output.push_back(Output::Send(leg, packet));
        }
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: Instant) {
        if self.swept.is_none_or(|swept| now.duration_since(swept) >= SWEEP) {
            self.swept = Some(now);
            self.heard.expire(now);
        }
        let legs: Vec<Leg> = self.legs.keys().copied().collect();
        let any_asks = self.legs.values().any(|state| state.is_to_ask(now));
        for leg in legs {
            let Some(state) = self.legs.get_mut(&leg) else { continue };
            if state.retry_at.is_some_and(|at| at <= now) {
                self.open(leg);
                continue;
            }
            if state.deaf_until.is_some_and(|until| until <= now) {
                state.deaf_until = None;
                state.begin(now);
                self.output.push_back(Output::Listen(leg, true));
                self.judge();
            }
            let Some(state) = self.legs.get_mut(&leg) else { continue };
            if any_asks && state.asks(now) {
                self.output.push_back(Output::Send(leg, codec::question(self.id)));
            }
            if state.tells(now) {
                let packet = codec::answer(&self.instance, &self.local, state.records(), TTL);
                self.output.push_back(Output::Send(leg, packet));
            }
        }
    }

    /// When [`Core::tick`] is wanted next.
    pub(super) fn due(&self) -> Option<Instant> {
        self.legs.values().filter_map(State::due).min()
    }

    /// Something came in at `leg`.
    pub(super) fn packet(&mut self, leg: Leg, source: IpAddr, bytes: &[u8], now: Instant) {
        let ours = self.is_ours(source);
        let Some(state) = self.legs.get_mut(&leg).filter(|state| state.open && state.deaf_until.is_none()) else { return };
        state.meter.packet(now);
        if ours || is_on_link(source, &state.nets) {
            if !ours {
                state.heard += 1;
                state.heard_at = Some(now);
            }
            self.said(leg, source, ours, bytes, now);
        } else {
            tracing::trace!(%source, "mDNS packet from elsewhere ignored");
        }
        if let Some(until) = self.legs.get_mut(&leg).and_then(|state| state.meter.flooded(now)) {
            self.flooded(leg, until, now);
        }
    }

    /// A packet from this link, or of this machine.
    fn said(&mut self, leg: Leg, source: IpAddr, ours: bool, bytes: &[u8], now: Instant) {
        match codec::read(bytes) {
            Ok(Packet::Query(query)) if ours && query.id == self.id => {} // our own, or one in 65,536 of a sibling's
            Ok(Packet::Query(query)) => self.question(leg, &query, now),
            Ok(Packet::Response(instances)) => {
                for instance in instances {
                    self.instance(leg, source, ours, instance, now);
                }
            }
            Err(error) => tracing::trace!(%source, %error, "mDNS packet not read"),
        }
    }

    fn is_ours(&self, ip: IpAddr) -> bool {
        self.interfaces.iter().any(|interface| interface.addresses.iter().any(|net| net.ip == ip))
    }

    fn question(&mut self, leg: Leg, query: &Query, now: Instant) {
        let around = self.heard.nodes(leg, now);
        let Some(state) = self.legs.get_mut(&leg) else { return };
        if query.services && state.tells_services(now) {
            self.output.push_back(Output::Send(leg, codec::services(TTL)));
        }
        if !query.peers {
            return;
        }
        if query.known.is_empty() {
            state.heard_question(now);
        }
        // RFC 6762 §7.1: who knows it for half of its time is not told again.
        if !query.known.iter().any(|(name, ttl)| name.begins_with(&self.instance) && *ttl >= TTL / 2) {
            state.wants_answer(around, now);
        }
    }

    fn instance(&mut self, leg: Leg, source: IpAddr, ours: bool, instance: Instance, now: Instant) {
        let Instance { name, ttl, peer, addresses } = instance;
        if peer == self.local {
            if !ours && ttl > 0 && !name.begins_with(&self.instance) {
                self.twin(source, now);
            }
            return;
        }
        if ttl == 0 {
            if self.heard.gone(leg, peer, source) {
                self.output.push_back(Output::Tell(Event::Gone(peer)));
            }
            return;
        }
        let Some(state) = self.legs.get_mut(&leg) else { return };
        let mut usable: Vec<Multiaddr> = Vec::new();
        for address in addresses.iter().filter_map(|address| at_link(address, source, &state.nets)) {
            if address::dialable(&address, &self.networks) && !usable.contains(&address) {
                usable.push(address);
            }
        }
        if usable.is_empty() {
            return;
        }
        if let News::Tell { fresh } = self.heard.learn(leg, peer, &usable, source, now) {
            state.meter.fresh(fresh);
            self.output.push_back(Output::Tell(Event::Found(peer, usable)));
        }
    }

    /// Another machine says that it is this node.
    fn twin(&mut self, source: IpAddr, now: Instant) {
        self.twins.retain(|_, told| now.duration_since(*told) < TWIN_AGAIN);
        if self.twins.len() < MAX_TWINS && !self.twins.contains_key(&source) {
            self.twins.insert(source, now);
            self.output.push_back(Output::Tell(Event::SameIdentity(source)));
        }
    }

    /// Stops listening for a while. What was heard there is forgotten, most of it being the flood; whoever is real is heard
    /// again afterwards. This node goes on telling of itself.
    fn flooded(&mut self, leg: Leg, until: Instant, now: Instant) {
        let Some(state) = self.legs.get_mut(&leg) else { return };
        state.deaf_until = Some(until);
        let (name, seconds) = (state.name.clone(), until.duration_since(now).as_secs());
        tracing::warn!("mDNS flood at {name}: not listening to mDNS there for {seconds} s");
        self.heard.clear(leg);
        self.output.push_back(Output::Listen(leg, false));
        self.output.push_back(Output::Tell(Event::Flooded));
        self.judge();
    }

    /// Some leg does not listen because of a flood.
    pub(super) fn is_flooded(&self) -> bool {
        self.legs.values().any(|state| state.deaf_until.is_some())
    }

    /// What the user has to be told, in a sentence: all legs that should work do not.
    fn judge(&mut self) {
        let flooded =
            self.is_flooded().then(|| "discovery on the local network is paused: it is flooded with mDNS records".to_owned());
        let failed = || {
            if self.legs.values().any(|state| state.open) {
                return None;
            }
            self.legs.values().find_map(|state| match &state.obstacle {
                Some(Obstacle::Failed(why)) => Some(format!("mDNS could not be started at {}: {why}", state.name)),
                _ => None,
            })
        };
        let problem = flooded.or_else(failed);
        if self.problem != problem {
            self.problem.clone_from(&problem);
            self.output.push_back(Output::Tell(Event::Problem(problem)));
        }
    }

    /// What was counted at each leg.
    pub(super) fn facts(&self, now: Instant) -> Vec<MdnsFacts> {
        self.legs.iter().map(|(leg, state)| self.facts_of(*leg, state, now)).collect()
    }

    fn facts_of(&self, leg: Leg, state: &State, now: Instant) -> MdnsFacts {
        let flood = state.deaf_until.map(|_| "it is flooded with mDNS records, and not listened to for a while".to_owned());
        MdnsFacts {
            interface: state.name.clone(),
            ipv6: leg.ipv6,
            sent: state.sent,
            heard: state.heard,
            nodes: u32::try_from(self.heard.nodes(leg, now)).unwrap_or(u32::MAX),
            heard_ago: state.heard_at.map(|at| now.duration_since(at)),
            failed: matches!(state.obstacle, Some(Obstacle::Failed(_))),
            problem: flood.or_else(|| state.obstacle.as_ref().map(ToString::to_string)),
        }
    }
}

/// `announced` as it can be dialled from this link: an address that is on it. Another IPv4 address is replaced by the one that
/// the packet came from, as libp2p does it, so that nobody can make others dial third machines.
fn at_link(announced: &Multiaddr, source: IpAddr, nets: &[Net]) -> Option<Multiaddr> {
    let ip = address::ip_of(announced)?;
    if ip == source || nets.iter().any(|net| net.contains(ip)) {
        return Some(announced.clone());
    }
    match (ip, source) {
        (IpAddr::V4(_), IpAddr::V4(source)) => {
            Some(std::iter::once(Protocol::Ip4(source)).chain(announced.iter().skip(1)).collect())
        }
        _ => None,
    }
}
