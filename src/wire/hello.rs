//! The hello of `/opengateway/member/1`: both sides prove that they know the cluster's root, and neither tells a
//! stranger which clusters it is in. A state machine without I/O; nonces are given from outside.
//!
//! ```text
//! H1  I → R  0x01, ver_min u16, ver_max u16, nonceI[32], tagI[32]      69 bytes
//! H2  R → I  0x02, version u16, nonceR[32], proof_len u16, proofR, tagR[32]
//! H3  I → R  0x03, proof_len u16, proofI, tagC[32]
//! ```
//!
//! The tags bind both peer ids, the roles, both nonces and the offered versions: nothing can be reflected, replayed at
//! another node, or downgraded.

use hmac::Mac as _;

use super::keys::Root;
use super::limits::H1_BYTES;
use super::version::{MEMBER_VERSION_MAX, MEMBER_VERSION_MIN, Versions};

const TAG_BYTES: usize = 32;
const NONCE_BYTES: usize = 32;
/// 0x02, version, nonce, proof length, tag.
const H2_BYTES: usize = 1 + 2 + NONCE_BYTES + 2 + TAG_BYTES;
/// 0x03, proof length, tag.
const H3_BYTES: usize = 1 + 2 + TAG_BYTES;

/// A nonce: 32 bytes from the operating system. From version 3 on the first 8 of them are the same in every hello of one run
/// of a node: two machines with one identity are told apart by them. What is left is new each time.
pub type Nonce = [u8; NONCE_BYTES];

/// Bytes of a nonce that name the run of the node.
pub const RUN_BYTES: usize = 8;

/// The run of the opener, by its H1, or of the accepter, by its H2. Both nonces begin in different places.
pub fn run_of(message: &[u8]) -> Option<u64> {
    let at = match message.first()? {
        0x01 => 5,
        0x02 => 3,
        _ => return None,
    };
    message.get(at..at + RUN_BYTES)?.try_into().ok().map(u64::from_be_bytes)
}

/// Why a hello failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// No joined cluster fits: the other side is a stranger and gets no byte.
    #[error("the hello fits none of the joined clusters")]
    NoMatch,
    /// A message has the wrong length, kind or order of fields.
    #[error("malformed {message}: {reason}")]
    Malformed {
        /// "H1", "H2" or "H3".
        message: &'static str,
        /// What is wrong.
        reason: &'static str,
    },
    /// A tag does not verify: the other side does not know the root, or something was altered on the way.
    #[error("the tag of {0} does not verify")]
    BadTag(&'static str),
    /// No common version.
    #[error("no common protocol version: we speak {MEMBER_VERSION_MIN} to {MEMBER_VERSION_MAX}, the other side {min} to {max}")]
    VersionMismatch {
        /// Oldest of the other side; 0 when it did not say.
        min: u16,
        /// Newest of the other side; 0 when it did not say.
        max: u16,
    },
}

fn tag(root: &Root, role: &[u8], opener: &[u8], accepter: &[u8], transcript: &[&[u8]]) -> hmac::Hmac<sha2::Sha256> {
    let mut parts: Vec<&[u8]> = vec![b"hello", role, opener, accepter];
    parts.extend_from_slice(transcript);
    root.mac(&parts)
}

fn seal(root: &Root, role: &[u8], opener: &[u8], accepter: &[u8], transcript: &[&[u8]], message: &mut Vec<u8>) {
    let mut whole: Vec<&[u8]> = transcript.to_vec();
    whole.push(message);
    let tag = tag(root, role, opener, accepter, &whole).finalize().into_bytes();
    message.extend_from_slice(&tag);
}

fn verify(root: &Root, role: &[u8], opener: &[u8], accepter: &[u8], transcript: &[&[u8]], message: &[u8]) -> bool {
    let Some((body, sent)) = message.split_last_chunk::<TAG_BYTES>() else { return false };
    let mut whole: Vec<&[u8]> = transcript.to_vec();
    whole.push(body);
    tag(root, role, opener, accepter, &whole).verify_slice(sent).is_ok()
}

