//! The pure parts together, without a network.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use libp2p::{Multiaddr, PeerId};
use proptest::prelude::*;

use super::codec::{self, Instance, Packet};
use super::core::{Core, Output};
use super::interfaces::{Interface, Net};
use super::{Event, Leg};

const V4: Leg = Leg { index: 2, ipv6: false };
const V6: Leg = Leg { index: 2, ipv6: true };

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn addr(text: &str) -> Multiaddr {
    text.parse().unwrap()
}

fn interface(index: u32, addresses: &[&str]) -> Interface {
    let net = |text: &&str| {
        let (ip, prefix) = text.split_once('/').unwrap();
        Net { ip: ip.parse().unwrap(), prefix: prefix.parse().unwrap() }
    };
    let (name, addresses) = (format!("eth{index}"), addresses.iter().map(net).collect());
    Interface { index, name, up: true, multicast: true, loopback: false, addresses }
}

fn loopback() -> Interface {
    Interface { loopback: true, multicast: false, ..interface(1, &["127.0.0.1/8", "::1/128"]) }
}

const LAN: &[&str] = &["10.0.0.1/24", "fd00::1/64", "fe80::1/64"];

/// A core outside of which everything succeeds.
struct Node {
    core: Core,
    peer: PeerId,
    now: Instant,
    open: Vec<Leg>,
    sent: Vec<(Leg, Vec<u8>)>,
    told: Vec<Event>,
    listening: Vec<(Leg, bool)>,
}

impl Node {
    fn new(listening: &[&str]) -> Self {
        let peer = PeerId::random();
        let mut node = Self {
            core: Core::new(peer),
            peer,
            now: Instant::now(),
            open: Vec::new(),
            sent: Vec::new(),
            told: Vec::new(),
            listening: Vec::new(),
        };
        node.core.set_listening(listening.iter().map(|text| addr(text)).collect(), node.now);
        node
    }

    /// On one LAN, with both families, at rest: nothing was sent lately.
    fn settled() -> Self {
        let mut node = Self::new(&["/ip4/10.0.0.1/udp/4001/quic-v1", "/ip4/10.0.0.1/tcp/4001", "/ip6/fd00::1/tcp/4001"]);
        node.interfaces(&[loopback(), interface(2, LAN)]);
        node.after(Duration::from_secs(90));
        node.sent.clear();
        node
    }

    fn interfaces(&mut self, interfaces: &[Interface]) {
        self.core.set_interfaces(interfaces, self.now);
        self.work();
    }

    fn work(&mut self) {
        loop {
            self.core.tick(self.now);
            let Some(output) = self.core.output() else { return };
            match output {
                Output::Open(leg, _) => {
                    self.open.push(leg);
                    self.core.opened(leg, Ok(()), self.now);
                }
                Output::Close(leg) => self.open.retain(|open| *open != leg),
                Output::Send(leg, packet) => {
                    self.core.sent(leg, Ok(()));
                    self.sent.push((leg, packet));
                }
                Output::Listen(leg, listen) => self.listening.push((leg, listen)),
                Output::Tell(event) => self.told.push(event),
            }
        }
    }

    /// Lets time pass, from one thing that is due to the next.
    fn after(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(due) = self.core.due().filter(|due| *due <= until) {
            self.now = due.max(self.now);
            self.work();
        }
        self.now = until;
        self.work();
    }

    fn hears(&mut self, leg: Leg, source: &str, packet: &[u8]) {
        self.core.packet(leg, ip(source), packet, self.now);
        self.work();
    }

    fn hears_answer(&mut self, source: &str, peer: PeerId, addresses: &[&str]) {
        let addresses: Vec<Multiaddr> = addresses.iter().map(|text| addr(text)).collect();
        self.hears(V4, source, &codec::answer("somebody", &peer, &addresses, 60));
    }

    fn questions(&self, leg: Leg) -> usize {
        self.sent.iter().filter(|(at, packet)| *at == leg && matches!(codec::read(packet), Ok(Packet::Query(_)))).count()
    }

