//! kill -9: at random moments, and at every step that changes the state directory.

use rustix::process::Signal;

use super::strace::{CHANGES, Fault, Strace};
use super::*;
use crate::common::seeded::{Seeded, seed};

const KILLS: usize = 1000;
/// Clusters that are joined and left.
const CLUSTERS: usize = 6;

/// What a caller may ask of a cluster, and what is then remembered of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Joined,
    Left,
    Forgotten,
}

impl Kept {
    async fn ask(self, connection: &Connection, id: &str) -> zbus::Result<Message> {
        let (method, options) = match self {
            Self::Joined => ("Connect", Options::new()),
            Self::Left => ("Disconnect", Options::new()),
            Self::Forgotten => ("Disconnect", Options::from([("Forget", Variant::from(true))])),
        };
        connection.call_method(Some(NAME), ROOT, Some(MANAGER), method, &(id, options)).await
    }
}

/// What is known of what the daemon has to remember.
#[derive(Debug, Default)]
struct Acknowledged {
    kept: HashMap<String, Kept>,
    /// The one change that may have been under way when it was killed: done or not, both are right.
    under_way: Option<(String, Kept)>,
}

impl Acknowledged {
    /// Asks for changes, as `next` says, until the daemon is gone or there are no more.
    async fn change(&mut self, connection: &Connection, mut next: impl FnMut() -> Option<(String, Kept)>) {
        while let Some((id, wanted)) = next() {
            match wanted.ask(connection, &id).await {
                Ok(_) => drop(self.kept.insert(id, wanted)),
                // It was not joined or not known: nothing changed.
                Err(zbus::Error::MethodError(name, ..)) if name.as_str().starts_with(ERROR) => {}
                Err(_) => {
                    self.under_way = Some((id, wanted));
                    return;
                }
            }
        }
    }

    /// Compares with what a daemon that was started again remembers; that is what counts from now on.
    async fn check(&mut self, node: &Node, told: &str) {
        let connection = node.bus.connect().await;
        let reply = call(&connection, "ListClusters", &()).await.unwrap();
        let listed: Vec<(String, OwnedObjectPath, HashMap<String, zbus::OwnedVariant>)> = reply.body().deserialize().unwrap();
        let under_way = self.under_way.take();
        for number in 0..CLUSTERS {
            let id = format!("c{number}");
            let now = match listed.iter().find(|(found, ..)| *found == id) {
                None => Kept::Forgotten,
                Some((_, _, details)) if *details["State"] == Variant::from("disconnected") => Kept::Left,
                Some(_) => Kept::Joined,
            };
            let before = self.kept.get(&id).copied().unwrap_or(Kept::Forgotten);
            let may = under_way.as_ref().filter(|(other, _)| *other == id).map(|(_, wanted)| *wanted);
            assert!(now == before || Some(now) == may, "{told}: {id} was {before:?}, {may:?} was asked, it is {now:?}");
            self.kept.insert(id, now);
        }
        assert!(!node.log().contains("damaged") && !node.log().contains("was gone"), "{told}: {}", node.log());
    }
}

fn files(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// What a killed daemon left is gone. (What the new one writes itself is gone in a moment.)
async fn no_litter(node: &Node, told: &str) {
    let deadline = Instant::now() + DEADLINE;
    let litter = |name: &String| name.ends_with(".tmp") || name.contains("corrupt");
    while let Some(left) = files(&node.state_dir()).into_iter().find(litter) {
        assert!(Instant::now() < deadline, "{told}: {left}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Every file is whole before anything mends it.
fn whole(state: &Path, told: &str) {
    for name in ["clusters.json", "clusters.json.prev"] {
        if let Ok(bytes) = std::fs::read(state.join(name)) {
            let parsed = serde_json::from_slice::<Value>(&bytes);
            assert!(parsed.is_ok(), "{told}: {name}: {parsed:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_moment_it_loses_no_acknowledged_change_and_damages_nothing() {
    let mut random = Seeded(seed());
    let Some(mut node) = Node::start("a", &[]).await else { return };
    let begun = Instant::now();
    let identity = std::fs::read(node.state_dir().join("identity.key")).unwrap();
    let (mut acknowledged, mut changes) = (Acknowledged::default(), 0);
    for kill in 0..KILLS {
        let connection = node.bus.connect().await;
        let after = Duration::from_micros(random.next() % 12_000);
        let told = format!("kill {kill} after {after:?}");
        let pid = node.pid();
        let killer = tokio::task::spawn_blocking(move || {
            std::thread::sleep(after); // the moment itself is what is random
            let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            rustix::process::kill_process(pid, Signal::KILL).unwrap();
        });
        let next = || {
            changes += 1;
            let wanted = [Kept::Joined, Kept::Left, Kept::Forgotten][random.below(3)];
            Some((format!("c{}", random.below(CLUSTERS)), wanted))
        };
        acknowledged.change(&connection, next).await;
        killer.await.unwrap();
        node.ended().await;
        whole(&node.state_dir(), &told);
        node.restart().await;
        no_litter(&node, &told).await;
        acknowledged.check(&node, &told).await;
        assert_eq!(std::fs::read(node.state_dir().join("identity.key")).unwrap(), identity, "{told}");
    }
    eprintln!("{KILLS} kills among {changes} changes in {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_step_of_a_first_start_it_starts_as_one_node() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    if !Strace::is_here() {
        return;
    }
    let state = node.state_dir();
    let mut kills = 0;
    for call in CHANGES {
        for step in 1.. {
            let told = format!("{call} {step}");
            node.kill().await;
            std::fs::remove_dir_all(&state).unwrap();
            let _strace = Strace::launch(&mut node, call, step, Fault::Kill);
            let survived = node.comes_up().await;
            // A key that is there is the one that stays.
            let key = std::fs::read(state.join("identity.key")).ok();
            node.kill().await;
            node.restart().await;
            no_litter(&node, &told).await;
            let now = std::fs::read(state.join("identity.key")).unwrap();
            assert!(key.is_none_or(|key| key == now), "{told}: another identity");
            if survived {
                break;
            }
            kills += 1;
        }
    }
    eprintln!("killed at {kills} steps");
    assert!(kills > 12);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_step_of_joining_and_leaving_it_remembers_what_it_acknowledged() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    if !Strace::is_here() {
        return;
    }
    let mut acknowledged = Acknowledged::default();
    let mut kills = 0;
    // One change a run: strace counts for each thread, and who knows which thread makes the next change.
    for (before, wanted) in [(Kept::Forgotten, Kept::Joined), (Kept::Joined, Kept::Left), (Kept::Joined, Kept::Forgotten)] {
        for call in CHANGES {
            for step in 1.. {
                let told = format!("{wanted:?}: {call} {step}");
                acknowledged.change(&node.bus.connect().await, only(before)).await;
                let _strace = Strace::attach(&node, call, step, Fault::Kill).await;
                acknowledged.change(&node.bus.connect().await, only(wanted)).await;
                let survived = acknowledged.under_way.is_none();
                node.kill().await;
                whole(&node.state_dir(), &told);
                node.restart().await;
                no_litter(&node, &told).await;
                acknowledged.check(&node, &told).await;
                if survived {
                    break;
                }
                kills += 1;
            }
        }
    }
    eprintln!("killed at {kills} steps");
    assert!(kills > 30);
}

/// This change, once.
fn only(wanted: Kept) -> impl FnMut() -> Option<(String, Kept)> {
    let mut change = Some(("c0".to_owned(), wanted));
    move || change.take()
}
