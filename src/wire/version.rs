//! Protocol names and versions.

/// The DHT of this project: nodes of other programs never enter it.
pub const KAD_PROTOCOL: &str = "/opengateway/kad/1";
/// One stream per pair of peers and cluster: hello, then control frames.
pub const MEMBER_PROTOCOL: &str = "/opengateway/member/1";
/// Prompts: one at a time on a stream, any number one after the other.
pub const INFERENCE_PROTOCOL: &str = "/opengateway/inference/1";
/// All of them.
pub const ALL: [&str; 3] = [KAD_PROTOCOL, MEMBER_PROTOCOL, INFERENCE_PROTOCOL];

/// Oldest version of the membership stream that this software speaks.
pub const MEMBER_VERSION_MIN: u16 = 1;
/// Newest version of the membership stream that this software speaks.
pub const MEMBER_VERSION_MAX: u16 = 1;
/// Version in the `inference_request`.
pub const INFERENCE_VERSION: u16 = 1;
