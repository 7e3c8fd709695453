//! Files that come into the models directory and go from it. All of it blocks and runs on threads for that.
//!
//! A model is copied under a temporary name beside its place, hashed on the way, made durable, and only then given its name,
//! which never replaces another file. Whatever fails or is cancelled leaves nothing.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, fstatvfs, openat, renameat_with, unlinkat};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::digest::{STEP, hash, hex};
use super::gguf;
use super::library::{EXTENSION, Stamp, check_name, open_beneath};
use super::{ModelError, Progress};

/// Ends the temporary name of a model that is being copied; left-overs of a crash are removed at the start.
const ADDING: &str = ".adding";
/// Left free on the file system: the state directory is often on the same one.
const RESERVE: u64 = 64 << 20;

/// A model that was added.
#[derive(Debug)]
pub(super) struct Added {
    pub digest: [u8; 32],
    pub stamp: Stamp,
}

fn temporary(name: &str) -> String {
    format!(".{name}{EXTENSION}{ADDING}")
}

fn file_name(name: &str) -> String {
    format!("{name}{EXTENSION}")
}

/// A failure of the disk, with what may be done about it.
fn storage(what: &str, path: &Path, error: &io::Error) -> ModelError {
    let path = path.display();
    ModelError::Storage(match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!("{path}: no space is left; nothing was added; see what takes it: ogctl models; df {path}")
        }
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            format!("{path}: {what}: {error}; nothing was changed; see its owner, mode and mount: namei -l {path}")
        }
        _ => format!("{path}: {what}: {error}; nothing was changed"),
    })
}

/// Makes the directory, where that is possible.
pub(super) fn make(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(directory)
}

/// Removes what a crash left in `directory`.
pub(super) fn remove_leftovers(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.as_bytes();
        if name.starts_with(b".") && name.ends_with(format!("{EXTENSION}{ADDING}").as_bytes()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Removes the temporary file unless it got its name.
struct Temporary<'a> {
    directory: &'a File,
    name: String,
    kept: bool,
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let _ = unlinkat(self.directory, self.name.as_str(), AtFlags::empty());
        }
    }
}

/// Copies `source` to `NAME.gguf` in `directory`.
pub(super) fn add(
    directory: &Path,
    name: &str,
    source: OwnedFd,
    wanted: Option<[u8; 32]>,
    progress: &mpsc::Sender<Progress>,
) -> Result<Added, ModelError> {
    check_name(name).map_err(ModelError::Invalid)?;
    let source = File::from(source);
    let unreadable = |error: io::Error| ModelError::Invalid(format!("the file cannot be read: {error}"));
    let before = Stamp::of(&source).map_err(unreadable)?;
    if !source.metadata().map_err(unreadable)?.is_file() {
        return Err(ModelError::Invalid("only a regular file can be added".to_owned()));
    }
    check_header(&source, before.size)?;
    make(directory).map_err(|error| storage("it cannot be made", directory, &error))?;
    let at = File::open(directory).map_err(|error| storage("it cannot be opened", directory, &error))?;
    if open_beneath(&at, Path::new(&file_name(name))).is_ok() || directory.join(file_name(name)).symlink_metadata().is_ok() {
        return Err(exists(name));
    }
    check_space(&at, directory, before.size)?;
    let mut temporary = Temporary { directory: &at, name: temporary(name), kept: true };
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = match openat(&at, temporary.name.as_str(), flags, Mode::from_raw_mode(0o644)) {
        Ok(file) => File::from(file),
        Err(Errno::EXIST) => return Err(ModelError::Exists(format!("a model {name:?} is being added just now"))),
        Err(error) => return Err(storage("a file cannot be made", directory, &error.into())),
    };
    temporary.kept = false;
    let digest = copy(&source, &file, before.size, directory, progress)?;
    if Stamp::of(&source).map_err(unreadable)? != before {
        return Err(ModelError::Invalid("the file changed while it was copied; add it when it is whole".to_owned()));
    }
    if let Some(wanted) = wanted.filter(|wanted| *wanted != digest) {
        let (found, wanted) = (hex(&digest), hex(&wanted));
        return Err(ModelError::Invalid(format!("its SHA-256 is {found}, and {wanted} was asked for; nothing was added")));
    }
    // What was copied is what counts, whatever the source was at the beginning.
    check_header(&file, before.size)?;
    file.sync_all().map_err(|error| storage("the model cannot be made durable", directory, &error))?;
    place(&at, &temporary.name, name, directory)?;
    temporary.kept = true;
    at.sync_all().map_err(|error| {
        let _ = unlinkat(&at, file_name(name).as_str(), AtFlags::empty());
        storage("the model cannot be made durable", directory, &error)
    })?;
    let stamp = Stamp::of(&file).map_err(|error| storage("the model cannot be read", directory, &error))?;
    Ok(Added { digest, stamp })
}

