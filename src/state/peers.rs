//! Who was a member last, and where it was reached: what a node that starts again tries first. Hints, no more: a file that is
//! lost or damaged costs a moment of looking around, and never the start.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::atomic::{self, StorageError};

const FILE: &str = "peers.json";
const SCHEMA: u32 = 1;
/// Peers that are remembered.
pub const MAX_PEERS: usize = 64;
/// Addresses of each.
pub const MAX_PEER_ADDRESSES: usize = 8;
/// Bytes of one address as text.
pub const MAX_PEER_ADDRESS_BYTES: usize = 256;
/// Bytes of a peer id as text.
pub const MAX_PEER_ID_BYTES: usize = 128;
/// Above what all of that takes (about 150 KiB).
pub const MAX_PEERS_FILE_BYTES: u64 = 256 << 10;

/// A peer as it is remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedPeer {
    /// Its peer id.
    pub id: String,
    /// Multiaddrs where it was reached, best first.
    pub addresses: Vec<String>,
    /// When it was a member last, to the second.
    pub last_seen: SystemTime,
}

/// The file with them.
#[derive(Debug)]
pub struct PeersFile {
    path: PathBuf,
    /// Not ours to write.
    closed: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    schema: u32,
    peers: Vec<RawPeer>,
}

#[derive(Serialize, Deserialize)]
struct RawPeer {
    id: String,
    addresses: Vec<String>,
    /// Seconds since 1970.
    last_seen: u64,
}

#[derive(Deserialize)]
struct Version {
    schema: u32,
}

