//! Protocol names and versions.

pub use crate::domain::version::{INFERENCE_PROTOCOL, KAD_PROTOCOL, MEMBER_PROTOCOL, PEER_PROTOCOLS};

/// Oldest version of the membership stream that this software speaks.
pub const MEMBER_VERSION_MIN: u16 = 1;
/// Newest version of the membership stream that this software speaks.
pub const MEMBER_VERSION_MAX: u16 = 1;
/// Version in the `inference_request`.
pub const INFERENCE_VERSION: u16 = 1;
