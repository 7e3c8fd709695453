//! The adapter for the benchmark harness (`benches/harness`): a node without a bus that prints what happens as JSON lines.
//!
//! ```text
//! opengatewayd-perf bootstrap --state DIR --listen ADDR            {"ev":"ready","addr":…}
//! opengatewayd-perf serve --cluster C --name N …                   {"ev":"joined"}
//! opengatewayd-perf ask   --cluster C …                            {"ev":"peer","name":…}, {"ev":"response"}
//! opengatewayd-perf bench --cluster C -n 10000 -m 20000 …          as ask, then {"ev":"bench",…}
//! opengatewayd-perf watch --cluster C …                            as ask, then {"ev":"gone","name":…}
//! ```

use std::collections::HashSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use opengateway::domain::cluster::ClusterId;
use opengateway::domain::prompt::{Ask, Text};
use opengateway::net::identity::Identity;
use opengateway::net::{self, Event, JoinOptions};
use opengateway::serve::backend::{Backend, Limits};
use opengateway::serve::{self, Echo};
use opengateway::{dispatch, state};

#[derive(Debug, Parser)]
struct Arguments {
    /// bootstrap, serve, ask, bench or watch
    role: String,
    #[arg(long, default_value = "perf")]
    cluster: String,
    #[arg(long, default_value = "C")]
    name: String,
    #[arg(long)]
    state: PathBuf,
    #[arg(long)]
    listen: Vec<String>,
    #[arg(long)]
    bootstrap: Vec<String>,
    /// Look for members on the local network
    #[arg(long)]
    mdns: bool,
    /// Prompts one after the other
    #[arg(short, default_value_t = 10_000)]
    n: usize,
    /// Prompts, 64 at once
    #[arg(short, default_value_t = 20_000)]
    m: usize,
}

fn say(event: serde_json::Value) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{event}");
    let _ = out.flush();
}

type Failed = Box<dyn std::error::Error>;

struct Node {
    net: net::Handle,
    dispatch: dispatch::Handle,
}

async fn start(arguments: &Arguments) -> Result<Node, Failed> {
    let directory = arguments.state.join(format!("{}-{}", arguments.role, std::process::id()));
    let held = state::StateDir::open(&directory)?;
    let decode = |bytes: &[u8]| Identity::decode(bytes).map(|identity| identity.peer_id()).map_err(|error| error.to_string());
    let bytes = state::load_or_create(held.path(), || Identity::generate().encode().unwrap_or_default(), decode)?;
    std::mem::forget(held);
    let identity = Identity::decode(&bytes)?;
    let (_tiers, tiers) = tokio::sync::watch::channel(Vec::new());
    std::mem::forget(_tiers);
    let limits = Limits { ..Echo::default_limits() };
    let backends: Vec<Arc<dyn Backend>> = vec![Arc::new(Echo::new(limits))];
    let (serve, _) = serve::spawn(serve::Config { backends, tiers });
    let listen = if arguments.listen.is_empty() {
        vec!["/ip4/0.0.0.0/udp/0/quic-v1".to_owned(), "/ip4/0.0.0.0/tcp/0".to_owned()]
    } else {
        arguments.listen.clone()
    };
    let config = net::Config {
        node_name: arguments.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        listen,
        any_port: true,
        bootstrap: arguments.bootstrap.iter().filter(|address| !address.is_empty()).cloned().collect(),
        mdns: arguments.mdns,
        timings: net::Timings::default(),
        caps: net::ConnectionCaps::default(),
    };
    let (net, _) = net::start(config, &identity, Arc::new(serve.clone())).await?;
    let dispatch = dispatch::Handle::new(dispatch::Router::new(net.clone(), serve, arguments.name.clone()));
    Ok(Node { net, dispatch })
}

impl Node {
    async fn prompt(&self, cluster: &ClusterId, text: &str) -> Result<usize, Failed> {
        let ask = Ask { prompt: Text::new(text), ..Ask::default() };
        let mut job = self.dispatch.start(0, cluster.clone(), ask, dispatch::Options { no_local: true, ..dispatch::Options::default() })?;
        let mut bytes = 0;
        while let Some(event) = job.next().await {
            match event {
                dispatch::JobEvent::Started { .. } => {}
                dispatch::JobEvent::Text(text) => bytes += text.len(),
                dispatch::JobEvent::End(outcome) => {
                    outcome?;
                    return Ok(bytes);
                }
            }
        }
        Err("no outcome".into())
    }
}

