//! Tells that something moved in the models directories: by inotify, and by the clock where there is none.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// What comes together is one change.
const TOGETHER: Duration = Duration::from_millis(150);
/// A directory that is always written to is looked at this often.
const AT_MOST: Duration = Duration::from_secs(1);
/// Without inotify, and for what it does not tell: a directory that appears, a mount.
const SLOW: Duration = Duration::from_secs(60);
/// The same where nothing is told.
const UNTOLD: Duration = Duration::from_secs(10);

/// Watches directories for as long as it lives.
#[derive(Debug)]
pub(super) struct Notice {
    changed: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Notice {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Notice {
    pub(super) fn of(directories: Vec<PathBuf>) -> Self {
        let changed = Arc::new(Notify::new());
        let task = tokio::spawn(watch(directories, Arc::clone(&changed)));
        Self { changed, task }
    }

    /// Resolves when it is time to look. Cancel-safe.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

async fn watch(directories: Vec<PathBuf>, changed: Arc<Notify>) {
    let told = match begin() {
        Ok(told) => told,
        Err(error) => {
            tracing::warn!(%error, "no inotify: models directories are looked at every {} s: {error}", UNTOLD.as_secs());
            loop {
                sleep(UNTOLD).await;
                changed.notify_one();
            }
        }
    };
    loop {
        // Again for those that appeared or were replaced; the same directory again is the same watch.
        for directory in &directories {
            if let Err(error) = inotify::add_watch(&told, directory, what()) {
                tracing::trace!(%error, "{} is not watched: {error}", directory.display());
            }
        }
        if timeout(SLOW, event(&told)).await.is_ok() {
            let quiet = async { while timeout(TOGETHER, event(&told)).await.is_ok() {} };
            let _ = timeout(AT_MOST, quiet).await;
        }
        changed.notify_one();
    }
}

/// An inotify instance is read like a pipe, and readiness is told of both in the same way.
fn begin() -> io::Result<Receiver> {
    Receiver::from_owned_fd_unchecked(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?)
}

fn what() -> WatchFlags {
    WatchFlags::CLOSE_WRITE
        | WatchFlags::MODIFY
        | WatchFlags::MOVED_TO
        | WatchFlags::MOVED_FROM
        | WatchFlags::DELETE
        | WatchFlags::ATTRIB
        | WatchFlags::ONLYDIR
}

/// Resolves when something was told; what it was is found by looking. Cancel-safe.
async fn event(told: &Receiver) {
    let mut buffer = [0; 4096];
    loop {
        if told.readable().await.is_err() {
            return std::future::pending().await;
        }
        match told.try_read(&mut buffer) {
            Ok(0) => return std::future::pending().await,
            Ok(_) => return,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return std::future::pending().await,
        }
    }
}
