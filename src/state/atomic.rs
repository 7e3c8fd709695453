//! Files that are there whole or not at all: temporary file in the same directory, fsync, rename, fsync of the directory.
//! A failure at any of these steps leaves what was there before.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

/// Ends the name of a file that is being written; left-overs of a crash are removed at the start.
const TEMPORARY: &str = ".tmp";

/// Why something could not be written; what was there before still is.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {what}: {source}")]
pub struct StorageError {
    /// Which file.
    pub path: PathBuf,
    /// What was tried.
    pub what: &'static str,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl StorageError {
    /// No space, or no quota, is left.
    pub fn is_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(TEMPORARY);
    name.into()
}

/// The directory that holds `path`.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// How to undo that a file was put in place. None of it needs space or a descriptor.
enum Placed {
    /// There was none before.
    New,
    /// The one before has the temporary name now.
    Exchanged,
    /// The one before is gone: this file system cannot exchange.
    Replaced,
}

/// Gives `path` what `temporary` holds. The old content is kept where that is possible, so that a failure afterwards can
/// still be undone.
fn place(temporary: &Path, path: &Path) -> io::Result<Placed> {
    // A directory is not replaced by a file, which an exchange would do.
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    match renameat_with(CWD, temporary, CWD, path, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(Placed::Exchanged),
        Err(Errno::NOENT) => fs::rename(temporary, path).map(|()| Placed::New),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => fs::rename(temporary, path).map(|()| Placed::Replaced),
        Err(error) => Err(error.into()),
    }
}

fn undo(placed: &Placed, temporary: &Path, path: &Path) {
    let _ = match placed {
        Placed::New => fs::rename(path, temporary),
        Placed::Exchanged => fs::rename(temporary, path),
        Placed::Replaced => Ok(()),
    };
}

/// Writes `bytes` to `path`, mode 0600. Either all of it is there afterwards, durably, or what was there before.
///
/// # Errors
/// [`StorageError`]. Whoever reads the file then reads the old content, also when it was the last step that failed, the
/// one that makes the new name durable. (Only a power cut at that very moment may still bring the new one, whole.)
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), StorageError> {
    let failed = |what| move |source| StorageError { path: path.to_owned(), what, source };
    let temporary = temporary(path);
    // Of a write that was interrupted; nobody else writes here, the directory is locked.
    let _ = fs::remove_file(&temporary);
    let outcome = (|| {
        // First, for when there are no more descriptors: nothing after the new name is there may fail for want of one.
        let directory = File::open(parent(path)).map_err(failed("its directory cannot be opened"))?;
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(failed("cannot be created"))?;
        file.write_all(bytes).map_err(failed("cannot be written"))?;
        file.sync_all().map_err(failed("cannot be made durable"))?;
        let placed = place(&temporary, path).map_err(failed("cannot be put in place"))?;
        directory.sync_all().map_err(|error| {
            undo(&placed, &temporary, path);
            failed("cannot be made durable")(error)
        })
    })();
    // What failed, or what was replaced.
    let _ = fs::remove_file(&temporary);
    outcome
}

/// Gives a damaged file a second name. It keeps its own until a good one is there to take it: a crash in between costs
/// nothing.
pub(super) fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut name = path.with_file_name(format!("{file}.corrupt-{stamp}"));
    for number in 1.. {
        if !name.exists() {
            break;
        }
        name.set_file_name(format!("{file}.corrupt-{stamp}-{number}"));
    }
    // Not every file system knows second names.
    fs::hard_link(path, &name).or_else(|_| {
        let damaged = fs::read(path)?;
        write(&name, &damaged).map_err(|error| error.source)
    })?;
    Ok(name)
}

/// Removes what interrupted writes left in `directory`.
pub fn remove_leftovers(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().ends_with(TEMPORARY) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_file_is_replaced_whole_and_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_write_that_fails_leaves_what_was_there_and_no_litter() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("inside"), b"kept").unwrap();
        let error = write(&path, b"new").unwrap_err();
        assert!(error.to_string().contains("put in place"), "{error}");
        assert!(path.join("inside").exists());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(write(&directory.path().join("none/file"), b"x").is_err());
    }

    #[test]
    fn what_was_put_in_place_can_be_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let temporary = temporary(&path);
        fs::write(&temporary, b"first").unwrap();
        let placed = place(&temporary, &path).unwrap();
        undo(&placed, &temporary, &path);
        assert!(!path.exists() && temporary.exists());
        place(&temporary, &path).unwrap();
        fs::write(&temporary, b"second").unwrap();
        let placed = place(&temporary, &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        undo(&placed, &temporary, &path);
        assert_eq!(fs::read(&path).unwrap(), b"first");
    }

    #[test]
    fn leftovers_of_a_crash_are_removed_and_do_not_hinder() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(temporary(&path), b"half").unwrap();
        write(&path, b"whole").unwrap();
        fs::write(temporary(&path), b"half").unwrap();
        remove_leftovers(directory.path());
        assert!(!temporary(&path).exists() && path.exists());
    }
}