fn figures(mut times: Vec<f64>, seconds: f64) -> serde_json::Value {
    times.sort_by(f64::total_cmp);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a share of an index
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    serde_json::json!({
        "n": times.len(), "p50_us": at(0.5), "p90_us": at(0.9), "p99_us": at(0.99), "per_s": times.len() as f64 / seconds,
    })
}

async fn bench(node: &Node, cluster: &ClusterId, n: usize, m: usize) -> Result<(), Failed> {
    let text = "a".repeat(64);
    for _ in 0..200 {
        node.prompt(cluster, &text).await?;
    }
    let begun = Instant::now();
    let mut times = Vec::with_capacity(n);
    for _ in 0..n {
        let one = Instant::now();
        node.prompt(cluster, &text).await?;
        times.push(one.elapsed().as_secs_f64() * 1e6);
    }
    let rtt = figures(times, begun.elapsed().as_secs_f64());
    let begun = Instant::now();
    let left = std::cell::Cell::new(m);
    let worker = || async {
        let mut times = Vec::with_capacity(m / 32);
        while left.get() > 0 {
            left.set(left.get() - 1);
            let one = Instant::now();
            node.prompt(cluster, &text).await.map_err(|error| error.to_string())?;
            times.push(one.elapsed().as_secs_f64() * 1e6);
        }
        Ok::<_, String>(times)
    };
    let all = futures::future::join_all((0..64).map(|_| worker())).await;
    let seconds = begun.elapsed().as_secs_f64();
    let times: Vec<f64> = all.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
    say(serde_json::json!({ "ev": "bench", "rtt": rtt, "flight64": figures(times, seconds) }));
    Ok(())
}

async fn ask(node: &Node, arguments: &Arguments, cluster: &ClusterId) -> Result<(), Failed> {
    let mut events = node.net.events();
    let mut seen = HashSet::new();
    let mut answered = false;
    while seen.len() < 2 || !answered {
        let Event::MemberUp { member, .. } = events.recv().await? else { continue };
        if member.name == "boot" || !seen.insert(member.name.clone()) {
            continue;
        }
        say(serde_json::json!({ "ev": "peer", "name": member.name }));
        if !answered {
            let bytes = node.prompt(cluster, &"a".repeat(64)).await?;
            answered = true;
            say(serde_json::json!({ "ev": "response", "bytes": bytes }));
        }
    }
    match arguments.role.as_str() {
        "bench" => bench(node, cluster, arguments.n, arguments.m).await?,
        "watch" => loop {
            if let Event::MemberDown { name, .. } = events.recv().await? {
                say(serde_json::json!({ "ev": "gone", "name": name }));
            }
        },
        _ => {}
    }
    Ok(())
}

async fn run(arguments: Arguments) -> Result<(), Failed> {
    let cluster = ClusterId::new(&arguments.cluster)?;
    let node = start(&arguments).await?;
    match arguments.role.as_str() {
        "bootstrap" => {
            let mut state = node.net.watch();
            let ready = |snapshot: &Arc<net::Snapshot>| snapshot.listen_addresses.iter().any(|address| address.contains("quic"));
            let snapshot = state.wait_for(ready).await?.clone();
            let address = snapshot
                .listen_addresses
                .iter()
                .filter(|address| address.contains("quic"))
                .min_by_key(|address| address.contains("127.0.0.1"))
                .ok_or("no address")?;
            let peer = snapshot.peer_id.as_ref().ok_or("no peer id")?;
            say(serde_json::json!({ "ev": "ready", "addr": format!("{address}/p2p/{peer}") }));
        }
        "serve" => {
            node.net.join(cluster.clone(), JoinOptions { bootstrap: Vec::new(), serve: true }).await?;
            let alone = arguments.bootstrap.is_empty();
            let mut state = node.net.watch();
            // Announced: in the DHT where there is one to announce to, else on the local network by listening.
            state
                .wait_for(|snapshot| {
                    let announced = snapshot.clusters.get(&cluster).is_some_and(|view| view.announced);
                    !snapshot.listen_addresses.is_empty() && (alone || announced)
                })
                .await?;
            say(serde_json::json!({ "ev": "joined" }));
        }
        _ => {
            node.net.join(cluster.clone(), JoinOptions::default()).await?;
            ask(&node, &arguments, &cluster).await?;
        }
    }
    // Until the harness ends it.
    std::future::pending::<()>().await;
    Ok(())
}

fn main() {
    let arguments = Arguments::parse();
    if let Ok(filter) = std::env::var("RUST_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    if let Err(error) = runtime.block_on(run(arguments)) {
        eprintln!("opengatewayd-perf: {error}");
        std::process::exit(1);
    }
}
