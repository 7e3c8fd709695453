//! Keys of the `a{sv}` dictionaries, written once for the daemon and its clients.
//!
//! `dbus/*.xml` says what each means and has its type. A client ignores detail keys that it does
//! not know; the daemon refuses option keys that it does not know (`InvalidArgs`).

/// Options of `Prompt` and `StartPrompt`.
pub mod prompt_option {
    /// `s`: model wished for.
    pub const MODEL: &str = "Model";
    /// `s`: only nodes that qualify for this tier.
    pub const TIER: &str = "Tier";
    /// `u`: most tokens of the answer.
    pub const MAX_TOKENS: &str = "MaxTokens";
    /// `d`: sampling temperature, 0 to 2.
    pub const TEMPERATURE: &str = "Temperature";
    /// `t`: seed of the sampler.
    pub const SEED: &str = "Seed";
    /// `d`: nucleus sampling, above 0 to 1.
    pub const TOP_P: &str = "TopP";
    /// `as`: texts that end the answer.
    pub const STOP: &str = "Stop";
    /// `s`: instructions before the prompt.
    pub const SYSTEM: &str = "System";
    /// `a(ss)`: earlier messages, role and text.
    pub const MESSAGES: &str = "Messages";
    /// `b`: no chat template.
    pub const RAW: &str = "Raw";
    /// `t`: microseconds to the last token.
    pub const TIMEOUT: &str = "Timeout";
    /// `s`: insist on this peer id.
    pub const PEER: &str = "Peer";
    /// `s`: insist on this node, by name or peer id.
    pub const NODE: &str = "Node";
    /// `b`: answer on this machine when it can.
    pub const LOCAL_FIRST: &str = "LocalFirst";
    /// `b`: never answer on this machine.
    pub const NO_LOCAL: &str = "NoLocal";
    /// `h`: read the prompt from here (`StartPrompt` alone).
    pub const PROMPT_FD: &str = "PromptFd";

    /// What `Prompt` accepts.
    pub const PROMPT: &[&str] = &[
        MODEL,
        TIER,
        MAX_TOKENS,
        TEMPERATURE,
        SEED,
        TOP_P,
        STOP,
        SYSTEM,
        MESSAGES,
        RAW,
        TIMEOUT,
        PEER,
        NODE,
        LOCAL_FIRST,
        NO_LOCAL,
    ];
    /// What `StartPrompt` accepts.
    pub const START_PROMPT: &[&str] = &[
        MODEL,
        TIER,
        MAX_TOKENS,
        TEMPERATURE,
        SEED,
        TOP_P,
        STOP,
        SYSTEM,
        MESSAGES,
        RAW,
        TIMEOUT,
        PEER,
        NODE,
        LOCAL_FIRST,
        NO_LOCAL,
        PROMPT_FD,
    ];
}

/// Options of `Connect`.
pub mod connect_option {
    /// `as`: multiaddrs to try.
    pub const BOOTSTRAP: &str = "Bootstrap";
    /// `h`: holds the cluster's pre-shared key.
    pub const SECRET: &str = "Secret";
    /// `b`: also after a restart.
    pub const AUTO_CONNECT: &str = "AutoConnect";
    /// `b`: lend this machine's resources.
    pub const SERVE: &str = "Serve";
    /// `t`: microseconds.
    pub const TIMEOUT: &str = "Timeout";
    /// What `Connect` accepts.
    pub const ALL: &[&str] = &[BOOTSTRAP, SECRET, AUTO_CONNECT, SERVE, TIMEOUT];
}

/// Options of `Disconnect`.
pub mod disconnect_option {
    /// `b`: drop it from the saved clusters too.
    pub const FORGET: &str = "Forget";
    /// `t`: microseconds to let work in progress end.
    pub const DRAIN: &str = "Drain";
    /// What `Disconnect` accepts.
    pub const ALL: &[&str] = &[FORGET, DRAIN];
}

/// Options of `ListPeers`.
pub mod peers_option {
    /// `u`: most entries; default and most [`MAX_LIMIT`].
    pub const LIMIT: &str = "Limit";
    /// `s`: peer id to page on from.
    pub const AFTER: &str = "After";
    /// What `ListPeers` accepts.
    pub const ALL: &[&str] = &[LIMIT, AFTER];
    /// Most entries of one reply.
    pub const MAX_LIMIT: u32 = 512;
}

/// Options of `GetResources` and `ListEligible`.
pub mod resources_option {
    /// `b`: measure now.
    pub const FRESH: &str = "Fresh";
    /// `s`: this tier only (`ListEligible` alone).
    pub const TIER: &str = "Tier";
}

/// Options of `Models.ListModels` and `Models.Add`.
pub mod models_option {
    /// `s`: this one only.
    pub const MODEL: &str = "Model";
    /// `s`: SHA-256 that the file must have, hexadecimal.
    pub const DIGEST: &str = "Digest";
}

/// Options of `SetSharing`.
pub mod sharing_option {
    /// `d`: cores.
    pub const CORES: &str = "Cores";
    /// `t`: bytes.
    pub const MEMORY: &str = "Memory";
    /// `t`: bytes.
    pub const STORAGE: &str = "Storage";
    /// `t`: bytes.
    pub const VRAM: &str = "Vram";
    /// `b`: only until the next start.
    pub const RUNTIME: &str = "Runtime";
    /// What `SetSharing` accepts.
    pub const ALL: &[&str] = &[CORES, MEMORY, STORAGE, VRAM, RUNTIME];
}

/// Options of `Network.Diagnose` and `Network.Ping`.
pub mod network_option {
    /// `s`: only what is about this peer, by name or peer id.
    pub const PEER: &str = "Peer";
    /// `s`: only what is about this cluster.
    pub const CLUSTER: &str = "Cluster";
    /// `u`: how many pings; 1 to [`MAX_COUNT`].
    pub const COUNT: &str = "Count";
    /// What `Diagnose` accepts.
    pub const DIAGNOSE: &[&str] = &[PEER, CLUSTER];
    /// What `Ping` accepts.
    pub const PING: &[&str] = &[COUNT];
    /// Most pings of one call.
    pub const MAX_COUNT: u32 = 100;
}

/// Options of `GetKey`, of the interface for HTTP.
pub mod key_option {
    /// `b`: make another key.
    pub const RENEW: &str = "Renew";
    /// What `GetKey` accepts.
    pub const ALL: &[&str] = &[RENEW];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_key_is_in_the_interface_file() {
        let manager = include_str!("../../dbus/org.opengateway.Gateway1.Manager.xml");
        let all =
            [prompt_option::START_PROMPT, connect_option::ALL, disconnect_option::ALL, peers_option::ALL, sharing_option::ALL];
        let models = include_str!("../../dbus/org.opengateway.Gateway1.Models.xml");
        for key in [models_option::MODEL, models_option::DIGEST] {
            assert!(models.contains(&format!("{key} (s")), "{key} is not documented");
        }
        for key in all.into_iter().flatten().chain(&[resources_option::FRESH, resources_option::TIER]) {
            assert!(manager.contains(&format!("{key} (")), "{key} is not documented");
        }
        let network = include_str!("../../dbus/org.opengateway.Gateway1.Network.xml");
        for key in network_option::DIAGNOSE.iter().chain(network_option::PING) {
            assert!(network.contains(&format!("{key} (")), "{key} is not documented");
        }
        let http = include_str!("../../dbus/org.opengateway.Gateway1.Http.xml");
        assert!(key_option::ALL.iter().all(|key| http.contains(&format!("{key} ("))));
    }
}