fn malformed<T>(message: &'static str, reason: &'static str) -> Result<T, HelloError> {
    Err(HelloError::Malformed { message, reason })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The opener, after H1.
#[derive(Debug)]
pub struct Initiator {
    root: Root,
    opener: Vec<u8>,
    accepter: Vec<u8>,
    h1: Vec<u8>,
    versions: Versions,
}

impl Initiator {
    /// Begins a hello from `opener` to `accepter` (binary peer ids, as the connection proved them). Gives H1.
    pub fn new(versions: Versions, root: &Root, opener: &[u8], accepter: &[u8], nonce: Nonce) -> (Self, Vec<u8>) {
        let mut h1 = Vec::with_capacity(H1_BYTES);
        h1.push(0x01);
        h1.extend_from_slice(&versions.min.to_be_bytes());
        h1.extend_from_slice(&versions.max.to_be_bytes());
        h1.extend_from_slice(&nonce);
        seal(root, b"I", opener, accepter, &[], &mut h1);
        (Self { root: root.clone(), opener: opener.to_vec(), accepter: accepter.to_vec(), h1: h1.clone(), versions }, h1)
    }

    /// Checks H2. Gives the agreed version and H3.
    ///
    /// # Errors
    /// [`HelloError`]; nothing may be sent after it.
    pub fn on_h2(self, h2: &[u8]) -> Result<(u16, Vec<u8>), HelloError> {
        if h2.first() != Some(&0x02) {
            return malformed("H2", "wrong kind");
        }
        if h2.len() < H2_BYTES {
            return malformed("H2", "too short");
        }
        // The tag comes first: what is inside is believed only after it.
        if !verify(&self.root, b"R", &self.opener, &self.accepter, &[&self.h1], h2) {
            return Err(HelloError::BadTag("H2"));
        }
        let version = u16_at(h2, 1);
        if version == 0 {
            return Err(HelloError::VersionMismatch { min: 0, max: 0 });
        }
        if !self.versions.has(version) {
            return Err(HelloError::VersionMismatch { min: version, max: version });
        }
        if u16_at(h2, 3 + NONCE_BYTES) != 0 {
            return malformed("H2", "a proof in version 1");
        }
        if h2.len() != H2_BYTES {
            return malformed("H2", "trailing bytes");
        }
        let mut h3 = vec![0x03, 0, 0];
        seal(&self.root, b"C", &self.opener, &self.accepter, &[&self.h1, h2], &mut h3);
        Ok((version, h3))
    }
}

/// The accepter, after a matching H1.
#[derive(Debug)]
pub struct Responder {
    root: Root,
    opener: Vec<u8>,
    accepter: Vec<u8>,
    h1: Vec<u8>,
    h2: Vec<u8>,
    version: Result<u16, HelloError>,
}

impl Responder {
    /// Compares H1 with every root, without an early exit, and answers in the one that fits. Gives its index.
    ///
    /// # Errors
    /// [`HelloError::NoMatch`] or [`HelloError::Malformed`]: send nothing.
    pub fn on_h1(
        versions: Versions,
        roots: &[&Root],
        opener: &[u8],
        accepter: &[u8],
        h1: &[u8],
        nonce: Nonce,
    ) -> Result<(usize, Self), HelloError> {
        if h1.len() != H1_BYTES {
            return malformed("H1", "wrong length");
        }
        if h1[0] != 0x01 {
            return malformed("H1", "wrong kind");
        }
        let mut matched = None;
        for (index, root) in roots.iter().enumerate() {
            if verify(root, b"I", opener, accepter, &[], h1) {
                matched = Some(index);
            }
        }
        let Some(index) = matched else { return Err(HelloError::NoMatch) };
        let root = roots[index].clone();
        let (min, max) = (u16_at(h1, 1), u16_at(h1, 3));
        let version = versions.common(Versions { min, max }).ok_or(HelloError::VersionMismatch { min, max });
        let mut h2 = Vec::with_capacity(H2_BYTES);
        h2.push(0x02);
        h2.extend_from_slice(&version.as_ref().copied().unwrap_or(0).to_be_bytes());
        h2.extend_from_slice(&nonce);
        h2.extend_from_slice(&[0, 0]);
        seal(&root, b"R", opener, accepter, &[h1], &mut h2);
        Ok((index, Self { root, opener: opener.to_vec(), accepter: accepter.to_vec(), h1: h1.to_vec(), h2, version }))
    }

    /// H2, to be sent also when there is no common version: it says so, authenticated.
    pub fn h2(&self) -> &[u8] {
        &self.h2
    }

    /// The agreed version.
    ///
    /// # Errors
    /// [`HelloError::VersionMismatch`]: close after H2.
    pub fn version(&self) -> Result<u16, HelloError> {
        self.version.clone()
    }

    /// Checks H3: after it the opener is a member.
    ///
    /// # Errors
    /// [`HelloError`].
    pub fn on_h3(self, h3: &[u8]) -> Result<(), HelloError> {
        if h3.first() != Some(&0x03) {
            return malformed("H3", "wrong kind");
        }
        if h3.len() < H3_BYTES {
            return malformed("H3", "too short");
        }
        if !verify(&self.root, b"C", &self.opener, &self.accepter, &[&self.h1, &self.h2], h3) {
            return Err(HelloError::BadTag("H3"));
        }
        if u16_at(h3, 1) != 0 {
            return malformed("H3", "a proof in version 1");
        }
        if h3.len() != H3_BYTES {
            return malformed("H3", "trailing bytes");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::cluster::ClusterId;

    const OURS: Versions = Versions::OURS;
    const A: &[u8] = b"peer-a";
    const B: &[u8] = b"peer-b";

    fn root(name: &str) -> Root {
        Root::public(&ClusterId::new(name).unwrap())
    }

    fn run(flip: Option<(u8, usize)>) -> Result<(), HelloError> {
        let ours = root("home");
        let damage = |message: u8, mut bytes: Vec<u8>| {
            if let Some((which, bit)) = flip
                && which == message
            {
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            bytes
        };
        let (initiator, h1) = Initiator::new(OURS, &ours, A, B, [1; 32]);
        let (_, responder) = Responder::on_h1(OURS, &[&root("other"), &ours], A, B, &damage(1, h1), [2; 32])?;
        responder.version()?;
        let (version, h3) = initiator.on_h2(&damage(2, responder.h2().to_vec()))?;
        assert_eq!(version, 3);
        responder.on_h3(&damage(3, h3))
    }

    #[test]
    fn members_of_the_same_cluster_greet_each_other() {
        assert_eq!(run(None), Ok(()));
    }

    #[test]
    fn every_single_flipped_bit_is_refused() {
        for (message, bytes) in [(1, H1_BYTES), (2, H2_BYTES), (3, H3_BYTES)] {
            for bit in 0..bytes * 8 {
                assert!(run(Some((message, bit))).is_err(), "H{message}, bit {bit}");
            }
        }
    }

    #[test]
    fn a_stranger_gets_no_byte() {
        let (_, h1) = Initiator::new(OURS, &root("away"), A, B, [1; 32]);
        let (ours, other) = (root("home"), root("lab"));
        assert_eq!(Responder::on_h1(OURS, &[&ours, &other], A, B, &h1, [2; 32]).unwrap_err(), HelloError::NoMatch);
        assert_eq!(Responder::on_h1(OURS, &[], A, B, &h1, [2; 32]).unwrap_err(), HelloError::NoMatch);
    }

    #[test]
    fn a_recorded_h1_is_useless_to_another_peer_and_at_another_node() {
        let ours = root("home");
        let (_, h1) = Initiator::new(OURS, &ours, A, B, [1; 32]);
        assert!(Responder::on_h1(OURS, &[&ours], b"peer-c", B, &h1, [2; 32]).is_err());
        assert!(Responder::on_h1(OURS, &[&ours], A, b"peer-c", &h1, [2; 32]).is_err());
    }

    #[test]
    fn a_message_is_not_accepted_back_by_its_sender() {
        let ours = root("home");
        let (initiator, h1) = Initiator::new(OURS, &ours, A, B, [1; 32]);
        assert!(Responder::on_h1(OURS, &[&ours], B, A, &h1, [2; 32]).is_err());
        assert!(initiator.on_h2(&h1).is_err());
    }

    #[test]
    fn a_replay_by_the_same_pair_dies_at_the_last_tag() {
        let ours = root("home");
        let (initiator, h1) = Initiator::new(OURS, &ours, A, B, [1; 32]);
        let (_, first) = Responder::on_h1(OURS, &[&ours], A, B, &h1, [2; 32]).unwrap();
        let (_, h3) = initiator.on_h2(first.h2()).unwrap();
        let (_, again) = Responder::on_h1(OURS, &[&ours], A, B, &h1, [3; 32]).unwrap();
        assert_eq!(again.on_h3(&h3), Err(HelloError::BadTag("H3")));
    }

    #[test]
    fn an_old_peer_is_told_of_the_mismatch_and_cannot_be_fooled_about_it() {
        let ours = root("home");
        let mut h1 = vec![0x01, 0, 9, 0, 12];
        h1.extend_from_slice(&[1; 32]);
        seal(&ours, b"I", A, B, &[], &mut h1);
        let (_, responder) = Responder::on_h1(OURS, &[&ours], A, B, &h1, [2; 32]).unwrap();
        assert_eq!(responder.version(), Err(HelloError::VersionMismatch { min: 9, max: 12 }));
        let initiator = Initiator { root: ours, opener: A.to_vec(), accepter: B.to_vec(), h1, versions: OURS };
        assert_eq!(initiator.on_h2(responder.h2()), Err(HelloError::VersionMismatch { min: 0, max: 0 }));
    }

    #[test]
    fn the_newest_version_that_both_speak_is_taken() {
        let ours = root("home");
        let range = |min, max| Versions { min, max };
        for (opening, accepting, agreed) in [
            (range(1, 2), range(1, 2), Some(2)),
            (range(1, 1), range(1, 2), Some(1)),
            (range(1, 2), range(1, 1), Some(1)),
            (range(2, 3), range(1, 2), Some(2)),
            (range(2, 2), range(1, 1), None),
            (range(3, 1), range(1, 3), None),
        ] {
            let (initiator, h1) = Initiator::new(opening, &ours, A, B, [1; 32]);
            let (_, responder) = Responder::on_h1(accepting, &[&ours], A, B, &h1, [2; 32]).unwrap();
            assert_eq!(responder.version().ok(), agreed, "{opening:?} {accepting:?}");
            let greeted = initiator.on_h2(responder.h2());
            assert_eq!(greeted.as_ref().ok().map(|(version, _)| *version), agreed);
            if let Ok((_, h3)) = greeted {
                assert_eq!(responder.on_h3(&h3), Ok(()));
            }
        }
    }

    #[test]
    fn lengths_must_match_exactly() {
        let ours = root("home");
        let (initiator, h1) = Initiator::new(OURS, &ours, A, B, [1; 32]);
        for length in 0..H1_BYTES {
            assert!(Responder::on_h1(OURS, &[&ours], A, B, &h1[..length], [2; 32]).is_err());
        }
        let longer = [h1.as_slice(), &[0]].concat();
        assert!(Responder::on_h1(OURS, &[&ours], A, B, &longer, [2; 32]).is_err());
        let (_, responder) = Responder::on_h1(OURS, &[&ours], A, B, &h1, [2; 32]).unwrap();
        // A longer H2 with a valid tag: still refused.
        let mut h2 = responder.h2()[..H2_BYTES - TAG_BYTES].to_vec();
        h2.push(0);
        seal(&ours, b"R", A, B, &[&h1], &mut h2);
        assert_eq!(initiator.on_h2(&h2).unwrap_err(), HelloError::Malformed { message: "H2", reason: "trailing bytes" });
    }

    #[test]
    fn a_proof_is_refused_in_version_one() {
        let ours = root("home");
        let (initiator, h1) = Initiator::new(OURS, &ours, A, B, [1; 32]);
        let mut h2 = vec![0x02, 0, 1];
        h2.extend_from_slice(&[2; 32]);
        h2.extend_from_slice(&[0, 1, 0xff]);
        seal(&ours, b"R", A, B, &[&h1], &mut h2);
        assert_eq!(initiator.on_h2(&h2).unwrap_err(), HelloError::Malformed { message: "H2", reason: "a proof in version 1" });
    }
}
