//! Networks made of namespaces: hosts, switches, routers and cables, none of them connected to the machine's own.
//!
//! A few labs at a time on a machine (`turn`). `topology` says what is plugged into what, `faults` what goes wrong with it.
//! All of a lab goes when it is dropped, panic or not.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

mod faults;
mod selftest;
mod topology;
mod turn;
mod vpn;

pub use faults::Weather;
pub use topology::Nat;

const NAMESPACES: &str = "/run/netns";
/// The first host of a LAN is number 11, as in 10.71.0.11.
const FIRST_HOST: usize = 11;

/// Which addresses the hosts have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Both,
    Ipv4,
    Ipv6,
}

/// A lab. Hosts are called a1, a2, … in LAN a, b1, … in LAN b, and w1, … in the wide network between home routers.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    /// Hosts and the switch that each is plugged into.
    hosts: BTreeMap<String, char>,
    family: Family,
    /// Programs that run inside, by what they are for.
    programs: Mutex<BTreeMap<String, Child>>,
    _turn: turn::Turn,
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

impl Lab {
    /// Hosts and switches, and nothing that joins the LANs.
    fn new(lans: &[(char, usize)], family: Family) -> Option<Self> {
        static LABS: AtomicU32 = AtomicU32::new(0);
        let turn = turn::turn(lans.iter().map(|&(_, hosts)| hosts).sum())?;
        for stale in turn.prefixes().flat_map(|prefix| namespaces(&prefix)) {
            let _ = remove(&stale);
        }
        let prefix = format!("{}-{}-{}", turn.prefix(), std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let hosts = lans.iter().flat_map(|&(lan, count)| (1..=count).map(move |at| (format!("{lan}{at}"), lan))).collect();
        let lab = Self { prefix, hosts, family, programs: Mutex::default(), _turn: turn };
        lab.build(lans);
        Some(lab)
    }

    /// The namespace of a host, to run something in.
    pub fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    fn switch(&self, lan: char) -> String {
        self.namespace(&format!("sw{lan}"))
    }

    /// The number of a host in its LAN: its last byte.
    fn number(&self, host: &str) -> usize {
        FIRST_HOST - 1 + host[1..].parse::<usize>().unwrap()
    }

    /// The IPv4 address of a host, as in 10.71.0.11.
    pub fn ipv4(&self, host: &str) -> String {
        format!("{}.{}", topology::net4(self.hosts[host]), self.number(host))
    }

    /// The IPv6 address of a host, as in fd71::11.
    pub fn ipv6(&self, host: &str) -> String {
        format!("{}::{}", topology::net6(self.hosts[host]), self.number(host))
    }

    /// Runs `act` on a thread inside a host's network: sockets that it makes stay there wherever they are used.
    pub fn within<T: Send>(&self, host: &str, act: impl FnOnce() -> T + Send) -> T {
        let namespace = std::fs::File::open(format!("{NAMESPACES}/{}", self.namespace(host))).unwrap();
        let entered = move || {
            use std::os::fd::AsFd as _;
            let network = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(network)).unwrap();
            act()
        };
        std::thread::scope(|scope| scope.spawn(entered).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// `ip` inside a host, router or switch.
    fn ip(&self, host: &str, arguments: &[&str]) -> String {
        ip(&[&["-n", &self.namespace(host)], arguments].concat(), "")
    }

    /// Commands of `ip` inside a host, router or switch, one a line.
    fn ip_batch(&self, host: &str, commands: &str) {
        ip(&["-n", &self.namespace(host), "-batch", "-"], commands);
    }

    fn sysctl(&self, host: &str, settings: &[&str]) {
        for setting in settings {
            let (path, value) = setting.split_once('=').unwrap();
            let script = format!("echo {value} >/proc/sys/{path}");
            ip(&["netns", "exec", &self.namespace(host), "sh", "-c", &script], "");
        }
    }

    /// Puts `chains` in place of the table `name` of a host, router or switch; without chains the table is gone.
    fn table(&self, host: &str, family: &str, name: &str, chains: Option<&str>) {
        let mut rules = format!("table {family} {name} {{}}\ndelete table {family} {name}\n");
        if let Some(chains) = chains {
            let _ = writeln!(rules, "table {family} {name} {{\n{chains}\n}}");
        }
        run(Command::new("ip").args(["netns", "exec", &self.namespace(host), "nft", "-f", "-"]), &rules)
            .unwrap_or_else(|error| panic!("{error}"));
    }

    /// Runs a program of `lab/` inside a host, router or switch and waits until it has said "ready".
    fn program(&self, host: &str, purpose: &str, arguments: &[&str]) {
        use std::io::BufRead as _;
        let (script, arguments) = arguments.split_first().unwrap();
        let script = format!("{}/tests/netns/lab/{script}", env!("CARGO_MANIFEST_DIR"));
        let mut child = Command::new("ip")
            .args(["netns", "exec", &self.namespace(host), "python3", &script])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut word = String::new();
        std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut word).unwrap();
        assert_eq!(word.trim(), "ready", "{script} {arguments:?} does not start");
        let before = self.programs.lock().unwrap().insert(purpose.to_owned(), child);
        assert!(before.is_none(), "two programs for {purpose}");
    }

    /// Ends what [`Lab::program`] began, if it did.
    fn end_program(&self, purpose: &str) {
        if let Some(mut child) = self.programs.lock().unwrap().remove(purpose) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let programs: Vec<String> =
            self.programs.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).keys().cloned().collect();
        for purpose in programs {
            self.end_program(&purpose);
        }
        for namespace in namespaces(&format!("{}-", self.prefix)) {
            if let Err(error) = remove(&namespace) {
                eprintln!("{namespace} stays: {error}");
            }
        }
    }
}
