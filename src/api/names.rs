//! Names on the bus, and the vocabulary of errors with what each means for a command line.
//!
//! The daemon sends these names, clients match on them: by name alone, never by message text.
//! The tables have no default arm, so a new name cannot be forgotten in one of them.

use std::fmt;
use std::str::FromStr;

/// The well-known name of the daemon, on the system bus or (per-user mode) the session bus.
pub const BUS_NAME: &str = "org.opengateway.Gateway1";
/// The object that carries [`MANAGER_INTERFACE`] and the object manager.
pub const ROOT_PATH: &str = "/org/opengateway/Gateway1";
/// The node: its state, clusters, resources, and prompts.
pub const MANAGER_INTERFACE: &str = "org.opengateway.Gateway1.Manager";
/// The OpenAI endpoint, on the same object.
pub const HTTP_INTERFACE: &str = "org.opengateway.Gateway1.Http";
/// One cluster; objects below [`CLUSTER_PATH_PREFIX`](crate::api::path::CLUSTER_PATH_PREFIX).
pub const CLUSTER_INTERFACE: &str = "org.opengateway.Gateway1.Cluster";
/// One prompt in progress; objects below [`JOB_PATH_PREFIX`](crate::api::path::JOB_PATH_PREFIX).
pub const JOB_INTERFACE: &str = "org.opengateway.Gateway1.Job";
/// The models; on the root object.
pub const MODELS_INTERFACE: &str = "org.opengateway.Gateway1.Models";
/// Findings, facts of the network, pings; on the root object.
pub const NETWORK_INTERFACE: &str = "org.opengateway.Gateway1.Network";
/// Prefix of the error names that are this service's own.
pub const ERROR_PREFIX: &str = "org.opengateway.Gateway1.Error.";
/// The cluster meant by an empty cluster id when not exactly one cluster is joined.
pub const DEFAULT_CLUSTER: &str = "gatewayai-poc";
/// Longest prompt that goes as a D-Bus string, in bytes.
pub const MAX_PROMPT_BYTES: usize = 1 << 20;

/// Exit codes of `ogctl`. The numbers are API.
pub mod exit {
    /// Success.
    pub const OK: u8 = 0;
    /// Failed, for a reason that has no code of its own.
    pub const FAILED: u8 = 1;
    /// The command line, or an argument that the daemon refused.
    pub const USAGE: u8 = 2;
    /// A deadline passed.
    pub const TIMEOUT: u8 = 3;
    /// Refused by authorisation.
    pub const REFUSED: u8 = 4;
    /// No node can serve the prompt now.
    pub const NO_NODE: u8 = 5;
    /// Joining or leaving a cluster failed.
    pub const MEMBERSHIP: u8 = 6;
    /// The daemon is not running or not reachable.
    pub const NO_DAEMON: u8 = 8;
    /// No such cluster, peer, tier or job.
    pub const NOT_FOUND: u8 = 10;
    /// Interrupted by the user (SIGINT).
    pub const INTERRUPTED: u8 = 130;
    /// Ended by SIGHUP: 128 and its number, as shells have it.
    pub const HUNG_UP: u8 = 129;
    /// Ended by SIGTERM.
    pub const TERMINATED: u8 = 143;
}

/// Where an error name comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Sent by this service alone, with [`ERROR_PREFIX`].
    Service,
    /// A standard name that this service also sends.
    Standard,
    /// Sent by the bus or a D-Bus library, never by this service's own code.
    Bus,
}

