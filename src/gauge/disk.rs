//! The file system of the models. Every call here may hang on a dead network file system: it is
//! an errand, with a deadline.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::domain::resources::Storage;

/// Files counted below the models directory; a directory with more is no models directory.
const MAX_FILES: usize = 10_000;

/// The directory, or its nearest parent that exists.
fn existing(path: &Path) -> PathBuf {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn taken(directory: &Path) -> Option<u64> {
    let mut todo = vec![directory.to_owned()];
    let (mut bytes, mut files) = (0_u64, 0);
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(next).ok()?.flatten() {
            files += 1;
            if files > MAX_FILES {
                return None;
            }
            // `DirEntry::metadata` does not follow links: a model that is linked in takes no space here.
            let Ok(found) = entry.metadata() else { continue };
            if found.is_dir() {
                todo.push(entry.path());
            } else if found.is_file() {
                bytes = bytes.saturating_add(found.len());
            }
        }
    }
    Some(bytes)
}

/// Measures.
pub(super) fn probe(models: &Path, warnings: &mut Vec<String>) -> Storage {
    let path = existing(models);
    let models = match fs::metadata(models) {
        Ok(found) if found.is_dir() => taken(models),
        Ok(_) => Some(0),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Some(0),
        // There may be models that cannot be seen.
        Err(_) => None,
    };
    match rustix::fs::statvfs(&path) {
        // A file system without blocks (/proc, some of FUSE) has no size to tell.
        Ok(found) if found.f_blocks == 0 => Storage { path, total: None, available: None, models },
        Ok(found) => Storage {
            total: Some(found.f_blocks.saturating_mul(found.f_frsize)),
            available: Some(found.f_bavail.saturating_mul(found.f_frsize)),
            models,
            path,
        },
        Err(error) => {
            warnings.push(format!("the file system of {} cannot be measured: {error}", path.display()));
            Storage { path, total: None, available: None, models }
        }
    }
}
