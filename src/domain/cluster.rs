//! Cluster names: what is accepted, how they are shown, how they are compared.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

/// Longest cluster name in bytes (`design.md`: 1 to 64 of `[A-Za-z0-9._-]`).
pub const MAX_CLUSTER_ID_BYTES: usize = 64;

/// The cluster that an unconfigured installation talks about.
pub const DEFAULT_CLUSTER: &str = "gatewayai-poc";

/// A valid cluster name, kept as typed and compared without regard to case.
#[derive(Clone)]
pub struct ClusterId {
    shown: Arc<str>,
    key: Arc<str>,
}

/// Why a text is not a cluster name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterIdError {
    /// Nothing was given.
    #[error("a cluster id must not be empty")]
    Empty,
    /// More than [`MAX_CLUSTER_ID_BYTES`].
    #[error("a cluster id has at most 64 characters, this one has {0}")]
    TooLong(usize),
    /// A character outside `[A-Za-z0-9._-]`, or a first character that is no letter or digit.
    #[error(
        "a cluster id consists of letters, digits, '.', '_' and '-' and starts with a letter or digit; {0:?} is not allowed there"
    )]
    BadCharacter(char),
}

impl ClusterId {
    /// Checks `text`.
    ///
    /// # Errors
    /// [`ClusterIdError`] names the first thing that is wrong.
    pub fn new(text: &str) -> Result<Self, ClusterIdError> {
        if text.is_empty() {
            return Err(ClusterIdError::Empty);
        }
        let allowed = |(at, c): (usize, char)| c.is_ascii_alphanumeric() || (at > 0 && matches!(c, '.' | '_' | '-'));
        if let Some((_, bad)) = text.char_indices().find(|&found| !allowed(found)) {
            return Err(ClusterIdError::BadCharacter(bad));
        }
        if text.len() > MAX_CLUSTER_ID_BYTES {
            return Err(ClusterIdError::TooLong(text.len()));
        }
        Ok(Self { shown: text.into(), key: text.to_ascii_lowercase().into() })
    }

    /// As the user typed it.
    pub fn as_str(&self) -> &str {
        &self.shown
    }

    /// Lower case: the form that is hashed, compared and stored as a map key.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterId({})", self.shown)
    }
}

impl FromStr for ClusterId {
    type Err = ClusterIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::new(text)
    }
}

impl PartialEq for ClusterId {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}
impl Eq for ClusterId {}
impl Hash for ClusterId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key.hash(state);
    }
}
impl PartialOrd for ClusterId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for ClusterId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key.cmp(&other.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixty_four_characters_pass_and_sixty_five_do_not() {
        assert!(ClusterId::new(&"a".repeat(64)).is_ok());
        assert_eq!(ClusterId::new(&"a".repeat(65)), Err(ClusterIdError::TooLong(65)));
    }

    #[test]
    fn names_are_shown_as_typed_and_compared_without_case() {
        let typed = ClusterId::new("GatewayAI-PoC").unwrap();
        assert_eq!(typed.as_str(), "GatewayAI-PoC");
        assert_eq!(typed, ClusterId::new("gatewayai-poc").unwrap());
    }

    #[test]
    fn paths_spaces_and_leading_punctuation_are_refused() {
        for bad in ["", "../x", "-a", ".a", "_a", "a b", "a/b", "a\0", "ä", "a\n"] {
            assert!(ClusterId::new(bad).is_err(), "{bad:?} passed");
        }
    }
}
