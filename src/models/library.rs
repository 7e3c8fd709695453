//! The model files in the directories: what is there, and whether it can be used.
//!
//! A scan opens each file beneath its directory without following a link, reads its header, and says what it found. A file
//! whose content moved since the last scan, or a moment ago, is being written and is left for the next one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

use super::gguf::{self, GgufError, Header};

/// Longest name of a model: that of the wire.
pub const MAX_NAME_BYTES: usize = crate::wire::limits::MAX_MODEL_NAME_BYTES;
/// What the name of a model file ends with.
pub const EXTENSION: &str = ".gguf";
/// Models in all directories together.
pub const MAX_MODELS: usize = 256;
/// Entries of one directory that are looked at.
const MAX_ENTRIES: usize = 4096;
/// A file that did not change for this long is whole.
pub const SETTLED: Duration = Duration::from_secs(1);

/// What tells one content of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Stamp {
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since 1970.
    pub modified: i64,
    /// Of the file system.
    pub device: u64,
    /// Of the file.
    pub inode: u64,
}

impl Stamp {
    /// Of an open file.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            size: found.size(),
            modified: found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec()),
            device: found.dev(),
            inode: found.ino(),
        })
    }

    /// Whether the content moved so lately that it may still move.
    fn is_fresh(&self, now: SystemTime) -> bool {
        let age = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_nanos());
        let age = i128::try_from(age).unwrap_or(i128::MAX) - i128::from(self.modified);
        (0..i128::try_from(SETTLED.as_nanos()).unwrap_or(0)).contains(&age)
    }
}

/// One file with the name of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Without the extension.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Which content.
    pub stamp: Stamp,
    /// What its header says, or what is wrong with it.
    pub header: Result<Header, String>,
    /// It is in the directory that is written to.
    pub own: bool,
    /// Another file of this name that is not used.
    pub shadows: Option<PathBuf>,
}

/// What a scan found.
#[derive(Debug, Default)]
pub struct Scan {
    /// By name.
    pub models: BTreeMap<String, Found>,
    /// Some files are being written: look again after [`SETTLED`].
    pub unsettled: bool,
    /// What is wrong with the directories.
    pub problems: Vec<String>,
}

/// Checks the name of a model: it is part of a path, of messages and of lines on a terminal.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(format!("the name of a model has 1 to {MAX_NAME_BYTES} bytes; this one has {}", name.len()));
    }
    if name.starts_with('.') || name.starts_with('-') {
        return Err("the name of a model does not begin with '.' or '-'".to_owned());
    }
    match name.chars().find(|c| c.is_control() || *c == '/' || is_invisible(*c)) {
        Some(bad) => Err(format!("the name of a model contains {bad:?}")),
        None if name.ends_with(' ') || name.starts_with(' ') => {
            Err("the name of a model does not begin or end with a space".to_owned())
        }
        None => Ok(()),
    }
}

/// Characters that make a name look like another one.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' | '\u{2028}' | '\u{2029}')
}

/// The directories, and what the last scan knew of the files in them.
#[derive(Debug, Default)]
pub struct Library {
    directories: Vec<PathBuf>,
    /// Headers that were read, by path.
    known: BTreeMap<PathBuf, (Stamp, Result<Header, String>)>,
    /// Contents that are whole although they are new: this daemon wrote them.
    trusted: Vec<Stamp>,
}

impl Library {
    /// Over these directories; the first is the one that is written to, and its files come before those of the others.
    pub fn new(directories: Vec<PathBuf>) -> Self {
        Self { directories, known: BTreeMap::new(), trusted: Vec::new() }
    }

    /// Other directories from now on.
    pub fn set_directories(&mut self, directories: Vec<PathBuf>) {
        self.directories = directories;
    }

    /// Takes these contents for whole at the next scan, however new they are.
    pub fn trust(&mut self, stamps: Vec<Stamp>) {
        self.trusted = stamps;
    }

    /// Looks at all of them. Blocking.
    pub fn scan(&mut self, now: SystemTime) -> Scan {
        let mut scan = Scan::default();
        let mut known = BTreeMap::new();
        for (at, directory) in self.directories.clone().iter().enumerate() {
            if let Err(error) = self.directory(directory, at == 0, now, &mut scan, &mut known) {
                // One that is not there has no models; that is no mistake.
                if error.kind() != io::ErrorKind::NotFound {
                    scan.problems.push(format!("models: {} cannot be read: {error}", directory.display()));
                }
            }
        }
        self.known = known;
        scan
    }

