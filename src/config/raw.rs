//! The configuration as written: every key optional, unknown keys refused.

use serde::Deserialize;
use std::path::PathBuf;

/// One file, or several merged ones.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    /// `[node]`.
    pub node: Option<Node>,
    /// `[network]`.
    pub network: Option<Network>,
    /// `[relay]`.
    pub relay: Option<Relay>,
    /// `[serve]`.
    pub serve: Option<Serve>,
    /// `[[cluster]]`: joined at the start.
    pub cluster: Option<Vec<Cluster>>,
    /// `[[backend]]`.
    pub backend: Option<Vec<Backend>>,
    /// `[upstreams]`.
    pub upstreams: Option<Upstreams>,
    /// `[models]`.
    pub models: Option<Models>,
    /// `[engine]`.
    pub engine: Option<Engine>,
    /// `[http]`.
    pub http: Option<Http>,
    /// `[log]`.
    pub log: Option<Log>,
    /// Where the service manager puts secrets: of the environment, not of a file.
    #[serde(skip)]
    pub credentials: Option<PathBuf>,
}

/// `[node]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Shown to other members.
    pub name: Option<String>,
    /// Where identity, clusters and `resources.json` are kept.
    pub state_dir: Option<PathBuf>,
}

/// `[network]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Multiaddrs to listen on.
    pub listen: Option<Vec<String>>,
    /// Multiaddrs of nodes to dial at the start.
    pub bootstrap: Option<Vec<String>>,
    /// Multiaddrs at which others reach this node though it does not listen on them.
    pub announce: Option<Vec<String>>,
    /// Look for members on the local network.
    pub mdns: Option<bool>,
    /// Remember members on disk.
    pub remember: Option<bool>,
    /// Connections in all.
    pub max_connections: Option<u32>,
}

/// `[relay]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relay {
    /// Carry connections between nodes that do not reach each other.
    pub enabled: Option<bool>,
    /// Places held for others at once.
    pub reservations: Option<u32>,
    /// Circuits at once.
    pub circuits: Option<u32>,
    /// Bytes of one circuit, both directions together.
    pub circuit_bytes: Option<u64>,
    /// Hours that a circuit may last.
    pub circuit_hours: Option<u32>,
}

/// `[serve]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serve {
    /// Answer prompts of other members.
    pub enabled: Option<bool>,
    /// Most cores that are lent.
    pub cores: Option<f64>,
    /// Most memory that is lent, in GB of 10^9 bytes.
    pub memory_gb: Option<f64>,
    /// Most storage that is lent, in GB of 10^9 bytes.
    pub storage_gb: Option<f64>,
    /// Most video memory that is lent, in GB of 10^9 bytes.
    pub vram_gb: Option<f64>,
}

/// `[[cluster]]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Its id.
    pub id: String,
    /// Take prompts of it; the default is `[serve] enabled`.
    pub serve: Option<bool>,
    /// Multiaddrs to dial for it.
    pub bootstrap: Option<Vec<String>>,
}

/// `[[backend]]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backend {
    /// "echo" or "openai".
    pub kind: String,
    /// Of an "openai" backend: `http://127.0.0.1:11434/v1`.
    pub url: Option<String>,
    /// File with the key for it.
    pub api_key_file: Option<PathBuf>,
    /// Or the name of a secret that the service manager passes.
    pub api_key_credential: Option<String>,
    /// Which server it is; found out when absent.
    pub api: Option<String>,
    /// Send text in clear to another machine.
    pub allow_http: Option<bool>,
    /// Only these models of it.
    pub models: Option<Vec<String>>,
    /// Prompts running at once.
    pub slots: Option<usize>,
    /// Prompts waiting.
    pub queue: Option<usize>,
    /// Prompts of one peer running at once, while others wait.
    pub running_per_peer: Option<usize>,
    /// Prompts of one peer waiting.
    pub queued_per_peer: Option<usize>,
}

/// `[upstreams]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstreams {
    /// Look for servers of models on their usual ports of this machine.
    pub discover: Option<bool>,
}

/// `[models]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Models {
    /// Where models are kept.
    pub directory: Option<PathBuf>,
    /// Where models are found besides.
    pub also: Option<Vec<PathBuf>>,
}

/// `[engine]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    /// Compute models on this machine.
    pub enabled: Option<bool>,
    /// The program.
    pub program: Option<PathBuf>,
    /// Threads for computing.
    pub threads: Option<u32>,
    /// Context window of a prompt, in tokens.
    pub context: Option<u32>,
    /// Prompts answered at once.
    pub slots: Option<u32>,
    /// Models that are loaded at the start and stay.
    pub keep: Option<Vec<String>>,
    /// Seconds without a prompt until a model is unloaded.
    pub idle: Option<u64>,
    /// Use the chat template of the file.
    pub file_template: Option<bool>,
    /// Layers that go to a GPU.
    pub gpu_layers: Option<u32>,
}

