//! Files that appear, change, go, and are added, removed and verified.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use opengateway::domain::node::ModelState;
use opengateway::domain::prompt::FailureKind;
use opengateway::models::{Local, ModelError, Progress, hex};
use tokio::sync::mpsc;

use super::lab::{Lab, collect, first_text};
use crate::common::gguf::Gguf;
use crate::common::node::skipped;

/// What is in a directory, the hidden files too.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn source(lab: &Lab, bytes: &[u8]) -> OwnedFd {
    let path = lab.path("source");
    fs::write(&path, bytes).unwrap();
    File::open(path).unwrap().into()
}

async fn add(lab: &Lab, name: &str, file: OwnedFd, digest: Option<[u8; 32]>) -> Result<Local, ModelError> {
    let (progress, _receiver) = mpsc::channel(1);
    lab.models().handle.add(name.to_owned(), file, digest, progress).await
}

#[tokio::test]
async fn a_file_that_appears_is_offered_and_one_that_goes_is_not() {
    let mut lab = Lab::with(&[], |_| {}).await;
    lab.put("new");
    lab.until_within(Duration::from_secs(5), "new", |local| local.state == ModelState::Available).await;
    assert_eq!(lab.answer("new", "words 1").await.text, "word ");
    let mut running = lab.ask("new", "drip 1000 20");
    first_text(&mut running).await;
    fs::remove_file(lab.path("models/new.gguf")).unwrap();
    assert_eq!(collect(running).await.kind(), Some(FailureKind::EngineCrashed));
    lab.until_gone("new").await;
    assert!(lab.serve.offer().wait_for(|offer| offer.models.is_empty()).await.is_ok());
}

