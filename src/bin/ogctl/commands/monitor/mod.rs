//! `ogctl monitor`: what happens, as it happens; one line or one JSON object each, until interrupted.
//!
//! Subscribes first and looks second, so nothing falls between; when the daemon restarts it looks again. What happens to
//! members and clusters comes as signals, how jobs go on a pipe: that is for this user alone.

mod jobs;

use super::now_us;
use crate::bus::{Bus, within};
use crate::details::Read as _;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::render::{latency, relayed};
use crate::term;
use futures_core::Stream as _;
use jobs::Jobs;
use opengateway::api::names::{
    BUS_NAME, CLUSTER_INTERFACE, ErrorName, MANAGER_INTERFACE, MODELS_INTERFACE, NETWORK_INTERFACE, ROOT_PATH,
};
use opengateway::api::path::cluster_id;
use opengateway::api::proxy::Details;
use opengateway::api::stream::{JobLine, ServedBy};
use serde::Serialize;
use std::num::NonZeroUsize;
use std::pin::Pin;
use zbus::message::{Message, Type};
use zbus::proxy::CacheProperties;
use zbus::{MatchRule, MessageStream, OwnedObjectPath};

/// Signals that may wait while a snapshot is taken.
const QUEUE: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

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
    /// A member fell silent or is heard again, or the way to it is another.
    PeerChanged {
        cluster: String,
        peer_id: String,
        name: String,
        changed: Vec<String>,
        liveness: Option<String>,
        direct: Option<bool>,
        relay_name: Option<String>,
    },
    /// Too many came, went or changed to be told one by one.
    PeersChanged { cluster: String, count: u32 },
    /// How a job goes; the first ones are those in progress.
    Job {
        id: u64,
        cluster: String,
        uid: u32,
        state: String,
        position: Option<u32>,
        model: Option<String>,
        served_by: Option<ServedBy>,
        prompt_tokens: Option<u32>,
        completion_tokens: u32,
        duration_us: u64,
        error: Option<String>,
    },
    /// Too much happened to jobs to be told one by one.
    JobsSkipped { count: u64 },
    /// The worst finding of the doctor is another; null when nothing is wrong any more.
    Finding { code: Option<String>, severity: Option<String>, sentence: Option<String> },
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
    let mut jobs = Jobs::watch(bus, out).await;
    loop {
        // Owner changes first: a signal of a new owner comes after the change on the wire.
        tokio::select! {
            biased;
            message = next(&mut owners) => {
                let message = message?;
                let Ok((_, _, new)) = message.body().deserialize::<(String, String, String)>() else { continue };
                let gone = new.is_empty();
                owner = new;
                if gone {
                    jobs = Jobs::none();
                    print(out, Event::Stopped)?;
                } else {
                    look_again(bus, out).await?;
                    jobs = Jobs::watch(bus, out).await;
                }
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
            line = jobs.next() => {
                if let Some(event) = of_job(line) {
                    print(out, event)?;
                }
            }
        }
    }
}

fn of_job(line: JobLine) -> Option<Event> {
    match line {
        JobLine::Job(now) => Some(Event::Job {
            id: now.id,
            cluster: now.cluster,
            uid: now.uid,
            state: now.state,
            position: now.position,
            model: now.model,
            served_by: now.served_by,
            prompt_tokens: now.prompt_tokens,
            completion_tokens: now.completion_tokens,
            duration_us: now.duration_us,
            error: now.error.map(short),
        }),
        JobLine::Skipped { count } => Some(Event::JobsSkipped { count }),
        JobLine::Unknown => None,
    }
}

/// The last part of an error name.
fn short(name: String) -> String {
    name.rsplit('.').next().unwrap_or_default().to_owned()
}

