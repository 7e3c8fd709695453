//! Adding, checking, removing, loading and unloading model files.

use crate::bus::Bus;
use crate::commands::ask::broken;
use crate::errors::{Failure, Stop};
use crate::output::Output;
use crate::render::file_size;
use crate::term;
use opengateway::api::keys::models_option;
use opengateway::api::names::{ErrorName, MODELS_INTERFACE, ROOT_PATH, exit};
use opengateway::api::proxy::Options;
use opengateway::api::stream::{LineReader, Step, StreamError};
use rustix::fs::{FileType, Mode, OFlags};
use serde::Serialize;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use tokio::net::unix::pipe::Receiver;
use zbus::Variant;

/// A file to add, and what to call it.
#[derive(Debug)]
pub struct Source {
    name: String,
    file: File,
}

/// Opens what `ogctl models add FILE` names. Done before there is a connection: standard input may take as long as it likes.
///
/// # Errors
/// It cannot be read, or there is no name for it.
pub fn open(path: &Path, name: Option<&str>) -> Result<Source, Failure> {
    let standard_input = path == Path::new("-");
    let name = match name {
        Some(name) => name.to_owned(),
        None if standard_input => return Err(Failure::usage("what comes from standard input needs a name: --name NAME")),
        None => stem(path).ok_or_else(|| Failure::usage(format!("{path:?} gives no name for the model: say --name NAME")))?,
    };
    let file = if standard_input {
        File::from(rustix::io::dup(std::io::stdin()).map_err(|error| unreadable(path, &error))?)
    } else {
        File::open(path).map_err(|error| unreadable(path, &error))?
    };
    let kind = file.metadata().map_err(|error| unreadable(path, &error))?.file_type();
    let file = if kind.is_file() {
        file
    } else if kind.is_dir() {
        return Err(unreadable(path, &"it is a directory"));
    } else {
        spool(file)?
    };
    Ok(Source { name, file })
}

fn unreadable(path: &Path, why: &dyn std::fmt::Display) -> Failure {
    Failure::usage(format!("cannot read {}: {why}", term::line(&path.to_string_lossy())))
}

/// The name of the file without `.gguf`.
fn stem(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let cut = name.len().checked_sub(5).filter(|&at| name.is_char_boundary(at) && name[at..].eq_ignore_ascii_case(".gguf"));
    Some(cut.map_or(name, |at| &name[..at]).to_owned()).filter(|name| !name.is_empty())
}

/// What comes from a pipe, in a file without a name: the daemon takes files alone, since a pipe may have no end. It is gone
/// when this process is.
fn spool(mut pipe: File) -> Result<File, Failure> {
    let directory =
        std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let failed = |error: &dyn std::fmt::Display| {
        let message = format!("cannot keep standard input in {}: {error}", term::line(&directory.to_string_lossy()));
        Failure::new("System", message, "set TMPDIR to a directory with more space, or add a file", exit::FAILED)
    };
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(&directory, flags, Mode::RUSR | Mode::WUSR).map_err(|error| failed(&error))?;
    let mut file = File::from(file);
    std::io::copy(&mut pipe, &mut file).map_err(|error| failed(&error))?;
    Ok(file)
}

#[derive(Debug, Serialize)]
struct Added {
    added: String,
    size: Option<u64>,
    digest: Option<String>,
}

/// Copies the file into the models directory.
pub async fn add(bus: &mut Bus, out: &Output, source: Source, digest: Option<&str>) -> Result<(), Stop> {
    bus.ask(async |manager| manager.get_status().await).await?;
    let mut options = Options::new();
    if let Some(digest) = digest {
        options.insert(models_option::DIGEST, Variant::from(digest));
    }
    let kind = rustix::fs::fstat(&source.file).map(|found| FileType::from_raw_mode(found.st_mode));
    debug_assert_eq!(kind, Ok(FileType::RegularFile));
    let body = (source.name.as_str(), zbus::Fd::from(&source.file), options);
    let pipe: zbus::OwnedFd = bus.change_at(ROOT_PATH, MODELS_INTERFACE, "Add", &body).await?;
    let (name, size, digest, ..) = followed(pipe.into(), out, "copying").await?;
    out.view(Added { added: name, size, digest }, |view, _| {
        let digest = view.digest.as_deref().map_or_else(String::new, |digest| format!(", SHA-256 {}", term::line(digest)));
        format!("Added {} ({}{digest}).\n", term::line(&view.added), file_size(view.size))
    })
}

#[derive(Debug, Serialize)]
struct Verified {
    verified: String,
    /// Null when there was no digest to compare with.
    intact: Option<bool>,
    digest: Option<String>,
    expected: Option<String>,
}

