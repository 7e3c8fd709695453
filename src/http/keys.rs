//! Keys of local users: derived, not stored. `og-UID-MAC`, where MAC is HMAC-SHA256 over the uid and its generation under
//! a secret of this machine (`http.secret`, mode 0600). To renew a key is to raise the generation (`http-keys.json`).
//!
//! Whose key it is stands in it, so that checking one costs one HMAC, whoever asks and however many users there are.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::state::write_file;

const SECRET: &str = "http.secret";
const GENERATIONS: &str = "http-keys.json";
const SECRET_BYTES: usize = 32;
/// Users whose keys were renewed.
const MAX_RENEWED: usize = 4096;
/// Bytes of the file with [`MAX_RENEWED`] users, and more.
const MAX_FILE_BYTES: u64 = 256 * 1024;
/// What is signed begins so: no other use of the secret can give the same bytes.
const CONTEXT: &[u8] = b"opengateway/http-key/1";
/// Longest key: "og-", ten digits, "-", 64 hexadecimal digits.
const MAX_KEY_BYTES: usize = 78;

/// Why there is no key. What was there is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A file is damaged, or others can read it.
    #[error("{0}")]
    Damaged(String),
    /// A file cannot be read or written.
    #[error("{0}")]
    Storage(String),
    /// So many users have renewed theirs.
    #[error(
        "{MAX_RENEWED} users have renewed their keys, which is the limit; remove {GENERATIONS} and {SECRET} from the state directory to make all keys anew"
    )]
    TooMany,
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    version: u32,
    generations: BTreeMap<u32, u32>,
}

struct Loaded {
    secret: [u8; SECRET_BYTES],
    generations: BTreeMap<u32, u32>,
}

/// The owner of the secret and of the generations.
pub(super) struct Keys {
    directory: PathBuf,
    /// `None` until somebody asks: a machine that does not use the endpoint has no secret for it. Held for one HMAC, or
    /// on a blocking thread for one write.
    loaded: Mutex<Option<Loaded>>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl Keys {
    /// The keys whose secret is kept in `directory`; nothing is read or written yet.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, loaded: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Loaded>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the files, or makes the secret. Blocks.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn load(&self) -> Result<(), KeyError> {
        self.loaded(|_| ())
    }

    fn loaded<T>(&self, with: impl FnOnce(&mut Loaded) -> T) -> Result<T, KeyError> {
        let mut loaded = self.lock();
        if loaded.is_none() {
            *loaded = Some(load(&self.directory)?);
        }
        match loaded.as_mut() {
            Some(loaded) => Ok(with(loaded)),
            None => Err(KeyError::Failed("the keys are gone".to_owned())),
        }
    }

    /// The key of a user. Blocks at its first call.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn of(&self, uid: u32) -> Result<String, KeyError> {
        self.loaded(|loaded| loaded.key(uid))
    }

    /// Another key for a user, durable before it is told. Blocks.
    ///
    /// # Errors
    /// [`KeyError`]; the old key is still good.
    pub fn renew(&self, uid: u32) -> Result<String, KeyError> {
        self.loaded(|loaded| {
            let mut generations = loaded.generations.clone();
            let next = generations.get(&uid).copied().unwrap_or(0).checked_add(1).ok_or(KeyError::TooMany)?;
            generations.insert(uid, next);
            if generations.len() > MAX_RENEWED {
                return Err(KeyError::TooMany);
            }
            let saved = Saved { version: 1, generations };
            let text = serde_json::to_vec(&saved).map_err(|error| KeyError::Failed(error.to_string()))?;
            write_file(&self.directory.join(GENERATIONS), &text).map_err(|error| KeyError::Storage(error.to_string()))?;
            loaded.generations = saved.generations;
            Ok(loaded.key(uid))
        })?
    }

    /// Whose key this is; `None` when it is nobody's. The time it takes does not depend on how much of it is right.
    pub fn user(&self, key: &[u8]) -> Option<u32> {
        let (uid, mac) = split(key)?;
        self.lock().as_ref().and_then(|loaded| loaded.mac(uid).verify_slice(&mac).is_ok().then_some(uid))
    }
}

/// The parts of a key: whose it says to be, and its proof. One text for each: no other spelling is taken.
fn split(key: &[u8]) -> Option<(u32, [u8; 32])> {
    if key.len() > MAX_KEY_BYTES {
        return None;
    }
    let text = std::str::from_utf8(key).ok()?;
    let (digits, hex) = text.strip_prefix("og-")?.split_once('-')?;
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    if !is_number || hex.len() != 64 || !hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut mac = [0; 32];
    for (byte, digits) in mac.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some((digits.parse().ok()?, mac))
}

impl Loaded {
    fn mac(&self, uid: u32) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret).expect("HMAC takes a key of any length");
        mac.update(CONTEXT);
        mac.update(&uid.to_be_bytes());
        mac.update(&self.generations.get(&uid).copied().unwrap_or(0).to_be_bytes());
        mac
    }

    fn key(&self, uid: u32) -> String {
        let mut key = format!("og-{uid}-");
        for byte in self.mac(uid).finalize().into_bytes() {
            key.push_str(&format!("{byte:02x}"));
        }
        key
    }
}

