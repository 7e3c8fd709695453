//! What is plugged into what.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use super::{Family, Lab, ip};

/// The wide network, where home routers have their outer addresses.
const WAN: char = 'w';

/// What a home router does between its LAN and the wide network. All of them hide the LAN behind one address, and none lets a
/// connection in that nobody inside asked for, unless it is forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nat {
    /// Keeps source ports where it can and drops unsolicited packets: punching holes works.
    KeepsPorts,
    /// The same, but it answers unsolicited packets with a reset or "port unreachable": an early reset ends a punch by TCP.
    Rejects,
    /// A new random port for each flow: punching holes cannot work.
    Symmetric,
    /// Keeps ports, and forwards 4001 over TCP and UDP to the first host of its LAN.
    Forwards,
}

/// The first three bytes of a LAN's IPv4 network: 10.71.0 for LAN a, addresses for documentation in the wide network.
pub fn net4(lan: char) -> String {
    match lan {
        WAN => "198.51.100".to_owned(),
        _ => format!("10.{}.0", 71 + u32::from(lan) - u32::from('a')),
    }
}

/// The first two bytes of a LAN's IPv6 network: fd71 for LAN a.
pub fn net6(lan: char) -> String {
    match lan {
        WAN => "2001:db8".to_owned(),
        _ => format!("fd{}", 71 + u32::from(lan) - u32::from('a')),
    }
}

impl Lab {
    /// Hosts a1, a2, … on one switch.
    pub fn one_lan(hosts: usize, family: Family) -> Option<Self> {
        Self::new(&[('a', hosts)], family)
    }

    /// LANs a and b, which nothing joins.
    pub fn two_islands(hosts: [usize; 2]) -> Option<Self> {
        Self::new(&[('a', hosts[0]), ('b', hosts[1])], Family::Both)
    }

    /// LANs a, b and c with so many hosts each, joined by a router: no NAT, and multicast stays in its LAN.
    pub fn routed(hosts: [usize; 3]) -> Option<Self> {
        let lab = Self::new(&[('a', hosts[0]), ('b', hosts[1]), ('c', hosts[2])], Family::Both)?;
        ip(&["netns", "add", &lab.namespace("router")], "");
        lab.ip("router", &["link", "set", "lo", "up"]);
        for lan in ['a', 'b', 'c'] {
            lab.join("router", &format!("lan-{lan}"), lan, 1, Family::Both);
        }
        lab.sysctl("router", &["net/ipv4/ip_forward=1", "net/ipv6/conf/all/forwarding=1"]);
        for (host, lan) in &lab.hosts {
            let routes = format!("route add default via {}.1\nroute add default via {}::1\n", net4(*lan), net6(*lan));
            lab.ip_batch(host, &routes);
        }
        Some(lab)
    }

    /// LANs a and b, each behind a home router "ra" or "rb" of its kind, which are 198.51.100.1 and 198.51.100.2 outside, and
    /// `wan` hosts w1, … in the wide network, which know no way into the LANs.
    pub fn homes(kinds: [Nat; 2], hosts: [usize; 2], wan: usize) -> Option<Self> {
        let lab = Self::new(&[('a', hosts[0]), ('b', hosts[1]), (WAN, wan)], Family::Both)?;
        for ((lan, kind), outside) in ['a', 'b'].into_iter().zip(kinds).zip([1, 2]) {
            lab.home_router(lan, kind, outside);
        }
        for (host, lan) in lab.hosts.iter().filter(|(_, lan)| **lan != WAN) {
            lab.ip(host, &["route", "add", "default", "via", &format!("{}.1", net4(*lan))]);
        }
        Some(lab)
    }

