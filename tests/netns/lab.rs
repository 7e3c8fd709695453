//! Networks made of namespaces: hosts, switches, routers and cables, none of them connected to the machine's own.
//!
//! A few labs at a time on a machine: the owner of a lab holds the lock of its place, so every namespace with the prefix of
//! that place that is there when the lock is taken belongs to a process that died. All of a lab goes when it is dropped,
//! panic or not.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

const PREFIX: &str = "ogtest";
/// Labs at once: most tests wait most of the time, and the nodes of three labs leave two cores room to be in time.
const PLACES: usize = 3;
/// A lab with more hosts than this takes all places: what it measures should not wait for others.
const SMALL: usize = 8;
const NAMESPACES: &str = "/run/netns";

/// The first host of a LAN is number 11, as in 10.71.0.11.
const FIRST_HOST: usize = 11;

/// Which addresses the hosts have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Both,
    Ipv6,
}

/// A lab. Hosts are called a1, a2, … in LAN a, b1, … in LAN b.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    /// Hosts and the switch that each is plugged into.
    hosts: BTreeMap<String, char>,
    family: Family,
    _turn: Turn,
}

/// Places for labs that are held, by their locks.
#[derive(Debug)]
struct Turn {
    place: usize,
    locks: Vec<File>,
}

/// The lock of a place: held by an open file and not by a process, so the tests of one process wait for each other too.
fn lock(place: usize) -> std::io::Result<File> {
    File::options().create(true).truncate(false).write(true).open(format!("/run/opengateway-netns-test-{place}.lock"))
}

/// Waits for a free place, or for all of them in order.
fn take(all: bool) -> std::io::Result<Turn> {
    if all {
        let locks = (0..PLACES).map(|place| {
            let lock = lock(place)?;
            rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
            Ok(lock)
        });
        return Ok(Turn { place: 0, locks: locks.collect::<std::io::Result<_>>()? });
    }
    loop {
        for place in 0..PLACES {
            let lock = lock(place)?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Turn { place, locks: vec![lock] }),
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Why there can be no lab here, if so.
fn obstacle() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root can make network namespaces".to_owned());
    }
    for (tool, argument) in [("ip", "-V"), ("nft", "--version"), ("dbus-daemon", "--version")] {
        let found = Command::new(tool).arg(argument).stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !found.is_ok_and(|status| status.success()) {
            return Some(format!("no {tool}"));
        }
    }
    // Root of a container is not allowed everything.
    static PROBES: AtomicU32 = AtomicU32::new(0);
    let probe = format!("probe-{PREFIX}-{}-{}", std::process::id(), PROBES.fetch_add(1, Ordering::Relaxed));
    let made = Command::new("ip").args(["netns", "add", &probe]).output().unwrap();
    let _ = Command::new("ip").args(["netns", "del", &probe]).output();
    (!made.status.success()).then(|| format!("namespaces are not allowed: {}", String::from_utf8_lossy(&made.stderr).trim()))
}

/// Waits for its turn among all tests of this machine. `None`, said aloud, where there can be no lab; a panic in CI.
fn turn(hosts: usize) -> Option<Turn> {
    let obstacle = match take(hosts > SMALL) {
        Ok(turn) => match obstacle() {
            None => return Some(turn),
            Some(obstacle) => obstacle,
        },
        Err(error) => format!("no lock below /run: {error}"),
    };
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs the namespace tests: {obstacle}");
    eprintln!("SKIPPED: {obstacle}");
    None
}

fn run(command: &mut Command, input: &str) -> Result<String, String> {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(|error| error.to_string())?;
    let written = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    if output.status.success() && written.is_some_and(|written| written.is_ok()) {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{command:?} with {input}: {}", String::from_utf8_lossy(&output.stderr)))
}

fn ip(arguments: &[&str], input: &str) -> String {
    run(Command::new("ip").args(arguments), input).unwrap_or_else(|error| panic!("{error}"))
}

/// Ends whatever runs in a namespace, waits until it has ended, and removes the namespace.
fn remove(namespace: &str) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let pids = run(Command::new("ip").args(["netns", "pids", namespace]), "")?;
        let pids: Vec<_> = pids.split_whitespace().filter_map(|pid| rustix::process::Pid::from_raw(pid.parse().ok()?)).collect();
        if pids.is_empty() || Instant::now() > deadline {
            break;
        }
        for pid in pids {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    run(Command::new("ip").args(["netns", "del", namespace]), "").map(drop)
}

/// Namespaces whose names begin with `prefix`.
fn namespaces(prefix: &str) -> Vec<String> {
    let entries = std::fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name.starts_with(prefix)).collect()
}

/// The third part of an IPv4 network and the second of an IPv6 one: LAN a is 10.71.0.0/24 and fd71::/64.
fn net(lan: char) -> u32 {
    71 + u32::from(lan) - u32::from('a')
}

