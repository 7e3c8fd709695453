//! Client proxies of the interfaces in `dbus/`.
//!
//! For programs written in Rust; `ogctl` uses them for reading. Methods that only read do not start
//! the daemon (`no_autostart`), methods that change something let polkit ask the user. A proxy waits
//! for ever: bound each call with a timeout of your own, because zbus's `method_timeout` does not
//! cover calls with flags, which these are.

use std::collections::HashMap;
use zbus::{OwnedFd, OwnedObjectPath, OwnedVariant, Variant};

/// The `a{sv}` of a reply.
pub type Details = HashMap<String, OwnedVariant>;
/// The `a{sv}` of a call.
pub type Options<'a> = HashMap<&'a str, Variant<'a>>;
/// One entry of `ListEligible`: tier, whether it qualifies, what is unmet, details.
pub type TierEntry = (String, bool, Vec<(String, String)>, Details);

/// The node: its state, its clusters, its resources, and prompts.
#[zbus::proxy(
    interface = "org.opengateway.Gateway1.Manager",
    default_service = "org.opengateway.Gateway1",
    default_path = "/org/opengateway/Gateway1"
)]
pub trait Manager {
    /// A snapshot for people and scripts.
    #[zbus(no_autostart)]
    fn get_status(&self) -> zbus::Result<Details>;

    /// Configured clusters and those seen by discovery: id, object path, details.
    #[zbus(no_autostart)]
    fn list_clusters(&self) -> zbus::Result<Vec<(String, OwnedObjectPath, Details)>>;

