//! `ogctl clusters`, `connect` and `disconnect`.

use super::is_joined;
use crate::args::{Connect, Disconnect};
use crate::bus::{Bus, within};
use crate::details::Read as _;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::render::{Style, Table, cell, list, tone_of_state};
use crate::term;
use opengateway::api::keys::{connect_option, disconnect_option};
use opengateway::api::names::{ErrorName, exit};
use opengateway::api::proxy::{ClusterProxy, Details, Options};
use serde::Serialize;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Duration;
use zbus::proxy::CacheProperties;
use zbus::{OwnedObjectPath, Variant};

#[derive(Debug, Serialize)]
struct Clusters {
    clusters: Vec<Cluster>,
}

#[derive(Debug, Serialize)]
struct Cluster {
    id: String,
    path: String,
    name: String,
    state: String,
    joined: bool,
    /// "serve" or "consume"; null when not joined or unknown.
    role: Option<&'static str>,
    peer_count: Option<u64>,
    models: Vec<String>,
    configured: bool,
    auto_connect: bool,
    private: bool,
    discovery: Vec<String>,
}

/// Prints the known clusters.
pub async fn clusters(bus: &mut Bus, out: &Output) -> Result<(), Stop> {
    let clusters = bus.ask(async |manager| manager.list_clusters().await).await?;
    out.view(Clusters { clusters: clusters.into_iter().map(cluster).collect() }, clusters_text)
}

fn cluster((id, path, details): (String, OwnedObjectPath, Details)) -> Cluster {
    let state = details.text_or_empty("State");
    let joined = is_joined(&state);
    let role = details.flag("Serving").filter(|_| joined).map(|serving| if serving { "serve" } else { "consume" });
    Cluster {
        id,
        path: path.as_str().to_owned(),
        name: details.text_or_empty("Name"),
        joined,
        role,
        state,
        peer_count: details.number("PeerCount"),
        models: details.texts("Models"),
        configured: details.flag("Configured").unwrap_or(false),
        auto_connect: details.flag("AutoConnect").unwrap_or(false),
        private: details.flag("Private").unwrap_or(false),
        discovery: details.texts("Discovery"),
    }
}

fn clusters_text(view: &Clusters, style: &Style) -> String {
    if view.clusters.is_empty() {
        return "No clusters. Join one with: ogctl connect CLUSTER\n".into();
    }
    let mut table = Table::new(&["CLUSTER", "STATE", "ROLE", "PEERS", "ACCESS", "MODELS"]);
    for cluster in &view.clusters {
        table.row(vec![
            cell(term::line(&cluster.id)),
            (term::line(&cluster.state), tone_of_state(&cluster.state)),
            cell(cluster.role.unwrap_or("-")),
            cell(cluster.peer_count.map_or_else(|| "-".into(), |count| count.to_string())),
            cell(if cluster.private { "private" } else { "public" }),
            cell(list(&cluster.models)),
        ]);
    }
    table.render(style)
}

/// How long `connect` looks round for a first peer when `--wait` is not given.
const LOOK_ROUND: Duration = Duration::from_secs(5);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[derive(Debug, Serialize)]
struct Connected {
    cluster: String,
    path: String,
    state: String,
    peer_count: u32,
}

/// Joins a cluster and waits for company.
pub async fn connect(bus: &mut Bus, out: &Output, options: &Connect) -> Result<(), Stop> {
    let secret = options.secret_file.as_deref().map(secret_pipe).transpose()?;
    let mut details = Options::new();
    if !options.bootstrap.is_empty() {
        details.insert(connect_option::BOOTSTRAP, Variant::from(options.bootstrap.clone()));
    }
    if options.serve || options.consume {
        details.insert(connect_option::SERVE, Variant::from(options.serve));
    }
    if let Some(secret) = secret {
        details.insert(connect_option::SECRET, Variant::Fd(zbus::Fd::from(secret)));
    }
    let name = options.cluster.as_str();
    let path: OwnedObjectPath = bus.change("Connect", &(name, &details)).await.map_err(Failure::of_membership)?;
    let (state, peer_count) = look_round(bus, &path, options.wait.unwrap_or(LOOK_ROUND)).await?;
    if peer_count == 0 && options.wait.is_some_and(|wait| !wait.is_zero()) {
        let message = format!("joined {}, and no peer was found in time", term::line(name));
        let hint = "name a node that is there with: ogctl connect --bootstrap ADDR, or start one";
        return Err(Failure::new("NoPeers", message, hint, exit::MEMBERSHIP).into());
    }
    let view = Connected { cluster: name.to_owned(), path: path.as_str().to_owned(), state, peer_count };
    out.view(view, |view, _| {
        let cluster = term::line(&view.cluster);
        match view.peer_count {
            0 => format!("Joined {cluster}; no other node has been seen yet.\n"),
            1 => format!("Joined {cluster}; 1 peer.\n"),
            count => format!("Joined {cluster}; {count} peers.\n"),
        }
    })
}