    fn directory(
        &self,
        path: &Path,
        own: bool,
        now: SystemTime,
        scan: &mut Scan,
        known: &mut BTreeMap<PathBuf, (Stamp, Result<Header, String>)>,
    ) -> io::Result<()> {
        let directory = File::open(path)?;
        let mut names: Vec<_> = std::fs::read_dir(path)?.take(MAX_ENTRIES).flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        for file_name in names {
            let Some(stem) = file_name.as_bytes().strip_suffix(EXTENSION.as_bytes()) else { continue };
            // Hidden files are those of programs that are not done with them.
            if stem.starts_with(b".") {
                continue;
            }
            let shown = String::from_utf8_lossy(stem).into_owned();
            let Ok(name) = std::str::from_utf8(stem) else {
                scan.problems.push(format!("models: {:?} in {} is not used: its name is no UTF-8", shown, path.display()));
                continue;
            };
            if let Err(why) = check_name(name) {
                let shown: String = shown.chars().take(MAX_NAME_BYTES).collect();
                scan.problems.push(format!("models: {shown:?} in {} is not used: {why}", path.display()));
                continue;
            }
            let whole = path.join(&file_name);
            if let Some(first) = scan.models.get_mut(name) {
                first.shadows = Some(whole);
                continue;
            }
            if scan.models.len() >= MAX_MODELS {
                scan.problems.push(format!("models: more than {MAX_MODELS}; those after {name:?} are not used"));
                break;
            }
            let Some((stamp, header)) = self.look(&directory, &file_name, &whole, now, scan) else { continue };
            known.insert(whole.clone(), (stamp, header.clone()));
            let found = Found { name: name.to_owned(), path: whole, stamp, header, own, shadows: None };
            scan.models.insert(name.to_owned(), found);
        }
        Ok(())
    }

    /// One file. `None` when it is gone again or still being written.
    fn look(
        &self,
        directory: &File,
        name: &std::ffi::OsStr,
        path: &Path,
        now: SystemTime,
        scan: &mut Scan,
    ) -> Option<(Stamp, Result<Header, String>)> {
        let nothing = Stamp { size: 0, modified: 0, device: 0, inode: 0 };
        let file = match open_beneath(directory, Path::new(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => return Some((nothing, Err(unreadable(&error)))),
        };
        let stamp = match (Stamp::of(&file), file.metadata()) {
            (Ok(stamp), Ok(found)) if found.is_file() => stamp,
            (Ok(_), Ok(_)) => return Some((nothing, Err("it is no regular file".to_owned()))),
            (Err(error), _) | (_, Err(error)) => return Some((nothing, Err(unreadable(&error)))),
        };
        if let Some((known, header)) = self.known.get(path)
            && *known == stamp
        {
            return Some((stamp, header.clone()));
        }
        if stamp.is_fresh(now) && !self.trusted.contains(&stamp) {
            scan.unsettled = true;
            return None;
        }
        match gguf::read(&file, stamp.size) {
            Ok(header) => Some((stamp, Ok(header))),
            Err(error @ GgufError::Truncated(_)) => {
                Some((stamp, Err(format!("{error}; if it is still being copied, it is taken when it is whole"))))
            }
            Err(error) => Some((stamp, Err(error.to_string()))),
        }
    }
}

fn unreadable(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) if number == Errno::LOOP.raw_os_error() => "it is a link; put the file itself here".to_owned(),
        _ => format!("it cannot be read: {error}"),
    }
}

/// Opens a file of `directory` for reading, without following any link and without waiting for a pipe.
///
/// # Errors
/// As `openat2`.
pub fn open_beneath(directory: &File, name: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match openat2(directory, name, flags, Mode::empty(), resolve) {
        Ok(file) => Ok(file.into()),
        // A sandbox without the call; a plain name without a link in it is beneath its directory all the same.
        Err(Errno::NOSYS) if name.components().count() == 1 => Ok(openat(directory, name, flags, Mode::empty())?.into()),
        Err(error) => Err(error.into()),
    }
}
