//! The asking daemon without its bus: `dispatch` and `net` as `opengatewayd` wires them, with its defaults.

use std::collections::HashSet;
use std::sync::Arc;

use opengateway::domain::cluster::ClusterId;
use opengateway::domain::prompt::{Ask, Text};
use opengateway::net::identity::Identity;
use opengateway::net::{self, Event, JoinOptions};
use opengateway::serve::backend::Backend;
use opengateway::serve::{self, Echo};
use opengateway::{dispatch, state};

use super::{Arguments, Failed, Role, say};

/// The addresses of the daemon's own default configuration.
const LISTEN: [&str; 4] =
    ["/ip4/0.0.0.0/udp/4001/quic-v1", "/ip4/0.0.0.0/tcp/4001", "/ip6/::/udp/4001/quic-v1", "/ip6/::/tcp/4001"];

struct Node {
    net: net::Handle,
    dispatch: dispatch::Handle,
    // What must live as long as the node.
    _state: state::StateDir,
    _tiers: tokio::sync::watch::Sender<Vec<String>>,
}

async fn start(arguments: &Arguments) -> Result<Node, Failed> {
    let held = state::StateDir::open(arguments.state.as_deref().ok_or("a node needs --state")?)?;
    let decode = |bytes: &[u8]| Identity::decode(bytes).map(|identity| identity.peer_id()).map_err(|error| error.to_string());
    let bytes = state::load_or_create(held.path(), || Identity::generate().encode().unwrap_or_default(), decode)?;
    let identity = Identity::decode(&bytes)?;
    let (publish, tiers) = tokio::sync::watch::channel(Vec::new());
    let backends: Vec<Arc<dyn Backend>> = vec![Arc::new(Echo::default())];
    let (serve, _) = serve::spawn(serve::Config { backends, tiers });
    let config = net::Config {
        node_name: arguments.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        listen: LISTEN.map(str::to_owned).to_vec(),
        any_port: true,
        bootstrap: arguments.bootstrap.clone(),
        mdns: arguments.mdns,
        timings: net::Timings::default(),
        caps: net::ConnectionCaps::default(),
        versions: opengateway::wire::version::Versions::OURS,
        ..net::Config::default()
    };
    let (net, _) = net::start(config, &identity, Arc::new(serve.clone())).await?;
    let dispatch = dispatch::Handle::new(dispatch::Router::new(net.clone(), serve, arguments.name.clone()));
    Ok(Node { net, dispatch, _state: held, _tiers: publish })
}

impl Node {
    async fn prompt(&self, cluster: &ClusterId, text: &str) -> Result<usize, Failed> {
        // By name: a member may have a real model beside its echo.
        let ask = Ask { prompt: Text::new(text), model: Some("echo".to_owned()), ..Ask::default() };
        let options = dispatch::Options { no_local: true, ..dispatch::Options::default() };
        let mut job = self.dispatch.start(0, cluster.clone(), ask, options)?;
        let mut bytes = 0;
        while let Some(event) = job.next().await {
            match event {
                dispatch::JobEvent::Queued { .. } | dispatch::JobEvent::Started { .. } => {}
                dispatch::JobEvent::Text(text) => bytes += text.len(),
                dispatch::JobEvent::End(outcome) => {
                    outcome?;
                    return Ok(bytes);
                }
            }
        }
        Err("no outcome".into())
    }

    async fn ask(&self, arguments: &Arguments, cluster: &ClusterId) -> Result<(), Failed> {
        let mut events = self.net.events();
        self.net.join(cluster.clone(), JoinOptions::default()).await?;
        let mut seen = HashSet::new();
        let mut answered = false;
        while seen.len() < arguments.members || !answered {
            let Event::MemberUp { member, .. } = events.recv().await? else { continue };
            if !seen.insert(member.name.clone()) {
                continue;
            }
            say(&serde_json::json!({ "ev": "peer", "name": member.name }));
            if member.serving && !answered {
                let bytes = self.prompt(cluster, &"a".repeat(arguments.size)).await?;
                answered = true;
                say(&serde_json::json!({ "ev": "response", "bytes": bytes }));
            }
        }
        Ok(())
    }

    /// After a warm-up tells how many prompts are done, every tenth of them, so that the harness can look at memory meanwhile.
    async fn flood(&self, arguments: &Arguments, cluster: &ClusterId) -> Result<(), Failed> {
        let text = "a".repeat(arguments.size);
        for _ in 0..arguments.m {
            self.prompt(cluster, &text).await?;
        }
        let step = (arguments.n / 10).max(1);
        for done in 1..=arguments.n {
            self.prompt(cluster, &text).await?;
            if done % step == 0 {
                say(&serde_json::json!({ "ev": "done", "n": done }));
                // The harness reads /proc now.
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }
}

pub async fn run(arguments: &Arguments) -> Result<(), Failed> {
    let cluster = ClusterId::new(&arguments.cluster)?;
    let node = start(arguments).await?;
    node.ask(arguments, &cluster).await?;
    match arguments.role {
        Role::Ask => {}
        Role::Bench => super::measure(arguments, |text| async { node.prompt(&cluster, &{ text }).await }).await?,
        Role::Flood => node.flood(arguments, &cluster).await?,
        Role::Joined | Role::Watch | Role::Exec => return Err("this role is one of the bus".into()),
    }
    node.net.shutdown().await;
    Ok(())
}