#[tokio::test]
async fn a_file_that_is_being_written_is_taken_when_it_is_whole() {
    let lab = Lab::with(&[], |_| {}).await;
    let bytes = Gguf { data: 300_000, ..Gguf::default() }.bytes();
    let mut file = File::create(lab.path("models/growing.gguf")).unwrap();
    for piece in bytes.chunks(60_000) {
        file.write_all(piece).unwrap();
        assert!(lab.local("growing").is_none_or(|local| local.state == ModelState::Failed), "it is not used half");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(file);
    let local = lab.until_state("growing", ModelState::Available).await;
    assert_eq!((local.size, local.problem), (bytes.len() as u64, None));
}

#[tokio::test]
async fn a_file_that_became_shorter_ends_its_engine_and_says_so() {
    let lab = Lab::with(&["m"], |_| {}).await;
    lab.answer("m", "words 1").await.outcome.unwrap();
    let file = File::options().write(true).open(lab.path("models/m.gguf")).unwrap();
    file.set_len(200).unwrap();
    let local = lab.until("m", |local| local.state == ModelState::Failed).await;
    assert!(local.problem.unwrap().contains("truncated"));
    assert_eq!(local.engine_pid, None);
    assert_eq!(lab.answer("m", "words 1").await.kind(), Some(FailureKind::ModelUnavailable));
}

#[tokio::test]
async fn what_is_no_model_is_shown_with_its_reason_and_what_is_no_file_is_not_opened() {
    let lab = Lab::with(&["good"], |_| {}).await;
    let models = lab.path("models");
    fs::write(models.join("text.gguf"), "hello").unwrap();
    symlink(models.join("good.gguf"), models.join("link.gguf")).unwrap();
    symlink("/etc/passwd", models.join("passwd.gguf")).unwrap();
    fs::create_dir(models.join("folder.gguf")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, models.join("pipe.gguf"), rustix::fs::FileType::Fifo, 0o644.into(), 0).unwrap();
    fs::write(models.join("bad\u{202e}name.gguf"), Gguf::default().bytes()).unwrap();
    fs::write(models.join(".hidden.gguf"), Gguf::default().bytes()).unwrap();
    for (name, why) in [
        ("text", "no GGUF file"),
        ("link", "it is a link"),
        ("passwd", "it is a link"),
        ("folder", "no regular file"),
        ("pipe", "no regular file"),
    ] {
        let local = lab.until(name, |local| local.problem.is_some()).await;
        assert!(local.problem.as_deref().unwrap().contains(why), "{local:?}");
        assert_eq!(local.state, ModelState::Failed);
    }
    assert_eq!(lab.models().handle.list().len(), 6);
    let mut problems = lab.models().problems.clone();
    let found = problems.wait_for(|list| list.iter().any(|problem| problem.contains("is not used"))).await.unwrap().clone();
    assert!(found[0].contains("\\u{202e}") && found.iter().all(|problem| !problem.contains('\u{202e}')), "{found:?}");
    assert_eq!(lab.answer("good", "words 1").await.text, "word ");
}

#[tokio::test]
async fn of_two_with_one_name_the_own_one_is_used_and_the_other_is_told() {
    let lab = Lab::with(&["m"], |_| {}).await;
    fs::create_dir(lab.path("also")).unwrap();
    fs::write(lab.path("also/m.gguf"), Gguf::default().bytes()).unwrap();
    fs::write(lab.path("also/other.gguf"), Gguf::default().bytes()).unwrap();
    // The directory itself is new: it is found by the next look.
    let mut settings = lab.settings.borrow().clone();
    settings.keep = vec![];
    lab.settings.send_replace(settings);
    let local = lab.until("m", |local| local.problem.is_some()).await;
    assert!(local.problem.unwrap().contains("also/m.gguf has the same name"));
    assert_eq!(local.path, lab.path("models/m.gguf"));
    let other = lab.until_state("other", ModelState::Available).await;
    assert!(!other.removable);
    assert!(matches!(lab.models().handle.remove("other".to_owned()).await, Err(ModelError::Refused(_))));
    assert!(lab.path("also/other.gguf").exists());
}

#[tokio::test]
async fn a_model_is_added_whole_and_known_after_a_restart() {
    let lab = Lab::with(&[], |_| {}).await;
    let bytes = Gguf { data: 3_000_000, ..Gguf::default() }.bytes();
    let local = add(&lab, "added", source(&lab, &bytes), None).await.unwrap();
    assert_eq!((local.name.as_str(), local.size, local.removable), ("added", bytes.len() as u64, true));
    assert_eq!(names(&lab.path("models")), ["added.gguf"]);
    assert_eq!(fs::read(lab.path("models/added.gguf")).unwrap(), bytes);
    let digest = local.digest.unwrap();
    assert_eq!(lab.answer("added", "words 1").await.text, "word ");
    assert!(matches!(add(&lab, "added", source(&lab, &bytes), None).await, Err(ModelError::Exists(_))));
    let text = fs::read_to_string(lab.path("state/models.json")).unwrap();
    assert!(text.contains(&hex(&digest)));
    // Left by a crash in the middle of another one.
    fs::write(lab.path("models/.half.gguf.adding"), "half").unwrap();
    let lab = lab.restart().await;
    let again = lab.until("added", |local| local.digest.is_some()).await;
    assert_eq!(again.digest, Some(digest));
    assert_eq!(names(&lab.path("models")), ["added.gguf"]);
    lab.models().handle.remove("added".to_owned()).await.unwrap();
    assert!(names(&lab.path("models")).is_empty());
    lab.until_gone("added").await;
    assert_eq!(lab.models().handle.remove("added".to_owned()).await, Err(ModelError::NoSuchModel("added".to_owned())));
}

#[tokio::test]
async fn what_cannot_be_added_is_named_and_leaves_nothing() {
    let lab = Lab::with(&[], |_| {}).await;
    let good = Gguf::default().bytes();
    for name in ["", ".a", "-a", "a/b", "../a", "a\n", "a\0", "a\u{200b}b", &"n".repeat(129)] {
        let error = add(&lab, name, source(&lab, &good), None).await.unwrap_err();
        assert!(matches!(error, ModelError::Invalid(_)), "{name:?}: {error}");
    }
    let invalid = |outcome: Result<Local, ModelError>, part: &str| {
        let Err(ModelError::Invalid(why)) = outcome else { panic!("{outcome:?}") };
        assert!(why.contains(part), "{why}");
    };
    invalid(add(&lab, "m", source(&lab, b"hello"), None).await, "no GGUF file");
    invalid(add(&lab, "m", source(&lab, &good[..good.len() - 1]), None).await, "truncated");
    invalid(add(&lab, "m", source(&lab, &good), Some([7; 32])).await, "SHA-256");
    invalid(add(&lab, "m", File::open("/dev/zero").unwrap().into(), None).await, "regular file");
    invalid(add(&lab, "m", File::open("/").unwrap().into(), None).await, "regular file");
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    invalid(add(&lab, "m", pipe, None).await, "regular file");
    assert!(names(&lab.path("models")).is_empty());
    assert!(add(&lab, &"n".repeat(128), source(&lab, &good), None).await.is_ok());
}

#[tokio::test]
async fn a_copy_that_is_cancelled_leaves_nothing() {
    let lab = Lab::with(&[], |_| {}).await;
    let file = File::create(lab.path("source")).unwrap();
    let header = Gguf { data: 0, ..Gguf::default() };
    (&file).write_all(&Gguf { data: 224, ..header }.bytes()).unwrap();
    // Sparse: it takes no space here, and gigabytes of copying.
    file.set_len(3 << 30).unwrap();
    let file: OwnedFd = File::open(lab.path("source")).unwrap().into();
    let (progress, mut receiver) = mpsc::channel(1);
    let handle = lab.models().handle.clone();
    let adding = tokio::spawn(async move { handle.add("m".to_owned(), file, None, progress).await });
    let Some(Progress { done, total }) = receiver.recv().await else {
        let outcome = adding.await.unwrap();
        return skipped(&format!("no room for a copy of 3 GiB: {outcome:?}"));
    };
    assert!(done <= total && total == 3 << 30);
    assert!(names(&lab.path("models")).iter().any(|name| name.ends_with(".adding")));
    drop(receiver);
    assert!(matches!(adding.await.unwrap(), Err(ModelError::Refused(_))));
    assert!(names(&lab.path("models")).is_empty());
}

#[tokio::test]
async fn a_full_disk_is_named_and_leaves_nothing() {
    if !rustix::process::geteuid().is_root() {
        return skipped("mounting a file system of a few MiB takes root");
    }
    let lab = Lab::with(&[], |_| {}).await;
    let models = lab.path("models");
    let mounted = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(&models).status();
    if !mounted.is_ok_and(|status| status.success()) {
        return skipped("a tmpfs cannot be mounted here");
    }
    let outcome = add(&lab, "m", source(&lab, &Gguf { data: 3_000_000, ..Gguf::default() }.bytes()), None).await;
    let left = names(&models);
    let _ = std::process::Command::new("umount").arg("-l").arg(&models).status();
    let Err(ModelError::Storage(why)) = outcome else { panic!("{outcome:?}") };
    assert!(why.contains("MB are free"), "{why}");
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn verifying_finds_a_content_that_changed_behind_the_clock() {
    let lab = Lab::with(&["m"], |_| {}).await;
    let before = lab.until("m", |local| local.digest.is_some()).await;
    let verify = || async {
        let (progress, _receiver) = mpsc::channel(1);
        lab.models().handle.verify("m".to_owned(), progress).await.unwrap()
    };
    let good = verify().await;
    assert_eq!((Some(good.digest), good.expected), (before.digest, before.digest));
    // The last byte, and the time of before.
    let file = File::options().write(true).open(&before.path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    std::os::unix::fs::FileExt::write_at(&file, &[1], before.size - 1).unwrap();
    file.set_modified(modified).unwrap();
    let changed = verify().await;
    assert_ne!(Some(changed.digest), changed.expected);
    assert_eq!(changed.expected, before.digest);
    let (progress, _receiver) = mpsc::channel(1);
    let none = lab.models().handle.verify("none".to_owned(), progress).await;
    assert_eq!(none, Err(ModelError::NoSuchModel("none".to_owned())));
}

#[tokio::test]
async fn a_model_that_answers_is_not_removed() {
    let lab = Lab::with(&["m"], |_| {}).await;
    let mut running = lab.ask("m", "drip 20 50");
    first_text(&mut running).await;
    lab.until("m", |local| local.state == ModelState::Ready).await;
    let refused = lab.models().handle.remove("m".to_owned()).await;
    assert!(matches!(&refused, Err(ModelError::Refused(why)) if why.contains("answers 1 prompt now")), "{refused:?}");
    assert!(collect(running).await.outcome.is_ok());
    lab.models().handle.remove("m".to_owned()).await.unwrap();
    assert!(!lab.path("models/m.gguf").exists());
}
