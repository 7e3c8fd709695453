//! Files that somebody damaged: the daemon says which and why, touches nothing, and makes no new identity.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn contents(state: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(state)
        .unwrap()
        .flatten()
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).unwrap_or_default()))
        // Who held it last, which each start writes, and what a start removes.
        .filter(|(name, _)| name != "lock" && !name.ends_with(".tmp"))
        .collect();
    files.sort();
    files
}

/// Starts it on damaged files: exit code 78, `says`, and nothing touched.
async fn refuses(node: &mut Node, says: &str) {
    let before = contents(&node.state_dir());
    let log = node.log().len();
    node.launch();
    assert_eq!(node.ended().await, Some(78), "{says}: {}", node.log());
    let said = node.log()[log..].to_owned();
    assert!(said.contains(says), "{says:?} is not in {said}");
    assert_eq!(contents(&node.state_dir()), before, "{says}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_damage_to_the_identity_is_mended_by_a_new_one() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    node.kill().await;
    let (key, marker) = (node.state_dir().join("identity.key"), node.state_dir().join("identity.pub"));
    let good = std::fs::read(&key).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    refuses(&mut node, "has mode 640").await;
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut other = good.clone();
    *other.last_mut().unwrap() ^= 1;
    std::fs::write(&key, &other).unwrap();
    refuses(&mut node, "identity.key").await;
    std::fs::remove_file(&key).unwrap();
    refuses(&mut node, "identity.key is gone, but identity.pub beside it says that this node had a key").await;
    std::os::unix::fs::symlink("/etc/hostname", &key).unwrap();
    refuses(&mut node, "it is no regular file").await;
    std::fs::remove_file(&key).unwrap();
    std::fs::write(&key, &good).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&marker, "12D3KooWsomebodyElse\n").unwrap();
    refuses(&mut node, "but identity.pub says 12D3KooWsomebodyElse").await;
    // The key is good, only its marker was lost.
    std::fs::remove_file(&marker).unwrap();
    node.restart().await;
    assert_eq!(std::fs::read(&key).unwrap(), good);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_clusters_that_a_newer_version_wrote_or_that_is_no_file_stops_the_start() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    node.kill().await;
    let list = node.state_dir().join("clusters.json");
    std::fs::write(&list, br#"{"schema":2,"sha256":"","later":{"anything":1}}"#).unwrap();
    refuses(&mut node, "was written by a newer version (schema 2; this one reads 1)").await;
    for damage in [&b""[..], b"{", b"\xff\xfe\0garbage", b"{\"schema\":1,\"sha256\":\"00\",\"content\":{}}"] {
        std::fs::write(&list, damage).unwrap();
        refuses(&mut node, "clusters.json is damaged").await;
    }
    std::fs::remove_file(&list).unwrap();
    std::fs::create_dir(&list).unwrap();
    refuses(&mut node, "clusters.json cannot be read: Is a directory").await;
    std::fs::remove_dir(&list).unwrap();
    node.restart().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_clusters_that_is_gone_comes_back_from_the_version_before() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    for id in ["one", "two"] {
        call(&node.bus.connect().await, "Connect", &(id, Options::new())).await.unwrap();
    }
    node.kill().await;
    std::fs::remove_file(node.state_dir().join("clusters.json")).unwrap();
    node.restart().await;
    let clusters = node.json(&["clusters"]).await;
    assert_eq!((clusters["clusters"].as_array().unwrap().len(), &clusters["clusters"][0]["id"]), (1, &Value::from("one")));
    let status = node.json(&["status"]).await;
    assert!(status["problems"][0].as_str().unwrap().contains("clusters.json was gone"), "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_configuration_stops_the_start_with_its_place_and_stays_as_it_is() {
    let Some(bus) = bus_or_skip() else { return };
    let config = bus.dir().join("opengatewayd.toml");
    std::fs::write(&config, "").unwrap();
    let mut node = Node::on(bus, Plan::loopback("a", &["--config", config.to_str().unwrap()]));
    node.ready().await; // an empty one is a good one
    node.kill().await;
    for damage in [&b"[node\nname ="[..], b"\xff\xfe\0garbage", b"state_dir = 7\n", b"[[cluster]]\nid = \"no spaces\"\n"] {
        std::fs::write(&config, damage).unwrap();
        refuses(&mut node, "opengatewayd.toml").await;
        assert_eq!(std::fs::read(&config).unwrap(), damage);
    }
    std::fs::remove_file(&config).unwrap();
    std::fs::create_dir(&config).unwrap();
    refuses(&mut node, "opengatewayd.toml").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_measurement_is_measured_again_and_one_that_cannot_be_kept_is_a_warning() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    let profile = node.state_dir().join("resources.json");
    let kept = async |node: &Node| {
        let deadline = Instant::now() + DEADLINE;
        while std::fs::read(&profile).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok()).is_none() {
            assert!(Instant::now() < deadline, "{}", node.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    kept(&node).await;
    for damage in [&b""[..], b"{\"schema\":99}garbage", b"\xff\0"] {
        node.kill().await;
        std::fs::write(&profile, damage).unwrap();
        node.restart().await;
        kept(&node).await;
    }
    node.kill().await;
    std::fs::remove_file(&profile).unwrap();
    std::fs::create_dir(&profile).unwrap();
    node.restart().await;
    let resources = node.until(&["resources"], |resources| resources["warnings"].to_string().contains("resources.json")).await;
    assert!(resources["cpu"]["logical"].as_u64().unwrap() > 0, "{resources}");
}
