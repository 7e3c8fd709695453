//! The node's key: ed25519, in libp2p's protobuf encoding. The bytes are kept by `state`.

use libp2p::identity::{KeyType, Keypair};

/// A node's key pair. Its `Debug` shows the public half.
#[derive(Debug, Clone)]
pub struct Identity(pub(super) Keypair);

/// Why bytes are no identity of this program.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Not the protobuf encoding of a private key.
    #[error("the bytes are not a private key: {0}")]
    Undecodable(String),
    /// A key of another kind.
    #[error("the key is {0:?}, not ed25519")]
    WrongKind(KeyType),
}

impl Identity {
    /// A new one, from the system's random numbers.
    pub fn generate() -> Self {
        Self(Keypair::generate_ed25519())
    }

    /// Reads the protobuf encoding.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, IdentityError> {
        let keypair = Keypair::from_protobuf_encoding(bytes).map_err(|error| IdentityError::Undecodable(error.to_string()))?;
        match keypair.key_type() {
            KeyType::Ed25519 => Ok(Self(keypair)),
            other => Err(IdentityError::WrongKind(other)),
        }
    }

    /// The protobuf encoding, to be kept secret.
    ///
    /// # Errors
    /// Never for a key that this module made.
    pub fn encode(&self) -> Result<Vec<u8>, IdentityError> {
        self.0.to_protobuf_encoding().map_err(|error| IdentityError::Undecodable(error.to_string()))
    }

    /// The peer id in its text form.
    pub fn peer_id(&self) -> String {
        self.0.public().to_peer_id().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_reads_back_and_nonsense_does_not() {
        let identity = Identity::generate();
        let bytes = identity.encode().unwrap();
        assert_eq!(Identity::decode(&bytes).unwrap().peer_id(), identity.peer_id());
        assert!(Identity::decode(&bytes[1..]).is_err());
        assert!(Identity::decode(&[]).is_err());
    }
}
