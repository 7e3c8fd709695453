//! The real `opengatewayd` on private buses of its own, on loopback, asked by the real `ogctl` and by raw D-Bus calls.

mod cluster;
mod contract;
mod hand;
mod lifecycle;
mod prompts;
mod random;
mod storage;
mod supervision;
mod users;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use zbus::{Connection, Message, MessageStream, OwnedObjectPath, Variant};

use crate::ogctl::fake::{Bus, Said, bus_or_skip, ogctl, ogctl_on};

pub const NAME: &str = "org.opengateway.Gateway1";
pub const ROOT: &str = "/org/opengateway/Gateway1";
pub const MANAGER: &str = "org.opengateway.Gateway1.Manager";
pub const ERROR: &str = "org.opengateway.Gateway1.Error.";
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A daemon with a bus of its own; both end with it.
pub struct Node {
    pub bus: Bus,
    child: Child,
    name: String,
    args: Vec<String>,
}

/// Says aloud why a test cannot run here; fails where that is not allowed.
pub fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI must not skip: {why}");
}

pub fn command(bus: &Bus, name: &str, state: &Path, args: &[String]) -> Command {
    let log = std::fs::File::options().create(true).append(true).open(bus.dir().join("daemon.log")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_opengatewayd"));
    command
        .args(["--bus", bus.address(), "--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--no-mdns"])
        .arg("--state-dir")
        .arg(state)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    if !name.is_empty() {
        command.args(["--node-name", name]);
    }
    for variable in ["JOURNAL_STREAM", "NOTIFY_SOCKET", "NODE_NAME", "POC_CLUSTER_ID", "POC_SERVE", "OPENGATEWAY_BOOTSTRAP", "OPENGATEWAY_POC_ROOT"] {
        command.env_remove(variable);
    }
    command
}

pub fn launch(bus: &Bus, name: &str, state: &Path, args: &[String]) -> Child {
    command(bus, name, state, args).spawn().unwrap()
}

impl Node {
    /// Starts a daemon and waits for its name on the bus. `None` where there is no `dbus-daemon`.
    pub async fn start(name: &str, args: &[&str]) -> Option<Self> {
        let bus = bus_or_skip()?;
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        Some(Self::start_on(bus, name, args).await)
    }

    /// The same on this bus.
    pub async fn start_on(bus: Bus, name: &str, args: Vec<String>) -> Self {
        let child = launch(&bus, name, &bus.dir().join("state"), &args);
        let mut node = Self { bus, child, name: name.to_owned(), args };
        node.ready().await;
        node
    }

    async fn ready(&mut self) {
        let connection = self.bus.connect().await;
        let deadline = Instant::now() + DEADLINE;
        loop {
            let owned: bool = connection
                .call_method(Some("org.freedesktop.DBus"), "/org/freedesktop/DBus", Some("org.freedesktop.DBus"), "NameHasOwner", &NAME)
                .await
                .unwrap()
                .body()
                .deserialize()
                .unwrap();
            if owned {
                return;
            }
            assert!(Instant::now() < deadline && self.child.try_wait().unwrap().is_none(), "not started: {}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
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
        let deadline = Instant::now() + DEADLINE;
        loop {
            let value = self.json(args).await;
            if wanted(&value) {
                return value;
            }
            assert!(Instant::now() < deadline, "{args:?} stays {value}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn address(&self) -> String {
        let status = self.until(&["status"], |status| status["addresses"].as_array().is_some_and(|list| !list.is_empty())).await;
        status["addresses"][0].as_str().unwrap().to_owned()
    }

    /// Waits until exactly these nodes are peers.
    pub async fn sees(&self, names: &[&str]) {
        let wanted: BTreeSet<&str> = names.iter().copied().collect();
        self.until(&["peers", "gatewayai-poc"], |peers| {
            let list = peers["peers"].as_array();
            list.is_some_and(|list| list.iter().filter_map(|peer| peer["name"].as_str()).collect::<BTreeSet<_>>() == wanted)
        })
        .await;
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

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
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

    async fn restart(&mut self) {
        self.child = launch(&self.bus, &self.name, &self.state_dir(), &self.args);
        self.ready().await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub async fn call<B>(connection: &Connection, method: &str, body: &B) -> Result<Message, (String, String)>
where
    B: serde::Serialize + zbus::wire::DynamicType + Sync,
{
    match tokio::time::timeout(DEADLINE, connection.call_method(Some(NAME), ROOT, Some(MANAGER), method, body)).await.unwrap() {
        Ok(reply) => Ok(reply),
        Err(zbus::Error::MethodError(name, message, _)) => Err((name.to_string(), message.unwrap_or_default())),
        // The standard names come as a type of their own.
        Err(zbus::Error::FDO(error)) => {
            use zbus::DBusError as _;
            Err((error.name().to_string(), error.description().unwrap_or_default().to_owned()))
        }
        Err(error) => panic!("{method}: {error}"),
    }
}

pub type Options<'a> = HashMap<&'a str, Variant<'a>>;
