//! The real `opengatewayd` on a private bus, asked by the real `ogctl`.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::bus::{Bus, Said, bus_or_skip, ogctl};

pub const NAME: &str = "org.opengateway.Gateway1";
/// Most time that anything may take that takes well under a second on an idle machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// How a daemon is started, and started again.
#[derive(Debug, Clone)]
pub struct Plan {
    name: String,
    /// Its network; `None` is that of the test.
    namespace: Option<String>,
    args: Vec<String>,
    /// Set in its environment.
    environment: Vec<(String, OsString)>,
    /// A program with arguments that becomes the daemon, or runs it as its own child would: `strace -D …`, `setpriv …`.
    under: Vec<OsString>,
}

/// What an environment may say to a daemon: not that of whoever runs the tests.
const HEARD: [&str; 7] = [
    "JOURNAL_STREAM",
    "NOTIFY_SOCKET",
    "NODE_NAME",
    "POC_CLUSTER_ID",
    "POC_SERVE",
    "OPENGATEWAY_BOOTSTRAP",
    "OPENGATEWAY_POC_ROOT",
];

/// Says aloud why a test cannot run here; fails where that is not allowed.
pub fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI must not skip: {why}");
}

impl Plan {
    fn new(name: &str, namespace: Option<String>, args: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            namespace,
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            environment: Vec::new(),
            under: Vec::new(),
        }
    }

    /// On loopback alone, hearing of nobody but by bootstrap.
    pub fn loopback(name: &str, args: &[&str]) -> Self {
        let quiet = ["--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--no-mdns", "--no-discover"];
        Self::new(name, None, &[&quiet, args].concat())
    }

    /// In a network namespace, listening and discovering as an installed daemon does.
    pub fn within(namespace: &str, name: &str, args: &[&str]) -> Self {
        Self::new(name, Some(namespace.to_owned()), args)
    }

    /// With this variable in its environment.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((key.to_owned(), value.into()));
        self
    }

    /// Started by this program, which must leave the daemon its own pid.
    #[must_use]
    pub fn under(mut self, wrapper: &[&OsStr]) -> Self {
        self.under = wrapper.iter().map(|&word| word.to_owned()).collect();
        self
    }

    pub fn command(&self, bus: &Bus) -> Command {
        let program = env!("CARGO_BIN_EXE_opengatewayd");
        // `ip netns exec` becomes the daemon: the pid is its own.
        let mut command = match &self.namespace {
            None if self.under.is_empty() => Command::new(program),
            None => {
                let mut command = Command::new(&self.under[0]);
                command.args(&self.under[1..]).arg(program);
                command
            }
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, program]);
                command
            }
        };
        let log = std::fs::File::options().create(true).append(true).open(bus.dir().join("daemon.log")).unwrap();
        command
            .args(["--bus", bus.address(), "--node-name", &self.name, "--state-dir"])
            .arg(bus.dir().join("state"))
            .args(&self.args);
        for variable in HEARD {
            command.env_remove(variable);
        }
        command
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        command
    }
}

/// A daemon with a bus of its own; both end with it.
#[derive(Debug)]
pub struct Node {
    pub bus: Bus,
    child: Child,
    plan: Plan,
}

impl Node {
    /// Starts a daemon on loopback and waits for its name on the bus. `None` where there is no `dbus-daemon`.
    pub async fn start(name: &str, args: &[&str]) -> Option<Self> {
        Some(Self::start_on(bus_or_skip()?, name, args).await)
    }

    /// The same on this bus.
    pub async fn start_on(bus: Bus, name: &str, args: &[&str]) -> Self {
        let mut node = Self::on(bus, Plan::loopback(name, args));
        node.ready().await;
        node
    }

    /// Starts a daemon and waits for nothing.
    pub fn on(bus: Bus, plan: Plan) -> Self {
        let child = plan.command(&bus).spawn().unwrap();
        Self { bus, child, plan }
    }