macro_rules! error_names {
    ($($(#[doc = $doc:literal])+ $variant:ident = $origin:ident $name:literal;)+) => {
        /// An error name that a caller of the service can meet. Add freely, never rename.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ErrorName { $($(#[doc = $doc])+ $variant,)+ }

        impl ErrorName {
            /// Every name, in the order of the declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The full D-Bus error name.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => error_names!(@full $origin $name),)+ }
            }

            /// The last part of the name, as scripts see it in `ogctl --json`.
            pub const fn short(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// Who sends it.
            pub const fn origin(self) -> Origin {
                match self { $(Self::$variant => Origin::$origin,)+ }
            }
        }
    };
    (@full Service $name:literal) => { concat!("org.opengateway.Gateway1.Error.", $name) };
    (@full $other:ident $name:literal) => { concat!("org.freedesktop.DBus.Error.", $name) };
}

error_names! {
    /// Not a cluster id.
    InvalidClusterId = Service "InvalidClusterId";
    /// No cluster with this id is known.
    NoSuchCluster = Service "NoSuchCluster";
    /// The cluster is known; this node is not in it.
    NotConnected = Service "NotConnected";
    /// The configured limit is reached.
    TooManyClusters = Service "TooManyClusters";
    /// The cluster speaks a protocol version that this node does not.
    Incompatible = Service "Incompatible";
    /// Serving was asked for and this machine does not meet the tier.
    NotEligible = Service "NotEligible";
    /// No member can serve this.
    NoEligiblePeer = Service "NoEligiblePeer";
    /// No member has the model.
    ModelUnavailable = Service "ModelUnavailable";
    /// Every queue is full.
    Busy = Service "Busy";
    /// The serving node's share for this asker is used up for now.
    QuotaExceeded = Service "QuotaExceeded";
    /// No whole answer before the deadline.
    DeadlineExceeded = Service "DeadlineExceeded";
    /// The serving node sent nothing for 10 s.
    Stalled = Service "Stalled";
    /// The caller did not read its stream for 30 s.
    SlowConsumer = Service "SlowConsumer";
    /// The answer passed the limit on its size.
    AnswerTooLarge = Service "AnswerTooLarge";
    /// A relay ended the connection at its own limit.
    RelayLimit = Service "RelayLimit";
    /// The inference engine of the serving node died.
    EngineCrashed = Service "EngineCrashed";
    /// The inference backend answered with an error.
    BackendFailed = Service "BackendFailed";
    /// Every serving node that was tried was lost before its first token.
    PeerLost = Service "PeerLost";
    /// The serving node was lost after the first token.
    Interrupted = Service "Interrupted";
    /// Cancelled by the caller, or by somebody who may.
    Cancelled = Service "Cancelled";
    /// Polkit, or the serving node, said no.
    NotAuthorized = Service "NotAuthorized";
    /// The serving node broke the protocol between peers.
    ProtocolError = Service "ProtocolError";
    /// The serving node has seen this request's id before.
    Duplicate = Service "Duplicate";
    /// The state directory is full.
    StorageFull = Service "StorageFull";
    /// The configuration has a mistake.
    InvalidConfiguration = Service "InvalidConfiguration";
    /// The daemon is stopping.
    ShuttingDown = Service "ShuttingDown";
    /// The prompt does not fit the model's context window.
    ContextOverflow = Service "ContextOverflow";
    /// The model is being loaded.
    ModelLoading = Service "ModelLoading";
    /// The prompt ended the engine twice and is not tried again.
    PromptQuarantined = Service "PromptQuarantined";
    /// No model of this name is on this machine.
    NoSuchModel = Service "NoSuchModel";
    /// A model of this name, or with this content, is there already.
    ModelExists = Service "ModelExists";
    /// The file is no model that the engine can load.
    InvalidModel = Service "InvalidModel";
    /// This cannot be done with the model now.
    ModelRefused = Service "ModelRefused";
    /// There is no engine, or it is switched off.
    NoEngine = Service "NoEngine";
    /// No peer of this id or name is known.
    NoSuchPeer = Service "NoSuchPeer";
    /// The peer is known, and there is no connection to it.
    PeerUnreachable = Service "PeerUnreachable";
    /// The peer is connected and did not answer.
    NoAnswer = Service "NoAnswer";
    /// An argument or option that the service does not accept.
    InvalidArgs = Standard "InvalidArgs";
    /// Polkit would allow it after a password.
    InteractiveAuthorizationRequired = Standard "InteractiveAuthorizationRequired";
    /// A mistake in the daemon itself.
    Failed = Standard "Failed";
    /// The policy of the bus refused the message.
    AccessDenied = Bus "AccessDenied";
    /// The daemon does not run and the caller asked not to start it.
    NameHasNoOwner = Bus "NameHasNoOwner";
    /// The daemon does not run and the bus knows no way to start it, or starting failed.
    ServiceUnknown = Bus "ServiceUnknown";
    /// The bus started the daemon and it did not come up.
    TimedOut = Bus "TimedOut";
    /// The daemon, or the bus, did not reply in time or went away.
    NoReply = Bus "NoReply";
    /// The connection to the bus is lost.
    Disconnected = Bus "Disconnected";
    /// No such object: a job or cluster that is gone.
    UnknownObject = Bus "UnknownObject";
    /// An older daemon without this method.
    UnknownMethod = Bus "UnknownMethod";
}

impl ErrorName {
    /// What to do next, as one sentence for people.
    pub const fn hint(self) -> &'static str {
        match self {
            Self::InvalidClusterId => "the default cluster is gatewayai-poc; see those that are known with: ogctl clusters",
            Self::NoSuchCluster => "see the known clusters with: ogctl clusters",
            Self::NotConnected => "join it first with: ogctl connect CLUSTER",
            Self::TooManyClusters => "leave one with: ogctl disconnect CLUSTER",
            Self::Incompatible => "compare versions with: ogctl version, and upgrade the older side",
            Self::NotEligible => {
                "see what is missing with: ogctl eligible, or join without serving: ogctl connect --consume CLUSTER"
            }
            Self::NoEligiblePeer => "see who is there with: ogctl peers",
            Self::ModelUnavailable => "see what is served with: ogctl models",
            Self::Busy => "try again in a moment; see the queues with: ogctl peers",
            Self::QuotaExceeded => "try again later, or ask another node with: ogctl prompt --node NAME",
            Self::DeadlineExceeded => "allow more time with --timeout, or ask for less with --max-tokens",
            Self::Stalled => "try again; ask another node with: ogctl prompt --node NAME",
            Self::SlowConsumer => "read the answer as it comes, or use --no-stream",
            Self::AnswerTooLarge => "ask for less with --max-tokens",
            Self::RelayLimit => "make a direct connection possible (open UDP port 4001), or ask for less with --max-tokens",
            Self::EngineCrashed => "try again; on the serving node see: journalctl -u opengatewayd",
            Self::BackendFailed => "on the serving node see: journalctl -u opengatewayd",
            Self::PeerLost => "try again; see who is still there with: ogctl peers",
            Self::Interrupted => "the text above is the beginning of the answer; ask again for all of it",
            Self::Cancelled => "ask again if that was not meant",
            Self::NotAuthorized => {
                "run it with sudo, or let an administrator add you with: sudo usermod -aG opengateway-users USER, and log in anew"
            }
            Self::ProtocolError => "compare versions with: ogctl peers, and upgrade the older side",
            Self::Duplicate => "ask again",
            Self::StorageFull => "free some space on the file system of /var/lib/opengateway",
            Self::InvalidConfiguration => "find the mistake with: ogctl config check",
            Self::ShuttingDown => "start it again with: systemctl start opengatewayd",
            Self::ContextOverflow => "shorten the prompt, or ask a model with a larger context window: ogctl models",
            Self::ModelLoading => "ask again in a moment; see how far it is with: ogctl models",
            Self::PromptQuarantined => "change the prompt; on the serving node see: journalctl -u opengatewayd",
            Self::NoSuchModel => "see the models of this machine with: ogctl models --local",
            Self::ModelExists => "remove the old one first with: ogctl models rm NAME",
            Self::InvalidModel => "the engine takes GGUF files; fetch the file again, or convert it",
            Self::ModelRefused => "see where it lies and what it does with: ogctl models --local",
            Self::NoEngine => "install the engine (opengateway-engine), or switch it on: enabled = true in [engine]",
            Self::NoSuchPeer => "see who is known with: ogctl peers, and who was heard of with: ogctl doctor",
            Self::PeerUnreachable => "see what each of its addresses answered with: ogctl doctor PEER",
            Self::NoAnswer => "see how it is connected with: ogctl doctor PEER",
            Self::InvalidArgs => "see what is accepted with: ogctl help",
            Self::InteractiveAuthorizationRequired => {
                "run it on a terminal to be asked for a password, or with sudo, or let an administrator add you with: sudo usermod -aG opengateway-users USER, and log in anew"
            }
            Self::Failed => "please report it with what the daemon logged: journalctl -u opengatewayd",
            Self::AccessDenied => "the policy of the bus forbids it: is the package installed whole?",
            Self::NameHasNoOwner => {
                "is it installed? Try: systemctl start opengatewayd, or on a bus of your own: opengatewayd --bus ADDRESS"
            }
            Self::ServiceUnknown => "is it installed and enabled? Try: systemctl start opengatewayd",
            Self::TimedOut => "see why with: journalctl -u opengatewayd",
            Self::NoReply => "see whether it hangs with: systemctl status opengatewayd",
            Self::Disconnected => "see whether the bus is up with: systemctl status dbus",
            Self::UnknownObject => "it may have ended already; list what is there with: ogctl jobs",
            Self::UnknownMethod => "the daemon is another version than ogctl; compare with: ogctl version",
        }
    }

    /// The exit code of `ogctl` for this error.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Interrupted
            | Self::Stalled
            | Self::SlowConsumer
            | Self::AnswerTooLarge
            | Self::RelayLimit
            | Self::EngineCrashed
            | Self::BackendFailed
            | Self::PeerLost
            | Self::Cancelled
            | Self::ProtocolError
            | Self::Duplicate
            | Self::StorageFull
            | Self::InvalidConfiguration
            | Self::ShuttingDown
            | Self::PromptQuarantined
            | Self::ModelExists
            | Self::InvalidModel
            | Self::ModelRefused
            | Self::NoEngine
            | Self::PeerUnreachable
            | Self::NoAnswer
            | Self::Failed
            | Self::Disconnected
            | Self::UnknownMethod => exit::FAILED,
            Self::InvalidArgs | Self::InvalidClusterId | Self::ContextOverflow => exit::USAGE,
            Self::DeadlineExceeded | Self::NoReply => exit::TIMEOUT,
            Self::NotAuthorized | Self::AccessDenied | Self::InteractiveAuthorizationRequired => exit::REFUSED,
            Self::NoEligiblePeer | Self::ModelUnavailable | Self::ModelLoading | Self::Busy | Self::QuotaExceeded => {
                exit::NO_NODE
            }
            Self::NotEligible | Self::Incompatible | Self::TooManyClusters => exit::MEMBERSHIP,
            Self::NameHasNoOwner | Self::ServiceUnknown | Self::TimedOut => exit::NO_DAEMON,
            Self::NoSuchCluster | Self::NoSuchModel | Self::NoSuchPeer | Self::NotConnected | Self::UnknownObject => {
                exit::NOT_FOUND
            }
        }
    }
}