    fn answers(&self, leg: Leg) -> Vec<Instance> {
        let read = |(at, packet): &(Leg, Vec<u8>)| match codec::read(packet) {
            Ok(Packet::Response(instances)) if *at == leg => instances,
            _ => Vec::new(),
        };
        self.sent.iter().flat_map(read).collect()
    }
}

#[test]
fn a_node_asks_at_once_and_more_and_more_rarely_whatever_it_hears() {
    let mut node = Node::new(&["/ip4/10.0.0.1/tcp/4001"]);
    node.interfaces(&[interface(2, LAN)]);
    assert_eq!((node.questions(V4), node.questions(V6)), (1, 1));
    node.hears_answer("10.0.0.2", PeerId::random(), &["/ip4/10.0.0.2/tcp/4001"]);
    node.after(Duration::from_millis(150));
    assert_eq!(node.questions(V4), 2);
    node.after(Duration::from_secs(5));
    assert!((4..=6).contains(&node.questions(V4)), "{}", node.questions(V4));
    node.after(Duration::from_secs(115));
    // Each at moments of its own.
    for leg in [V4, V6] {
        assert!((9..=13).contains(&node.questions(leg)), "{}", node.questions(leg));
    }
}

#[test]
fn what_is_new_is_announced_twice_and_each_interface_tells_its_own_addresses() {
    let mut node = Node::new(&["/ip4/127.0.0.1/tcp/4001", "/ip4/10.0.0.1/tcp/4001", "/ip4/10.9.0.1/tcp/4001"]);
    node.interfaces(&[loopback(), interface(2, LAN), interface(3, &["10.9.0.1/24"])]);
    node.after(Duration::from_secs(3));
    let other = Leg { index: 3, ipv6: false };
    for (leg, told) in [(V4, "/ip4/10.0.0.1/tcp/4001"), (other, "/ip4/10.9.0.1/tcp/4001")] {
        let answers = node.answers(leg);
        assert_eq!(answers.len(), 2, "{answers:?}");
        assert!(answers.iter().all(|answer| answer.addresses == [addr(told)] && answer.peer == node.peer && answer.ttl > 0));
    }
    assert_eq!(node.answers(V6), [], "it listens at none of them");
    // Once more where an address is new, and only there.
    node.sent.clear();
    node.core.set_listening(vec![addr("/ip4/10.0.0.1/tcp/4001"), addr("/ip4/10.9.0.1/tcp/4002")], node.now);
    node.after(Duration::from_secs(3));
    assert_eq!((node.answers(V4).len(), node.answers(other).len()), (0, 2));
}

#[test]
fn a_question_is_answered_at_once_and_never_twice_in_a_second() {
    let mut node = Node::settled();
    node.hears(V4, "10.0.0.2", &codec::question(7));
    assert_eq!(node.answers(V4).len(), 1);
    assert_eq!(node.answers(V4)[0].addresses.len(), 2);
    for _ in 0..10 {
        node.hears(V4, "10.0.0.3", &codec::question(8));
        node.after(Duration::from_millis(50));
    }
    assert_eq!(node.answers(V4).len(), 1);
    node.after(Duration::from_millis(500));
    assert_eq!(node.answers(V4).len(), 2, "those who asked meanwhile are answered as soon as may be");
    assert_eq!(node.answers(V6).len(), 0);
}

#[test]
fn where_many_answer_each_waits_for_a_random_time() {
    let mut node = Node::settled();
    for number in 2..12 {
        let source = format!("10.0.0.{number}");
        node.hears_answer(&source, PeerId::random(), &[&format!("/ip4/{source}/tcp/4001")]);
    }
    node.hears(V4, "10.0.0.2", &codec::question(7));
    assert_eq!(node.answers(V4).len(), 0);
    node.after(Duration::from_millis(121));
    assert_eq!(node.answers(V4).len(), 1);
}