/// `[http]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// "off", an address, or several.
    pub listen: Option<OneOrMany>,
    /// "required" or "none".
    pub key: Option<String>,
    /// Take addresses that other machines reach.
    pub allow_remote: Option<bool>,
    /// Connections at once.
    pub max_connections: Option<u32>,
    /// Names that a `Host` header may have besides `localhost`.
    pub hosts: Option<Vec<String>>,
    /// Web pages that may call from a browser.
    pub origins: Option<Vec<String>>,
}

/// A text or a list of texts.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// `[log]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// "error", "warn", "info", "debug", "trace", or a tracing filter.
    pub level: Option<String>,
}

macro_rules! overlay {
    ($under:expr, $over:expr; $($field:ident),+) => {{ $(if $over.$field.is_some() { $under.$field = $over.$field; })+ }};
}

fn section<T: Default>(under: &mut Option<T>, over: Option<T>, merge: impl FnOnce(&mut T, T)) {
    if let Some(over) = over {
        merge(under.get_or_insert_with(T::default), over);
    }
}

impl Raw {
    /// Lays `over` on top: its keys win one by one; its lists replace whole lists.
    pub fn merge(&mut self, over: Self) {
        section(&mut self.node, over.node, |under, over| overlay!(under, over; name, state_dir));
        section(
            &mut self.network,
            over.network,
            |under, over| overlay!(under, over; listen, bootstrap, announce, mdns, remember, max_connections),
        );
        section(
            &mut self.relay,
            over.relay,
            |under, over| overlay!(under, over; enabled, reservations, circuits, circuit_bytes, circuit_hours),
        );
        section(&mut self.serve, over.serve, |under, over| overlay!(under, over; enabled, cores, memory_gb, storage_gb, vram_gb));
        section(&mut self.upstreams, over.upstreams, |under, over| overlay!(under, over; discover));
        section(&mut self.models, over.models, |under, over| overlay!(under, over; directory, also));
        section(&mut self.engine, over.engine, |under, over| {
            overlay!(under, over; enabled, program, threads, context, slots, keep, idle, file_template, gpu_layers);
        });
        section(
            &mut self.http,
            over.http,
            |under, over| overlay!(under, over; listen, key, allow_remote, max_connections, hosts, origins),
        );
        section(&mut self.log, over.log, |under, over| overlay!(under, over; level));
        overlay!(self, over; cluster, backend);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_raw() -> impl Strategy<Value = Raw> {
        let node = (any::<Option<bool>>(), any::<Option<bool>>())
            .prop_map(|(name, state)| Node { name: name.map(|n| n.to_string()), state_dir: state.map(|s| s.to_string().into()) });
        let network =
            (any::<Option<bool>>(), any::<Option<u32>>(), any::<Option<bool>>()).prop_map(|(mdns, max_connections, list)| {
                Network { listen: list.map(|list| vec![list.to_string()]), mdns, max_connections, ..Network::default() }
            });
        let serve = (any::<Option<bool>>(), proptest::option::of(0.5..9.0)).prop_map(|(enabled, cores)| Serve {
            enabled,
            cores,
            ..Serve::default()
        });
        let cluster = proptest::collection::vec("[ab]", 0..3)
            .prop_map(|ids| ids.into_iter().map(|id| Cluster { id, ..Cluster::default() }).collect());
        use proptest::option::of;
        (of(node), of(network), of(serve), of(cluster)).prop_map(|(node, network, serve, cluster)| Raw {
            node,
            network,
            serve,
            cluster,
            ..Raw::default()
        })
    }

    fn merged(mut under: Raw, over: &Raw) -> Raw {
        under.merge(over.clone());
        under
    }

    proptest! {
        #[test]
        fn files_are_laid_on_top_of_each_other(a in any_raw(), b in any_raw(), c in any_raw()) {
            prop_assert_eq!(merged(a.clone(), &Raw::default()), a.clone(), "an empty file changes nothing");
            prop_assert_eq!(merged(merged(a.clone(), &b), &b), merged(a.clone(), &b), "twice is once");
            prop_assert_eq!(merged(merged(a.clone(), &b), &c), merged(a.clone(), &merged(b.clone(), &c)), "in any grouping");
            if let Some(name) = b.node.as_ref().and_then(|node| node.name.clone()) {
                prop_assert_eq!(merged(a, &b).node.and_then(|node| node.name), Some(name), "the stronger one wins");
            }
        }
    }
}
