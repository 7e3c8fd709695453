//! The state directory when things go wrong: full, read-only, damaged. Kills and single faults: `kills.rs`, `faults.rs`.

use std::os::unix::fs::PermissionsExt as _;

use rustix::process::Signal;

use super::*;

/// A small file system of a test's own. Unmounted at the end.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skipped("only root can mount a small file system");
            return None;
        }
        std::fs::create_dir_all(&at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs"]).arg(&at).status();
        if !mounted.is_ok_and(|status| status.success()) {
            skipped("a tmpfs cannot be mounted here");
            return None;
        }
        Some(Self(at))
    }

    /// A read-only one over it. (The lock is open, so it cannot itself become read-only.)
    fn cover(&self) {
        assert!(Command::new("mount").args(["-t", "tmpfs", "-o", "ro", "tmpfs"]).arg(&self.0).status().unwrap().success());
    }

    fn remount(&self, how: &str) {
        assert!(Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(&self.0).status().unwrap().success());
    }

    fn uncover(&self) {
        assert!(Command::new("umount").arg(&self.0).status().unwrap().success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Takes all the space that is left.
fn fill(filler: &Path) {
    let mut file = std::fs::File::create(filler).unwrap();
    while std::io::Write::write_all(&mut file, &[0; 512]).is_ok() {}
}

fn files(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(directory).unwrap().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

async fn connect(node: &Node, cluster: &str) -> Result<(), (String, String)> {
    let connection = node.bus.connect().await;
    call(&connection, "Connect", &(cluster, Options::new())).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_or_read_only_state_directory_refuses_changes_keeps_the_old_and_needs_no_restart() {
    let Some(bus) = bus_or_skip() else { return };
    let Some(small) = Small::mount(bus.dir().join("state")) else { return };
    let mut node = Node::start_on(bus, "a", &["--serve"]).await;
    connect(&node, "before").await.unwrap();
    let memory = || std::fs::read(node.state_dir().join("clusters.json")).unwrap();
    let kept = memory();
    let storage_full = format!("{ERROR}StorageFull");

    let filler = node.state_dir().join("filler");
    fill(&filler);
    let (name, message) = connect(&node, "full").await.unwrap_err();
    assert!(name == storage_full && message.contains("no space is left"), "{name}: {message}");
    let said = node.ogctl(&["connect", "full", "--wait", "0"]).await;
    assert!(said.code == 6 && said.stderr.contains(node.state_dir().to_str().unwrap()), "{said:?}");
    // Neither half joined nor half left.
    let (name, _) = {
        let connection = node.bus.connect().await;
        call(&connection, "Disconnect", &("before", Options::new())).await.unwrap_err()
    };
    assert_eq!(name, storage_full);
    let clusters = node.json(&["clusters"]).await;
    assert_eq!(clusters["clusters"].as_array().unwrap().len(), 1, "{clusters}");
    assert_eq!(
        (clusters["clusters"][0]["id"].as_str(), clusters["clusters"][0]["joined"].as_bool()),
        (Some("before"), Some(true))
    );
    assert_eq!(memory(), kept);
    // Prompts go on.
    assert_eq!(node.ogctl(&["prompt", "x"]).await.stdout, "x\n");
    std::fs::remove_file(&filler).unwrap();
    connect(&node, "again").await.unwrap();

    let kept = memory();
    small.cover();
    let (name, message) = connect(&node, "readonly").await.unwrap_err();
    assert!(name == storage_full && message.contains("the state directory cannot be written"), "{name}: {message}");
    small.uncover();
    assert_eq!(memory(), kept);
    connect(&node, "writable").await.unwrap();
    assert!(files(&node.state_dir()).iter().all(|name| !name.ends_with(".tmp")), "{:?}", files(&node.state_dir()));
    node.signal(Signal::KILL);
    node.ended().await;
    node.restart().await;
    let clusters = node.json(&["clusters"]).await;
    let ids: Vec<&str> = clusters["clusters"].as_array().unwrap().iter().map(|cluster| cluster["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["again", "before", "writable"]);
    drop(node);
    drop(small);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_kept_is_private_and_nobody_else_writes_it() {
    let Some(node) = Node::start("a", &[]).await else { return };
    connect(&node, "x").await.unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&node.state_dir()), 0o700);
    for name in ["identity.key", "identity.pub", "clusters.json"] {
        assert_eq!(mode(&node.state_dir().join(name)), 0o600, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_memory_is_kept_and_told_and_stops_the_start_only_without_a_version_before() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    connect(&node, "one").await.unwrap();
    connect(&node, "two").await.unwrap();
    node.signal(Signal::KILL);
    node.ended().await;
    let memory = node.state_dir().join("clusters.json");
    std::fs::write(&memory, b"{ damaged").unwrap();
    node.restart().await;
    // The version before is used; what was damaged is kept, and status says so.
    let clusters = node.json(&["clusters"]).await;
    assert_eq!((clusters["clusters"].as_array().unwrap().len(), &clusters["clusters"][0]["id"]), (1, &Value::from("one")));
    let status = node.json(&["status"]).await;
    assert!(status["problems"][0].as_str().unwrap().contains("clusters.json was damaged"), "{status}");
    let aside = files(&node.state_dir()).into_iter().find(|name| name.contains("corrupt")).unwrap();
    assert_eq!(std::fs::read(node.state_dir().join(aside)).unwrap(), b"{ damaged");
    node.signal(Signal::KILL);
    node.ended().await;
    // Both damaged: nothing is guessed and nothing is touched.
    std::fs::write(&memory, b"").unwrap();
    std::fs::write(node.state_dir().join("clusters.json.prev"), b"{}").unwrap();
    node.launch();
    assert_eq!(node.ended().await, Some(78));
    assert!(node.log().contains("move both away"), "{}", node.log());
    assert_eq!(std::fs::read(&memory).unwrap(), b"");
    assert_eq!(std::fs::read(node.state_dir().join("clusters.json.prev")).unwrap(), b"{}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connecting_again_loses_neither_address_nor_role_and_memory_has_a_limit() {
    let Some(mut node) = Node::start("a", &["--serve"]).await else {
        return;
    };
    let address = "/ip4/127.0.0.1/udp/9/quic-v1";
    assert_eq!(node.ogctl(&["connect", "room", "--consume", "--bootstrap", address, "--wait", "0"]).await.code, 0);
    assert_eq!(node.ogctl(&["connect", "room", "--wait", "0"]).await.code, 0);
    let role = async |node: &Node| node.json(&["clusters"]).await["clusters"][0]["role"].clone();
    assert_eq!(role(&node).await, "consume");
    let memory = std::fs::read_to_string(node.state_dir().join("clusters.json")).unwrap();
    assert!(memory.contains(address), "{memory}");
    node.signal(Signal::KILL);
    node.ended().await;
    node.restart().await;
    assert_eq!(role(&node).await, "consume");
    // Not after the next start, though it was to be before.
    let connection = node.bus.connect().await;
    let once = Options::from([("AutoConnect", Variant::from(false))]);
    call(&connection, "Connect", &("room", once)).await.unwrap();
    let clusters = node.json(&["clusters"]).await;
    assert_eq!(
        (&clusters["clusters"][0]["joined"], &clusters["clusters"][0]["auto_connect"]),
        (&Value::from(true), &Value::from(false))
    );

    let many = vec![address; 65];
    let (name, _) = call(&connection, "Connect", &("x", Options::from([("Bootstrap", Variant::from(many))]))).await.unwrap_err();
    assert_eq!(name, "org.freedesktop.DBus.Error.InvalidArgs");
    for number in 0..63 {
        let id = format!("c{number}");
        call(&connection, "Connect", &(id.as_str(), Options::new())).await.unwrap();
        call(&connection, "Disconnect", &(id.as_str(), Options::new())).await.unwrap();
    }
    let (name, message) = call(&connection, "Connect", &("one-more", Options::new())).await.unwrap_err();
    assert!(name == format!("{ERROR}TooManyClusters") && message.contains("--forget"), "{name}: {message}");
    call(&connection, "Disconnect", &("c0", Options::from([("Forget", Variant::from(true))]))).await.unwrap();
    call(&connection, "Connect", &("one-more", Options::new())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_without_space_works_and_one_on_a_read_only_directory_says_why_not() {
    let Some(bus) = bus_or_skip() else { return };
    let Some(small) = Small::mount(bus.dir().join("state")) else { return };
    let mut node = Node::start_on(bus, "a", &["--serve"]).await;
    connect(&node, "kept").await.unwrap();
    let key = std::fs::read(node.state_dir().join("identity.key")).unwrap();
    node.kill().await;
    let filler = node.state_dir().join("filler");
    fill(&filler);
    node.restart().await;
    assert_eq!(node.ogctl(&["prompt", "x"]).await.stdout, "x\n");
    let (name, _) = connect(&node, "refused").await.unwrap_err();
    assert_eq!(name, format!("{ERROR}StorageFull"));
    std::fs::remove_file(&filler).unwrap();
    connect(&node, "again").await.unwrap();
    node.kill().await;

    small.remount("ro");
    node.launch();
    assert_eq!(node.ended().await, Some(1), "a restart may mend it: {}", node.log());
    let said = node.log();
    let path = node.state_dir();
    assert!(said.contains("Read-only file system") && said.contains(path.to_str().unwrap()), "{said}");
    small.remount("rw");
    node.restart().await;
    assert_eq!(std::fs::read(node.state_dir().join("identity.key")).unwrap(), key);
    assert_eq!(node.json(&["clusters"]).await["clusters"].as_array().unwrap().len(), 2);

    // No space for the first start either: nothing half is left, and it starts when there is some.
    node.kill().await;
    // That of the models is empty.
    std::fs::remove_dir(node.state_dir().join("models")).unwrap();
    for name in files(&node.state_dir()) {
        std::fs::remove_file(node.state_dir().join(name)).unwrap();
    }
    fill(&filler);
    let log = node.log().len();
    node.launch();
    assert_eq!(node.ended().await, Some(1), "a restart may mend it: {}", node.log());
    assert!(node.log()[log..].contains("No space left on device"), "{}", node.log());
    let left = files(&node.state_dir());
    assert!(!left.iter().any(|name| name.starts_with("identity")), "{left:?}");
    std::fs::remove_file(&filler).unwrap();
    node.restart().await;
    drop(node);
    drop(small);
}
