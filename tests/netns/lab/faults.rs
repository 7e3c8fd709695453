//! What goes wrong with a network, and its end. Each fault is the host's own and there once at most.

use super::{Lab, topology};

/// What a cable does to the frames on it, each way.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    pub delay_ms: u32,
    /// A delay differs by up to this much, more or less.
    pub jitter_ms: u32,
    /// Frames may overtake each other, where the jitter lets them.
    pub reorder: bool,
    /// Of a hundred frames so many come twice.
    pub duplicate_percent: u32,
}

impl Lab {
    fn lan_switch(&self, host: &str) -> String {
        format!("sw{}", self.hosts[host])
    }

    fn cable(&self, host: &str, state: &str) {
        self.ip(&self.lan_switch(host), &["link", "set", &format!("p-{host}"), state]);
    }

    /// Pulls a host's cable: the carrier goes away.
    pub fn cut(&self, host: &str) {
        self.cable(host, "down");
    }

    /// Plugs it in again.
    pub fn heal(&self, host: &str) {
        self.cable(host, "up");
    }

    /// Pulls the cable of a second interface ("eth1"), which is plugged into `lan`, or plugs it in again.
    pub fn second_cable(&self, host: &str, lan: char, there: bool) {
        let state = if there { "up" } else { "down" };
        self.ip(&format!("sw{lan}"), &["link", "set", &Self::port(host, "eth1"), state]);
    }

    /// A host's interface in its own LAN keeps its carrier and its addresses, but not a frame passes.
    pub fn dead(&self, host: &str) {
        let chains = format!(
            "chain f {{ type filter hook forward priority -20;\niifname \"p-{host}\" drop;\noifname \"p-{host}\" drop; }}"
        );
        self.table(&self.lan_switch(host), "bridge", &format!("dead-{host}"), Some(&chains));
    }

    /// Drops all frames between two groups of one LAN, without a word: no carrier is lost.
    pub fn split(&self, one: &[&str], other: &[&str]) {
        let ports = |hosts: &[&str]| hosts.iter().map(|host| format!("\"p-{host}\"")).collect::<Vec<_>>().join(", ");
        let (at, one, other) = (self.lan_switch(one[0]), ports(one), ports(other));
        let chains = format!(
            "chain f {{ type filter hook forward priority 0;\n\
             iifname {{ {one} }} oifname {{ {other} }} drop;\niifname {{ {other} }} oifname {{ {one} }} drop; }}"
        );
        self.table(&at, "bridge", "split", Some(&chains));
    }

    /// Ends [`Lab::split`] in LAN a.
    pub fn unsplit(&self) {
        self.table("swa", "bridge", "split", None);
    }

    /// Frames from one host to another of its LAN vanish; those back pass.
    pub fn one_way(&self, from: &str, to: &str) {
        let chains =
            format!("chain f {{ type filter hook forward priority 0; iifname \"p-{from}\" oifname \"p-{to}\" counter drop; }}");
        self.table(&self.lan_switch(from), "bridge", &format!("oneway-{from}-{to}"), Some(&chains));
    }

    /// Ends [`Lab::one_way`].
    pub fn both_ways(&self, from: &str, to: &str) {
        self.table(&self.lan_switch(from), "bridge", &format!("oneway-{from}-{to}"), None);
    }

    /// Loses so many of a hundred frames of a host at random, each way; 0 ends it.
    pub fn loss(&self, host: &str, percent: u32) {
        let chains = format!(
            "chain f {{ type filter hook forward priority -10;\n\
             iifname \"p-{host}\" numgen random mod 100 < {percent} drop;\n\
             oifname \"p-{host}\" numgen random mod 100 < {percent} drop; }}"
        );
        self.table(&self.lan_switch(host), "bridge", &format!("loss-{host}"), (percent > 0).then_some(&chains));
    }

    /// Lays a worse cable to a host; `None` lays the old one. The program is the same on every kernel, with netem or without.
    pub fn weather(&self, host: &str, weather: Option<Weather>) {
        let (switch, purpose) = (self.lan_switch(host), format!("wire to {host}"));
        let (port, near, far) = (format!("p-{host}"), format!("x-{host}"), format!("y-{host}"));
        if self.programs.lock().unwrap().contains_key(&purpose) {
            self.end_program(&purpose);
            self.ip_batch(&switch, &format!("link del {near}\nlink set {port} master br0\n"));
        }
        let Some(weather) = weather else { return };
        self.ip_batch(
            &switch,
            &format!(
                "link add {near} type veth peer name {far}\nlink set {near} up\nlink set {far} master br0 up\n\
                 link set {port} nomaster\n"
            ),
        );
        let (delay, jitter, dup) =
            (weather.delay_ms.to_string(), weather.jitter_ms.to_string(), weather.duplicate_percent.to_string());
        let mut arguments = vec!["wire.py", &port, &near, "--delay", &delay, "--jitter", &jitter, "--dup", &dup];
        if weather.reorder {
            arguments.push("--reorder");
        }
        self.program(&switch, &purpose, &arguments);
    }