impl fmt::Display for ErrorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A D-Bus error name that is not in the table, such as one of a newer daemon.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown error name {0}")]
pub struct UnknownErrorName(pub String);

impl FromStr for ErrorName {
    type Err = UnknownErrorName;

    /// Reads the full name, as in a D-Bus error reply or the `error` line of a stream.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.iter().copied().find(|known| known.as_str() == name).ok_or_else(|| UnknownErrorName(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const MANAGER: &str = include_str!("../../dbus/org.opengateway.Gateway1.Manager.xml");

    /// The names of the table at the top of the Manager's file: lines of four blanks, a name, text.
    fn documented() -> BTreeSet<String> {
        let table = MANAGER.split("Error names, all with the prefix").nth(1).unwrap();
        let table = table.split("NotAuthorized is a name of our own").next().unwrap();
        let name = |line: &str| line.strip_prefix("    ")?.split_once("  ").map(|(name, _)| name.to_owned());
        table.lines().filter_map(name).filter(|name| name.starts_with(|c: char| c.is_ascii_uppercase())).collect()
    }

    #[test]
    fn every_documented_error_has_a_hint_and_an_exit_code_and_the_other_way_round() {
        let own = |name: &&ErrorName| name.origin() == Origin::Service;
        let known: BTreeSet<String> = ErrorName::ALL.iter().filter(own).map(|name| name.short().to_owned()).collect();
        assert_eq!(documented(), known);
        assert!(known.len() > 20);
        for name in ErrorName::ALL {
            assert!(!name.hint().is_empty() && !name.hint().ends_with('.'), "{name}");
            assert!([1, 2, 3, 4, 5, 6, 8, 10].contains(&name.exit_code()), "{name}");
        }
    }

