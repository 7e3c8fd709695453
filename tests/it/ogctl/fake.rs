//! A daemon that the test plays on a private bus.

use opengateway::api::names::{BUS_NAME, CLUSTER_INTERFACE, ErrorName, MODELS_INTERFACE, NETWORK_INTERFACE, ROOT_PATH};
use opengateway::api::path::{cluster_path, job_path};
use opengateway::api::stream::{JobLine, JobNow, Line, ServedBy, Step, Timings, Usage};
use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;
use zbus::message::Header;
use zbus::{Connection, OwnedFd, OwnedObjectPath, OwnedVariant, Variant, fdo};

use crate::common::bus::Bus;

type Details = HashMap<String, OwnedVariant>;

/// A `StartPrompt` as the daemon saw it.
#[derive(Debug, Clone, Default)]
pub struct PromptCall {
    pub cluster: String,
    pub prompt: String,
    /// `Key=value`, sorted.
    pub options: Vec<String>,
}

/// What the daemon saw.
#[derive(Debug, Default)]
pub struct Seen {
    pub calls: Vec<String>,
    pub prompt: PromptCall,
    pub closed_pipes: usize,
    /// What came with the last `Add`: name, bytes, digest that it must have.
    pub added: (String, Vec<u8>, Option<String>),
    hang: bool,
    /// Where watchers of jobs are told.
    watchers: Vec<std::io::PipeWriter>,
}

#[derive(Clone, Default)]
struct Shared {
    seen: Arc<Mutex<Seen>>,
    changed: Arc<Notify>,
}

impl Shared {
    fn note(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().unwrap());
        self.changed.notify_waiters();
    }
    async fn read(&self) {
        if self.seen.lock().unwrap().hang {
            std::future::pending::<()>().await;
        }
    }
}

/// The daemon that the test plays.
pub struct Fake {
    connection: Connection,
    shared: Shared,
}

impl Fake {
    pub async fn serve(bus: &Bus) -> Self {
        let shared = Shared::default();
        let mut builder = zbus::connection::Builder::address(bus.address())
            .serve_at(ROOT_PATH, Manager { shared: shared.clone() })
            .serve_at(ROOT_PATH, Models { shared: shared.clone() })
            .serve_at(ROOT_PATH, Network { shared: shared.clone() });
        for (name, state, peers) in
            [("room", "connected", 2), ("room-opened", "connected", 1), ("alone", "discovering", 0), ("broken", "failed", 0)]
        {
            builder = builder.serve_at(cluster_path(name), Cluster { state, peers });
        }
        let job = Job { shared: shared.clone() };
        let connection = builder.serve_at(job_path(1), job).name(BUS_NAME).build().await.unwrap();
        Self { connection, shared }
    }

