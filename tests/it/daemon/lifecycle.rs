//! Start, reload, stop, and what is remembered from one run to the next.

use super::*;

#[tokio::test]
async fn a_second_daemon_on_the_same_bus_or_state_is_refused_with_a_sentence() {
    let Some(node) = Node::start("a", &[]).await else { return };
    let other = tempfile::tempdir().unwrap();
    let run = |state: &Path| {
        let output = Command::new(env!("CARGO_BIN_EXE_opengatewayd"))
            .args([
                "--bus",
                node.bus.address(),
                "--listen",
                "/ip4/127.0.0.1/udp/0/quic-v1",
                "--no-mdns",
                "--no-discover",
                "--state-dir",
            ])
            .arg(state)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = run(other.path());
    assert!(code == Some(1) && said.contains("another opengatewayd has the name"), "{said}");
    let (code, said) = run(&node.state_dir());
    assert!(code == Some(1) && said.contains("in use by another opengatewayd"), "{said}");
    assert_eq!(node.ogctl(&["status"]).await.code, 0);
}

#[tokio::test]
async fn a_damaged_identity_stops_the_start_with_78_and_stays_as_it_is() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    node.signal(rustix::process::Signal::TERM);
    assert_eq!(node.ended().await, Some(0));
    let key = node.state_dir().join("identity.key");
    let good = std::fs::read(&key).unwrap();
    for damage in [&good[..10], b"", b"nonsense"] {
        std::fs::write(&key, damage).unwrap();
        node.launch();
        assert_eq!(node.ended().await, Some(78));
        assert_eq!(std::fs::read(&key).unwrap(), damage);
        assert!(node.log().contains("identity.key is damaged"), "{}", node.log());
    }
    std::fs::write(&key, good).unwrap();
    node.restart().await;
}

#[tokio::test]
async fn a_mistake_in_the_configuration_stops_the_start_and_not_a_running_daemon() {
    let Some(bus) = bus_or_skip() else { return };
    let config = bus.dir().join("opengatewayd.toml");
    std::fs::write(&config, "[network]\nmnds = false\n").unwrap();
    let plan = Plan::loopback("a", &["--config", config.to_str().unwrap()]);
    let mut node = Node::on(bus, plan);
    assert_eq!(node.ended().await, Some(78));
    let log = node.log();
    assert!(log.contains("opengatewayd.toml:2:1") && log.contains("did you mean \"mdns\""), "{log}");
    std::fs::write(&config, "").unwrap();
    node.restart().await;
    std::fs::write(&config, "[serve\n").unwrap();
    let connection = node.bus.connect().await;
    assert_eq!(call(&connection, "Reload", &()).await.unwrap_err().0, format!("{ERROR}InvalidConfiguration"));
    std::fs::write(&config, "[serve]\nenabled = false\n[[cluster]]\nid = \"home\"\n").unwrap();
    call(&connection, "Reload", &()).await.unwrap();
    node.until(&["clusters"], |clusters| clusters["clusters"][0]["id"] == "home").await;
    assert_eq!(node.json(&["status"]).await["sharing"], false);
}

#[tokio::test]
async fn joined_clusters_are_joined_again_and_left_ones_are_not() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    for id in ["keep", "leave", "forget"] {
        assert_eq!(node.ogctl(&["connect", id, "--wait", "0"]).await.code, 0);
    }
    assert_eq!(node.ogctl(&["disconnect", "leave"]).await.code, 0);
    assert_eq!(node.ogctl(&["disconnect", "forget", "--forget"]).await.code, 0);
    // As the power goes: nothing was acknowledged that is not on the disk.
    node.signal(rustix::process::Signal::KILL);
    node.ended().await;
    node.restart().await;
    let clusters = node.json(&["clusters"]).await;
    let states: BTreeSet<(String, String)> = clusters["clusters"]
        .as_array()
        .unwrap()
        .iter()
        .map(|cluster| (cluster["id"].as_str().unwrap().to_owned(), cluster["state"].as_str().unwrap().to_owned()))
        .collect();
    let expected = [("keep", "discovering"), ("leave", "disconnected")].map(|(id, state)| (id.to_owned(), state.to_owned()));
    assert_eq!(states, BTreeSet::from(expected));
}

#[tokio::test]
async fn leaving_from_two_sides_at_once_is_leaving_and_no_stop() {
    let Some(node) = Node::start("a", &[]).await else { return };
    let connection = node.bus.connect().await;
    for round in 0..20 {
        call(&connection, "Connect", &("room", Options::new())).await.unwrap();
        let body = ("room", Options::new());
        let (one, two) = tokio::join!(call(&connection, "Disconnect", &body), call(&connection, "Disconnect", &body));
        for left in [one, two] {
            // The later one waits for the same end, or comes when it is over.
            assert!(left.is_ok() || left.as_ref().unwrap_err().0 == format!("{ERROR}NotConnected"), "{round}: {left:?}");
        }
    }
}

