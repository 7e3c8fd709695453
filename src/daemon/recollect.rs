//! Keeps on disk who was a member last: `net` knows it, `state` writes it, and the next start gives it back to `net`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::dbus::control::ControlState;
use crate::domain::node::NodeId;
use crate::net::{self, Remembered};
use crate::state::{PeersFile, SavedPeer};

/// A change is written after this: members come together, and the first ones are soon safe.
const SOON: Duration = Duration::from_secs(2);
/// And then not again within this.
const SELDOM: Duration = Duration::from_secs(30);
/// What the last write may take when the daemon stops.
const LAST: Duration = Duration::from_secs(2);

/// Reads who was a member before the last stop; gives a warning to show when the file could not be used.
pub(super) fn load(directory: &Path) -> (PeersFile, Vec<Remembered>, Option<String>) {
    let (file, saved, warning) = PeersFile::load(directory);
    let remembered =
        |saved: SavedPeer| Remembered { id: NodeId::new(saved.id), addresses: saved.addresses, last_seen: saved.last_seen };
    (file, saved.into_iter().map(remembered).collect(), warning)
}

/// The task that writes.
#[derive(Debug)]
pub(super) struct Recollector {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Recollector {
    pub(super) fn start(file: PeersFile, net: &net::Handle, problems: watch::Sender<ControlState>) -> Self {
        let stop = CancellationToken::new();
        let scribe = Scribe { file: Arc::new(file), written: Arc::from([]), problem: None, problems };
        let task = tokio::spawn(scribe.run(net.remembered(), stop.clone()));
        Self { stop, task }
    }

    /// Writes what is known at the end.
    pub(super) async fn finish(self) {
        self.stop.cancel();
        if timeout(LAST, self.task).await.is_err() {
            tracing::warn!("the disk is too slow: the peers of the last seconds are not remembered");
        }
    }
}

struct Scribe {
    file: Arc<PeersFile>,
    written: Arc<[Remembered]>,
    /// What was last said about the disk.
    problem: Option<String>,
    problems: watch::Sender<ControlState>,
}

impl Scribe {
    async fn run(mut self, mut remembered: watch::Receiver<Arc<[Remembered]>>, stop: CancellationToken) {
        let mut pause = SOON;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                changed = remembered.changed() => if changed.is_err() { break },
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep(pause) => {}
            }
            pause = SELDOM;
            let latest = Arc::clone(&remembered.borrow_and_update());
            self.write(latest).await;
        }
        let latest = Arc::clone(&remembered.borrow());
        self.write(latest).await;
    }

    async fn write(&mut self, latest: Arc<[Remembered]>) {
        if latest.is_empty() || latest == self.written {
            return;
        }
        let saved = |known: &Remembered| SavedPeer {
            id: known.id.as_str().to_owned(),
            addresses: known.addresses.clone(),
            last_seen: known.last_seen,
        };
        let (file, peers): (_, Vec<SavedPeer>) = (Arc::clone(&self.file), latest.iter().map(saved).collect());
        let problem = match tokio::task::spawn_blocking(move || file.save(&peers)).await {
            Ok(Ok(())) => {
                self.written = latest;
                None
            }
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        self.tell(problem.map(|why| format!("members are not remembered for the next start: {why}")));
    }

    /// Says once what is wrong, and takes it back when it is mended.
    fn tell(&mut self, problem: Option<String>) {
        if problem == self.problem {
            return;
        }
        if let Some(problem) = &problem {
            tracing::error!("{problem}");
        }
        let old = std::mem::replace(&mut self.problem, problem.clone());
        self.problems.send_modify(|state| {
            state.problems.retain(|known| Some(known) != old.as_ref());
            state.problems.extend(problem);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    fn known(name: &str) -> Remembered {
        Remembered {
            id: NodeId::new(name),
            addresses: vec!["/ip4/192.0.2.1/tcp/4001".to_owned()],
            last_seen: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        }
    }

    fn state() -> (watch::Sender<ControlState>, watch::Receiver<ControlState>) {
        watch::channel(ControlState {
            saved: Vec::new(),
            sharing: true,
            lent: crate::domain::resources::Lent::default(),
            stopping: false,
            problems: Vec::new(),
        })
    }

    #[tokio::test(start_paused = true)]
    async fn changes_are_written_soon_then_seldom_and_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let (net, scripted) = net::Handle::scripted();
        let (file, nobody, warning) = load(directory.path());
        assert!(nobody.is_empty() && warning.is_none());
        let (problems, _shown) = state();
        let recollector = Recollector::start(file, &net, problems);
        let there = || load(directory.path()).1;
        // Time is the test's own, and stands still while a thread writes.
        let until = async |what: &str, list: &[Remembered]| {
            for _ in 0..10_000 {
                if there() == list {
                    return;
                }
                tokio::task::yield_now().await;
                std::thread::sleep(Duration::from_micros(100));
            }
            panic!("{what}: {:?}", there());
        };
        scripted.remembered.send_replace(Arc::from([known("a")]));
        tokio::time::sleep(SOON + Duration::from_millis(1)).await;
        until("soon", &[known("a")]).await;
        scripted.remembered.send_replace(Arc::from([known("b"), known("a")]));
        tokio::time::sleep(SELDOM / 2).await;
        assert_eq!(there(), [known("a")], "not yet");
        tokio::time::sleep(SELDOM / 2 + Duration::from_millis(1)).await;
        until("later", &[known("b"), known("a")]).await;
        scripted.remembered.send_replace(Arc::from([known("c")]));
        recollector.finish().await;
        assert_eq!(there(), [known("c")]);
    }

    #[tokio::test]
    async fn a_disk_that_takes_nothing_is_a_problem_until_it_does() {
        let directory = tempfile::tempdir().unwrap();
        let (file, ..) = load(&directory.path().join("none"));
        let (problems, shown) = state();
        let mut scribe = Scribe { file: Arc::new(file), written: Arc::from([]), problem: None, problems };
        scribe.write(Arc::from([known("a")])).await;
        assert!(shown.borrow().problems[0].contains("not remembered"), "{:?}", shown.borrow().problems);
        scribe.write(Arc::from([known("a")])).await;
        assert_eq!(shown.borrow().problems.len(), 1);
        std::fs::create_dir(directory.path().join("none")).unwrap();
        scribe.write(Arc::from([known("a")])).await;
        assert!(shown.borrow().problems.is_empty());
    }
}
