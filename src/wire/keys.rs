//! What follows from a cluster's name or secret: its root, its key in the DHT, its reference in requests.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};

use crate::domain::cluster::ClusterId;

const DOMAIN_PUBLIC: &[u8] = b"opengateway/cluster/1\0public\0";
const DOMAIN_SECRET: &[u8] = b"opengateway/cluster/1\0secret\0";

/// Bytes of a cluster's reference in a request.
pub const REFERENCE_BYTES: usize = 16;

/// The key of a cluster, from which all others are derived. Its `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Root([u8; 32]);

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Root(…)")
    }
}

impl Root {
    /// The root of a public cluster: whoever knows the name knows it.
    pub fn public(id: &ClusterId) -> Self {
        let mut hash = Sha256::new();
        hash.update(DOMAIN_PUBLIC);
        hash.update(id.key().as_bytes());
        Self(hash.finalize().into())
    }

    /// The root of a private cluster. The secret is 32 bytes from a generator, never a text that a person chose: a
    /// guessable one would be found offline from a single hello.
    pub fn private(secret: &[u8; 32], epoch: u32) -> Self {
        let mut mac = keyed(secret);
        mac.update(DOMAIN_SECRET);
        mac.update(&epoch.to_be_bytes());
        Self(mac.finalize().into_bytes().into())
    }

    /// A MAC over `parts`, each preceded by its length, ready to be finished or verified.
    pub(super) fn mac(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = keyed(&self.0);
        for part in parts {
            mac.update(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
            mac.update(part);
        }
        mac
    }

    fn derive(&self, parts: &[&[u8]]) -> [u8; 32] {
        self.mac(parts).finalize().into_bytes().into()
    }

    /// Names the cluster in requests; only members ever see it.
    pub fn cluster_ref(&self) -> [u8; REFERENCE_BYTES] {
        let whole = self.derive(&[b"ref"]);
        let mut reference = [0; REFERENCE_BYTES];
        reference.copy_from_slice(&whole[..REFERENCE_BYTES]);
        reference
    }
}

fn keyed(key: &[u8; 32]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

/// The key of the provider records of a cluster. `day` is 0 for a public cluster, else days since the epoch in UTC.
pub fn dht_key(root: &Root, day: u32, shard: u8) -> [u8; 32] {
    root.derive(&[b"dht", &day.to_be_bytes(), &[shard]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    // Computed with Python's hashlib and hmac from the description in docs/protocol.md.
    #[test]
    fn the_keys_are_those_of_the_description() {
        let root = Root::public(&ClusterId::new("GatewayAI-PoC").unwrap());
        assert_eq!(hex(&root.0), "2b197ee3b56ae4a91d282992f9fac32ab1076296f25d9aeb9dcc57c462178a97");
        assert_eq!(hex(&root.cluster_ref()), "5f62a92907f8ccdb40e60ef00a370b4f");
        assert_eq!(hex(&dht_key(&root, 0, 0)), "18122e78b7958b88fc871237ac59848e08cb322c1877f43ae6c586ddec7b5190");
        let private = Root::private(&[7; 32], 3);
        assert_eq!(hex(&private.0), "debe8843741a224dd85b7616b211c2b2b7e60cd5a42d6c5a6448aae08e67d671");
    }

    #[test]
    fn a_root_does_not_show_itself() {
        assert_eq!(format!("{:?}", Root::private(&[1; 32], 0)), "Root(…)");
    }
}