    #[test]
    fn every_error_that_a_method_lists_is_in_the_table() {
        let models = include_str!("../../dbus/org.opengateway.Gateway1.Models.xml");
        let network = include_str!("../../dbus/org.opengateway.Gateway1.Network.xml");
        let files = [MANAGER, models, network].into_iter();
        let listed = files.flat_map(|file| {
            let in_stream = file.split("in the stream:").skip(1);
            file.split("Errors:").skip(1).chain(file.split("polkit and errors:").skip(1)).chain(in_stream)
        });
        for list in listed {
            let list = list.split("-->").next().unwrap().split(". ").next().unwrap();
            for word in list.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| word.len() > 3) {
                let upper = word.starts_with(|c: char| c.is_ascii_uppercase());
                if upper && word.chars().any(|c| c.is_ascii_lowercase()) && !["Prompt"].contains(&word) {
                    assert!(ErrorName::ALL.iter().any(|name| name.short() == word), "{word} is not in the table");
                }
            }
        }
    }

    #[test]
    fn names_read_back_and_strange_ones_do_not() {
        for &name in ErrorName::ALL {
            assert_eq!(name.as_str().parse(), Ok(name));
            assert!(name.as_str().ends_with(name.short()));
        }
        assert!("org.opengateway.Gateway1.Error.Nonsense".parse::<ErrorName>().is_err());
        assert!("Busy".parse::<ErrorName>().is_err(), "a short name is no D-Bus error name");
        assert_eq!(ErrorName::Busy.as_str(), format!("{ERROR_PREFIX}Busy"));
    }
}
