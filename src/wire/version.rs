//! Protocol names and versions.

pub use crate::domain::version::{
    INFERENCE_PROTOCOL, KAD_PROTOCOL, MEMBER_PROTOCOL, MEMBER_VERSION_THREE, MEMBER_VERSION_TWO, PEER_PROTOCOLS,
};

/// Signs of life, as every libp2p program gives them.
pub const PING_PROTOCOL: &str = "/ipfs/ping/1.0.0";

/// Oldest version of the membership stream that this software speaks.
pub const MEMBER_VERSION_MIN: u16 = 1;
/// Newest version of the membership stream that this software speaks.
pub const MEMBER_VERSION_MAX: u16 = 3;
/// Version in the `inference_request`.
pub const INFERENCE_VERSION: u16 = 1;

/// A range of versions of the membership stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl Versions {
    /// What this software speaks.
    pub const OURS: Self = Self { min: MEMBER_VERSION_MIN, max: MEMBER_VERSION_MAX };

    /// One version alone: what an older node speaks.
    pub const fn only(version: u16) -> Self {
        Self { min: version, max: version }
    }

    pub(super) const fn has(self, version: u16) -> bool {
        self.min <= version && version <= self.max
    }

    /// The newest that both speak.
    pub(super) fn common(self, other: Self) -> Option<u16> {
        let common = self.max.min(other.max);
        (self.has(common) && other.has(common)).then_some(common)
    }
}

impl Default for Versions {
    fn default() -> Self {
        Self::OURS
    }
}
