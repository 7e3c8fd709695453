//! `ogctl version`: client, daemon, protocols, and whether the two fit. Works without a daemon.

use crate::args::Globals;
use crate::bus::Bus;
use crate::errors::Stop;
use crate::output::Output;
use crate::render::{Style, Tone};
use crate::{details::Read as _, term};
use opengateway::api::names::BUS_NAME;
use opengateway::domain::version;
use serde::Serialize;

#[derive(Debug, Serialize)]
struct Version {
    client: Client,
    /// Null when no daemon answered.
    daemon: Option<Daemon>,
    protocols: Protocols,
    /// Whether client and daemon are of different versions.
    skew: bool,
}

#[derive(Debug, Serialize)]
struct Client {
    version: &'static str,
    commit: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct Daemon {
    version: String,
}

#[derive(Debug, Serialize)]
struct Protocols {
    bus: &'static str,
    peers: &'static [&'static str],
}

/// Prints the versions.
pub async fn run(globals: &Globals, out: &Output) -> Result<(), Stop> {
    let daemon = match Bus::open(globals).await {
        Ok(mut bus) => bus.ask(async |manager| manager.get_status().await).await,
        Err(failure) => Err(failure),
    };
    let reason = daemon.as_ref().err().map(|failure| failure.message.clone());
    let daemon = daemon.ok().and_then(|details| details.text("Version")).map(|version| Daemon { version });
    let client = Client { version: version::VERSION, commit: version::COMMIT };
    let skew = daemon.as_ref().is_some_and(|daemon| daemon.version != client.version);
    let view = Version { client, daemon, protocols: Protocols { bus: BUS_NAME, peers: version::PEER_PROTOCOLS }, skew };
    out.view(view, |view, style| text(view, reason.as_deref(), style))
}

fn text(view: &Version, reason: Option<&str>, style: &Style) -> String {
    let commit = view.client.commit.map_or_else(String::new, |commit| format!(" ({commit})"));
    let daemon = match &view.daemon {
        Some(daemon) => term::line(&daemon.version),
        None => format!("- ({})", reason.unwrap_or("it did not say")),
    };
    let mut text = format!(
        "ogctl {}{commit}\nopengatewayd {daemon}\nbus {}\npeers {}\n",
        view.client.version,
        view.protocols.bus,
        view.protocols.peers.join(" ")
    );
    if view.skew {
        let warning = "ogctl and opengatewayd are of different versions; restart the service after an upgrade with: systemctl restart opengatewayd";
        text.push_str(&format!("{} {warning}\n", style.paint(Tone::Warn, "!")));
    }
    text
}