#[test]
fn who_knows_this_node_already_gets_no_answer() {
    let mut node = Node::settled();
    node.hears(V4, "10.0.0.2", &codec::question(7));
    let answer = node.sent.last().unwrap().1.clone();
    node.after(Duration::from_secs(2));
    node.sent.clear();
    // The question, with the pointer of the answer behind it as what is known.
    let mut question = codec::question(7);
    question[7] = 1;
    let end = answer.windows(2).rposition(|window| window == [0xc0, 0x0c]).unwrap() + 2;
    question.extend(&answer[12..end]);
    let Ok(Packet::Query(query)) = codec::read(&question) else { panic!() };
    assert_eq!(query.known.len(), 1);
    node.hears(V4, "10.0.0.2", &question);
    node.after(Duration::from_millis(500));
    assert_eq!(node.answers(V4), []);
}

#[test]
fn at_rest_one_question_serves_all() {
    let mut node = Node::settled();
    // Somebody else asks every ten seconds, over both families.
    for _ in 0..18 {
        for (leg, source) in [(V4, "10.0.0.2"), (V6, "fe80::2")] {
            node.hears(leg, source, &codec::question(7));
        }
        node.after(Duration::from_secs(10));
    }
    assert_eq!((node.questions(V4), node.questions(V6)), (0, 0));
    // It cannot be silenced for good, and asks itself when nobody else does.
    node.after(Duration::from_secs(60));
    assert!(node.questions(V4) >= 1);
}

#[test]
fn an_idle_node_wakes_once_in_half_a_minute() {
    let mut node = Node::settled();
    let (begun, mut wakes) = (node.now, 0);
    while node.now < begun + Duration::from_secs(600) {
        node.now = node.core.due().unwrap();
        node.work();
        wakes += 1;
    }
    assert!((15..=25).contains(&wakes), "{wakes}");
}

#[test]
fn what_is_found_is_told_once_and_its_goodbye_too() {
    let (mut node, peer) = (Node::settled(), PeerId::random());
    for _ in 0..3 {
        node.hears_answer("10.0.0.2", peer, &["/ip4/10.0.0.2/tcp/4001"]);
    }
    assert_eq!(node.told, [Event::Found(peer, vec![addr("/ip4/10.0.0.2/tcp/4001")])]);
    let goodbye = codec::answer("somebody", &peer, &[addr("/ip4/10.0.0.2/tcp/4001")], 0);
    node.told.clear();
    node.hears(V4, "10.0.0.3", &goodbye);
    assert_eq!(node.told, [], "another machine's word");
    node.hears(V4, "10.0.0.2", &goodbye);
    node.hears(V4, "10.0.0.2", &goodbye);
    assert_eq!(node.told, [Event::Gone(peer)]);
}

#[test]
fn nobody_is_made_to_dial_third_machines() {
    let (mut node, peer) = (Node::settled(), PeerId::random());
    let far = ["/ip4/192.0.2.1/tcp/80", "/ip4/127.0.0.1/tcp/4001", "/ip6/2001:db8::1/tcp/80", "/ip4/10.0.0.7/tcp/4001"];
    node.hears_answer("10.0.0.2", peer, &far);
    let expected = ["/ip4/10.0.0.2/tcp/80", "/ip4/10.0.0.2/tcp/4001", "/ip4/10.0.0.7/tcp/4001"];
    assert_eq!(node.told, [Event::Found(peer, expected.iter().map(|text| addr(text)).collect())]);
    node.told.clear();
    let peer = PeerId::random();
    let answer = codec::answer("somebody", &peer, &[addr("/ip6/2001:db8::1/tcp/80"), addr("/ip6/fd00::9/tcp/4001")], 60);
    node.hears(V6, "fe80::9", &answer);
    assert_eq!(node.told, [Event::Found(peer, vec![addr("/ip6/fd00::9/tcp/4001")])]);
}

