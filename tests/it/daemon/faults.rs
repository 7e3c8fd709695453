//! Every write that can fail does, once: the change is refused with its reason or it is kept, and never something between.

use opengateway::net::identity::Identity;
use opengateway::state::{Memory, StateDir};

use super::strace::{CHANGES, Fault, Strace};
use super::*;

/// Of disks that are full or broken, and of a process that has too much open.
const ERRORS: [&str; 4] = ["ENOSPC", "EIO", "EDQUOT", "EMFILE"];

/// The state directory as it was, to begin from again.
struct Before(Vec<(PathBuf, Vec<u8>)>);

impl Before {
    fn of(state: &Path) -> Self {
        let files = ["identity.key", "identity.pub", "clusters.json", "clusters.json.prev"].iter().map(|name| state.join(name));
        Self(files.map(|path| (path.clone(), std::fs::read(&path).unwrap())).collect())
    }

    fn restore(&self) {
        for (path, bytes) in &self.0 {
            std::fs::write(path, bytes).unwrap();
        }
    }
}

/// What the next start will remember, read by the code that it will read it with.
fn remembered(state: &Path, told: &str) -> Vec<String> {
    let held = StateDir::open(state).unwrap();
    let (memory, warning) = Memory::load(held.path()).unwrap();
    assert_eq!(warning, None, "{told}");
    let litter =
        std::fs::read_dir(state).unwrap().flatten().find(|entry| entry.path().extension().is_some_and(|end| end == "tmp"));
    assert!(litter.is_none(), "{told}: {litter:?}");
    memory.clusters.iter().map(|saved| saved.id.to_string()).collect()
}

async fn joined(connection: &Connection) -> Vec<String> {
    let reply = call(connection, "ListClusters", &()).await.unwrap();
    let listed: Vec<(String, OwnedObjectPath, HashMap<String, zbus::OwnedVariant>)> = reply.body().deserialize().unwrap();
    listed.into_iter().map(|(id, ..)| id).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_write_of_a_change_that_fails_once_refuses_it_and_leaves_what_was() {
    let Some(mut node) = Node::start("a", &["--serve"]).await else { return };
    if !Strace::is_here() {
        return;
    }
    for id in ["one", "two"] {
        call(&node.bus.connect().await, "Connect", &(id, Options::new())).await.unwrap();
    }
    node.kill().await;
    let state = node.state_dir();
    let before = Before::of(&state);
    let (mut refused, mut harmless) = (0, 0);
    for (call, error) in faults() {
        for step in 1.. {
            before.restore();
            node.restart().await;
            let mut strace = Strace::attach(&node, call, step, Fault::Error(error)).await;
            let outcome = connect(&node, error).await;
            node.kill().await;
            let faults = strace.faults();
            let told = format!("{call} {step} fails with {error}: {outcome:?}: {faults:?}");
            assert_eq!(remembered(&state, &told), outcome.shown, "what is remembered is not what was said: {told}");
            if faults.is_empty() {
                assert!(outcome.refused.is_none(), "{told}");
                break;
            }
            refused += usize::from(outcome.refused.is_some());
            harmless += usize::from(outcome.refused.is_none());
            // Never "saved" after a write, a sync or a rename failed. (To remove what is no longer needed may fail.)
            assert!(outcome.refused.is_some() || call.contains("unlink"), "{told}");
        }
    }
    eprintln!("changes refused: {refused}; faults that cost nothing: {harmless}");
    assert!(refused > 40);
}

/// Every call with every error.
fn faults() -> impl Iterator<Item = (&'static str, &'static str)> {
    CHANGES.iter().flat_map(|&call| ERRORS.map(|error| (call, error)))
}

/// How a daemon took the wish to join "new".
#[derive(Debug)]
struct Outcome {
    refused: Option<(String, String)>,
    /// Its clusters afterwards.
    shown: Vec<String>,
}

/// Joins "new": that succeeds, or is refused with a reason that fits `error`. Prompts go on in both cases.
async fn connect(node: &Node, error: &str) -> Outcome {
    let connection = node.bus.connect().await;
    let refused = call(&connection, "Connect", &("new", Options::new())).await.err();
    let shown = joined(&connection).await;
    if let Some((name, message)) = &refused {
        let reason =
            if ["ENOSPC", "EDQUOT"].contains(&error) { "no space is left" } else { "the state directory cannot be written" };
        assert!(*name == format!("{ERROR}StorageFull") && message.contains(reason), "{name}: {message}");
        assert!(message.contains("nothing was changed") && message.contains("clusters.json"), "{message}");
    }
    let expected = if refused.is_some() { &["one", "two"][..] } else { &["new", "one", "two"] };
    assert_eq!(shown, expected, "{refused:?}");
    let reply = call(&connection, "Prompt", &("one", "x", Options::new())).await.unwrap();
    let (text, _): (String, HashMap<String, zbus::OwnedVariant>) = reply.body().deserialize().unwrap();
    assert_eq!(text, "x");
    Outcome { refused, shown }
}

/// Every fault at every step of a start: it says what failed and why, or goes on without. `prepare` says how the state
/// directory is before each; `check` what it must be after it.
async fn start_with_every_fault(node: &mut Node, prepare: impl Fn(), check: impl Fn(&str)) {
    let mut refused = 0;
    for (call, error) in faults() {
        for step in 1.. {
            node.kill().await;
            prepare();
            let log = node.log().len();
            let mut strace = Strace::launch(node, call, step, Fault::Error(error));
            let up = node.comes_up().await;
            node.kill().await;
            let said = node.log()[log..].to_owned();
            let faults = strace.faults();
            let told = format!("{call} {step} fails with {error}: {faults:?}: {said}");
            let path = node.state_dir();
            assert!(up || (said.contains("(os error ") && said.contains(path.to_str().unwrap())), "{told}");
            refused += usize::from(!up);
            check(&told);
            if faults.is_empty() {
                assert!(up, "{told}");
                break;
            }
        }
    }
    node.restart().await;
    eprintln!("starts refused: {refused}");
    assert!(refused > 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_write_of_a_first_start_that_fails_once_is_told_and_leaves_one_identity_or_none() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    if !Strace::is_here() {
        return;
    }
    let state = node.state_dir();
    let prepare = || drop(std::fs::remove_dir_all(&state));
    let check = |told: &str| {
        let key = std::fs::read(state.join("identity.key")).ok();
        let marker = state.join("identity.pub").exists();
        assert!(key.is_some() || !marker, "a marker without a key would stop the next start: {told}");
        assert!(key.is_none_or(|key| Identity::decode(&key).is_ok()), "{told}");
    };
    start_with_every_fault(&mut node, prepare, check).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_write_of_a_later_start_that_fails_once_changes_nothing() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    if !Strace::is_here() {
        return;
    }
    for id in ["one", "two"] {
        call(&node.bus.connect().await, "Connect", &(id, Options::new())).await.unwrap();
    }
    let state = node.state_dir();
    let before = Before::of(&state);
    let check = |told: &str| {
        for (path, bytes) in &before.0 {
            assert_eq!(&std::fs::read(path).unwrap(), bytes, "{told}");
        }
        assert_eq!(remembered(&state, told), ["one", "two"]);
    };
    start_with_every_fault(&mut node, || {}, check).await;
}