enum Found {
    Good(Vec<SavedPeer>),
    Newer(u32),
    Damaged(String),
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    match fs::File::open(path) {
        Ok(file) => file.take(MAX_PEERS_FILE_BYTES + 1).read_to_end(&mut bytes).map(|_| Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse(bytes: &[u8]) -> Found {
    if bytes.len() as u64 > MAX_PEERS_FILE_BYTES {
        return Found::Damaged(format!("it is larger than {MAX_PEERS_FILE_BYTES} bytes"));
    }
    match serde_json::from_slice(bytes) {
        Ok(Version { schema: SCHEMA }) => {}
        Ok(Version { schema }) if schema > SCHEMA => return Found::Newer(schema),
        Ok(Version { schema }) => return Found::Damaged(format!("there is no schema {schema}")),
        Err(error) => return Found::Damaged(error.to_string()),
    }
    match serde_json::from_slice::<Raw>(bytes) {
        Ok(raw) => check(raw),
        Err(error) => Found::Damaged(error.to_string()),
    }
}

fn check(raw: Raw) -> Found {
    if raw.peers.len() > MAX_PEERS {
        return Found::Damaged(format!("{} peers are in it, and {MAX_PEERS} at most are remembered", raw.peers.len()));
    }
    for RawPeer { id, addresses, .. } in &raw.peers {
        if id.len() > MAX_PEER_ID_BYTES {
            return Found::Damaged(format!("a peer id in it is longer than {MAX_PEER_ID_BYTES} bytes"));
        }
        if addresses.len() > MAX_PEER_ADDRESSES {
            return Found::Damaged(format!("a peer in it has more than {MAX_PEER_ADDRESSES} addresses"));
        }
        if addresses.iter().any(|address| address.len() > MAX_PEER_ADDRESS_BYTES) {
            return Found::Damaged(format!("an address in it is longer than {MAX_PEER_ADDRESS_BYTES} bytes"));
        }
    }
    let peer = |RawPeer { id, addresses, last_seen }: RawPeer| {
        let last_seen = UNIX_EPOCH.checked_add(Duration::from_secs(last_seen)).unwrap_or(UNIX_EPOCH);
        SavedPeer { id, addresses, last_seen }
    };
    Found::Good(raw.peers.into_iter().map(peer).collect())
}

fn encode(peers: &[SavedPeer]) -> serde_json::Result<Vec<u8>> {
    let peer = |saved: &SavedPeer| RawPeer {
        id: saved.id.clone(),
        addresses: saved
            .addresses
            .iter()
            .filter(|address| address.len() <= MAX_PEER_ADDRESS_BYTES)
            .take(MAX_PEER_ADDRESSES)
            .cloned()
            .collect(),
        last_seen: saved.last_seen.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
    };
    let peers = peers.iter().filter(|saved| saved.id.len() <= MAX_PEER_ID_BYTES).take(MAX_PEERS).map(peer).collect();
    serde_json::to_vec_pretty(&Raw { schema: SCHEMA, peers })
}

impl PeersFile {
    /// Reads who is remembered in `directory`. A file that cannot be used is left or set aside, as the warning says; nobody is
    /// remembered then.
    pub fn load(directory: &Path) -> (Self, Vec<SavedPeer>, Option<String>) {
        let path = directory.join(FILE);
        let shown = path.display();
        let (closed, peers, warning) = match read(&path).map(|bytes| bytes.map(|bytes| parse(&bytes))) {
            Ok(None) => (false, Vec::new(), None),
            Ok(Some(Found::Good(peers))) => (false, peers, None),
            Ok(Some(Found::Newer(schema))) => {
                let what = format!("{shown} was written by a newer version (schema {schema}; this one reads {SCHEMA})");
                (true, Vec::new(), Some(format!("{what}: it is left alone, and no peers are remembered until it is moved away")))
            }
            Ok(Some(Found::Damaged(reason))) => {
                match atomic::set_aside(&path).and_then(|aside| fs::remove_file(&path).map(|()| aside)) {
                    Ok(aside) => {
                        let what = format!("{shown} was damaged ({reason}), kept as {}", aside.display());
                        (false, Vec::new(), Some(format!("{what}; the peers of before are found anew")))
                    }
                    Err(error) => {
                        let what = format!("{shown} is damaged ({reason}) and cannot be set aside: {error}");
                        (true, Vec::new(), Some(format!("{what}; no peers are remembered until it is moved away")))
                    }
                }
            }
            Err(error) => {
                let what = format!("{shown} cannot be read: {error}");
                (true, Vec::new(), Some(format!("{what}; no peers are remembered until that is mended: namei -l {shown}")))
            }
        };
        (Self { path, closed }, peers, warning)
    }

    /// Writes who is to be remembered: durable when this returns.
    ///
    /// # Errors
    /// [`StorageError`]: what was there before still is.
    pub fn save(&self, peers: &[SavedPeer]) -> Result<(), StorageError> {
        if self.closed {
            return Ok(());
        }
        let encoded = encode(peers);
        let encoded =
            encoded.map_err(|error| StorageError { path: self.path.clone(), what: "cannot be encoded", source: error.into() })?;
        atomic::write(&self.path, &encoded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn peers(count: usize, addresses: usize, bytes: usize) -> Vec<SavedPeer> {
        let peer = |at: usize| SavedPeer {
            id: format!("12D3KooW{at}"),
            addresses: vec!["x".repeat(bytes); addresses],
            last_seen: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        };
        (0..count).map(peer).collect()
    }

    /// As somebody else would write it.
    fn written(directory: &Path, peers: &[SavedPeer]) {
        let list: Vec<_> = peers
            .iter()
            .map(|peer| serde_json::json!({ "id": peer.id, "addresses": peer.addresses, "last_seen": 1_700_000_000 }))
            .collect();
        fs::write(directory.join(FILE), serde_json::json!({ "schema": 1, "peers": list }).to_string()).unwrap();
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(directory).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn who_was_saved_is_remembered_and_nobody_else_can_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let (file, nobody, warning) = PeersFile::load(directory.path());
        assert!(nobody.is_empty() && warning.is_none());
        file.save(&peers(3, 2, 20)).unwrap();
        let (_, found, warning) = PeersFile::load(directory.path());
        assert_eq!((found, warning), (peers(3, 2, 20), None));
        assert_eq!(fs::metadata(directory.path().join(FILE)).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn every_limit_holds_at_the_limit_and_not_one_past_it() {
        let (most, each, long) = (MAX_PEERS, MAX_PEER_ADDRESSES, MAX_PEER_ADDRESS_BYTES);
        for (list, reason) in [
            (peers(most, each, long), None),
            (peers(most + 1, 1, 20), Some("65 peers")),
            (peers(1, each + 1, 20), Some("more than 8 addresses")),
            (peers(1, 1, long + 1), Some("longer than 256 bytes")),
        ] {
            let directory = tempfile::tempdir().unwrap();
            written(directory.path(), &list);
            let (file, found, warning) = PeersFile::load(directory.path());
            match reason {
                None => assert_eq!((found, warning), (list.clone(), None)),
                Some(reason) => {
                    assert!(warning.as_ref().unwrap().contains(reason), "{warning:?}");
                    assert!(found.is_empty());
                }
            }
            // What would be refused is never written.
            file.save(&list).unwrap();
            assert_eq!(PeersFile::load(directory.path()).2, None);
        }
        let mut long_id = peers(1, 1, 20);
        for (bytes, good) in [(MAX_PEER_ID_BYTES, true), (MAX_PEER_ID_BYTES + 1, false)] {
            let directory = tempfile::tempdir().unwrap();
            long_id[0].id = "x".repeat(bytes);
            written(directory.path(), &long_id);
            assert_eq!(PeersFile::load(directory.path()).2.is_none(), good);
        }
    }

    #[test]
    fn a_file_of_any_size_is_read_up_to_its_limit() {
        let directory = tempfile::tempdir().unwrap();
        let mut text = br#"{"schema":1,"peers":[]}"#.to_vec();
        for (size, good) in [(MAX_PEERS_FILE_BYTES, true), (MAX_PEERS_FILE_BYTES + 1, false)] {
            text.resize(usize::try_from(size).unwrap(), b' ');
            fs::write(directory.path().join(FILE), &text).unwrap();
            assert_eq!(PeersFile::load(directory.path()).2.is_none(), good, "{size}");
        }
    }

    #[test]
    fn a_damaged_file_is_reported_kept_aside_and_never_replaced_in_silence() {
        for damage in [&b""[..], b"{", b"[]", br#"{"schema":1}"#, br#"{"schema":0,"peers":[]}"#, b"\xff\xfe"] {
            let directory = tempfile::tempdir().unwrap();
            fs::write(directory.path().join(FILE), damage).unwrap();
            let (file, found, warning) = PeersFile::load(directory.path());
            assert!(found.is_empty() && warning.as_ref().unwrap().contains("kept as"), "{warning:?}");
            file.save(&peers(1, 1, 20)).unwrap();
            let names = names(directory.path());
            assert!(names.len() == 2 && names[1].starts_with("peers.json.corrupt-"), "{names:?}");
            assert_eq!(fs::read(directory.path().join(&names[1])).unwrap(), damage);
        }
    }

    #[test]
    fn a_file_of_a_newer_version_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let newer = br#"{"schema":2,"peers":{}}"#;
        fs::write(directory.path().join(FILE), newer).unwrap();
        let (file, found, warning) = PeersFile::load(directory.path());
        assert!(found.is_empty() && warning.unwrap().contains("newer version"));
        file.save(&peers(1, 1, 20)).unwrap();
        assert_eq!(fs::read(directory.path().join(FILE)).unwrap(), newer);
    }

    #[test]
    fn what_cannot_be_read_or_written_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join(FILE)).unwrap();
        let (file, _, warning) = PeersFile::load(directory.path());
        assert!(warning.unwrap().contains("cannot be read"));
        file.save(&peers(1, 1, 20)).unwrap();
        assert!(directory.path().join(FILE).is_dir());
        let gone = PeersFile { path: directory.path().join("none").join(FILE), closed: false };
        assert!(gone.save(&peers(1, 1, 20)).unwrap_err().to_string().contains("peers.json"));
    }
}
