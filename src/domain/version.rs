//! Which version this is, and which protocols it speaks. Both binaries tell it.

/// The DHT of this project: nodes of other programs never enter it.
pub const KAD_PROTOCOL: &str = "/opengateway/kad/1";
/// One stream per pair of peers and cluster: hello, then control frames.
pub const MEMBER_PROTOCOL: &str = "/opengateway/member/1";
/// Prompts: one at a time on a stream, any number one after the other.
pub const INFERENCE_PROTOCOL: &str = "/opengateway/inference/1";
/// All that is spoken with peers, besides libp2p's own identify and ping.
pub const PEER_PROTOCOLS: &[&str] = &[KAD_PROTOCOL, MEMBER_PROTOCOL, INFERENCE_PROTOCOL];

/// Version of the package.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit it was built from; `None` in debug builds and where the build knew none.
pub const COMMIT: Option<&str> = option_env!("OPENGATEWAY_COMMIT");
/// Version of the membership stream from which on a member hears of models in detail, and understands conversations, raw
/// text, nucleus sampling and stop texts.
pub const MEMBER_VERSION_TWO: u16 = 2;
/// Version of the membership stream from which on members tell each other of those that they are not connected to, and name
/// the run of the node, so that two machines with one identity are told apart.
pub const MEMBER_VERSION_THREE: u16 = 3;
