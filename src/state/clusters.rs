//! What the daemon remembers: the clusters it was asked to join, and whether it shares. One file, with a checksum inside;
//! the last good version stays beside it.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::atomic::{self, StorageError};
use crate::domain::cluster::ClusterId;
use crate::domain::resources::Lent;

const FILE: &str = "clusters.json";
const PREVIOUS: &str = "clusters.json.prev";
const SCHEMA: u32 = 1;
/// Far above what [`MAX_SAVED`] clusters with all their addresses take (about 1 MiB).
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Clusters that are remembered: those that were left, too. One that is not forgotten keeps its addresses for the next time.
pub const MAX_SAVED: usize = 64;

/// A cluster that was joined by hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedCluster {
    /// Which.
    pub id: ClusterId,
    /// Take prompts of it; `None` is the machine's setting.
    pub serve: Option<bool>,
    /// Join at the start.
    pub auto_connect: bool,
    /// Multiaddrs to dial for it.
    pub bootstrap: Vec<String>,
}

/// What is remembered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Memory {
    /// Clusters, by id.
    pub clusters: Vec<SavedCluster>,
    /// `SetSharing`; `None` is as configured.
    pub sharing: Option<(bool, Lent)>,
}

/// Why there is no memory. The files are as they were.
#[derive(Debug, thiserror::Error)]
pub enum ClustersError {
    /// It cannot be read.
    #[error("{path} cannot be read: {source}")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A newer version of the program wrote it.
    #[error("{path} was written by a newer version (schema {schema}; this one reads {SCHEMA}): install that version again")]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Its schema.
        schema: u32,
    },
    /// It, and the last good version beside it, are damaged.
    #[error("{path} is damaged ({reason}), and so is the version before it: move both away to begin with no clusters")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    schema: u32,
    sha256: String,
    #[serde(default)]
    content: serde_json::Value,
}

#[derive(Serialize, Deserialize)]
struct Content {
    clusters: Vec<RawCluster>,
    sharing: Option<(bool, Lent)>,
}

#[derive(Serialize, Deserialize)]
struct RawCluster {
    id: String,
    serve: Option<bool>,
    auto_connect: bool,
    #[serde(default)]
    bootstrap: Vec<String>,
}

enum Found {
    Good(Memory),
    None,
    Damaged(String),
}