    /// A daemon that was started otherwise.
    pub fn of(bus: Bus, child: Child, plan: Plan) -> Self {
        Self { bus, child, plan }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A number of `/proc/PID/status`, in KiB.
    pub fn kib(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Waits for the daemon's name on the bus.
    pub async fn ready(&mut self) {
        assert!(self.comes_up().await, "not started: {}", self.log());
    }

    /// Waits until the daemon has its name on the bus, or has ended, which is `false`.
    pub async fn comes_up(&mut self) -> bool {
        let connection = self.bus.connect().await;
        let deadline = Instant::now() + DEADLINE;
        loop {
            // The pid, since the bus may not have noticed yet that the daemon before this one is gone.
            let owner = connection.call_method(
                Some("org.freedesktop.DBus"),
                "/org/freedesktop/DBus",
                Some("org.freedesktop.DBus"),
                "GetConnectionUnixProcessID",
                &NAME,
            );
            let owner: Option<u32> = owner.await.ok().map(|reply| reply.body().deserialize().unwrap());
            if owner == Some(self.child.id()) {
                return true;
            }
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(Instant::now() < deadline, "neither started nor ended: {}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn name(&self) -> &str {
        &self.plan.name
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.bus.dir().join("daemon.log")).unwrap_or_default()
    }

    pub fn state_dir(&self) -> PathBuf {
        self.bus.dir().join("state")
    }

    pub async fn ogctl(&self, args: &[&str]) -> Said {
        ogctl(&self.bus, args).await
    }

    pub async fn json(&self, args: &[&str]) -> Value {
        let said = self.ogctl(&[args, &["--json"]].concat()).await;
        serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {said:?}"))
    }

    /// Polls an `ogctl … --json` until `wanted`.
    pub async fn until(&self, args: &[&str], wanted: impl Fn(&Value) -> bool) -> Value {
        self.until_within(DEADLINE, args, wanted).await
    }

    /// The same, with a deadline of one's own.
    pub async fn until_within(&self, limit: Duration, args: &[&str], wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + limit;
        loop {
            let value = self.json(args).await;
            if wanted(&value) {
                return value;
            }
            assert!(Instant::now() < deadline, "{}: {args:?} stays {value} for {limit:?}\n{}", self.name(), self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn address(&self) -> String {
        let status = self.until(&["status"], |status| status["addresses"].as_array().is_some_and(|list| !list.is_empty())).await;
        status["addresses"][0].as_str().unwrap().to_owned()
    }

    /// Waits until exactly these nodes are peers.
    pub async fn sees(&self, names: &[&str]) {
        self.sees_in("gatewayai-poc", names, DEADLINE).await;
    }

    /// Waits until exactly these nodes are peers in `cluster`; gives the time that it took.
    pub async fn sees_in(&self, cluster: &str, names: &[&str], limit: Duration) -> Duration {
        let begun = Instant::now();
        let wanted: BTreeSet<&str> = names.iter().copied().collect();
        self.until_within(limit, &["peers", cluster], |peers| names_of(peers) == wanted).await;
        begun.elapsed()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Kills the daemon, unless it has ended.
    pub async fn kill(&mut self) {
        if self.is_running() {
            self.signal(rustix::process::Signal::KILL);
        }
        self.ended().await;
    }

    pub async fn ended(&mut self) -> Option<i32> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "still running: {}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Starts the daemon again, as it was started before, and waits for nothing.
    pub fn launch(&mut self) {
        self.child = self.plan.command(&self.bus).spawn().unwrap();
    }

    /// The same, started by this program.
    pub fn launch_under(&mut self, wrapper: &[&OsStr]) {
        self.child = self.plan.clone().under(wrapper).command(&self.bus).spawn().unwrap();
    }

    pub async fn restart(&mut self) {
        self.launch();
        self.ready().await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The names in an `ogctl peers --json`.
pub fn names_of(peers: &Value) -> BTreeSet<&str> {
    peers["peers"].as_array().into_iter().flatten().filter_map(|peer| peer["name"].as_str()).collect()
}
