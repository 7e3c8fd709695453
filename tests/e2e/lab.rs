//! Booted hosts: a real systemd, bus, polkit and journal each, made by `lab/lab.sh`.
//!
//! A machine has places for a few hosts at a time. A lab holds the locks of its places, so what is there under the name of
//! a place when it is taken belongs to a process that died. All of a lab goes when it is dropped, panic or not.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde_json::Value;

use crate::common::bus::Said;
use crate::common::node::skipped;

/// Hosts at once: more would be late on two cores.
const PLACES: usize = 4;
/// Most time that a command in a host may take, in seconds.
const LIMIT: &str = "180";
/// Most time that anything may take that takes a second or two on an idle machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The message bus of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// Debian's.
    Daemon,
    /// Fedora's.
    Broker,
}

/// Hosts a1, a2, … on one LAN.
#[derive(Debug)]
pub struct Lab {
    hosts: Vec<Host>,
    script: Script,
    _places: Vec<File>,
}

/// One host.
#[derive(Debug, Clone)]
pub struct Host {
    pub name: String,
    script: Script,
}

/// `lab.sh` for one lab.
#[derive(Debug, Clone)]
struct Script {
    lab: String,
    bus: Bus,
}

impl Script {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/lab/lab.sh"));
        let bus = if self.bus == Bus::Broker { "broker" } else { "daemon" };
        command.args(args).env("LAB", &self.lab).env("LAB_BUS", bus).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) {
        let said = said(self.command(args).output().unwrap());
        assert_eq!(said.code, 0, "lab.sh {args:?}: {}{}", said.stdout, said.stderr);
    }
}