/// The event of a worst finding; all three are empty when there is none.
fn finding((code, severity, sentence): (String, String, String)) -> Event {
    let some = |text: String| (!text.is_empty()).then_some(text);
    Event::Finding { code: some(code), severity: some(severity), sentence: some(sentence) }
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
    // A daemon of an older version has no findings.
    match bus.ask_network(async |network| network.worst_finding().await).await {
        Ok(worst) if !worst.0.is_empty() => print(out, finding(worst)),
        _ => Ok(()),
    }
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
        (CLUSTER_INTERFACE, "PeerChanged") => {
            let (peer_id, changed, details): (String, Vec<String>, Details) = body.deserialize().ok()?;
            Event::PeerChanged {
                cluster: cluster()?,
                peer_id,
                name: details.text_or_empty("Name"),
                changed,
                liveness: details.text("Liveness"),
                direct: details.flag("Direct"),
                relay_name: details.text("RelayName").or_else(|| details.text("Relay")),
            }
        }
        (PROPERTIES, "PropertiesChanged") => {
            let (interface, changed, _): (String, Details, Vec<String>) = body.deserialize().ok()?;
            let worst = changed.get("WorstFinding").filter(|_| interface == NETWORK_INTERFACE)?;
            finding(worst.try_clone().ok()?.try_into().ok()?)
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
        Event::PeerChanged { cluster, peer_id, name, changed, liveness, direct, relay_name } => {
            let liveness = liveness.as_deref().filter(|_| changed.iter().any(|key| key == "Liveness"));
            let is = liveness.map(|liveness| match liveness {
                "suspect" => "is silent".to_owned(),
                "alive" => "is heard again".to_owned(),
                "known" => "is known and not connected any more".to_owned(),
                other => format!("is {other}"),
            });
            let way = changed.iter().any(|key| key == "Direct" || key == "Relay").then(|| match direct {
                Some(true) => "is connected directly now".to_owned(),
                _ => format!("is {} now", relayed(relay_name.as_deref())),
            });
            let what = [is, way].into_iter().flatten().collect::<Vec<_>>().join(", ");
            format!("{cluster}: peer {name} ({peer_id}) {what}")
        }
        Event::Job { id, cluster, state, position, model, served_by, completion_tokens, duration_us, error, .. } => {
            let place = position.map_or_else(String::new, |position| format!(", {position} before it"));
            let by = served_by.as_ref().map(|by| if by.name.is_empty() { &by.peer_id } else { &by.name });
            let by = by.map_or_else(String::new, |name| format!(" on {name}"));
            let taken = model.as_ref().map_or_else(String::new, |model| format!(", {model}{by}"));
            let over = matches!(state.as_str(), "done" | "failed" | "cancelled");
            let took = if over {
                format!(
                    ", {completion_tokens} token{} in {}",
                    if *completion_tokens == 1 { "" } else { "s" },
                    latency(Some(*duration_us))
                )
            } else {
                String::new()
            };
            let cluster = if cluster.is_empty() { "this machine" } else { cluster };
            format!("job {id} ({cluster}): {state}{place}{taken}{took}{}", option(", ", error, ""))
        }
        Event::JobsSkipped { count } => format!("{count} more changes of jobs; see: ogctl jobs"),
        Event::Finding { sentence: None, .. } => "nothing is wrong any more".into(),
        Event::Finding { code, sentence: Some(sentence), .. } => {
            format!("{sentence}{}; more: ogctl doctor", option(" [", code, "]"))
        }
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
    fn jobs_and_changes_read_well() {
        let job = |state: &str, position, model: Option<&str>, error: Option<&str>| Event::Job {
            id: 7,
            cluster: "room".into(),
            uid: 1000,
            state: state.into(),
            position,
            model: model.map(str::to_owned),
            served_by: model.map(|_| ServedBy { peer_id: "12D3".into(), name: "NodeA".into() }),
            prompt_tokens: None,
            completion_tokens: 12,
            duration_us: 150_000,
            error: error.map(str::to_owned),
        };
        assert_eq!(sentence(&job("queued", Some(3), None, None)), "job 7 (room): queued, 3 before it");
        assert_eq!(sentence(&job("running", None, Some("demo"), None)), "job 7 (room): running, demo on NodeA");
        assert_eq!(sentence(&job("done", None, Some("demo"), None)), "job 7 (room): done, demo on NodeA, 12 tokens in 150.0 ms");
        let failed = sentence(&job("failed", None, None, Some("NoEligiblePeer")));
        assert_eq!(failed, "job 7 (room): failed, 12 tokens in 150.0 ms, NoEligiblePeer");
        let changed = |keys: &[&str], liveness: &str, direct| Event::PeerChanged {
            cluster: "room".into(),
            peer_id: "12D3".into(),
            name: "NodeB".into(),
            changed: keys.iter().map(|&key| key.to_owned()).collect(),
            liveness: Some(liveness.into()),
            direct: Some(direct),
            relay_name: Some("NodeW".into()),
        };
        assert_eq!(sentence(&changed(&["Liveness"], "suspect", true)), "room: peer NodeB (12D3) is silent");
        assert_eq!(sentence(&changed(&["Direct", "Relay"], "alive", false)), "room: peer NodeB (12D3) is relayed via NodeW now");
        assert_eq!(sentence(&changed(&["Direct"], "alive", true)), "room: peer NodeB (12D3) is connected directly now");
    }

    #[test]
    fn events_are_objects_with_a_time_and_a_kind() {
        let event = Timed { time: 7, event: Event::PeersChanged { cluster: "c".into(), count: 2 } };
        assert_eq!(serde_json::to_string(&event).unwrap(), r#"{"time":7,"event":"peers_changed","cluster":"c","count":2}"#);
        assert_eq!(clock(86_399_000_000), "23:59:59Z");
    }
}
