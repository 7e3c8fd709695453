//! `ogctl monitor`: what happens, as it happens; one line or one JSON object each, until interrupted.
//!
//! Subscribes first and looks second, so nothing falls between; when the daemon restarts it looks again.

use super::now_us;
use crate::bus::{Bus, within};
use crate::details::Read as _;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::term;
use futures_core::Stream as _;
use opengateway::api::names::{BUS_NAME, CLUSTER_INTERFACE, ErrorName, MANAGER_INTERFACE, MODELS_INTERFACE, ROOT_PATH};
use opengateway::api::path::cluster_id;
use opengateway::api::proxy::Details;
use serde::Serialize;
use std::num::NonZeroUsize;
use std::pin::Pin;
use zbus::message::{Message, Type};
use zbus::proxy::CacheProperties;
use zbus::{MatchRule, MessageStream, OwnedObjectPath};

/// Signals that may wait while a snapshot is taken.
const QUEUE: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// Something that happened, or how things are at the start (`snapshot`).
#[derive(Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    /// The daemon is there; the first event, and after each restart.
    Node { node_name: String, peer_id: String, state: String },
    /// How a cluster is, or what it has become.
    Cluster {
        cluster: String,
        state: String,
        previous: Option<String>,
        reason: Option<String>,
        error: Option<String>,
        peer_count: Option<u64>,
    },
    /// A member is there.
    PeerConnected { cluster: String, peer_id: String, name: String },
    /// A member is gone.
    PeerDisconnected { cluster: String, peer_id: String, reason: String },
    /// Too many came or went to be told one by one.
    PeersChanged { cluster: String, count: u32 },
    /// What of the resources moved.
    ResourcesChanged { changed: Vec<String> },
    /// A model of this machine is there, or has changed.
    ModelChanged { model: String, state: String, progress: Option<f64>, problem: Option<String> },
    /// A model is not on this machine any more.
    ModelRemoved { model: String },
    /// The node is about to leave its clusters.
    ShuttingDown,
    /// The daemon is gone.
    Stopped,
}

/// An event with its time.
#[derive(Debug, Serialize)]
struct Timed {
    /// Microseconds since the epoch.
    time: u64,
    #[serde(flatten)]
    event: Event,
}

/// Prints until interrupted or until nobody reads.
pub async fn run(bus: &mut Bus, out: &Output) -> Result<(), Stop> {
    // Finds the bus that has the daemon, before anything is subscribed on it.
    bus.ask(async |manager| manager.get_status().await).await?;
    let mut signals = subscribe(bus, MatchRule::builder().sender(BUS_NAME).path_namespace(ROOT_PATH)).await?;
    let owner_rule = MatchRule::builder().sender("org.freedesktop.DBus").member("NameOwnerChanged").add_arg(BUS_NAME);
    let mut owners = subscribe(bus, owner_rule).await?;
    let dbus = zbus::fdo::DBusProxy::builder(bus.connection()).cache_properties(CacheProperties::No).build().await;
    let dbus = dbus.map_err(|error| Failure::from_zbus(&error))?;
    let name = BUS_NAME.try_into().expect("the bus name is a bus name");
    let owner = within(bus.limit(), async { Ok(dbus.get_name_owner(name).await?) }).await?;
    let mut owner = owner.as_str().to_owned();
    snapshot(bus, out).await?;
    loop {
        // Owner changes first: a signal of a new owner comes after the change on the wire.
        tokio::select! {
            biased;
            message = next(&mut owners) => {
                let message = message?;
                let Ok((_, _, new)) = message.body().deserialize::<(String, String, String)>() else { continue };
                let gone = new.is_empty();
                owner = new;
                if gone { print(out, Event::Stopped)? } else { look_again(bus, out).await? }
            }
            message = next(&mut signals) => {
                let message = message?;
                // The bus checks the sender too; streams of the same connection may share its subscriptions.
                if message.header().sender().is_some_and(|sender| sender.as_str() == owner)
                    && let Some(event) = event(&message)
                {
                    print(out, event)?;
                }
            }
        }
    }
}

async fn subscribe(bus: &Bus, rule: zbus::match_rule::Builder<'_>) -> Result<MessageStream, Failure> {
    let subscribed =
        async { MessageStream::for_match_rule(rule.msg_type(Type::Signal).build()?, bus.connection(), Some(QUEUE)).await };
    within(bus.limit(), subscribed).await
}

/// The next message of a stream; a stream that ends means that the bus is gone.
async fn next(stream: &mut MessageStream) -> Result<Message, Failure> {
    match std::future::poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await {
        Some(Ok(message)) => Ok(message),
        Some(Err(error)) => Err(Failure::from_zbus(&error)),
        None => Err(Failure::named(ErrorName::Disconnected.as_str(), "the connection to the bus is lost")),
    }
}

/// Prints how things are.
async fn snapshot(bus: &mut Bus, out: &Output) -> Result<(), Stop> {
    let status = bus.ask(async |manager| manager.get_status().await).await?;
    let [node_name, peer_id, state] = ["NodeName", "PeerId", "State"].map(|key| status.text_or_empty(key));
    print(out, Event::Node { node_name, peer_id, state })?;
    for (cluster, _, details) in bus.ask(async |manager| manager.list_clusters().await).await? {
        let (state, peer_count) = (details.text_or_empty("State"), details.number("PeerCount"));
        print(out, Event::Cluster { cluster, state, previous: None, reason: None, error: None, peer_count })?;
    }
    Ok(())
}