fn load(directory: &Path) -> Result<Loaded, KeyError> {
    let path = directory.join(GENERATIONS);
    let generations = match read(&path, MAX_FILE_BYTES)? {
        None => BTreeMap::new(),
        Some(bytes) => {
            let saved: Option<Saved> = serde_json::from_slice(&bytes).ok();
            let saved = saved.filter(|saved| saved.version == 1 && saved.generations.len() <= MAX_RENEWED);
            // To guess would make keys good again that were renewed because somebody else had them.
            saved.map(|saved| saved.generations).ok_or_else(|| damaged(&path, "it is not what was written"))?
        }
    };
    let path = directory.join(SECRET);
    let secret = match read(&path, 4096)? {
        Some(bytes) => bytes.try_into().map_err(|_| damaged(&path, "it has another length than was written"))?,
        None => {
            let mut secret = [0; SECRET_BYTES];
            getrandom::fill(&mut secret)
                .map_err(|error| KeyError::Failed(format!("the system gives no random numbers: {error}")))?;
            write_file(&path, &secret).map_err(|error| KeyError::Storage(error.to_string()))?;
            secret
        }
    };
    Ok(Loaded { secret, generations })
}

fn damaged(path: &Path, why: &str) -> KeyError {
    let path = path.display();
    KeyError::Damaged(format!(
        "{path} is damaged ({why}): put it back from a backup, or remove {GENERATIONS} and {SECRET} beside it to make all keys anew"
    ))
}

fn read(path: &Path, most: u64) -> Result<Option<Vec<u8>>, KeyError> {
    let failed = |error: io::Error| KeyError::Storage(format!("{} cannot be read: {error}", path.display()));
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    if !found.is_file() || found.len() > most {
        return Err(damaged(path, "it is no such file"));
    }
    let mode = found.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        let path = path.display();
        return Err(KeyError::Damaged(format!(
            "{path} has mode {mode:o}: others can read it; after making sure that nobody did: chmod 600 {path}"
        )));
    }
    fs::read(path).map(Some).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(directory: &tempfile::TempDir) -> Keys {
        Keys::new(directory.path().to_owned())
    }

    #[test]
    fn a_key_is_its_users_alone_and_lasts_over_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let first = keys(&directory);
        assert_eq!(first.user(b"og-0-00"), None, "nothing is made by asking");
        assert!(!directory.path().join(SECRET).exists());
        let (alice, bob) = (first.of(1000).unwrap(), first.of(1001).unwrap());
        assert_ne!(alice, bob);
        let again = keys(&directory);
        assert_eq!(again.of(1000).unwrap(), alice);
        assert_eq!((again.user(alice.as_bytes()), again.user(bob.as_bytes())), (Some(1000), Some(1001)));
        let mode = fs::metadata(directory.path().join(SECRET)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
        let elsewhere = tempfile::tempdir().unwrap();
        assert_ne!(keys(&elsewhere).of(1000).unwrap(), alice);
    }

    #[test]
    fn a_renewed_key_replaces_the_old_one_of_this_user_alone() {
        let directory = tempfile::tempdir().unwrap();
        let keys_now = keys(&directory);
        let (old, other) = (keys_now.of(1000).unwrap(), keys_now.of(1001).unwrap());
        let new = keys_now.renew(1000).unwrap();
        assert_ne!(old, new);
        for keys in [&keys_now, &keys(&directory)] {
            keys.load().unwrap();
            assert_eq!(keys.user(old.as_bytes()), None);
            assert_eq!(keys.user(new.as_bytes()), Some(1000));
            assert_eq!(keys.user(other.as_bytes()), Some(1001));
        }
    }

    #[test]
    fn nothing_but_the_very_text_is_a_key() {
        let directory = tempfile::tempdir().unwrap();
        let keys = keys(&directory);
        let key = keys.of(u32::MAX).unwrap();
        assert_eq!((key.len(), keys.user(key.as_bytes())), (MAX_KEY_BYTES, Some(u32::MAX)));
        for at in 0..key.len() {
            for bit in 0..8 {
                let mut bytes = key.clone().into_bytes();
                bytes[at] ^= 1 << bit;
                assert_eq!(keys.user(&bytes), None, "byte {at}, bit {bit}");
            }
            assert_eq!(keys.user(&key.as_bytes()[..at]), None);
        }
        let zero = keys.of(0).unwrap();
        for other in [
            key.to_uppercase(),
            format!("{key}0"),
            zero.replace("og-0-", "og-00-"),
            zero.replace("og-0-", "og-+0-"),
            "DUMMY_KEY".into(),
        ] {
            assert_eq!(keys.user(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn damaged_files_are_named_and_not_touched() {
        let directory = tempfile::tempdir().unwrap();
        keys(&directory).renew(1000).unwrap();
        for (file, bytes) in [(SECRET, &b"short"[..]), (SECRET, b""), (GENERATIONS, b"{}"), (GENERATIONS, b"")] {
            let path = directory.path().join(file);
            let before = fs::read(&path).unwrap();
            fs::write(&path, bytes).unwrap();
            let error = keys(&directory).of(1000).unwrap_err();
            assert!(matches!(&error, KeyError::Damaged(why) if why.contains(file)), "{error}");
            assert_eq!(fs::read(&path).unwrap(), bytes);
            fs::write(&path, before).unwrap();
        }
        fs::set_permissions(directory.path().join(SECRET), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(keys(&directory).of(1000).unwrap_err().to_string().contains("chmod 600"));
    }

    #[test]
    fn so_many_users_renew_and_not_one_more() {
        let directory = tempfile::tempdir().unwrap();
        let generations = (0..u32::try_from(MAX_RENEWED).unwrap() - 1).map(|uid| (uid, u32::MAX - 1)).collect();
        let text = serde_json::to_vec(&Saved { version: 1, generations }).unwrap();
        assert!(u64::try_from(text.len()).unwrap() < MAX_FILE_BYTES);
        write_file(&directory.path().join(GENERATIONS), &text).unwrap();
        let keys = keys(&directory);
        keys.renew(100_000).unwrap();
        assert_eq!(keys.renew(100_001), Err(KeyError::TooMany));
        keys.renew(0).unwrap();
        assert_eq!(keys.renew(0), Err(KeyError::TooMany), "a generation is never used again");
    }
}