impl Lab {
    fn new(lans: &[(char, usize)], family: Family) -> Option<Self> {
        static LABS: AtomicU32 = AtomicU32::new(0);
        let turn = turn(lans.iter().map(|&(_, hosts)| hosts).sum())?;
        let places = if turn.locks.len() > 1 { 0..PLACES } else { turn.place..turn.place + 1 };
        for stale in places.flat_map(|place| namespaces(&format!("{PREFIX}{place}-"))) {
            let _ = remove(&stale);
        }
        let prefix = format!("{PREFIX}{}-{}-{}", turn.place, std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let hosts = lans.iter().flat_map(|&(lan, count)| (1..=count).map(move |at| (format!("{lan}{at}"), lan))).collect();
        let lab = Self { prefix, hosts, family, _turn: turn };
        lab.build(lans);
        Some(lab)
    }

    /// Hosts a1, a2, … on one switch.
    pub fn one_lan(hosts: usize, family: Family) -> Option<Self> {
        Self::new(&[('a', hosts)], family)
    }

    /// LANs a, b and c with so many hosts each, joined by a router: no NAT, and multicast stays in its LAN.
    pub fn routed(hosts: [usize; 3]) -> Option<Self> {
        let lab = Self::new(&[('a', hosts[0]), ('b', hosts[1]), ('c', hosts[2])], Family::Both)?;
        let router = lab.namespace("router");
        let mut root = format!("netns add {router}\n");
        let mut inside = "link set lo up\n".to_owned();
        for lan in ['a', 'b', 'c'] {
            let switch = lab.switch(lan);
            let _ = writeln!(root, "link add lan-{lan} netns {router} type veth peer name p-router netns {switch}");
            let net = net(lan);
            let _ = writeln!(inside, "addr add 10.{net}.0.1/24 dev lan-{lan}\naddr add fd{net}::1/64 dev lan-{lan} nodad");
            let _ = writeln!(inside, "link set lan-{lan} up");
        }
        ip(&["-batch", "-"], &root);
        ip(&["-n", &router, "-batch", "-"], &inside);
        for lan in ['a', 'b', 'c'] {
            ip(&["-n", &lab.switch(lan), "link", "set", "p-router", "master", "br0", "up"], "");
        }
        lab.sysctl("router", &["net/ipv4/ip_forward=1", "net/ipv6/conf/all/forwarding=1"]);
        for (host, lan) in &lab.hosts {
            let net = net(*lan);
            let routes = format!("route add default via 10.{net}.0.1\nroute add default via fd{net}::1\n");
            ip(&["-n", &lab.namespace(host), "-batch", "-"], &routes);
        }
        Some(lab)
    }

    fn build(&self, lans: &[(char, usize)]) {
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
            ip(&["-n", &self.switch(*lan), "-batch", "-"], &inside);
        }
        for (host, lan) in &self.hosts {
            let (net, number) = (net(*lan), self.number(host));
            let mut inside = "link set lo up\n".to_owned();
            if self.family == Family::Both {
                let _ = writeln!(inside, "addr add 10.{net}.0.{number}/24 dev eth0");
            }
            let _ = writeln!(inside, "addr add fd{net}::{number}/64 dev eth0 nodad\nlink set eth0 up");
            ip(&["-n", &self.namespace(host), "-batch", "-"], &inside);
        }
        if self.family == Family::Ipv6 {
            self.settle();
        }
    }

    /// Waits until no address is tentative: until then there is nothing to send from to a multicast group.
    fn settle(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        for host in self.hosts.keys() {
            while !ip(&["-n", &self.namespace(host), "-6", "addr", "show", "dev", "eth0", "tentative"], "").is_empty() {
                assert!(Instant::now() < deadline, "the addresses of {host} stay tentative");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    fn number(&self, host: &str) -> usize {
        FIRST_HOST - 1 + host[1..].parse::<usize>().unwrap()
    }

    /// The namespace of a host, to run something in.
    pub fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    fn switch(&self, lan: char) -> String {
        self.namespace(&format!("sw{lan}"))
    }

    fn sysctl(&self, host: &str, settings: &[&str]) {
        for setting in settings {
            let (path, value) = setting.split_once('=').unwrap();
            let script = format!("echo {value} >/proc/sys/{path}");
            ip(&["netns", "exec", &self.namespace(host), "sh", "-c", &script], "");
        }
    }

    fn cable(&self, host: &str, state: &str) {
        ip(&["-n", &self.switch(self.hosts[host]), "link", "set", &format!("p-{host}"), state], "");
    }

    /// Pulls a host's cable: the carrier goes away.
    pub fn cut(&self, host: &str) {
        self.cable(host, "down");
    }

    /// Plugs it in again.
    pub fn heal(&self, host: &str) {
        self.cable(host, "up");
    }

    fn nft(&self, lan: char, rules: &str) {
        run(Command::new("ip").args(["netns", "exec", &self.switch(lan), "nft", "-f", "-"]), rules)
            .unwrap_or_else(|error| panic!("{error}"));
    }

    /// Drops all frames between two groups of one LAN, without a word: no carrier is lost.
    pub fn split(&self, one: &[&str], other: &[&str]) {
        let ports = |hosts: &[&str]| hosts.iter().map(|host| format!("\"p-{host}\"")).collect::<Vec<_>>().join(", ");
        let (one, other) = (ports(one), ports(other));
        let table = "table bridge split";
        self.nft(
            'a',
            &format!(
                "{table} {{}}\ndelete {table}\n{table} {{ chain f {{ type filter hook forward priority 0;\n\
                 iifname {{ {one} }} oifname {{ {other} }} drop;\niifname {{ {other} }} oifname {{ {one} }} drop; }}; }}\n"
            ),
        );
    }

    /// Ends [`Lab::split`].
    pub fn unsplit(&self) {
        self.nft('a', "table bridge split {}\ndelete table bridge split\n");
    }

    /// Takes a host's addresses away, as a network manager does when the cable is gone, or gives them back.
    pub fn address(&self, host: &str, there: bool) {
        let (net, number) = (net(self.hosts[host]), self.number(host));
        let (verb, end) = if there { ("add", " nodad") } else { ("del", "") };
        let change = format!("addr {verb} 10.{net}.0.{number}/24 dev eth0\naddr {verb} fd{net}::{number}/64 dev eth0{end}\n");
        ip(&["-n", &self.namespace(host), "-batch", "-"], &change);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for namespace in namespaces(&format!("{}-", self.prefix)) {
            if let Err(error) = remove(&namespace) {
                eprintln!("{namespace} stays: {error}");
            }
        }
    }
}