    pub fn calls(&self) -> Vec<String> {
        self.shared.seen.lock().unwrap().calls.clone()
    }
    pub fn last_prompt(&self) -> PromptCall {
        self.shared.seen.lock().unwrap().prompt.clone()
    }
    /// From now on reading calls get no answer.
    pub fn hang(&self) {
        self.shared.note(|seen| seen.hang = true);
    }
    /// Waits until the daemon has seen what `condition` wants.
    pub async fn wait_for(&self, condition: impl Fn(&Seen) -> bool) {
        let wait = async {
            loop {
                let changed = self.shared.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if condition(&self.shared.seen.lock().unwrap()) {
                    return;
                }
                changed.await;
            }
        };
        let seen = tokio::time::timeout(Duration::from_secs(20), wait).await;
        assert!(seen.is_ok(), "never seen: {:?}", self.shared.seen.lock().unwrap());
    }
    pub async fn emit_peer_connected(&self) {
        let body = ("12D3KooWb", details(vec![("Name", Variant::from("NodeB"))]));
        let path = cluster_path("gatewayai-poc");
        self.connection.emit_signal(None::<&str>, path, CLUSTER_INTERFACE, "PeerConnected", &body).await.unwrap();
    }
    pub async fn emit_peer_changed(&self) {
        let told = [("Name", Variant::from("NodeB")), ("Direct", Variant::from(false)), ("RelayName", Variant::from("NodeW"))];
        let body = ("12D3KooWb", vec!["Direct", "Relay"], details(told.to_vec()));
        let path = cluster_path("gatewayai-poc");
        self.connection.emit_signal(None::<&str>, path, CLUSTER_INTERFACE, "PeerChanged", &body).await.unwrap();
    }
    pub async fn emit_worst_finding(&self, code: &str) {
        let worst =
            (code, if code.is_empty() { "" } else { "error" }, if code.is_empty() { "" } else { "nobody\u{1b}[2J is there" });
        let changed = HashMap::from([("WorstFinding", Variant::from(worst))]);
        let body = (NETWORK_INTERFACE, changed, Vec::<String>::new());
        let properties = "org.freedesktop.DBus.Properties";
        self.connection.emit_signal(None::<&str>, ROOT_PATH, properties, "PropertiesChanged", &body).await.unwrap();
    }
    /// Tells the watchers of jobs.
    pub async fn tell_job(&self, line: JobLine) {
        self.wait_for(|seen| !seen.watchers.is_empty()).await;
        self.shared.note(|seen| seen.watchers.iter_mut().for_each(|pipe| pipe.write_all(&line.to_bytes()).unwrap()));
    }
    pub async fn emit_model_changed(&self) {
        let body = ("demo", details(vec![("State", Variant::from("loading")), ("Progress", Variant::from(0.4))]));
        self.connection.emit_signal(None::<&str>, ROOT_PATH, MODELS_INTERFACE, "ModelChanged", &body).await.unwrap();
    }
    pub async fn stop(self) {
        self.connection.close().await.unwrap();
    }
}