    /// Joins a cluster; returns when the attempt has begun.
    #[zbus(allow_interactive_auth)]
    fn connect(&self, cluster_id: &str, options: &Options<'_>) -> zbus::Result<OwnedObjectPath>;

    /// Leaves a cluster.
    #[zbus(allow_interactive_auth)]
    fn disconnect(&self, cluster_id: &str, options: &Options<'_>) -> zbus::Result<()>;

    /// What this machine has.
    #[zbus(no_autostart)]
    fn get_resources(&self, options: &Options<'_>) -> zbus::Result<Details>;

    /// The tiers that this machine qualifies for.
    #[zbus(no_autostart)]
    fn list_eligible(&self, options: &Options<'_>) -> zbus::Result<Vec<TierEntry>>;

    /// Members of a cluster: peer id, details.
    #[zbus(no_autostart)]
    fn list_peers(&self, cluster_id: &str, options: &Options<'_>) -> zbus::Result<Vec<(String, Details)>>;

    /// Asks and waits for the whole answer: text, details.
    #[zbus(allow_interactive_auth)]
    fn prompt(&self, cluster_id: &str, prompt: &str, options: &Options<'_>) -> zbus::Result<(String, Details)>;

    /// Asks; the answer comes on a pipe (see [`crate::api::stream`]): job, read end.
    #[zbus(allow_interactive_auth)]
    fn start_prompt(&self, cluster_id: &str, prompt: &str, options: &Options<'_>) -> zbus::Result<(OwnedObjectPath, OwnedFd)>;

    /// Prompts in progress: id, object path, details.
    #[zbus(no_autostart)]
    fn list_jobs(&self) -> zbus::Result<Vec<(u64, OwnedObjectPath, Details)>>;

    /// How jobs go, as it happens, on a pipe (see [`crate::api::stream::JobLine`]).
    #[zbus(no_autostart)]
    fn watch_jobs(&self, options: &Options<'_>) -> zbus::Result<OwnedFd>;

    /// Whether, and how much of, this machine serves others.
    #[zbus(allow_interactive_auth)]
    fn set_sharing(&self, enabled: bool, options: &Options<'_>) -> zbus::Result<()>;

    /// Reads the configuration again.
    #[zbus(allow_interactive_auth)]
    fn reload(&self) -> zbus::Result<()>;

    /// A cluster changed its state.
    #[zbus(signal)]
    fn cluster_state_changed(
        &self,
        cluster_id: String,
        cluster: OwnedObjectPath,
        state: String,
        details: Details,
    ) -> zbus::Result<()>;

    /// Totals or availability moved by 5 % or more.
    #[zbus(signal)]
    fn resources_changed(&self, changed: Vec<String>) -> zbus::Result<()>;

    /// The node is about to leave its clusters.
    #[zbus(signal)]
    fn prepare_for_shutdown(&self, start: bool) -> zbus::Result<()>;

    /// Version of the daemon.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> zbus::Result<String>;

    /// What this build can do beyond the first release.
    #[zbus(property(emits_changed_signal = "const"))]
    fn features(&self) -> zbus::Result<Vec<String>>;

    /// This node's libp2p peer id.
    #[zbus(property(emits_changed_signal = "const"))]
    fn peer_id(&self) -> zbus::Result<String>;

    /// The name shown to others.
    #[zbus(property)]
    fn node_name(&self) -> zbus::Result<String>;

    /// "starting", "idle", "joining", "online", "degraded", "stopping".
    #[zbus(property)]
    fn state(&self) -> zbus::Result<String>;

    /// Whether this machine serves others.
    #[zbus(property)]
    fn sharing(&self) -> zbus::Result<bool>;

    /// Multiaddrs without the peer id.
    #[zbus(property(emits_changed_signal = "invalidates"))]
    fn listen_addresses(&self) -> zbus::Result<Vec<String>>;

    /// Prompts in progress.
    #[zbus(property(emits_changed_signal = "false"))]
    fn active_jobs(&self) -> zbus::Result<u32>;
}

/// The models of a cluster, and those of this machine.
#[zbus::proxy(
    interface = "org.opengateway.Gateway1.Models",
    default_service = "org.opengateway.Gateway1",
    default_path = "/org/opengateway/Gateway1"
)]
pub trait Models {
    /// Every model of a cluster: name, details.
    #[zbus(no_autostart)]
    fn list_models(&self, cluster_id: &str, options: &Options<'_>) -> zbus::Result<Vec<(String, Details)>>;

    /// The model files of this machine: name, details.
    #[zbus(no_autostart)]
    fn list_local(&self) -> zbus::Result<Vec<(String, Details)>>;

    /// Copies a file into the models directory; how far it is comes on a pipe (see [`crate::api::stream::Step`]).
    #[zbus(allow_interactive_auth)]
    fn add(&self, name: &str, file: zbus::Fd<'_>, options: &Options<'_>) -> zbus::Result<OwnedFd>;

    /// Hashes a model's file again; a pipe as of `add`.
    #[zbus(allow_interactive_auth)]
    fn verify(&self, name: &str, options: &Options<'_>) -> zbus::Result<OwnedFd>;

    /// Removes a model's file.
    #[zbus(allow_interactive_auth)]
    fn remove(&self, name: &str) -> zbus::Result<()>;

    /// Begins to load a model.
    #[zbus(allow_interactive_auth)]
    fn load(&self, name: &str) -> zbus::Result<()>;

    /// Ends a model's engine when its prompts have ended.
    #[zbus(allow_interactive_auth)]
    fn unload(&self, name: &str) -> zbus::Result<()>;

    /// What was answered and asked since the daemon's start.
    #[zbus(no_autostart)]
    fn get_usage(&self) -> zbus::Result<Details>;

    /// A model of this machine is there, or is another than before.
    #[zbus(signal)]
    fn model_changed(&self, name: String, details: Details) -> zbus::Result<()>;

    /// A model is not on this machine any more.
    #[zbus(signal)]
    fn model_removed(&self, name: String) -> zbus::Result<()>;

    /// Models on this machine.
    #[zbus(property)]
    fn count(&self) -> zbus::Result<u32>;

    /// How many of them are loaded.
    #[zbus(property)]
    fn loaded(&self) -> zbus::Result<u32>;

    /// Whether there is an engine, and it is switched on.
    #[zbus(property(emits_changed_signal = "false"))]
    fn engine_installed(&self) -> zbus::Result<bool>;
}

/// A cluster this node knows.
#[zbus::proxy(
    interface = "org.opengateway.Gateway1.Cluster",
    default_service = "org.opengateway.Gateway1",
    assume_defaults = false
)]
pub trait Cluster {
    /// A member is there.
    #[zbus(signal)]
    fn peer_connected(&self, peer_id: String, details: Details) -> zbus::Result<()>;

    /// A member is gone.
    #[zbus(signal)]
    fn peer_disconnected(&self, peer_id: String, reason: String) -> zbus::Result<()>;

    /// A member fell silent or is heard again, or the way to it is another.
    #[zbus(signal)]
    fn peer_changed(&self, peer_id: String, changed: Vec<String>, details: Details) -> zbus::Result<()>;

    /// Too many came, went or changed to be told one by one.
    #[zbus(signal)]
    fn peers_changed(&self, count: u32) -> zbus::Result<()>;

    /// The cluster id.
    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> zbus::Result<String>;

    /// For people.
    #[zbus(property)]
    fn name(&self) -> zbus::Result<String>;

    /// "disconnected", "discovering", "connecting", "connected", "degraded", "disconnecting", "failed".
    #[zbus(property)]
    fn state(&self) -> zbus::Result<String>;

    /// Error name and message, both "" when there is none.
    #[zbus(property)]
    fn last_error(&self) -> zbus::Result<(String, String)>;

    /// Members connected now.
    #[zbus(property)]
    fn peer_count(&self) -> zbus::Result<u32>;

    /// What can be asked here.
    #[zbus(property)]
    fn models(&self) -> zbus::Result<Vec<String>>;

    /// The ways of discovery in use.
    #[zbus(property)]
    fn discovery(&self) -> zbus::Result<Vec<String>>;

    /// Joined at start.
    #[zbus(property)]
    fn auto_connect(&self) -> zbus::Result<bool>;

    /// Its key comes from a secret.
    #[zbus(property)]
    fn private(&self) -> zbus::Result<bool>;

    /// This machine takes work for the cluster.
    #[zbus(property)]
    fn serving(&self) -> zbus::Result<bool>;

    /// Microseconds since the epoch, 0 when not connected.
    #[zbus(property)]
    fn connected_at(&self) -> zbus::Result<u64>;
}

/// One prompt in progress.
#[zbus::proxy(interface = "org.opengateway.Gateway1.Job", default_service = "org.opengateway.Gateway1", assume_defaults = false)]
pub trait Job {
    /// Cancels it.
    fn cancel(&self) -> zbus::Result<()>;

    /// It ended; sent to the caller alone.
    #[zbus(signal)]
    fn finished(&self, result: String, details: Details) -> zbus::Result<()>;

    /// Its number.
    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> zbus::Result<u64>;

    /// Where it was asked.
    #[zbus(property(emits_changed_signal = "const"))]
    fn cluster_id(&self) -> zbus::Result<String>;

    /// Who asked.
    #[zbus(property(emits_changed_signal = "const"))]
    fn uid(&self) -> zbus::Result<u32>;

    /// Microseconds since the epoch.
    #[zbus(property(emits_changed_signal = "const"))]
    fn created_at(&self) -> zbus::Result<u64>;

    /// "queued", "running", "done", "cancelled", "failed".
    #[zbus(property(emits_changed_signal = "false"))]
    fn state(&self) -> zbus::Result<String>;

    /// So far.
    #[zbus(property(emits_changed_signal = "false"))]
    fn completion_tokens(&self) -> zbus::Result<u32>;
}

/// The OpenAI endpoint of the node, and the keys for it.
#[zbus::proxy(
    interface = "org.opengateway.Gateway1.Http",
    default_service = "org.opengateway.Gateway1",
    default_path = "/org/opengateway/Gateway1"
)]
pub trait Http {
    /// The key of the caller's user.
    #[zbus(allow_interactive_auth)]
    fn get_key(&self, options: &Options<'_>) -> zbus::Result<String>;

    /// Where it listens; empty while it is off.
    #[zbus(property(emits_changed_signal = "false"))]
    fn addresses(&self) -> zbus::Result<Vec<String>>;

    /// Whoever comes by TCP shows a key.
    #[zbus(property(emits_changed_signal = "const"))]
    fn key_required(&self) -> zbus::Result<bool>;
}

/// Why this node finds the others, or does not; and signs of life.
#[zbus::proxy(
    interface = "org.opengateway.Gateway1.Network",
    default_service = "org.opengateway.Gateway1",
    default_path = "/org/opengateway/Gateway1"
)]
pub trait Network {
    /// Findings, the worst first, and the facts that they were drawn from.
    #[zbus(no_autostart)]
    fn diagnose(&self, options: &Options<'_>) -> zbus::Result<(Vec<Details>, Details)>;

    /// Asks a peer, by name or peer id, for signs of life.
    #[zbus(no_autostart)]
    fn ping(&self, peer: &str, options: &Options<'_>) -> zbus::Result<Details>;

    /// Code, severity, sentence of the worst finding; empty when all is well.
    #[zbus(property)]
    fn worst_finding(&self) -> zbus::Result<(String, String, String)>;
}

#[cfg(test)]
mod tests {
    use zbus_xml::{Node, PropertyAccess};

    /// `ListeningAddresses` as the proxies spell it: `listening_addresses`.
    fn snake(name: &str) -> String {
        let mut snake = String::new();
        for c in name.chars() {
            if c.is_ascii_uppercase() && !snake.is_empty() {
                snake.push('_');
            }
            snake.push(c.to_ascii_lowercase());
        }
        snake
    }

    #[test]
    fn the_proxies_have_every_member_of_the_interface_files_and_cache_no_more_than_they_allow() {
        let source = include_str!("proxy.rs");
        let files = [
            ("Manager", include_str!("../../dbus/org.opengateway.Gateway1.Manager.xml")),
            ("Cluster", include_str!("../../dbus/org.opengateway.Gateway1.Cluster.xml")),
            ("Job", include_str!("../../dbus/org.opengateway.Gateway1.Job.xml")),
            ("Models", include_str!("../../dbus/org.opengateway.Gateway1.Models.xml")),
            ("Http", include_str!("../../dbus/org.opengateway.Gateway1.Http.xml")),
            ("Network", include_str!("../../dbus/org.opengateway.Gateway1.Network.xml")),
        ];
        for (short, xml) in files {
            let start = source.find(&format!("pub trait {short} {{")).expect("the proxy is there");
            let proxy = &source[start..start + source[start..].find("\n}").expect("it ends")];
            let node = Node::from_reader(xml.as_bytes()).expect("the file is well-formed");
            let interface = &node.interfaces()[0];
            let method = |name: &str| proxy.matches(&format!("fn {}(", snake(name))).count();
            let mut members = 0;
            for name in interface.methods().map(|m| m.name()).chain(interface.signals().map(|s| s.name())) {
                assert_eq!(method(name.as_str()), 1, "{short}.{name}");
                members += 1;
            }
            for property in interface.properties() {
                let name = property.name();
                assert_eq!(method(name.as_str()), 1, "{short}.{name}");
                assert_eq!(property.access(), PropertyAccess::Read, "{short}.{name}");
                let emits = property.annotations().iter().find(|a| a.name().ends_with("EmitsChangedSignal")).map(|a| a.value());
                let attribute = match emits {
                    Some(value) => format!("#[zbus(property(emits_changed_signal = \"{value}\"))]"),
                    None => "#[zbus(property)]".to_owned(),
                };
                assert!(proxy.contains(&format!("{attribute}\n    fn {}(", snake(name.as_str()))), "{short}.{name} {attribute}");
                members += 1;
            }
            assert_eq!(proxy.matches("    fn ").count(), members, "{short} has members that the file lacks");
        }
    }
}
