//! The command line of the daemon; the man page is made from the same definitions.

use std::path::PathBuf;

use clap::Parser;
use opengateway::api::names::BUS_NAME;
use opengateway::config::Overrides;
use opengateway::daemon::{Bus, Options};
use opengateway::domain::version;

/// Linux machines lend each other their language models: the daemon.
#[derive(Debug, Parser)]
#[command(name = "opengatewayd", version, long_version = long_version(), about, max_term_width = 100)]
pub struct Arguments {
    /// Configuration file instead of /etc/opengateway/opengatewayd.toml; its drop-ins are in FILE.d
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Bus to serve: "system", "session", or a D-Bus address
    #[arg(long, value_name = "BUS", default_value = "system")]
    bus: Bus,
    /// Where identity, clusters and resources.json are kept
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Name shown to other members
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// Answer prompts of other members
    #[arg(long, conflicts_with = "consume")]
    serve: bool,
    /// Only ask, never answer
    #[arg(long)]
    consume: bool,
    /// Address to listen on, such as /ip4/0.0.0.0/udp/4001/quic-v1; may be given several times
    #[arg(long, value_name = "MULTIADDR")]
    listen: Vec<String>,
    /// Node to dial at the start, best with /p2p/PEER-ID; may be given several times
    #[arg(long, value_name = "MULTIADDR")]
    bootstrap: Vec<String>,
    /// Cluster to join at the start; may be given several times
    #[arg(long, value_name = "CLUSTER")]
    connect: Vec<String>,
    /// Do not look for members on the local network
    #[arg(long)]
    no_mdns: bool,
    /// Do not look for servers of models (Ollama, llama-server, ...) on this machine
    #[arg(long)]
    no_discover: bool,
    /// Where the OpenAI endpoint listens, such as 127.0.0.1:11480; may be given several times
    #[arg(long, value_name = "ADDR|unix:PATH|off")]
    http: Vec<String>,
    /// "error", "warn", "info", "debug", "trace", or a tracing filter
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
}

/// What `--version` prints; `-V` prints the version alone.
fn long_version() -> String {
    let commit = version::COMMIT.map_or_else(String::new, |commit| format!(" ({commit})"));
    format!("{}{commit}\nbus {BUS_NAME}\npeers {}", version::VERSION, version::PEER_PROTOCOLS.join(" "))
}

impl Arguments {
    /// The same as the daemon wants it.
    pub fn into_options(self) -> Options {
        let serve = if self.serve {
            Some(true)
        } else if self.consume {
            Some(false)
        } else {
            None
        };
        Options {
            bus: self.bus,
            config: self.config,
            overrides: Overrides {
                state_dir: self.state_dir,
                node_name: self.node_name,
                serve,
                listen: self.listen,
                bootstrap: self.bootstrap,
                connect: self.connect,
                no_mdns: self.no_mdns,
                no_discover: self.no_discover,
                http: self.http,
                log: self.log,
            },
        }
    }
}
