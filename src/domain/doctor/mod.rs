//! From facts to findings: what is wrong, and the command that mends it. Pure: what is not in the facts is not guessed.
//!
//! A finding has a code that never changes its meaning (`docs/doctor.md` lists all), a sentence that names the thing (the
//! address, the interface, the reason), and a remedy.

mod bootstrap;
mod clusters;
mod dials;
mod identity;
mod machine;
mod peers;
mod reach;
#[cfg(test)]
mod tests;
mod words;

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
    /// One sentence, without control characters whoever was quoted in it.
    pub sentence: String,
    /// The command that mends it, or the one that tells more.
    pub remedy: Option<String>,
}

impl Finding {
    fn new(severity: Severity, code: &'static str, sentence: impl AsRef<str>) -> Self {
        let sentence = words::clean(sentence.as_ref());
        Self { code, severity, peer: None, cluster: None, sentence, remedy: None }
    }

    fn error(code: &'static str, sentence: impl AsRef<str>) -> Self {
        Self::new(Severity::Error, code, sentence)
    }

    fn warning(code: &'static str, sentence: impl AsRef<str>) -> Self {
        Self::new(Severity::Warning, code, sentence)
    }

    fn info(code: &'static str, sentence: impl AsRef<str>) -> Self {
        Self::new(Severity::Info, code, sentence)
    }

    fn of(mut self, peer: &NodeId) -> Self {
        self.peer = Some(peer.clone());
        self
    }

    fn within(mut self, cluster: &ClusterId) -> Self {
        self.cluster = Some(cluster.clone());
        self
    }

    fn mend(mut self, remedy: impl AsRef<str>) -> Self {
        self.remedy = Some(words::clean(remedy.as_ref()));
        self
    }
}

/// What is known beside the network: of this host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Host {
    /// "firewalld", "ufw": a firewall that is active; `None` when none is known to be.
    pub firewall: Option<String>,
    /// That firewall has a rule for this program, by name, which has to be switched on only.
    pub firewall_rule: bool,
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
    let mut findings = match subject {
        Subject::Node => {
            let mut findings = of_node(facts, host);
            findings.extend(facts.clusters.iter().flat_map(|cluster| clusters::about(facts, cluster)));
            findings.extend(peers::in_trouble(facts));
            findings
        }
        Subject::Peer(wanted) => peers::about(facts, wanted),
        Subject::Cluster(id) => clusters::asked_about(facts, id),
    };
    if *subject != Subject::Node && findings.iter().any(|finding| finding.severity > Severity::Info) {
        // What is wrong here may be why.
        findings.extend(of_node(facts, host).into_iter().filter(|finding| finding.severity > Severity::Info));
    }
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    findings
}

/// What hinders this node as long as nothing changes, a sentence each, the worst first: for `ogctl status`, which is asked
/// often. Nothing in it counts or ages, so that it changes only when something has changed.
pub fn problems(facts: &Facts) -> Vec<String> {
    let mut standing = standing(facts);
    standing.retain(|finding| finding.severity > Severity::Info);
    standing.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    let told = standing.into_iter().map(|finding| match finding.remedy {
        Some(remedy) => format!("{}; {remedy}", finding.sentence),
        None => finding.sentence,
    });
    told.collect()
}

/// What can be told of the facts of `net` alone, at every moment.
fn standing(facts: &Facts) -> Vec<Finding> {
    let mut findings = identity::examine(facts);
    findings.extend(machine::listeners(facts));
    findings.extend(bootstrap::examine(facts));
    findings.extend(machine::mdns(facts));
    findings.extend(reach::relays(facts));
    findings
}

/// All about this node and its machine.
fn of_node(facts: &Facts, host: &Host) -> Vec<Finding> {
    let mut findings = standing(facts);
    findings.extend(machine::listening(facts));
    findings.extend(machine::interfaces(facts));
    findings.extend(machine::silence(facts, host));
    findings.extend(machine::idle(facts));
    findings.extend(machine::firewall(facts, host));
    findings.extend(machine::connections(facts));
    findings.extend(reach::nat(facts));
    findings.extend(reach::dht(facts));
    findings.extend(clusters::none(facts));
    findings.extend(machine::clock(host));
    findings
}