/// What a command left.
pub fn said(output: Output) -> Said {
    let code = output.status.code().and_then(|code| u8::try_from(code).ok()).expect("it exits by itself");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Said { code, stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Waits for so many places: whoever waits lets nobody pass, so that many places come together too.
fn take(places: usize) -> std::io::Result<Vec<(usize, File)>> {
    assert!(places <= PLACES, "no more than {PLACES} hosts at once");
    let lock =
        |name: &str| File::options().create(true).truncate(false).write(true).open(format!("/run/opengateway-e2e-{name}.lock"));
    let door = lock("door")?;
    rustix::fs::flock(&door, FlockOperation::LockExclusive)?;
    let mut taken = Vec::new();
    loop {
        for place in 0..PLACES {
            if taken.len() == places {
                return Ok(taken);
            }
            let file = lock(&place.to_string())?;
            if taken.iter().all(|(other, _)| *other != place)
                && rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
            {
                taken.push((place, file));
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Why no host can boot here, if so.
fn obstacle() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root can boot hosts");
    }
    // Root of a container is not allowed everything.
    let allowed = Command::new("unshare").args(["--mount", "--net", "--pid", "--fork", "true"]).output();
    (!allowed.is_ok_and(|output| output.status.success())).then_some("this machine allows no namespaces")
}

impl Lab {
    /// Boots so many hosts, with nothing of ours on them. `None`, said aloud, where that is impossible; a panic in CI.
    pub fn boot(hosts: usize, bus: Bus) -> Option<Self> {
        if let Some(obstacle) = obstacle() {
            skipped(obstacle);
            return None;
        }
        let places = take(hosts).unwrap();
        let scripts = places.iter().map(|(place, _)| Script { lab: format!("oge2e{place}"), bus });
        let scripts: Vec<Script> = scripts.collect();
        for script in &scripts {
            script.run(&["down"]);
        }
        let script = scripts[0].clone();
        script.run(&["up", &hosts.to_string()]);
        let hosts = (1..=hosts).map(|number| Host { name: format!("a{number}"), script: script.clone() }).collect();
        Some(Self { hosts, script, _places: places.into_iter().map(|(_, lock)| lock).collect() })
    }

    /// Boots hosts that have this package.
    pub fn with_package(hosts: usize, bus: Bus, package: &Path) -> Option<Self> {
        let lab = Self::boot(hosts, bus)?;
        lab.each(|host| host.install(&[package]));
        Some(lab)
    }

    /// The hosts, to take apart.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Host a1.
    pub fn host(&self) -> &Host {
        &self.hosts[0]
    }

    /// Does this with all hosts at once.
    pub fn each(&self, work: impl Fn(&Host) + Sync) {
        std::thread::scope(|scope| {
            for host in &self.hosts {
                scope.spawn(|| work(host));
            }
        });
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in &self.hosts {
                // Without a word when the host is gone: a panic here would end the process and leave the others up.
                let journal = host.command(&["journalctl", "--no-pager", "-n", "60"]).output();
                let text = journal.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
                eprintln!("---- end of the journal of {}\n{text}", host.name);
            }
        }
        let _ = self.script.command(&["down"]).output();
    }
}

impl Host {
    /// A command that runs in this host as root, with stdin, stdout and stderr to be set.
    pub fn command(&self, args: &[&str]) -> Command {
        self.script.command(&[&["exec", &self.name], args].concat())
    }

    /// Runs a script of the shell, as root.
    pub fn exec(&self, script: &str) -> Said {
        said(self.command(&["timeout", LIMIT, "sh", "-c", script]).output().unwrap())
    }

    /// The same; it must succeed. Gives what it printed, without the last line's end.
    pub fn sh(&self, script: &str) -> String {
        let said = self.exec(script);
        assert_eq!(said.code, 0, "{}: {script}: {}{}", self.name, said.stdout, said.stderr);
        said.stdout.trim_end().to_owned()
    }

    /// Runs a script of the shell as alice, who is a user like any other, or as bob, who may administrate.
    pub fn as_user(&self, user: &str, script: &str) -> Said {
        said(self.script.command(&["as", &self.name, user, "timeout", LIMIT, "sh", "-c", script]).output().unwrap())
    }

    /// Installs .deb files with apt-get, .rpm files with rpm.
    pub fn install(&self, packages: &[&Path]) {
        let said = self.try_install(packages);
        assert_eq!(said.code, 0, "{}: {packages:?}: {}{}", self.name, said.stdout, said.stderr);
    }

    /// The same; it may fail.
    pub fn try_install(&self, packages: &[&Path]) -> Said {
        let packages: Vec<&str> = packages.iter().map(|path| path.to_str().unwrap()).collect();
        said(self.script.command(&[&["install", &self.name], packages.as_slice()].concat()).output().unwrap())
    }

    /// Copies a file into the host, executable.
    pub fn push(&self, file: &Path, to: &str) {
        self.script.run(&["push", &self.name, file.to_str().unwrap(), to]);
    }

    /// Writes a file in the host, for all to read.
    pub fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// Where a file of the host is on this machine. Links that are absolute lead elsewhere.
    pub fn path(&self, path: &str) -> PathBuf {
        self.disk().join("root").join(path.trim_start_matches('/'))
    }

    /// Where the host's disk is on this machine; `disk/upper` has what differs from a host that never booted.
    pub fn disk(&self) -> PathBuf {
        let labs = std::env::var_os("LAB_DIR").unwrap_or_else(|| "/var/lib/opengateway-lab".into());
        Path::new(&labs).join("labs").join(&self.script.lab).join(&self.name)
    }

    /// Cuts the power. The disk stays.
    pub fn power_cut(&self) {
        self.script.run(&["kill", &self.name]);
    }

    /// Shuts down.
    pub fn power_off(&self) {
        self.script.run(&["poweroff", &self.name]);
    }

    /// Boots again after [`Host::power_cut`] or [`Host::power_off`].
    pub fn power_on(&self) {
        self.script.run(&["start", &self.name]);
    }

    /// Pulls the network cable.
    pub fn cut(&self) {
        self.script.run(&["cut", &self.name]);
    }

    /// Plugs it in again.
    pub fn heal(&self) {
        self.script.run(&["heal", &self.name]);
    }

    /// What the unit wrote to the journal in this boot.
    pub fn journal(&self, unit: &str) -> String {
        self.sh(&format!("journalctl --no-pager --boot --output=cat --unit={unit}"))
    }

    /// A property of the service.
    pub fn property(&self, name: &str) -> String {
        self.sh(&format!("systemctl show --property={name} --value opengatewayd"))
    }

    /// `ogctl` as root.
    pub fn ogctl(&self, args: &[&str]) -> Said {
        said(self.command(&[&["timeout", LIMIT, "ogctl"], args].concat()).output().unwrap())
    }

    /// `ogctl … --json` as root.
    pub fn json(&self, args: &[&str]) -> Value {
        let said = self.ogctl(&[args, &["--json"]].concat());
        serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{}: {args:?}: {error}: {said:?}", self.name))
    }

    /// Waits until a script of the shell succeeds; gives the time that it took.
    pub fn until(&self, limit: Duration, script: &str) -> Duration {
        let begun = Instant::now();
        loop {
            let said = self.exec(script);
            if said.code == 0 {
                return begun.elapsed();
            }
            assert!(begun.elapsed() < limit, "{}: not in {limit:?}: {script}: {}{}", self.name, said.stdout, said.stderr);
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