#[test]
fn whoever_is_not_on_the_link_is_not_listened_to() {
    let mut node = Node::settled();
    // A second subnet on the same link, and an address without neighbours.
    node.interfaces(&[interface(2, &["10.0.0.1/24", "172.16.5.1/16", "192.168.9.9/32", "fd00::1/64", "fe80::1/64"])]);
    node.after(Duration::from_secs(90));
    node.sent.clear();
    node.told.clear();
    let (local, heard) = (node.peer, node.core.facts(node.now)[0].heard);
    for source in ["192.0.2.1", "10.0.1.2", "192.168.9.8"] {
        node.hears_answer(source, PeerId::random(), &["/ip4/10.0.0.7/tcp/4001", &format!("/ip4/{source}/tcp/80")]);
        node.hears_answer(source, local, &["/ip4/10.0.0.7/tcp/4001"]);
        node.hears(V4, source, &codec::question(7));
    }
    node.hears(V6, "2001:db8::9", &codec::question(7));
    node.after(Duration::from_millis(500));
    assert_eq!(node.told, []);
    assert_eq!((node.answers(V4).len(), node.answers(V6).len(), node.core.facts(node.now)[0].heard), (0, 0, heard));
    for (leg, source) in [(V4, "10.0.0.2"), (V4, "172.16.200.1"), (V4, "169.254.3.4"), (V6, "fd00::2"), (V6, "fe80::2")] {
        let addresses = [addr("/ip4/10.0.0.7/tcp/4001"), addr("/ip6/fd00::7/tcp/4001")];
        node.hears(leg, source, &codec::answer("somebody", &PeerId::random(), &addresses, 60));
        assert!(matches!(node.told.pop(), Some(Event::Found(..))), "{source}");
    }
}

#[test]
fn the_node_says_goodbye_at_every_leg() {
    let mut node = Node::settled();
    node.core.goodbye();
    node.work();
    for leg in [V4, V6] {
        assert_eq!(node.answers(leg).iter().map(|answer| (answer.peer, answer.ttl)).collect::<Vec<_>>(), [(node.peer, 0)]);
    }
}

#[test]
fn another_machine_with_this_identity_is_noticed_and_this_one_is_not() {
    let mut node = Node::settled();
    node.hears(V4, "10.0.0.2", &codec::question(7));
    let own = node.sent.last().unwrap().1.clone();
    // Its own packet comes back: from itself, or by way of a reflector.
    node.hears(V4, "10.0.0.1", &own);
    node.hears(V4, "10.0.0.254", &own);
    assert_eq!(node.told, []);
    let peer = node.peer;
    for _ in 0..3 {
        node.hears_answer("10.0.0.9", peer, &["/ip4/10.0.0.9/tcp/4001"]);
    }
    assert_eq!(node.told, [Event::SameIdentity(ip("10.0.0.9"))]);
}

#[test]
fn interfaces_come_and_go() {
    let mut node = Node::new(&["/ip4/10.0.0.1/tcp/4001", "/ip4/10.9.0.1/tcp/4001"]);
    let (lan, other) = (interface(2, LAN), interface(3, &["10.9.0.1/24"]));
    node.interfaces(&[loopback()]);
    assert_eq!(node.open, [Leg { index: 1, ipv6: false }], "nothing but the loopback");
    node.interfaces(&[loopback(), lan.clone()]);
    assert_eq!(node.open, [V4, V6]);
    node.sent.clear();
    node.interfaces(&[loopback(), lan.clone(), other.clone()]);
    let new = Leg { index: 3, ipv6: false };
    assert_eq!((node.open.as_slice(), node.questions(new), node.questions(V4)), ([V4, V6, new].as_slice(), 1, 0));
    node.interfaces(&[loopback(), lan.clone(), Interface { up: false, ..other.clone() }]);
    assert_eq!(node.open, [V4, V6]);
    let facts = node.core.facts(node.now);
    assert!(facts[0].problem.is_none() && facts[0].sent > 0, "{facts:?}");
    assert!(facts[2].problem.as_deref().unwrap().contains("no carrier"), "{facts:?}");
    node.interfaces(&[loopback(), lan, other]);
    assert_eq!(node.open, [V4, V6, new]);
    node.interfaces(&[loopback()]);
    assert_eq!(node.core.facts(node.now).len(), 1);
}