    /// Limits a host to so many kbit/s each way; 0 ends it. What does not fit waits for up to 200 ms, then it is lost.
    pub fn rate(&self, host: &str, kbit: u32) {
        for (at, interface) in [(self.lan_switch(host), format!("p-{host}")), (host.to_owned(), "eth0".to_owned())] {
            let tc = |arguments: &[&str]| {
                let inside = self.namespace(&at);
                super::run(std::process::Command::new("tc").args(["-n", &inside, "qdisc"]).args(arguments), "")
            };
            let _ = tc(&["del", "dev", &interface, "root"]);
            if kbit > 0 {
                let rate = format!("{kbit}kbit");
                tc(&["add", "dev", &interface, "root", "tbf", "rate", &rate, "burst", "16kb", "latency", "200ms"])
                    .unwrap_or_else(|error| panic!("{error}"));
            }
        }
    }

    /// The largest packet that a host sends; larger ones of others do not reach it either.
    pub fn mtu(&self, host: &str, bytes: u32) {
        let bytes = bytes.to_string();
        self.ip(host, &["link", "set", "eth0", "mtu", &bytes]);
        self.ip(&self.lan_switch(host), &["link", "set", &format!("p-{host}"), "mtu", &bytes]);
    }

    /// No UDP from or to a host, mDNS included, as behind some company firewalls.
    pub fn no_udp(&self, host: &str, blocked: bool) {
        let chains = "chain i { type filter hook input priority 0; meta l4proto udp drop; }\n\
                      chain o { type filter hook output priority 0; meta l4proto udp drop; }";
        self.table(host, "inet", "noudp", blocked.then_some(chains));
    }

    /// Multicast of mDNS does not cross the switch of a LAN, as behind many wireless access points. What IPv6 needs to find
    /// neighbours passes.
    pub fn no_multicast(&self, lan: char) {
        let chains = "chain f { type filter hook forward priority -15;\n\
                      ip daddr 224.0.0.0/4 drop;\nip6 daddr ff02::fb drop; }";
        self.table(&format!("sw{lan}"), "bridge", "nomulticast", Some(chains));
    }

    /// A host firewall as distributions ship it: what this host did not ask for is dropped, mDNS excepted.
    pub fn firewall(&self, host: &str) {
        let chains = "chain i { type filter hook input priority 0; policy drop;\n\
                      ct state established,related accept;\niifname \"lo\" accept;\n\
                      meta l4proto { icmp, icmpv6 } accept;\nudp dport 5353 accept; }";
        self.table(host, "inet", "firewall", Some(chains));
    }

    /// Cuts a whole home off: its router lets nothing pass.
    pub fn wan_cut(&self, lan: char) {
        let chains = "chain f { type filter hook forward priority -200; policy drop; }";
        self.table(&format!("r{lan}"), "inet", "cut", Some(chains));
    }

    /// Ends [`Lab::wan_cut`].
    pub fn wan_heal(&self, lan: char) {
        self.table(&format!("r{lan}"), "inet", "cut", None);
    }

    /// A home router forgets every mapping, as when it starts again.
    pub fn flush_nat(&self, lan: char) {
        let script = format!("{}/tests/netns/lab/conntrack_flush.py", env!("CARGO_MANIFEST_DIR"));
        super::ip(&["netns", "exec", &self.namespace(&format!("r{lan}")), "python3", &script], "");
    }

    /// Takes a host's addresses away, as a network manager does when the cable is gone, or gives them back.
    pub fn address(&self, host: &str, there: bool) {
        let (verb, end) = if there { ("add", " nodad") } else { ("del", "") };
        let change = format!("addr {verb} {}/24 dev eth0\naddr {verb} {}/64 dev eth0{end}\n", self.ipv4(host), self.ipv6(host));
        self.ip_batch(host, &change);
    }

    /// One more IPv4 address of a host in its LAN.
    pub fn extra_address(&self, host: &str, address: &str) {
        self.ip(host, &["addr", "add", &format!("{address}/24"), "dev", "eth0"]);
    }

    /// Another address in the same LAN in place of the host's own, as from a DHCP server that forgot: 10.71.0.211 for a1.
    pub fn renumber(&self, host: &str) {
        let routed = !self.ip(host, &["route", "show", "default"]).is_empty();
        self.address(host, false);
        let (lan, number) = (self.hosts[host], 200 + self.number(host));
        let (v4, v6) = (topology::net4(lan), topology::net6(lan));
        self.ip_batch(host, &format!("addr add {v4}.{number}/24 dev eth0\naddr add {v6}::{number}/64 dev eth0 nodad\n"));
        // The route went with the address.
        if routed {
            self.ip(host, &["route", "replace", "default", "via", &format!("{v4}.1")]);
        }
    }
}
