//! The node's key on disk: made once, never replaced. `identity.key` holds it, `identity.pub` names the peer id it gave.
//!
//! What the bytes mean is not known here: the caller brings the functions that make and read them.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::atomic::{self, StorageError};

const KEY: &str = "identity.key";
const MARKER: &str = "identity.pub";
/// An ed25519 key in libp2p's encoding is 68 bytes.
const MAX_KEY_BYTES: u64 = 4096;

/// Why there is no identity. The files are as they were.
#[derive(Debug, thiserror::Error)]
pub enum IdentityFileError {
    /// The marker says that there was a key, and there is none.
    #[error(
        "{0} is gone, but identity.pub beside it says that this node had a key: put it back from a backup, or remove identity.pub to become a new node"
    )]
    Missing(PathBuf),
    /// It cannot be read.
    #[error("{path} cannot be read: {source}; see its owner and mode")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others than its owner can read it.
    #[error("{path} has mode {mode:o}: others can read this node's key; after making sure that nobody did: chmod 600 {path}")]
    Open {
        /// Which file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It is damaged.
    #[error("{path} is damaged ({reason}): put it back from a backup, or move it and identity.pub away to become a new node")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Key and marker belong to different nodes.
    #[error(
        "{path} belongs to peer {found}, but identity.pub says {expected}: put the right one back, or remove identity.pub to keep the key"
    )]
    Mismatch {
        /// Which file.
        path: PathBuf,
        /// Peer id of the key.
        found: String,
        /// Peer id of the marker.
        expected: String,
    },
    /// A new one cannot be written.
    #[error("the new identity cannot be saved: {0}")]
    Unsaved(#[from] StorageError),
}

/// The key's bytes: read, or made when there is neither key nor marker. `decode` gives the peer id of bytes.
///
/// # Errors
/// [`IdentityFileError`]; nothing was changed.
pub fn load_or_create(
    directory: &Path,
    generate: impl FnOnce() -> Vec<u8>,
    decode: impl Fn(&[u8]) -> Result<String, String>,
) -> Result<Vec<u8>, IdentityFileError> {
    let (key, marker) = (directory.join(KEY), directory.join(MARKER));
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |source| IdentityFileError::Unreadable { path, source }
    };
    let expected = match fs::read_to_string(&marker) {
        Ok(text) => Some(text.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(unreadable(&marker)(source)),
    };
    let found = match fs::symlink_metadata(&key) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if expected.is_some() {
                return Err(IdentityFileError::Missing(key));
            }
            let bytes = generate();
            let peer_id = decode(&bytes).map_err(|reason| IdentityFileError::Damaged { path: key.clone(), reason })?;
            atomic::write(&key, &bytes)?;
            atomic::write(&marker, format!("{peer_id}\n").as_bytes())?;
            return Ok(bytes);
        }
        Err(source) => return Err(unreadable(&key)(source)),
    };
    let damaged = |reason: &str| IdentityFileError::Damaged { path: key.clone(), reason: reason.to_owned() };
    if !found.is_file() {
        return Err(damaged("it is no regular file"));
    }
    if found.len() == 0 {
        return Err(damaged("it is empty"));
    }
    if found.len() > MAX_KEY_BYTES {
        return Err(damaged("it is too large"));
    }
    let mode = found.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(IdentityFileError::Open { path: key, mode });
    }
    let bytes = fs::read(&key).map_err(unreadable(&key))?;
    let peer_id = decode(&bytes).map_err(|reason| damaged(&reason))?;
    match expected {
        Some(expected) if expected != peer_id => Err(IdentityFileError::Mismatch { path: key, found: peer_id, expected }),
        Some(_) => Ok(bytes),
        None => {
            // The key is good: only its marker was lost (or a crash came between the two writes).
            atomic::write(&marker, format!("{peer_id}\n").as_bytes())?;
            Ok(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Result<String, String> {
        bytes.strip_prefix(b"key-").map(|id| String::from_utf8_lossy(id).into_owned()).ok_or_else(|| "no key".to_owned())
    }

    fn load(directory: &Path) -> Result<Vec<u8>, IdentityFileError> {
        load_or_create(directory, || b"key-new".to_vec(), decode)
    }

    fn with(change: impl FnOnce(&Path)) -> (tempfile::TempDir, Vec<u8>, Result<Vec<u8>, IdentityFileError>) {
        let directory = tempfile::tempdir().unwrap();
        load_or_create(directory.path(), || b"key-old".to_vec(), decode).unwrap();
        let key = directory.path().join(KEY);
        change(&key);
        let before = fs::read(&key).unwrap_or_default();
        let loaded = load(directory.path());
        assert_eq!(fs::read(&key).unwrap_or_default(), before, "the file was touched");
        (directory, before, loaded)
    }

    #[test]
    fn a_key_is_made_once_and_read_ever_after() {
        let (_directory, _, loaded) = with(|_| {});
        assert_eq!(loaded.unwrap(), b"key-old");
    }

    #[test]
    fn no_damage_is_ever_mended_by_a_new_key() {
        let missing = with(|key| fs::remove_file(key).unwrap()).2;
        assert!(matches!(missing, Err(IdentityFileError::Missing(_))));
        for damage in [&b""[..], b"garbage", b"key"] {
            let damaged = with(|key| fs::write(key, damage).unwrap()).2;
            assert!(matches!(damaged, Err(IdentityFileError::Damaged { .. })), "{damage:?}");
        }
        let large = with(|key| fs::write(key, vec![b'k'; 4097]).unwrap()).2;
        assert!(matches!(large, Err(IdentityFileError::Damaged { .. })));
        let swapped = with(|key| fs::write(key, b"key-other").unwrap()).2;
        assert!(matches!(swapped, Err(IdentityFileError::Mismatch { .. })));
        let open = with(|key| fs::set_permissions(key, fs::Permissions::from_mode(0o644)).unwrap()).2;
        assert!(matches!(open, Err(IdentityFileError::Open { mode: 0o644, .. })));
        let directory = with(|key| {
            fs::remove_file(key).unwrap();
            fs::create_dir(key).unwrap();
        });
        assert!(matches!(directory.2, Err(IdentityFileError::Damaged { .. })));
    }

    #[test]
    fn a_lost_marker_is_made_again() {
        let (directory, _, loaded) = with(|key| fs::remove_file(key.with_file_name(MARKER)).unwrap());
        assert_eq!(loaded.unwrap(), b"key-old");
        assert_eq!(fs::read_to_string(directory.path().join(MARKER)).unwrap(), "old\n");
    }
}