#[test]
fn public_networks_and_links_without_multicast_are_left_alone_and_say_so() {
    let mut node = Node::new(&["/ip4/198.51.100.1/tcp/4001", "/ip4/10.8.0.1/tcp/4001"]);
    let public = interface(2, &["198.51.100.1/24", "2001:db8::1/64", "fe80::1/64"]);
    let tunnel = Interface { multicast: false, ..interface(3, &["10.8.0.1/24"]) };
    node.interfaces(&[loopback(), public, tunnel]);
    assert_eq!(node.open, []);
    let problems: Vec<String> = node.core.facts(node.now).into_iter().map(|facts| facts.problem.unwrap()).collect();
    assert!(problems[0].contains("public") && problems[1].contains("public"), "{problems:?}");
    assert!(problems[2].contains("no multicast"), "{problems:?}");
    assert_eq!(node.told, []);
}

#[test]
fn a_leg_that_fails_is_tried_again_and_told_when_it_is_the_only_one() {
    let mut node = Node::new(&["/ip4/10.0.0.1/tcp/4001"]);
    node.core.set_interfaces(&[interface(2, &["10.0.0.1/24"])], node.now);
    assert_eq!(node.core.output(), Some(Output::Open(V4, Some([10, 0, 0, 1].into()))));
    node.core.opened(V4, Err("no".to_owned()), node.now);
    node.work();
    assert!(matches!(&node.told[..], [Event::Problem(Some(problem))] if problem.contains("eth2: no")), "{:?}", node.told);
    node.after(Duration::from_secs(11));
    assert_eq!((node.open.as_slice(), node.told.last()), ([V4].as_slice(), Some(&Event::Problem(None))));
}

#[test]
fn a_flood_is_not_listened_to_and_who_is_real_is_found_afterwards() {
    let mut node = Node::settled();
    let mut forged = 0;
    while node.listening.is_empty() {
        let source = format!("10.0.0.{}", 2 + forged % 250);
        node.hears_answer(&source, PeerId::random(), &["/ip4/10.0.0.2/tcp/4001"]);
        forged += 1;
    }
    assert!(forged <= 602, "{forged}");
    assert_eq!(node.listening, [(V4, false)]);
    assert!(node.core.is_flooded() && node.told.contains(&Event::Flooded));
    assert!(node.core.facts(node.now)[0].problem.as_deref().unwrap().contains("flooded"));
    // It goes on telling of itself, at the other leg it hears, and here it listens again.
    node.told.clear();
    node.after(Duration::from_secs(11));
    assert_eq!(node.listening, [(V4, false), (V4, true)]);
    assert!(!node.core.is_flooded() && node.told.contains(&Event::Problem(None)));
    let real = PeerId::random();
    node.hears_answer("10.0.0.2", real, &["/ip4/10.0.0.2/tcp/4001"]);
    assert!(node.told.contains(&Event::Found(real, vec![addr("/ip4/10.0.0.2/tcp/4001")])));
}

#[test]
fn one_machine_that_forges_thousands_does_not_keep_others_from_being_found() {
    let mut node = Node::settled();
    for _ in 0..5000 {
        node.hears_answer("10.0.0.66", PeerId::random(), &["/ip4/10.0.0.66/tcp/4001"]);
        node.now += Duration::from_millis(1);
    }
    let found = node.told.iter().filter(|event| matches!(event, Event::Found(..))).count();
    assert_eq!((found, node.core.is_flooded()), (64, false));
    let real = PeerId::random();
    node.hears_answer("10.0.0.2", real, &["/ip4/10.0.0.2/tcp/4001"]);
    assert!(node.told.contains(&Event::Found(real, vec![addr("/ip4/10.0.0.2/tcp/4001")])));
}

#[test]
fn after_a_change_of_the_network_all_is_asked_and_told_anew() {
    let (mut node, peer) = (Node::settled(), PeerId::random());
    node.hears_answer("10.0.0.2", peer, &["/ip4/10.0.0.2/tcp/4001"]);
    node.told.clear();
    node.core.ask_now(node.now);
    node.after(Duration::from_millis(10));
    assert_eq!((node.questions(V4), node.answers(V4).len()), (1, 1));
    node.hears_answer("10.0.0.2", peer, &["/ip4/10.0.0.2/tcp/4001"]);
    assert_eq!(node.told.len(), 1);
}