fn details(pairs: Vec<(&str, Variant<'static>)>) -> Details {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value.try_into_owned().unwrap())).collect()
}

fn nested(pairs: Vec<(&str, Variant<'static>)>) -> Variant<'static> {
    Variant::from(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<HashMap<String, Variant<'static>>>())
}

/// A peer's own word for its name.
pub const EVIL_NAME: &str = "\u{1b}]0;owned\u{07}evil\u{9b}2J\u{202e}";

struct Manager {
    shared: Shared,
}

#[zbus::interface(name = "org.opengateway.Gateway1.Manager")]
impl Manager {
    async fn get_status(&self) -> fdo::Result<Details> {
        self.shared.read().await;
        let cluster = HashMap::from([
            ("Id".to_owned(), Variant::from("gatewayai-poc")),
            ("State".to_owned(), Variant::from("degraded")),
            ("PeerCount".to_owned(), Variant::from(2u32)),
            ("Serving".to_owned(), Variant::from(true)),
        ]);
        Ok(details(vec![
            ("Version", Variant::from("9.9.9")),
            ("NodeName", Variant::from("NodeC")),
            ("PeerId", Variant::from("12D3KooWself")),
            ("State", Variant::from("degraded")),
            ("Sharing", Variant::from(true)),
            ("StartedAt", Variant::from(1u64)),
            ("Clusters", Variant::from(vec![cluster])),
            ("Problems", Variant::from(vec!["no peer can serve; start one"])),
            ("Addresses", Variant::from(vec!["/ip4/192.0.2.1/udp/4001/quic-v1/p2p/12D3KooWself"])),
            ("Newer", Variant::from(1u32)),
        ]))
    }

    async fn list_clusters(&self) -> Vec<(String, OwnedObjectPath, Details)> {
        let id = "gatewayai-poc";
        let state = details(vec![
            ("State", Variant::from("degraded")),
            ("PeerCount", Variant::from(2u32)),
            ("Serving", Variant::from(true)),
        ]);
        vec![(id.to_owned(), OwnedObjectPath::try_from(cluster_path(id)).unwrap(), state)]
    }

    async fn list_peers(&self, _cluster: String, _options: Details) -> Vec<(String, Details)> {
        let peer = details(vec![
            ("Name", Variant::from(EVIL_NAME)),
            ("Direct", Variant::from(true)),
            ("LatencyUSec", Variant::from(850u64)),
            ("Liveness", Variant::from("alive")),
            ("Models", Variant::from(vec!["echo"])),
            ("TierIds", Variant::from(vec!["Llama-3.2-3B"])),
            ("Version", Variant::from("0.1.0")),
        ]);
        let other = details(vec![("Name", Variant::from("Ann's node")), ("Models", Variant::from(vec!["llama3.2:3b"]))]);
        vec![("12D3KooWa".to_owned(), peer), ("12D3KooWb".to_owned(), other)]
    }

    async fn get_resources(&self, _options: Details) -> Details {
        let gpus: Vec<HashMap<String, Variant<'static>>> = Vec::new();
        details(vec![
            ("Cpu", nested(vec![("Logical", Variant::from(8u32)), ("Usable", Variant::from(1.5))])),
            ("Memory", nested(vec![("Total", Variant::from(8_160_437_862u64)), ("Available", Variant::from(1u64 << 30))])),
            ("Gpus", Variant::from(gpus)),
        ])
    }

    #[allow(clippy::type_complexity)] // the signature of the interface
    async fn list_eligible(&self, _options: Details) -> Vec<(String, bool, Vec<(String, String)>, Details)> {
        let now = |needed: u64| {
            vec![
                ("RequiredMemory", Variant::from(needed)),
                ("MemoryNow", Variant::from(9_000_000_000u64)),
                ("Quantisation", Variant::from("Q4_K_M")),
                ("BitsPerWeight", Variant::from(5.03)),
                ("Weights", Variant::from(2_020_000_000u64)),
                ("Context", Variant::from(4096u32)),
                ("KvCache", Variant::from(469_762_048u64)),
                ("Needed", Variant::from(2_800_000_000u64)),
                ("ErrorPercent", Variant::from(8u32)),
                ("FitsNow", Variant::from(true)),
                ("Advertised", Variant::from(true)),
            ]
        };
        let mut large = now(16_000_000_000);
        large.push(("Missing", nested(vec![("Memory", Variant::from(8_000_000_000u64))])));
        vec![
            ("Llama-3.2-3B".into(), true, vec![], details(now(8_000_000_000))),
            ("Llama-3.1-8B".into(), false, vec![("memory".into(), "needs 16 GB of memory".into())], details(large)),
        ]
    }

    async fn list_jobs(&self) -> Vec<(u64, OwnedObjectPath, Details)> {
        vec![(
            1,
            OwnedObjectPath::try_from(job_path(1)).unwrap(),
            details(vec![
                ("State", Variant::from("running")),
                ("ClusterId", Variant::from("gatewayai-poc")),
                ("Model", Variant::from("demo")),
                ("ServedByName", Variant::from("NodeB")),
            ]),
        )]
    }

    async fn watch_jobs(&self, _options: Details) -> OwnedFd {
        let (read, mut write) = std::io::pipe().unwrap();
        let now =
            JobNow { id: 1, cluster: "gatewayai-poc".into(), state: "queued".into(), position: Some(3), ..JobNow::default() };
        write.write_all(&JobLine::Job(now).to_bytes()).unwrap();
        self.shared.note(|seen| seen.watchers.push(write));
        OwnedFd::from(std::os::fd::OwnedFd::from(read))
    }

    async fn connect(
        &self,
        #[zbus(header)] header: Header<'_>,
        cluster: String,
        options: Details,
    ) -> Result<OwnedObjectPath, Named> {
        let asked = header.primary().flags().contains(zbus::message::Flags::ALLOW_INTERACTIVE_AUTH);
        self.authorise(&cluster, asked).await?;
        let bootstrap = options.get("Bootstrap").and_then(|list| Vec::<String>::try_from(list.try_clone().unwrap()).ok());
        let serve = options.get("Serve").and_then(|value| bool::try_from(value).ok());
        let mut secret = String::new();
        if let Some(Variant::Fd(fd)) = options.get("Secret").map(|value| &**value) {
            let fd = std::os::fd::AsFd::as_fd(fd).try_clone_to_owned().unwrap();
            std::fs::File::from(fd).read_to_string(&mut secret).unwrap();
        }
        let call = format!("Connect {cluster} {:?} serve={serve:?} secret={secret}", bootstrap.unwrap_or_default());
        self.shared.note(|seen| seen.calls.push(call));
        Ok(OwnedObjectPath::try_from(cluster_path(&cluster)).unwrap())
    }

    async fn disconnect(&self, _cluster: String, _options: Details) {}

    async fn start_prompt(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        cluster: String,
        prompt: String,
        options: Details,
    ) -> Result<(OwnedObjectPath, OwnedFd), Named> {
        let _ = (header, connection);
        let mut shown: Vec<String> = options.iter().map(|(key, value)| format!("{key}={}", show(value))).collect();
        shown.sort();
        self.shared.note(|seen| {
            seen.calls.push("StartPrompt".into());
            seen.prompt = PromptCall { cluster, prompt: prompt.clone(), options: shown };
        });
        if let Some(name) = prompt.strip_prefix("reply ") {
            return Err(Named(name.to_owned()));
        }
        let (read, write) = std::io::pipe().unwrap();
        let shared = self.shared.clone();
        std::thread::spawn(move || answer(&prompt, write, &shared));
        let read = std::os::fd::OwnedFd::from(read);
        Ok((OwnedObjectPath::try_from(job_path(1)).unwrap(), OwnedFd::from(read)))
    }
}

impl Manager {
    /// Plays polkit, as the cluster's name wishes: a password is always missing, accepted, refused, or never typed.
    async fn authorise(&self, cluster: &str, asked: bool) -> Result<(), Named> {
        if !["room-opened", "room-denied", "room-waiting"].contains(&cluster) {
            return Ok(());
        }
        self.shared.note(|seen| seen.calls.push(format!("asked={asked}")));
        match (asked, cluster) {
            (false, _) => Err(Named(ErrorName::InteractiveAuthorizationRequired.to_string())),
            (true, "room-denied") => Err(Named(ErrorName::NotAuthorized.to_string())),
            (true, "room-waiting") => std::future::pending().await,
            (true, _) => Ok(()),
        }
    }
}

fn show(value: &OwnedVariant) -> String {
    match &**value {
        Variant::Str(text) => text.to_string(),
        Variant::Bool(flag) => flag.to_string(),
        Variant::U32(number) => number.to_string(),
        Variant::U64(number) => number.to_string(),
        Variant::F64(number) => number.to_string(),
        Variant::Array(_) => {
            let texts = Vec::<String>::try_from(value.try_clone().unwrap());
            let turns = || Vec::<(String, String)>::try_from(value.try_clone().unwrap());
            texts.map_or_else(|_| format!("{:?}", turns().unwrap()), |texts| format!("{texts:?}"))
        }
        other => format!("{other:?}"),
    }
}

/// Plays a prompt's answer into the pipe, as the prompt's text wishes.
fn answer(prompt: &str, mut pipe: std::io::PipeWriter, shared: &Shared) {
    let mut say = |line: Line| pipe.write_all(&line.to_bytes()).is_ok();
    let text = |text: &str| Line::Text { text: text.to_owned() };
    if prompt == "queued" {
        say(Line::Queued { position: 3 });
    }
    if prompt == "waiting" {
        while say(Line::Queued { position: 1 }) {
            std::thread::sleep(Duration::from_millis(5));
        }
        shared.note(|seen| seen.closed_pipes += 1);
        return;
    }
    say(Line::Start { model: "echo".into(), served_by: ServedBy { peer_id: "12D3KooWa".into(), name: "NodeA".into() } });
    match prompt {
        "endless" => {
            while say(text("tick\n")) {
                std::thread::sleep(Duration::from_millis(5));
            }
            shared.note(|seen| seen.closed_pipes += 1);
            return;
        }
        "cut" => {
            say(text("half"));
            return;
        }
        "escape" => {
            say(text("a\u{1b}[3"));
            say(text("1mb"));
        }
        _ => {
            if let Some(name) = prompt.strip_prefix("stream ") {
                say(text("half"));
                say(Line::Error { name: name.to_owned(), message: "why".into() });
                return;
            }
            let (first, second) = prompt.split_at(prompt.len() / 2);
            say(text(first));
            say(text(second));
        }
    }
    say(Line::End {
        reason: "stop".into(),
        usage: Usage { prompt_tokens: 2, completion_tokens: 12 },
        timings: Timings { first_token_us: 50_000, duration_us: 150_000 },
    });
}

struct Models {
    shared: Shared,
}

fn pipe_of(steps: Vec<Step>) -> OwnedFd {
    let (read, mut write) = std::io::pipe().unwrap();
    for step in steps {
        write.write_all(&step.to_bytes()).unwrap();
    }
    OwnedFd::from(std::os::fd::OwnedFd::from(read))
}

#[zbus::interface(name = "org.opengateway.Gateway1.Models")]
impl Models {
    async fn list_models(&self, cluster: String, _options: Details) -> Result<Vec<(String, Details)>, Named> {
        self.shared.read().await;
        if cluster == "nowhere" {
            return Err(Named(ErrorName::NoSuchCluster.to_string()));
        }
        let node = |name: &str, more: Vec<(&str, Variant<'static>)>| {
            let mut node = HashMap::from([
                ("PeerId".to_owned(), Variant::from("12D3KooWa")),
                ("Name".to_owned(), Variant::from(name.to_owned())),
                ("Local".to_owned(), Variant::from(false)),
                ("FreeSlots".to_owned(), Variant::from(2u32)),
            ]);
            node.extend(more.into_iter().map(|(key, value)| (key.to_owned(), value)));
            node
        };
        let echo = vec![
            ("Nodes", Variant::from(vec![node("NodeA", vec![]), node(EVIL_NAME, vec![])])),
            ("State", Variant::from("available")),
        ];
        let digest = || Variant::from("ab".repeat(32));
        let llama = vec![
            ("Nodes", Variant::from(vec![node("Ann's node", vec![("State", Variant::from("ready")), ("Digest", digest())])])),
            ("State", Variant::from("ready")),
            ("Default", Variant::from(true)),
            ("Context", Variant::from(4096u32)),
            ("Quantisation", Variant::from("Q4_K_M")),
            ("Size", Variant::from(2_019_377_696u64)),
            ("TokensPerSecond", Variant::from(31.5)),
            ("Digest", digest()),
        ];
        Ok(vec![("echo".to_owned(), details(echo)), ("llama3.2:3b".to_owned(), details(llama))])
    }

    async fn list_local(&self) -> Vec<(String, Details)> {
        let demo = vec![
            ("State", Variant::from("ready")),
            ("Path", Variant::from("/var/lib/opengateway/models/demo.gguf")),
            ("Size", Variant::from(900_000u64)),
            ("Removable", Variant::from(true)),
            ("Answered", Variant::from(7u64)),
        ];
        let broken = vec![("State", Variant::from("failed")), ("Problem", Variant::from("the file is cut\u{1b}[2J off"))];
        vec![("broken".to_owned(), details(broken)), ("demo".to_owned(), details(demo))]
    }

    async fn add(&self, name: String, file: OwnedFd, options: Details) -> Result<OwnedFd, Named> {
        let mut bytes = Vec::new();
        let mut file = std::fs::File::from(std::os::fd::OwnedFd::from(file));
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        let (size, digest) = (bytes.len() as u64, options.get("Digest").map(show));
        self.shared.note(|seen| seen.added = (name.clone(), bytes, digest));
        let progress = Step::Progress { done: size / 2, total: size };
        Ok(match name.as_str() {
            "slow" => {
                let (read, mut write) = std::io::pipe().unwrap();
                let shared = self.shared.clone();
                std::thread::spawn(move || {
                    while write.write_all(&progress.to_bytes()).is_ok() {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    shared.note(|seen| seen.closed_pipes += 1);
                });
                OwnedFd::from(std::os::fd::OwnedFd::from(read))
            }
            "cut" => pipe_of(vec![progress]),
            "there" => pipe_of(vec![progress, Step::Error { name: ErrorName::ModelExists.to_string(), message: "why".into() }]),
            "refused" => return Err(Named(ErrorName::NotAuthorized.to_string())),
            _ => {
                let digest = Some("cd".repeat(32));
                pipe_of(vec![progress, Step::End { name, size: Some(size), digest, expected: None, intact: None }])
            }
        })
    }

    async fn verify(&self, name: String, _options: Details) -> OwnedFd {
        let intact = match name.as_str() {
            "demo" => Some(true),
            "changed" => Some(false),
            _ => None,
        };
        let expected = intact.map(|_| "cd".repeat(32));
        pipe_of(vec![Step::End { name, size: None, digest: Some("cd".repeat(32)), expected, intact }])
    }

    async fn remove(&self, name: String) -> Result<(), Named> {
        self.changed("Remove", &name)
    }

    async fn load(&self, name: String) -> Result<(), Named> {
        self.changed("Load", &name)
    }

    async fn unload(&self, name: String) -> Result<(), Named> {
        self.changed("Unload", &name)
    }
}

impl Models {
    fn changed(&self, what: &str, name: &str) -> Result<(), Named> {
        if name == "nonsense" {
            return Err(Named(ErrorName::NoSuchModel.to_string()));
        }
        self.shared.note(|seen| seen.calls.push(format!("{what} {name}")));
        Ok(())
    }
}

struct Network {
    shared: Shared,
}

#[zbus::interface(name = "org.opengateway.Gateway1.Network")]
impl Network {
    async fn diagnose(&self, options: Details) -> Result<(Vec<Details>, Details), Named> {
        self.shared.read().await;
        let mut shown: Vec<String> = options.iter().map(|(key, value)| format!("{key}={}", show(value))).collect();
        shown.sort();
        self.shared.note(|seen| seen.calls.push(format!("Diagnose {}", shown.join(" "))));
        let finding = |code: &'static str, severity: &'static str, sentence: &'static str| {
            vec![("Code", Variant::from(code)), ("Severity", Variant::from(severity)), ("Sentence", Variant::from(sentence))]
        };
        let findings = match shown.first().map(String::as_str) {
            Some("Peer=nobody") => vec![finding("peer-unknown", "error", "nobody here has heard of nobody")],
            Some("Peer=NodeB") => vec![finding("peer-relayed", "info", "NodeB is reached through NodeW")],
            Some("Cluster=nowhere") => return Err(Named(ErrorName::NoSuchCluster.to_string())),
            _ => {
                let mut refused = finding("bootstrap-refused", "error", "192.0.2.1 refuses\u{1b}[2J connections");
                refused.push(("Remedy", Variant::from("on that machine: systemctl start opengatewayd")));
                vec![refused, finding("mdns-silent", "warning", "nothing was heard on eth0")]
            }
        };
        let attempt = nested(vec![
            ("Address", Variant::from("/ip4/10.0.0.2/udp/4001/quic-v1")),
            ("AgoUSec", Variant::from(3_000_000u64)),
            ("Outcome", Variant::from("timed-out")),
        ]);
        let link = nested(vec![
            ("Address", Variant::from("/ip4/192.0.2.9/udp/4001/quic-v1")),
            ("Transport", Variant::from("quic")),
            ("Direct", Variant::from(false)),
            ("RelayName", Variant::from(EVIL_NAME)),
        ]);
        let peer = nested(vec![
            ("PeerId", Variant::from("12D3KooWb")),
            ("Name", Variant::from("NodeB")),
            ("MemberOf", Variant::from(vec!["gatewayai-poc"])),
            ("Attempts", array(vec![attempt])),
            ("Links", array(vec![link])),
        ]);
        let on = nested(vec![
            ("Interface", Variant::from("eth0")),
            ("Family", Variant::from("ipv4")),
            ("Sent", Variant::from(12u64)),
            ("Heard", Variant::from(0u64)),
        ]);
        let facts = details(vec![
            ("PeerId", Variant::from("12D3KooWself")),
            ("Mdns", nested(vec![("Enabled", Variant::from(true)), ("Interfaces", array(vec![on]))])),
            ("Reach", nested(vec![("Nat", Variant::from("cone"))])),
            ("Peers", array(vec![peer])),
            ("ClockSynchronised", Variant::from(true)),
            ("Newer", Variant::from(1u32)),
        ]);
        Ok((findings.into_iter().map(details).collect(), facts))
    }

    async fn ping(&self, peer: String, _options: Details) -> Result<Details, Named> {
        self.shared.read().await;
        self.shared.note(|seen| seen.calls.push(format!("Ping {peer}")));
        if let Some(name) = peer.strip_prefix("reply ") {
            return Err(Named(name.to_owned()));
        }
        Ok(details(vec![
            ("PeerId", Variant::from("12D3KooWb")),
            ("Name", Variant::from("NodeB")),
            ("Transport", Variant::from("quic")),
            ("Address", Variant::from("/ip4/10.0.0.2/udp/4001/quic-v1")),
            ("Direct", Variant::from(true)),
            ("RoundTrips", Variant::from(vec![800u64])),
        ]))
    }

    #[zbus(property)]
    fn worst_finding(&self) -> (String, String, String) {
        (String::new(), String::new(), String::new())
    }
}

/// A list of details.
fn array(items: Vec<Variant<'static>>) -> Variant<'static> {
    let item = |item| HashMap::<String, Variant<'static>>::try_from(item).unwrap();
    Variant::from(items.into_iter().map(item).collect::<Vec<_>>())
}

/// An error reply with any name.
#[derive(Debug)]
struct Named(String);

impl zbus::DBusError for Named {
    fn create_reply(&self, call: &Header<'_>) -> zbus::Result<zbus::Message> {
        zbus::Message::error(call, self.name()).build(&("why",))
    }
    fn name(&self) -> zbus::names::ErrorName<'_> {
        zbus::names::ErrorName::try_from(self.0.as_str()).unwrap()
    }
    fn description(&self) -> Option<&str> {
        Some("why")
    }
}

struct Cluster {
    state: &'static str,
    peers: u32,
}

#[zbus::interface(name = "org.opengateway.Gateway1.Cluster")]
impl Cluster {
    #[zbus(property)]
    fn state(&self) -> String {
        self.state.to_owned()
    }
    #[zbus(property)]
    fn peer_count(&self) -> u32 {
        self.peers
    }
    #[zbus(property)]
    fn last_error(&self) -> (String, String) {
        ("org.opengateway.Gateway1.Error.Incompatible".into(), "the cluster speaks version 9".into())
    }
}

struct Job {
    shared: Shared,
}

#[zbus::interface(name = "org.opengateway.Gateway1.Job")]
impl Job {
    fn cancel(&self) {
        self.shared.note(|seen| seen.calls.push("Cancel".into()));
    }
}
