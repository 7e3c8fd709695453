//! `ogctl status`: health first, then who this node is and what it is in.
//!
//! Exits with 0 when the daemon runs, whatever its health, and with 8 when it does not: scripts that want
//! health read `problems` and `state` of `--json`.

use super::now_us;
use crate::bus::Bus;
use crate::details::Read as _;
use crate::errors::Stop;
use crate::output::Output;
use crate::render::{Style, Tone, fields, span, tone_of_state};
use crate::term;
use opengateway::api::names::DEFAULT_CLUSTER;
use opengateway::api::proxy::Details;
use serde::Serialize;
use std::fmt::Write as _;
use std::time::Duration;

#[derive(Debug, Serialize)]
struct Status {
    running: bool,
    /// What is wrong now, a sentence each with the command that mends it.
    problems: Vec<String>,
    node_name: String,
    peer_id: String,
    state: String,
    sharing: bool,
    version: String,
    started_at: Option<u64>,
    uptime_s: Option<u64>,
    /// With the peer id, ready to paste after `ogctl connect --bootstrap`.
    addresses: Vec<String>,
    listen_addresses: Vec<String>,
    clusters: Vec<Cluster>,
    peers: Option<u64>,
    jobs: Option<u64>,
    backend: String,
    /// Models of this machine.
    models: Vec<Model>,
    /// Whether there is an engine, and it is switched on; null of a daemon that does not say.
    engine: Option<bool>,
    /// Where the OpenAI endpoint listens; empty while it is off.
    http: Vec<String>,
    last_error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Model {
    model: String,
    state: String,
    /// From 0 to 1 while it is being loaded.
    progress: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Cluster {
    id: String,
    state: String,
    peer_count: Option<u64>,
    /// Also those that are only known.
    member_count: Option<u64>,
    /// "serve" or "consume", as in `clusters`.
    role: Option<&'static str>,
}

/// Prints the status.
pub async fn run(bus: &mut Bus, out: &Output) -> Result<(), Stop> {
    let details = bus.ask(async |manager| manager.get_status().await).await?;
    out.view(view(&details, now_us()), text)
}

fn view(details: &Details, now: u64) -> Status {
    let started_at = details.number("StartedAt").filter(|&at| at > 0);
    let cluster = |details: &Details| Cluster {
        id: details.text_or_empty("Id"),
        state: details.text_or_empty("State"),
        peer_count: details.number("PeerCount"),
        member_count: details.number("MemberCount"),
        role: details.flag("Serving").map(|serving| if serving { "serve" } else { "consume" }),
    };
    let model = |details: &Details| Model {
        model: details.text_or_empty("Name"),
        state: details.text_or_empty("State"),
        progress: details.real("Progress"),
    };
    Status {
        running: true,
        problems: details.texts("Problems"),
        node_name: details.text_or_empty("NodeName"),
        peer_id: details.text_or_empty("PeerId"),
        state: details.text_or_empty("State"),
        sharing: details.flag("Sharing").unwrap_or(false),
        version: details.text_or_empty("Version"),
        started_at,
        uptime_s: started_at.map(|at| now.saturating_sub(at) / 1_000_000),
        addresses: details.texts("Addresses"),
        listen_addresses: details.texts("ListenAddresses"),
        clusters: details.inners("Clusters").iter().map(cluster).collect(),
        peers: details.number("Peers"),
        jobs: details.number("Jobs"),
        backend: details.text_or_empty("Backend"),
        models: details.inners("Models").iter().map(model).collect(),
        engine: details.flag("EngineInstalled"),
        http: details.texts("HttpAddresses"),
        last_error: details.text("LastError").filter(|error| !error.is_empty()),
    }
}

fn text(status: &Status, style: &Style) -> String {
    let mut text = String::new();
    let mut problem = |tone, mark: &str, line: &str| {
        writeln!(text, "{} {}", style.paint(tone, mark), term::line(line)).expect("writing to a String does not fail");
    };
    for line in &status.problems {
        problem(Tone::Bad, "!", line);
    }
    if !status.problems.is_empty() {
        problem(Tone::Plain, " ", "more: ogctl doctor");
    }
    if status.problems.is_empty() && status.clusters.is_empty() {
        problem(Tone::Warn, "!", &format!("this node is in no cluster; join one with: ogctl connect {DEFAULT_CLUSTER}"));
    }
    let number = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
    let cluster = |cluster: &Cluster| {
        let peers = cluster
            .peer_count
            .map_or_else(String::new, |count| format!(", {count} {}", if count == 1 { "peer" } else { "peers" }));
        let known = cluster.member_count.filter(|&members| Some(members) > cluster.peer_count);
        let known = known.map_or_else(String::new, |members| format!(" of {members} members"));
        let role = match cluster.role {
            Some("serve") => ", serving",
            Some(_) => ", asking only",
            None => "",
        };
        let state = style.paint(tone_of_state(&cluster.state), &term::line(&cluster.state));
        format!("{}: {state}{peers}{known}{role}", term::line(&cluster.id))
    };
    let lines = |list: &[String]| list.iter().map(|line| term::line(line)).collect::<Vec<_>>().join("\n");
    let addresses = if status.addresses.is_empty() { &status.listen_addresses } else { &status.addresses };
    let sharing = if status.sharing { "" } else { ", sharing is off" };
    let uptime = status.uptime_s.map_or_else(String::new, |seconds| format!(", up {}", span(Duration::from_secs(seconds))));
    text.push_str(&fields(
        style,
        &[
            ("Node", term::line(&status.node_name)),
            ("State", format!("{}{sharing}{uptime}", style.paint(tone_of_state(&status.state), &term::line(&status.state)))),
            ("Peer id", term::line(&status.peer_id)),
            ("Addresses", lines(addresses)),
            ("Clusters", status.clusters.iter().map(cluster).collect::<Vec<_>>().join("\n")),
            ("Peers", number(status.peers)),
            ("Prompts", number(status.jobs)),
            ("Backend", term::line(&status.backend)),
            ("Models", models(status)),
            ("OpenAI API", lines(&status.http)),
            ("Version", term::line(&status.version)),
            ("Last error", status.last_error.as_deref().map(term::line).unwrap_or_default()),
        ],
    ));
    text
}

/// "demo ready, large loading 40 %"; where there is no engine, that.
fn models(status: &Status) -> String {
    let model = |model: &Model| {
        let progress = model.progress.map_or_else(String::new, |progress| format!(" {:.0} %", progress * 100.0));
        format!("{} {}{progress}", term::line(&model.model), term::line(&model.state))
    };
    let list = status.models.iter().map(model).collect::<Vec<_>>().join(", ");
    match (status.engine, list.is_empty()) {
        (Some(false), true) => "no engine is installed or switched on".to_owned(),
        (Some(true), true) => "none; add one with: ogctl models add FILE.gguf".to_owned(),
        _ => list,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_reply_of_another_version_is_shown_without_inventing_anything() {
        let status = view(&Details::new(), 5_000_000);
        assert_eq!((status.uptime_s, status.peers, status.backend.as_str()), (None, None, ""));
        assert!(!text(&status, &Style::default()).contains("Peers"));
    }

    #[test]
    fn problems_come_before_everything_else() {
        let mut status = view(&Details::new(), 0);
        status.problems = vec!["UDP is blocked; run: firewall-cmd …".into()];
        assert!(text(&status, &Style::default()).starts_with("! UDP is blocked"));
    }
}