fn exists(name: &str) -> ModelError {
    ModelError::Exists(format!("a model {name:?} is there already; remove it first: ogctl models rm {name}"))
}

fn check_header(file: &File, size: u64) -> Result<(), ModelError> {
    match gguf::read(At { file, position: 0 }, size) {
        Ok(_) => Ok(()),
        Err(error) => Err(ModelError::Invalid(error.to_string())),
    }
}

fn check_space(at: &File, directory: &Path, size: u64) -> Result<(), ModelError> {
    let Ok(found) = fstatvfs(at) else { return Ok(()) };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if free >= size.saturating_add(RESERVE) {
        return Ok(());
    }
    let mb = |bytes: u64| bytes.div_ceil(1_000_000);
    Err(ModelError::Storage(format!(
        "{}: the model has {} MB, {} MB are free, and {} MB are left free; nothing was added",
        directory.display(),
        mb(size),
        mb(free),
        mb(RESERVE)
    )))
}

/// Copies `size` bytes and hashes them.
fn copy(
    source: &File,
    file: &File,
    size: u64,
    directory: &Path,
    progress: &mpsc::Sender<Progress>,
) -> Result<[u8; 32], ModelError> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; STEP];
    let mut reader = At { file: source, position: 0 };
    let mut writer = file;
    while reader.position < size {
        if progress.is_closed() {
            return Err(cancelled());
        }
        let most = usize::try_from(size - reader.position).unwrap_or(STEP).min(STEP);
        let count =
            reader.read(&mut buffer[..most]).map_err(|error| ModelError::Invalid(format!("the file cannot be read: {error}")))?;
        if count == 0 {
            return Err(ModelError::Invalid("the file became shorter while it was copied".to_owned()));
        }
        writer.write_all(&buffer[..count]).map_err(|error| storage("the model cannot be written", directory, &error))?;
        hasher.update(&buffer[..count]);
        // Who does not read the progress gets the outcome all the same.
        let _ = progress.try_send(Progress { done: reader.position, total: size });
    }
    Ok(hasher.finalize().into())
}

fn cancelled() -> ModelError {
    ModelError::Refused("it was cancelled; nothing was changed".to_owned())
}

/// Gives the model its name, which nobody else has.
fn place(at: &File, temporary: &str, name: &str, directory: &Path) -> Result<(), ModelError> {
    let place = file_name(name);
    match renameat_with(at, temporary, at, place.as_str(), RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(exists(name)),
        // A file system that cannot: a second name is made, which does not replace either, and the first one goes.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            match rustix::fs::linkat(at, temporary, at, place.as_str(), AtFlags::empty()) {
                Ok(()) => {
                    let _ = unlinkat(at, temporary, AtFlags::empty());
                    Ok(())
                }
                Err(Errno::EXIST) => Err(exists(name)),
                Err(error) => Err(storage("the model cannot be put in place", directory, &error.into())),
            }
        }
        Err(error) => Err(storage("the model cannot be put in place", directory, &error.into())),
    }
}

/// Removes a model durably.
pub(super) fn remove(directory: &Path, name: &str) -> Result<(), ModelError> {
    let at = File::open(directory).map_err(|error| storage("it cannot be opened", directory, &error))?;
    match unlinkat(&at, file_name(name).as_str(), AtFlags::empty()) {
        Ok(()) => at.sync_all().map_err(|error| storage("the removal may not outlive a power cut", directory, &error)),
        Err(Errno::NOENT) => Err(ModelError::NoSuchModel(name.to_owned())),
        Err(error) => Err(storage("the model cannot be removed", directory, &error.into())),
    }
}

/// Hashes a model's file. `Ok(None)`: it was cancelled.
pub(super) fn verify(path: &Path, progress: &mpsc::Sender<Progress>) -> Result<([u8; 32], Stamp), ModelError> {
    let unreadable = |error: io::Error| ModelError::Storage(format!("{} cannot be read: {error}", path.display()));
    let file = open(path).map_err(unreadable)?;
    let stamp = Stamp::of(&file).map_err(unreadable)?;
    let go_on = |done| {
        let _ = progress.try_send(Progress { done, total: stamp.size });
        !progress.is_closed()
    };
    match hash(&file, go_on).map_err(unreadable)? {
        Some(digest) => Ok((digest, stamp)),
        None => Err(cancelled()),
    }
}

/// Opens the file of a model.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::NotFound.into());
    };
    open_beneath(&File::open(directory)?, Path::new(name))
}

/// Where `NAME.gguf` is.
pub(super) fn path(directory: &Path, name: &str) -> PathBuf {
    directory.join(file_name(name))
}

/// Reads a file without its own position, which others may move.
struct At<'a> {
    file: &'a File,
    position: u64,
}

impl io::Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}
