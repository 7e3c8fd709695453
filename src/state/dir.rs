//! The state directory itself: made 0700, held by one daemon at a time.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::atomic;

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// It cannot be made or opened.
    #[error(
        "the state directory {path} cannot be used: {source}; see its owner, mode and mount: namei -l {path}; findmnt -T {path}"
    )]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another daemon holds it.
    #[error(
        "the state directory {path} is in use by another opengatewayd{holder}: two daemons with one identity would disturb each other"
    )]
    Locked {
        /// Which.
        path: PathBuf,
        /// " (pid N)", when it is known.
        holder: String,
    },
}

/// The state directory, locked for as long as this lives.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: File,
}

impl StateDir {
    /// Makes the directory if need be, locks it, removes what a crash left.
    ///
    /// # Errors
    /// [`DirError`].
    pub fn open(path: &Path) -> Result<Self, DirError> {
        let unusable = |source| DirError::Unusable { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(unusable)?;
        let lock = File::options().create(true).append(true).open(path.join("lock")).map_err(unusable)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let pid = fs::read_to_string(path.join("lock")).ok().and_then(|text| text.trim().parse::<u32>().ok());
                let holder = pid.map_or_else(String::new, |pid| format!(" (pid {pid})"));
                return Err(DirError::Locked { path: path.to_owned(), holder });
            }
            Err(error) => return Err(unusable(error.into())),
        }
        // For the message above, no more: the lock is the flock. A full disk does not hinder the start.
        let _ = lock.set_len(0);
        let _ = io::Write::write_all(&mut &lock, format!("{}\n", std::process::id()).as_bytes());
        atomic::remove_leftovers(path);
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_directory_is_private_and_held_by_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let held = StateDir::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        let error = StateDir::open(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("(pid {})", std::process::id())), "{error}");
        drop(held);
        assert!(StateDir::open(&path).is_ok());
    }

    #[test]
    fn a_file_in_its_place_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(StateDir::open(file.path()), Err(DirError::Unusable { .. })));
    }
}