fn answer() -> Vec<u8> {
    let addresses = [addr("/ip4/10.0.0.2/udp/4001/quic-v1"), addr("/ip6/fd00::2/tcp/4001")];
    codec::answer("abcdefghijklmnopqrstuvwxyz012345", &PeerId::random(), &addresses, 90)
}

#[test]
fn packets_are_read_as_they_were_written() {
    let Ok(Packet::Query(query)) = codec::read(&codec::question(0x1234)) else { panic!() };
    assert_eq!((query.id, query.peers, query.services, query.known.len()), (0x1234, true, false, 0));
    let peer = PeerId::random();
    let mut addresses: Vec<Multiaddr> = (1..=9).map(|port| addr(&format!("/ip4/10.0.0.2/tcp/{port}"))).collect();
    let Ok(Packet::Response(read)) = codec::read(&codec::answer("name", &peer, &addresses, 90)) else { panic!() };
    addresses.truncate(8);
    assert_eq!((read.len(), read[0].peer, read[0].ttl, &read[0].addresses), (1, peer, 90, &addresses));
    assert!(read[0].name.begins_with("name") && !read[0].name.begins_with("nam") && !read[0].name.begins_with("name2"));
    assert_eq!(codec::read(&codec::services(90)), Ok(Packet::Response(Vec::new())));
}

#[test]
fn packets_beyond_the_limits_are_refused() {
    let mut longest = codec::question(1);
    longest.resize(codec::MAX_PACKET, 0);
    assert!(codec::read(&longest).is_ok());
    longest.push(0);
    assert_eq!(codec::read(&longest), Err(codec::Malformed::TooLong));
    for (counts, error) in [([0, 64, 0, 0], codec::Malformed::Truncated), ([0, 65, 0, 0], codec::Malformed::TooMany)] {
        let packet = [[0; 4].as_slice(), &counts, &[0; 4]].concat();
        assert_eq!(codec::read(&packet), Err(error));
    }
    // A name that points at itself, forwards, or round and round.
    for name in [&[0xc0, 12][..], &[0xc0, 40], &[1, b'a', 0xc0, 12]] {
        let packet = [&[0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], name, &[0, 12, 0, 1]].concat();
        assert_eq!(codec::read(&packet), Err(codec::Malformed::Name), "{name:?}");
    }
}

proptest! {
    #[test]
    fn no_bytes_are_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = codec::read(&bytes);
    }

    #[test]
    fn no_damaged_packet_is_a_panic(changes in proptest::collection::vec((0_usize..400, any::<u8>()), 1..8), cut in 0_usize..400) {
        for mut packet in [answer(), codec::question(1), codec::services(1)] {
            for &(at, byte) in &changes {
                let length = packet.len();
                packet[at % length] = byte;
            }
            packet.truncate(cut.max(1));
            let mut node = Node::settled();
            node.hears(V4, "10.0.0.2", &packet);
            if let Ok(Packet::Response(instances)) = codec::read(&packet) {
                prop_assert!(instances.len() <= 4 && instances.iter().all(|instance| instance.addresses.len() <= 8));
            }
        }
    }

    #[test]
    fn whatever_is_heard_a_node_sends_little(packets in proptest::collection::vec((any::<bool>(), 0_u8..250, 0_u64..400), 1..200)) {
        let mut node = Node::settled();
        let begun = node.now;
        for (asks, from, pause) in packets {
            let source = format!("10.0.0.{}", from.max(2));
            let packet = if asks { codec::question(from.into()) } else { answer() };
            node.hears(V4, &source, &packet);
            node.after(Duration::from_millis(pause));
        }
        let seconds = node.now.duration_since(begun).as_secs_f64();
        prop_assert!((node.answers(V4).len() as f64) <= seconds + 1.0);
        prop_assert!((node.questions(V4) as f64) <= seconds / 20.0 + 1.0);
    }
}
