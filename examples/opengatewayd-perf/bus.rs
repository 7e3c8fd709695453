//! A client of the daemon's bus, as any program of a user's would be: it knows `opengateway::api` and nothing else.

use std::collections::HashMap;
use std::num::NonZero;
use std::os::unix::process::CommandExt as _;
use std::pin::Pin;

use futures::Stream;
use opengateway::api::names::{BUS_NAME, ROOT_PATH};
use opengateway::api::proxy::{ManagerProxy, Options};
use opengateway::api::stream::{Line, LineReader};
use tokio::net::unix::pipe::Receiver;
use zbus::message::Type;
use zbus::proxy::CacheProperties;
use zbus::{Connection, MatchRule, MessageStream};

use super::{Arguments, Failed, Role, say};

struct Client<'a> {
    arguments: &'a Arguments,
    connection: Connection,
    manager: ManagerProxy<'static>,
    /// Signals of the daemon, and of its name.
    daemon: MessageStream,
    owner: MessageStream,
}

async fn next(stream: &mut MessageStream) -> Result<(), Failed> {
    match std::future::poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await {
        Some(message) => {
            message?;
            Ok(())
        }
        None => Err("the bus is gone".into()),
    }
}

/// Asks as `ogctl` does: the answer comes on a pipe.
async fn prompt(manager: &ManagerProxy<'_>, cluster: &str, text: &str) -> Result<usize, Failed> {
    let (_job, pipe) = manager.start_prompt(cluster, text, &Options::new()).await?;
    let mut lines = LineReader::new(Receiver::from_owned_fd(pipe.into())?);
    let mut bytes = 0;
    while let Some(line) = lines.next().await? {
        match line {
            Line::Text { text } => bytes += text.len(),
            Line::End { .. } => return Ok(bytes),
            Line::Error { name, message } => return Err(format!("{name}: {message}").into()),
            Line::Queued { .. } | Line::Start { .. } | Line::Unknown => {}
        }
    }
    Err("the pipe was closed without an end".into())
}

impl<'a> Client<'a> {
    /// Connects, and subscribes before it looks: nothing falls between.
    async fn open(arguments: &'a Arguments) -> Result<Self, Failed> {
        let connection = zbus::connection::Builder::address(arguments.bus.as_str()).build().await?;
        let signals = MatchRule::builder().msg_type(Type::Signal).sender(BUS_NAME).path_namespace(ROOT_PATH).build()?;
        let daemon = MessageStream::for_match_rule(signals, &connection, NonZero::new(1024)).await?;
        let owners = MatchRule::builder()
            .msg_type(Type::Signal)
            .sender("org.freedesktop.DBus")
            .member("NameOwnerChanged")
            .arg(0, BUS_NAME)
            .build()?;
        let owner = MessageStream::for_match_rule(owners, &connection, NonZero::new(16)).await?;
        let manager = ManagerProxy::builder(&connection).cache_properties(CacheProperties::No).build().await?;
        let mut client = Self { arguments, connection, manager, daemon, owner };
        client.wait_for_daemon().await?;
        Ok(client)
    }

    async fn wait_for_daemon(&mut self) -> Result<(), Failed> {
        loop {
            let reply = self
                .connection
                .call_method(
                    Some("org.freedesktop.DBus"),
                    "/org/freedesktop/DBus",
                    Some("org.freedesktop.DBus"),
                    "NameHasOwner",
                    &(BUS_NAME,),
                )
                .await?;
            if reply.body().deserialize::<bool>()? {
                return Ok(());
            }
            next(&mut self.owner).await?;
        }
    }

    /// Names of the members by peer id, and whether one of them can be asked.
    async fn members(&self) -> Result<(HashMap<String, String>, bool), Failed> {
        let mut members = HashMap::new();
        let mut serving = false;
        for (id, details) in self.manager.list_peers(&self.arguments.cluster, &Options::new()).await? {
            serving |= details.get("Serving").is_some_and(|value| value.downcast_ref::<bool>().unwrap_or(false));
            let name = details.get("Name").and_then(|value| value.downcast_ref::<&str>().ok()).unwrap_or_default();
            members.insert(id, name.to_owned());
        }
        Ok((members, serving))
    }

    async fn joined(&mut self) -> Result<(), Failed> {
        loop {
            let clusters = self.manager.list_clusters().await?;
            let is_in = clusters.iter().any(|(id, _, _)| *id == self.arguments.cluster);
            if is_in && !self.manager.listen_addresses().await?.is_empty() {
                say(&serde_json::json!({ "ev": "joined" }));
                return Ok(());
            }
            next(&mut self.daemon).await?;
        }
    }

    /// Tells each member once; asks the first one that serves. Returns when enough were seen and one has answered, or,
    /// when watching, never.
    async fn ask(&mut self) -> Result<(), Failed> {
        let text = "a".repeat(self.arguments.size);
        let watching = self.arguments.role == Role::Watch;
        let mut known = HashMap::new();
        let mut answered = false;
        loop {
            let (now, serving) = self.members().await?;
            for (id, name) in &now {
                if !known.contains_key(id) {
                    say(&serde_json::json!({ "ev": "peer", "name": name }));
                }
            }
            for (id, name) in &known {
                if !now.contains_key(id) {
                    say(&serde_json::json!({ "ev": "gone", "name": name }));
                }
            }
            known = now;
            if serving && self.arguments.role == Role::Exec {
                let [program, rest @ ..] = self.arguments.program.as_slice() else { return Err("nothing to become".into()) };
                return Err(std::process::Command::new(program).args(rest).exec().into());
            }
            if serving && !answered {
                let bytes = prompt(&self.manager, &self.arguments.cluster, &text).await?;
                answered = true;
                say(&serde_json::json!({ "ev": "response", "bytes": bytes }));
            }
            if answered && known.len() >= self.arguments.members && !watching {
                return Ok(());
            }
            next(&mut self.daemon).await?;
        }
    }
}

pub async fn run(arguments: &Arguments) -> Result<(), Failed> {
    let mut client = Client::open(arguments).await?;
    match arguments.role {
        Role::Joined => client.joined().await,
        Role::Ask | Role::Watch | Role::Exec => client.ask().await,
        Role::Bench => {
            client.ask().await?;
            // Each job has its signals: a stream that nobody reads would stop the connection.
            let manager = client.manager.clone();
            drop(client);
            let manager = &manager;
            super::measure(arguments, |text| async move { prompt(manager, &arguments.cluster, &text).await }).await
        }
        Role::Flood => Err("floods go through the swarm".into()),
    }
}