fn checksum(content: &serde_json::Value) -> String {
    // serde_json writes an object's keys in a fixed order: the same content has the same bytes.
    Sha256::digest(content.to_string().as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// At most one byte more than a good file has. `None`: there is none.
fn bytes(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    match fs::File::open(path) {
        Ok(file) => file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map(|_| Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn read(path: &Path) -> Result<Found, ClustersError> {
    match bytes(path) {
        Ok(Some(bytes)) => parse(path, &bytes),
        Ok(None) => Ok(Found::None),
        Err(source) => Err(ClustersError::Unreadable { path: path.to_owned(), source }),
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Found, ClustersError> {
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Ok(Found::Damaged("it is too large".to_owned()));
    }
    let envelope: Envelope = match serde_json::from_slice(bytes) {
        Ok(envelope) => envelope,
        Err(error) => return Ok(Found::Damaged(error.to_string())),
    };
    if envelope.schema > SCHEMA {
        return Err(ClustersError::Newer { path: path.to_owned(), schema: envelope.schema });
    }
    if checksum(&envelope.content) != envelope.sha256 {
        return Ok(Found::Damaged("its checksum does not fit".to_owned()));
    }
    let content: Content = match serde_json::from_value(envelope.content) {
        Ok(content) => content,
        Err(error) => return Ok(Found::Damaged(error.to_string())),
    };
    let clusters: Result<Vec<SavedCluster>, _> = content
        .clusters
        .into_iter()
        .map(|raw| {
            let RawCluster { id, serve, auto_connect, bootstrap } = raw;
            ClusterId::new(&id).map(|id| SavedCluster { id, serve, auto_connect, bootstrap })
        })
        .collect();
    Ok(match clusters {
        Ok(clusters) => Found::Good(Memory { clusters, sharing: content.sharing }),
        Err(error) => Found::Damaged(error.to_string()),
    })
}

impl Memory {
    /// Reads what is remembered in `directory`; nothing is no error. Of a damaged file a copy is kept under a name of its own
    /// and the version before it takes its place; the warning says so. A file that is gone while the version before it is
    /// there is damage too.
    ///
    /// # Errors
    /// [`ClustersError`]; nothing was changed.
    pub fn load(directory: &Path) -> Result<(Self, Option<String>), ClustersError> {
        let (path, previous) = (directory.join(FILE), directory.join(PREVIOUS));
        let reason = match read(&path)? {
            Found::Good(memory) => return Ok((memory, None)),
            Found::None if !previous.exists() => return Ok((Self::default(), None)),
            Found::None => None,
            Found::Damaged(reason) => Some(reason),
        };
        let Found::Good(memory) = read(&previous)? else {
            let reason = reason.unwrap_or_else(|| "it is gone".to_owned());
            return Err(ClustersError::Damaged { path, reason });
        };
        let what = match reason {
            None => format!("{} was gone", path.display()),
            Some(reason) => match atomic::set_aside(&path) {
                Ok(aside) => format!("{} was damaged ({reason}), kept as {}", path.display(), aside.display()),
                Err(error) => {
                    // Without a copy it stays as it is; the next change that is remembered replaces it.
                    let warning = format!("{} is damaged ({reason}) and cannot be set aside: {error}", path.display());
                    return Ok((memory, Some(format!("{warning}; the version before it is used"))));
                }
            },
        };
        let restored = fs::read(&previous).map_err(|error| error.to_string());
        let restored = restored.and_then(|good| atomic::write(&path, &good).map_err(|error| error.to_string()));
        let not = restored.err().map_or_else(String::new, |error| format!(", but not put in its place: {error}"));
        Ok((memory, Some(format!("{what}; the version before it is used{not}"))))
    }

    fn encode(&self) -> serde_json::Result<Vec<u8>> {
        let raw = |saved: &SavedCluster| RawCluster {
            id: saved.id.as_str().to_owned(),
            serve: saved.serve,
            auto_connect: saved.auto_connect,
            bootstrap: saved.bootstrap.clone(),
        };
        let content = Content { clusters: self.clusters.iter().map(raw).collect(), sharing: self.sharing.clone() };
        let content = serde_json::to_value(content)?;
        serde_json::to_vec_pretty(&Envelope { schema: SCHEMA, sha256: checksum(&content), content })
    }

    /// Writes it: durable when this returns.
    ///
    /// # Errors
    /// [`StorageError`]: what was there before still is.
    pub fn save(&self, directory: &Path) -> Result<(), StorageError> {
        let path = directory.join(FILE);
        let failed = |what| move |source| StorageError { path: directory.join(FILE), what, source };
        let encoded = self.encode().map_err(|error| failed("cannot be encoded")(error.into()))?;
        if let Some(old) = bytes(&path).map_err(failed("cannot be read"))? {
            let found = parse(&path, &old).map_err(|error| failed("is not ours to replace")(io::Error::other(error)))?;
            // Only a good version may become the one to fall back to.
            if matches!(found, Found::Good(_)) {
                atomic::write(&directory.join(PREVIOUS), &old)?;
            }
        }
        atomic::write(&path, &encoded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(names: &[&str]) -> Memory {
        let clusters = names
            .iter()
            .map(|name| SavedCluster {
                id: ClusterId::new(name).unwrap(),
                serve: Some(true),
                auto_connect: true,
                bootstrap: vec!["/ip4/192.0.2.1/tcp/4001".to_owned()],
            })
            .collect();
        Memory { clusters, sharing: Some((true, Lent { cores: Some(1.5), ..Lent::default() })) }
    }

    #[test]
    fn what_was_saved_is_remembered() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Memory::load(directory.path()).unwrap(), (Memory::default(), None));
        memory(&["a"]).save(directory.path()).unwrap();
        memory(&["a", "B"]).save(directory.path()).unwrap();
        assert_eq!(Memory::load(directory.path()).unwrap(), (memory(&["a", "B"]), None));
    }

    #[test]
    fn damage_falls_back_to_the_version_before_and_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        memory(&["a"]).save(directory.path()).unwrap();
        memory(&["a", "b"]).save(directory.path()).unwrap();
        let path = directory.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        for damage in [
            whole[..whole.len() / 2].to_vec(),
            Vec::new(),
            String::from_utf8(whole.clone()).unwrap().replace("\"b\"", "\"c\"").into_bytes(),
        ] {
            fs::write(&path, &damage).unwrap();
            let (found, warning) = Memory::load(directory.path()).unwrap();
            assert_eq!(found, memory(&["a"]));
            assert!(warning.unwrap().contains("corrupt-"));
            assert!(fs::read_dir(directory.path()).unwrap().flatten().any(|entry| fs::read(entry.path()).unwrap() == damage));
        }
    }

    #[test]
    fn damage_without_a_version_before_stops_and_touches_nothing() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE), b"{").unwrap();
        assert!(matches!(Memory::load(directory.path()), Err(ClustersError::Damaged { .. })));
        assert_eq!(fs::read(directory.path().join(FILE)).unwrap(), b"{");
    }

    #[test]
    fn every_number_that_can_be_lent_survives_its_file() {
        let mut bits = 0x3ff0_0000_0000_0001_u64;
        for _ in 0..10_000 {
            bits = bits.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let cores = f64::from_bits(0x3fe0_0000_0000_0000 + (bits >> 10));
            assert!(cores.is_finite());
            let wanted = Memory { sharing: Some((true, Lent { cores: Some(cores), ..Lent::default() })), ..Memory::default() };
            let found = parse(Path::new(FILE), &wanted.encode().unwrap()).unwrap();
            assert!(matches!(&found, Found::Good(found) if *found == wanted), "{cores}");
        }
    }

    #[test]
    fn a_list_that_is_gone_is_damage_while_the_version_before_it_is_there() {
        let directory = tempfile::tempdir().unwrap();
        memory(&["a"]).save(directory.path()).unwrap();
        memory(&["a", "b"]).save(directory.path()).unwrap();
        fs::remove_file(directory.path().join(FILE)).unwrap();
        let (found, warning) = Memory::load(directory.path()).unwrap();
        assert!(found == memory(&["a"]) && warning.unwrap().contains("was gone"));
        assert_eq!(Memory::load(directory.path()).unwrap(), (memory(&["a"]), None));
    }

    #[test]
    fn several_damaged_ones_of_one_second_are_all_kept() {
        let directory = tempfile::tempdir().unwrap();
        memory(&["a"]).save(directory.path()).unwrap();
        memory(&["a"]).save(directory.path()).unwrap();
        for damage in ["1", "2", "3"] {
            fs::write(directory.path().join(FILE), damage).unwrap();
            assert!(Memory::load(directory.path()).unwrap().1.is_some());
        }
        let kept = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().contains("corrupt");
        assert_eq!(fs::read_dir(directory.path()).unwrap().flatten().filter(kept).count(), 3);
    }

    #[test]
    fn a_newer_schema_stops() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE), br#"{"schema":2,"sha256":"","content":{}}"#).unwrap();
        assert!(matches!(Memory::load(directory.path()), Err(ClustersError::Newer { schema: 2, .. })));
    }
}