#[tokio::test]
async fn a_lost_bus_ends_the_daemon_for_systemd_to_start_it_again() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    node.bus.signal(rustix::process::Signal::KILL);
    assert_eq!(node.ended().await, Some(1));
    assert!(node.log().contains("the connection to the bus is lost"), "{}", node.log());
}

#[tokio::test]
async fn a_reload_makes_no_consumer_serve_and_brings_back_nothing_that_was_left() {
    let Some(bus) = bus_or_skip() else { return };
    let config = bus.dir().join("opengatewayd.toml");
    let quiet = "[[cluster]]\nid = \"quiet\"\nserve = false\n[[cluster]]\nid = \"left\"\n";
    std::fs::write(&config, quiet).unwrap();
    let node = Node::start_on(bus, "a", &["--config", config.to_str().unwrap()]).await;
    assert_eq!(node.ogctl(&["connect", "mine", "--consume", "--wait", "0"]).await.code, 0);
    assert_eq!(node.ogctl(&["connect", "open", "--wait", "0"]).await.code, 0);
    assert_eq!(node.ogctl(&["disconnect", "left"]).await.code, 0);
    let roles = |clusters: &Value| {
        let list = clusters["clusters"].as_array().unwrap().iter();
        list.map(|cluster| {
            format!("{}:{}:{}", cluster["id"].as_str().unwrap(), cluster["state"].as_str().unwrap(), cluster["role"])
        })
        .collect::<BTreeSet<_>>()
    };
    let are = async |expected: &[&str]| {
        let expected: BTreeSet<String> = expected.iter().map(|&line| line.to_owned()).collect();
        node.until(&["clusters"], |clusters| roles(clusters) == expected).await;
    };
    let mine = ["left:disconnected:null", "mine:discovering:\"consume\"", "quiet:discovering:\"consume\""];
    are(&[&mine[..], &["open:discovering:\"serve\""]].concat()).await;
    let connection = node.bus.connect().await;
    let reload = async |text: String| {
        std::fs::write(&config, text).unwrap();
        call(&connection, "Reload", &()).await.unwrap();
    };
    // Another limit on what is lent is no consent, and a new cluster no reason to come back to one that was left.
    reload(format!("[serve]\nmemory_gb = 4.0\n{quiet}[[cluster]]\nid = \"new\"\n")).await;
    are(&[&mine[..], &["open:discovering:\"serve\"", "new:discovering:\"serve\""]].concat()).await;
    // Off for this machine: who was told nothing else follows.
    reload(format!("[serve]\nenabled = false\n{quiet}[[cluster]]\nid = \"new\"\n")).await;
    are(&[&mine[..], &["open:discovering:\"consume\"", "new:discovering:\"consume\""]].concat()).await;
    // A word about one cluster, and one that is gone from the file.
    reload(format!("[models]\ndirectory = \"/models\"\n{}", quiet.replace("serve = false", "serve = true"))).await;
    are(&["left:disconnected:null", "mine:discovering:\"consume\"", "quiet:discovering:\"serve\"", "open:discovering:\"serve\""])
        .await;
    let says_restart = async || {
        let status = node.json(&["status"]).await;
        status["problems"].as_array().unwrap().iter().any(|problem| problem.as_str().unwrap().contains("[models]"))
    };
    assert!(says_restart().await);
    call(&connection, "Reload", &()).await.unwrap();
    assert!(says_restart().await, "reading the same again does not make it true");
}

#[tokio::test]
async fn a_cluster_that_could_not_be_joined_is_joined_when_a_reload_mends_it_and_told_once_until_then() {
    let Some(bus) = bus_or_skip() else { return };
    let config = bus.dir().join("opengatewayd.toml");
    let with = |address: &str| format!("[[cluster]]\nid = \"room\"\nbootstrap = [\"{address}\"]\n");
    std::fs::write(&config, with("/ip4/192.0.2.1")).unwrap();
    let node = Node::start_on(bus, "a", &["--config", config.to_str().unwrap()]).await;
    let told = async || {
        let status = node.json(&["status"]).await;
        let problems = status["problems"].as_array().unwrap().iter().filter_map(Value::as_str);
        problems.filter(|problem| problem.contains("cluster room is not joined")).count()
    };
    assert_eq!(told().await, 1);
    let connection = node.bus.connect().await;
    std::fs::write(&config, with("/ip4/192.0.2.2")).unwrap();
    call(&connection, "Reload", &()).await.unwrap();
    assert_eq!(told().await, 1, "another mistake replaces the first");
    std::fs::write(&config, "[[cluster]]\nid = \"room\"\n").unwrap();
    call(&connection, "Reload", &()).await.unwrap();
    assert_eq!(told().await, 0);
    node.until(&["clusters"], |clusters| clusters["clusters"][0]["state"] == "discovering").await;
}
