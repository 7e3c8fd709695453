//! SHA-256 of model files, computed once for each content and kept in the state directory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::library::Stamp;
use crate::state;

/// Read at once; between two reads it is asked whether to go on.
pub(super) const STEP: usize = 1 << 20;
/// The file in the state directory.
const FILE: &str = "models.json";
const SCHEMA: u32 = 1;
/// What the file may have: 256 models are some 100 KiB.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Hashes a file from where it stands; `None` when `go_on` said no. Blocking.
///
/// # Errors
/// It cannot be read.
pub(super) fn hash(mut file: impl Read, mut go_on: impl FnMut(u64) -> bool) -> io::Result<Option<[u8; 32]>> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; STEP];
    let mut done = 0_u64;
    loop {
        let count = match file.read(&mut buffer) {
            Ok(0) => return Ok(Some(hasher.finalize().into())),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buffer[..count]);
        done += count as u64;
        if !go_on(done) {
            return Ok(None);
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    path: PathBuf,
    #[serde(flatten)]
    stamp: Stamp,
    sha256: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Whole {
    schema: u32,
    models: Vec<Kept>,
}

/// What was computed before.
#[derive(Debug)]
pub(super) struct Digests {
    file: PathBuf,
    known: BTreeMap<PathBuf, (Stamp, [u8; 32])>,
}

impl Digests {
    /// Reads what is kept. A damaged file is set aside: all of it can be computed again. Blocking.
    pub(super) fn load(state: &Path) -> Self {
        let file = state.join(FILE);
        let known = match read(&file) {
            Ok(known) => known,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => {
                let aside = state.join(format!("{FILE}.damaged"));
                tracing::error!(%error, "{} is damaged and is kept as {}: {error}", file.display(), aside.display());
                let _ = std::fs::rename(&file, aside);
                BTreeMap::new()
            }
        };
        Self { file, known }
    }

    /// That of this content.
    pub(super) fn get(&self, path: &Path, stamp: Stamp) -> Option<[u8; 32]> {
        self.known.get(path).filter(|(known, _)| *known == stamp).map(|(_, digest)| *digest)
    }

    pub(super) fn put(&mut self, path: &Path, stamp: Stamp, digest: [u8; 32]) {
        self.known.insert(path.to_owned(), (stamp, digest));
    }

    /// Forgets those of files that are gone. True when there were any.
    pub(super) fn retain(&mut self, keep: impl Fn(&Path) -> bool) -> bool {
        let before = self.known.len();
        self.known.retain(|path, _| keep(path));
        before != self.known.len()
    }

    /// What is to be written, and where.
    pub(super) fn encode(&self) -> (PathBuf, Vec<u8>) {
        let kept = |(path, (stamp, digest)): (&PathBuf, &(Stamp, [u8; 32]))| Kept {
            path: path.clone(),
            stamp: *stamp,
            sha256: hex(digest),
        };
        let whole = Whole { schema: SCHEMA, models: self.known.iter().map(kept).collect() };
        (self.file.clone(), serde_json::to_vec_pretty(&whole).unwrap_or_default())
    }
}

/// Writes what [`Digests::encode`] gave. Blocking.
pub(super) fn save((file, bytes): (PathBuf, Vec<u8>)) {
    if let Err(error) = state::write_file(&file, &bytes) {
        tracing::warn!(%error, "digests of models are not kept and will be computed again: {error}");
    }
}

fn read(file: &Path) -> io::Result<BTreeMap<PathBuf, (Stamp, [u8; 32])>> {
    let mut bytes = Vec::new();
    File::open(file)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other("it is too large"));
    }
    let whole: Whole = serde_json::from_slice(&bytes)?;
    if whole.schema != SCHEMA {
        return Err(io::Error::other(format!("it has schema {}", whole.schema)));
    }
    let one = |kept: Kept| {
        let digest = unhex(&kept.sha256).ok_or_else(|| io::Error::other("a digest is none"))?;
        Ok((kept.path, (kept.stamp, digest)))
    };
    whole.models.into_iter().map(one).collect()
}

/// As people write it.
pub fn hex(digest: &[u8; 32]) -> String {
    digest.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = std::fmt::Write::write_fmt(&mut text, format_args!("{byte:02x}"));
        text
    })
}

/// The digest that `text` is, of either case.
pub fn unhex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { size: 3, modified: 1, device: 2, inode: 4 };

    #[test]
    fn what_was_computed_is_known_for_that_content_alone() {
        let state = tempfile::tempdir().unwrap();
        let mut digests = Digests::load(state.path());
        let digest = hash(&b"abc"[..], |_| true).unwrap().unwrap();
        assert_eq!(hex(&digest), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        digests.put(Path::new("/m/a.gguf"), STAMP, digest);
        save(digests.encode());
        let again = Digests::load(state.path());
        assert_eq!(again.get(Path::new("/m/a.gguf"), STAMP), Some(digest));
        for other in [
            Stamp { size: 4, ..STAMP },
            Stamp { modified: 2, ..STAMP },
            Stamp { inode: 5, ..STAMP },
            Stamp { device: 3, ..STAMP },
        ] {
            assert_eq!(again.get(Path::new("/m/a.gguf"), other), None);
        }
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_all_is_computed_again() {
        for damage in [
            &b"{"[..],
            b"{\"schema\":2,\"models\":[]}",
            b"{\"schema\":1,\"models\":[{\"path\":\"/a\",\"size\":1,\"modified\":1,\"device\":1,\"inode\":1,\"sha256\":\"xy\"}]}",
        ] {
            let state = tempfile::tempdir().unwrap();
            std::fs::write(state.path().join(FILE), damage).unwrap();
            assert!(Digests::load(state.path()).known.is_empty());
            assert_eq!(std::fs::read(state.path().join("models.json.damaged")).unwrap(), damage);
        }
    }

    #[test]
    fn hashing_ends_when_it_is_told_to() {
        assert_eq!(hash(io::repeat(0), |done| done < 3 * STEP as u64).unwrap(), None);
    }

    #[test]
    fn digests_are_64_hexadecimal_digits() {
        assert_eq!(unhex(&hex(&[0xab; 32])), Some([0xab; 32]));
        assert_eq!(unhex(&"AB".repeat(32)), Some([0xab; 32]));
        for bad in ["", "ab", &"a".repeat(63), &"a".repeat(65), &"+1".repeat(32), &"ä".repeat(32)] {
            assert_eq!(unhex(bad), None, "{bad}");
        }
    }
}