/// A snapshot after a restart; a daemon that is gone again is told by the next owner change.
async fn look_again(bus: &mut Bus, out: &Output) -> Result<(), Stop> {
    match snapshot(bus, out).await {
        Err(Stop::Failed(failure)) if failure.is_no_daemon() || failure.name == ErrorName::NoReply.short() => Ok(()),
        other => other,
    }
}

/// What a signal tells; `None` for signals that this version does not know.
fn event(message: &Message) -> Option<Event> {
    let header = message.header();
    let (interface, member) = (header.interface()?.as_str(), header.member()?.as_str());
    let body = message.body();
    let cluster = || cluster_id(header.path()?.as_str());
    Some(match (interface, member) {
        (MANAGER_INTERFACE, "ClusterStateChanged") => {
            let (cluster, _, state, details): (String, OwnedObjectPath, String, Details) = body.deserialize().ok()?;
            let text = |key| details.text(key).filter(|text| !text.is_empty());
            Event::Cluster {
                cluster,
                state,
                previous: text("Previous"),
                reason: text("Reason"),
                error: text("Error"),
                peer_count: None,
            }
        }
        (MANAGER_INTERFACE, "ResourcesChanged") => Event::ResourcesChanged { changed: body.deserialize().ok()? },
        (MANAGER_INTERFACE, "PrepareForShutdown") => body.deserialize::<bool>().ok()?.then_some(Event::ShuttingDown)?,
        (MODELS_INTERFACE, "ModelChanged") => {
            let (model, details): (String, Details) = body.deserialize().ok()?;
            let (state, progress, problem) = (details.text_or_empty("State"), details.real("Progress"), details.text("Problem"));
            Event::ModelChanged { model, state, progress, problem }
        }
        (MODELS_INTERFACE, "ModelRemoved") => Event::ModelRemoved { model: body.deserialize().ok()? },
        (CLUSTER_INTERFACE, "PeerConnected") => {
            let (peer_id, details): (String, Details) = body.deserialize().ok()?;
            Event::PeerConnected { cluster: cluster()?, peer_id, name: details.text_or_empty("Name") }
        }
        (CLUSTER_INTERFACE, "PeerDisconnected") => {
            let (peer_id, reason) = body.deserialize().ok()?;
            Event::PeerDisconnected { cluster: cluster()?, peer_id, reason }
        }
        (CLUSTER_INTERFACE, "PeersChanged") => Event::PeersChanged { cluster: cluster()?, count: body.deserialize().ok()? },
        _ => return None,
    })
}

fn print(out: &Output, event: Event) -> Result<(), Stop> {
    out.view(Timed { time: now_us(), event }, |timed, _| {
        format!("{} {}\n", clock(timed.time), term::line(&sentence(&timed.event)))
    })
}

fn sentence(event: &Event) -> String {
    let option = |before: &str, text: &Option<String>, after: &str| {
        text.as_ref().map_or_else(String::new, |text| format!("{before}{text}{after}"))
    };
    match event {
        Event::Node { node_name, peer_id, state } => format!("node {node_name} ({peer_id}) is {state}"),
        Event::Cluster { cluster, state, previous, reason, error, peer_count } => {
            let peers = peer_count.map_or_else(String::new, |count| format!(", {count} peers"));
            let error = error.as_deref().map(|name| name.rsplit('.').next().unwrap_or(name).to_owned());
            format!(
                "{cluster}: {state}{peers}{}{}{}",
                option(" (was ", previous, ")"),
                option(", ", reason, ""),
                option(", error ", &error, "")
            )
        }
        Event::PeerConnected { cluster, peer_id, name } => format!("{cluster}: peer {name} ({peer_id}) is here"),
        Event::PeerDisconnected { cluster, peer_id, reason } => format!("{cluster}: peer {peer_id} is gone ({reason})"),
        Event::PeersChanged { cluster, count } => format!("{cluster}: {count} peers"),
        Event::ResourcesChanged { changed } => format!("resources changed: {}", changed.join(", ")),
        Event::ModelChanged { model, state, progress, problem } => {
            let progress = progress.map_or_else(String::new, |progress| format!(" {:.0} %", progress * 100.0));
            format!("model {model} is {state}{progress}{}", option(", ", problem, ""))
        }
        Event::ModelRemoved { model } => format!("model {model} is removed"),
        Event::ShuttingDown => "opengatewayd is about to stop".into(),
        Event::Stopped => "opengatewayd has stopped".into(),
    }
}

/// Time of day in UTC.
fn clock(micros: u64) -> String {
    let seconds = micros / 1_000_000 % 86_400;
    format!("{:02}:{:02}:{:02}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_objects_with_a_time_and_a_kind() {
        let event = Timed { time: 7, event: Event::PeersChanged { cluster: "c".into(), count: 2 } };
        assert_eq!(serde_json::to_string(&event).unwrap(), r#"{"time":7,"event":"peers_changed","cluster":"c","count":2}"#);
        assert_eq!(clock(86_399_000_000), "23:59:59Z");
    }
}