/// Hashes the file of a model again.
pub async fn verify(bus: &mut Bus, out: &Output, name: &str) -> Result<(), Stop> {
    bus.ask(async |manager| manager.get_status().await).await?;
    let body = (name, Options::new());
    let pipe: zbus::OwnedFd = bus.change_at(ROOT_PATH, MODELS_INTERFACE, "Verify", &body).await?;
    let (verified, _, digest, expected, intact) = followed(pipe.into(), out, "reading").await?;
    if intact == Some(false) {
        let [digest, expected] = [digest, expected].map(|digest| term::line(&digest.unwrap_or_default()));
        let message = format!("the file of {} has changed: its SHA-256 is {digest}, it was {expected}", term::line(&verified));
        let name = ErrorName::InvalidModel;
        return Err(Failure::new(name.short(), message, name.hint(), name.exit_code()).into());
    }
    out.view(Verified { verified, intact, digest, expected }, |view, _| {
        let (name, digest) = (term::line(&view.verified), term::line(view.digest.as_deref().unwrap_or("unknown")));
        match view.intact {
            Some(_) => format!("{name} is intact (SHA-256 {digest}).\n"),
            None => format!("{name} has SHA-256 {digest}; there is none to compare it with.\n"),
        }
    })
}

type End = (String, Option<u64>, Option<String>, Option<String>, Option<bool>);

/// Shows how far it is, until it is done.
async fn followed(pipe: OwnedFd, out: &Output, doing: &str) -> Result<End, Stop> {
    let receiver = Receiver::from_owned_fd(pipe).map_err(|error| broken(&StreamError::Io(error)))?;
    let mut lines = LineReader::new(receiver);
    let ended = loop {
        match lines.next_step().await {
            Ok(Some(Step::Progress { done, total })) => {
                let percent = done.saturating_mul(100).checked_div(total).unwrap_or(0).min(100);
                out.passing(Some(format!("{doing}, {percent} % of {}", file_size(Some(total)))));
            }
            Ok(Some(Step::End { name, size, digest, expected, intact })) => break Ok((name, size, digest, expected, intact)),
            Ok(Some(Step::Error { name, message })) => break Err(Failure::named(&name, &message)),
            Ok(Some(Step::Unknown)) => {}
            Ok(None) | Err(StreamError::CutOff) => {
                let hint = "nothing was changed; see: journalctl -u opengatewayd";
                break Err(Failure { hint: hint.into(), ..Failure::daemon_gone() });
            }
            Err(error) => break Err(broken(&error)),
        }
    };
    out.passing(None);
    Ok(ended?)
}

/// What is asked in one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Of the file.
    Remove,
    /// Into the engine.
    Load,
    /// Out of it.
    Unload,
}

#[derive(Debug, Serialize)]
struct Changed {
    #[serde(skip_serializing_if = "Option::is_none")]
    removed: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    loading: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unloaded: Option<String>,
}

/// Asks for it and says that it was done.
pub async fn change(bus: &mut Bus, out: &Output, change: Change, name: &str) -> Result<(), Stop> {
    bus.ask(async |manager| manager.get_status().await).await?;
    let method = match change {
        Change::Remove => "Remove",
        Change::Load => "Load",
        Change::Unload => "Unload",
    };
    bus.change_at::<_, ()>(ROOT_PATH, MODELS_INTERFACE, method, &(name,)).await?;
    let of = |wanted| (change == wanted).then(|| name.to_owned());
    let view = Changed { removed: of(Change::Remove), loading: of(Change::Load), unloaded: of(Change::Unload) };
    out.view(view, |_, _| match change {
        Change::Remove => format!("Removed {}.\n", term::line(name)),
        Change::Load => format!("Loading {}; see how far it is with: ogctl models --local\n", term::line(name)),
        Change::Unload => format!("Unloading {} as soon as its prompts have ended.\n", term::line(name)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_that_of_the_file() {
        let name = |path: &str| stem(Path::new(path));
        assert_eq!(name("/a/Llama-3.2-3B.Q4_K_M.gguf").as_deref(), Some("Llama-3.2-3B.Q4_K_M"));
        assert_eq!(name("demo.GGUF").as_deref(), Some("demo"));
        assert_eq!(name("ä.gguf").as_deref(), Some("ä"));
        assert_eq!((name("model").as_deref(), name(".gguf"), name("/")), (Some("model"), None, None));
    }

    #[test]
    fn what_cannot_be_added_is_told_before_anybody_is_asked() {
        assert!(open(Path::new("-"), None).unwrap_err().message.contains("--name"));
        assert!(open(Path::new("/"), Some("x")).unwrap_err().message.contains("directory"));
        assert!(open(Path::new("/nowhere.gguf"), None).unwrap_err().message.contains("/nowhere.gguf"));
    }
}