/// Waits until the cluster has a peer, fails, or the time is over; gives state and number of peers.
async fn look_round(bus: &Bus, path: &OwnedObjectPath, time: Duration) -> Result<(String, u32), Failure> {
    let cluster = ClusterProxy::builder(bus.connection()).path(path).cache_properties(CacheProperties::No).build().await;
    let cluster = cluster.map_err(|error| Failure::from_zbus(&error))?;
    let until = tokio::time::Instant::now() + time;
    loop {
        let state = within(bus.limit(), cluster.state()).await?;
        let count = within(bus.limit(), cluster.peer_count()).await?;
        if state == "failed" {
            let (name, message) = within(bus.limit(), cluster.last_error()).await?;
            return Err(joining_failed(&name, &message));
        }
        let now = tokio::time::Instant::now();
        if count > 0 || now >= until {
            return Ok((state, count));
        }
        tokio::time::sleep_until(until.min(now + LOOK_EVERY)).await;
    }
}

fn joining_failed(name: &str, message: &str) -> Failure {
    if name.parse::<ErrorName>().is_ok() {
        return Failure::named(name, message).of_membership();
    }
    let message = format!("joining failed: {}", term::line(message));
    Failure::new("JoinFailed", message, "see: journalctl -u opengatewayd", exit::MEMBERSHIP)
}

/// Longest secret: far below what a pipe holds, so that writing it never waits.
const MAX_SECRET_BYTES: u64 = 4096;

/// The read end of a pipe with the secret. Not a string: messages on the bus can be monitored.
fn secret_pipe(file: &Path) -> Result<std::os::fd::OwnedFd, Failure> {
    let failed =
        |what: &str, error: std::io::Error| Failure::usage(format!("{what} {}: {error}", term::line(&file.to_string_lossy())));
    let mut secret = Vec::new();
    let source = std::fs::File::open(file).map_err(|error| failed("cannot open", error))?;
    source.take(MAX_SECRET_BYTES + 1).read_to_end(&mut secret).map_err(|error| failed("cannot read", error))?;
    if secret.is_empty() || secret.len() as u64 > MAX_SECRET_BYTES {
        return Err(Failure::usage(format!("the secret must have 1 to {MAX_SECRET_BYTES} bytes")));
    }
    let (read, write) = std::io::pipe().map_err(|error| failed("cannot pass on", error))?;
    { write }.write_all(&secret).map_err(|error| failed("cannot pass on", error))?;
    Ok(read.into())
}

#[derive(Debug, Serialize)]
struct Disconnected {
    cluster: String,
    forgotten: bool,
}

/// Leaves a cluster.
pub async fn disconnect(bus: &mut Bus, out: &Output, options: &Disconnect) -> Result<(), Stop> {
    let mut details = Options::new();
    if options.forget {
        details.insert(disconnect_option::FORGET, Variant::from(true));
    }
    // The reply comes when the work in progress has ended: the drain is on top of the usual time.
    let drain = options.drain.unwrap_or(Duration::from_secs(10));
    if options.drain.is_some() {
        details.insert(disconnect_option::DRAIN, Variant::from(super::micros(drain)));
    }
    bus.set_limit(bus.limit() + drain);
    let name = options.cluster.as_str();
    bus.change::<_, ()>("Disconnect", &(name, &details)).await.map_err(Failure::of_membership)?;
    out.view(Disconnected { cluster: name.to_owned(), forgotten: options.forget }, |view, _| {
        let forgotten = if view.forgotten { " and forgot it" } else { "" };
        format!("Left {}{forgotten}.\n", term::line(&view.cluster))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_at_the_limit_passes_and_one_byte_more_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        for (size, passes) in [(0, false), (1, true), (MAX_SECRET_BYTES, true), (MAX_SECRET_BYTES + 1, false)] {
            std::fs::write(&file, vec![b's'; usize::try_from(size).unwrap()]).unwrap();
            assert_eq!(secret_pipe(&file).is_ok(), passes, "{size} bytes");
        }
        assert_eq!(secret_pipe(&dir.path().join("missing")).unwrap_err().code, exit::USAGE);
    }
}