    fn home_router(&self, lan: char, kind: Nat, outside: usize) {
        let router = format!("r{lan}");
        ip(&["netns", "add", &self.namespace(&router)], "");
        self.ip(&router, &["link", "set", "lo", "up"]);
        self.join(&router, "lan0", lan, 1, Family::Ipv4);
        self.join(&router, "wan0", WAN, outside, Family::Ipv4);
        self.sysctl(&router, &["net/ipv4/ip_forward=1"]);
        let random = if kind == Nat::Symmetric { "fully-random" } else { "" };
        let forward = match kind {
            Nat::Forwards => format!("iifname \"wan0\" meta l4proto {{ tcp, udp }} th dport 4001 dnat to {}.11;", net4(lan)),
            _ => String::new(),
        };
        let nat = format!(
            "chain post {{ type nat hook postrouting priority srcnat; oifname \"wan0\" masquerade {random}; }}\n\
             chain pre {{ type nat hook prerouting priority dstnat; {forward} }}"
        );
        self.table(&router, "ip", "nat", Some(&nat));
        let unsolicited = match kind {
            Nat::Rejects => {
                "iifname \"wan0\" ct state new meta l4proto tcp reject with tcp reset;\n\
                 iifname \"wan0\" ct state new reject with icmpx type port-unreachable;"
            }
            _ => "iifname \"wan0\" ct state new drop;",
        };
        // Unsolicited packets must die in the input hook, before they are confirmed: their own entry would take the mapping
        // that a hole punch needs a moment later.
        let filter = format!(
            "chain wan {{ type filter hook input priority 0; {unsolicited} }}\n\
             chain lan {{ type filter hook forward priority 0; policy drop;\n\
             ct state established,related accept; iifname \"lan0\" oifname \"wan0\" accept; ct status dnat accept; }}"
        );
        self.table(&router, "inet", "filter", Some(&filter));
    }

    /// Another interface of a host, router or switch, plugged into a LAN.
    fn join(&self, host: &str, interface: &str, lan: char, number: usize, family: Family) {
        let port = Self::port(host, interface);
        let (namespace, switch) = (self.namespace(host), self.switch(lan));
        ip(&["link", "add", interface, "netns", &namespace, "type", "veth", "peer", "name", &port, "netns", &switch], "");
        self.ip(&format!("sw{lan}"), &["link", "set", &port, "master", "br0", "up"]);
        let mut inside = String::new();
        if family != Family::Ipv6 {
            let _ = writeln!(inside, "addr add {}.{number}/24 dev {interface}", net4(lan));
        }
        if family != Family::Ipv4 {
            let _ = writeln!(inside, "addr add {}::{number}/64 dev {interface} nodad", net6(lan));
        }
        let _ = writeln!(inside, "link set {interface} up");
        self.ip_batch(host, &inside);
    }

    /// A second interface "eth1" of a host, in another LAN: 10.72.0.111 in LAN b for host a1.
    pub fn second_interface(&self, host: &str, lan: char) {
        self.join(host, "eth1", lan, 100 + self.number(host), self.family);
    }

    /// The port of a switch that an interface is plugged into.
    pub(super) fn port(host: &str, interface: &str) -> String {
        match interface {
            "eth0" => format!("p-{host}"),
            "eth1" => format!("q-{host}"),
            _ => format!("p-{host}-{}", &interface[..1]),
        }
    }

    pub(super) fn build(&self, lans: &[(char, usize)]) {
        let mut root = String::new();
        for (lan, _) in lans {
            let _ = writeln!(root, "netns add {}", self.switch(*lan));
        }
        for (host, lan) in &self.hosts {
            let (namespace, switch) = (self.namespace(host), self.switch(*lan));
            let _ = writeln!(root, "netns add {namespace}");
            let _ = writeln!(root, "link add eth0 netns {namespace} type veth peer name p-{host} netns {switch}");
        }
        ip(&["-batch", "-"], &root);
        for (lan, _) in lans {
            // The switch has no addresses: its own IP stack stays out of the way.
            let name = format!("sw{lan}");
            self.sysctl(&name, &["net/ipv6/conf/all/disable_ipv6=1", "net/ipv6/conf/default/disable_ipv6=1"]);
            let mut inside = "link add br0 type bridge stp_state 0 forward_delay 0\nlink set br0 up\n".to_owned();
            for (host, _) in self.hosts.iter().filter(|(_, in_lan)| *in_lan == lan) {
                let _ = writeln!(inside, "link set p-{host} master br0 up");
            }
            self.ip_batch(&name, &inside);
        }
        for host in self.hosts.keys() {
            let mut inside = "link set lo up\n".to_owned();
            if self.family != Family::Ipv6 {
                let _ = writeln!(inside, "addr add {}/24 dev eth0", self.ipv4(host));
            }
            if self.family != Family::Ipv4 {
                let _ = writeln!(inside, "addr add {}/64 dev eth0 nodad", self.ipv6(host));
            }
            let _ = writeln!(inside, "link set eth0 up");
            self.ip_batch(host, &inside);
        }
        if self.family == Family::Ipv6 {
            self.settle();
        }
    }

    /// Waits until no address is tentative: until then there is nothing to send from to a multicast group.
    fn settle(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        for host in self.hosts.keys() {
            while !self.ip(host, &["-6", "addr", "show", "dev", "eth0", "tentative"]).is_empty() {
                assert!(Instant::now() < deadline, "the addresses of {host} stay tentative");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}
