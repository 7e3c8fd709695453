//! From facts to findings: what is wrong, since when it matters, and the command that mends it. Pure.

use super::cluster::ClusterId;
use super::network::Facts;
use super::node::NodeId;

/// How bad a finding is; the greater the worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// As it should be, or good to know.
    Info,
    /// Works, and could work better, or will fail for some.
    Warning,
    /// Does not work.
    Error,
}

impl Severity {
    /// The word used on the bus and in `--json`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Stable, such as "bootstrap-refused"; `docs/doctor.md` lists them.
    pub code: &'static str,
    /// How bad.
    pub severity: Severity,
    /// The peer that it is about, if it is about one.
    pub peer: Option<NodeId>,
    /// The cluster that it is about, if it is about one.
    pub cluster: Option<ClusterId>,
    /// One sentence.
    pub sentence: String,
    /// The command that mends it, or the one that tells more.
    pub remedy: Option<String>,
}

/// What is known beside the network: of this host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Host {
    /// "firewalld", "ufw": a firewall that is active; `None` when none is known to be.
    pub firewall: Option<String>,
    /// The clock is known to be right; `None` when nobody says.
    pub clock_synchronised: Option<bool>,
    /// How long it was suspended since the daemon started, in seconds; 0 is never.
    pub suspended_s: u64,
}

/// What the caller wants to know about.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Subject {
    /// This node and every peer with trouble.
    #[default]
    Node,
    /// One peer, by id or name: everything that is known of it.
    Peer(String),
    /// One cluster: its members and those that should be.
    Cluster(ClusterId),
}

/// What there is to say about `subject`, the worst first.
pub fn examine(facts: &Facts, host: &Host, subject: &Subject) -> Vec<Finding> {
    let _ = (facts, host, subject);
    Vec::new()
}
