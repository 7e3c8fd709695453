//! The real `opengatewayd` on private buses of its own, on loopback, asked by the real `ogctl` and by raw D-Bus calls.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use zbus::{Connection, Message, MessageStream, OwnedObjectPath, Variant};

use crate::common::bus::{bus_or_skip, ogctl_on};
use crate::common::node::{DEADLINE, NAME, Node, Plan};

const ROOT: &str = "/org/opengateway/Gateway1";
const MANAGER: &str = "org.opengateway.Gateway1.Manager";
const ERROR: &str = "org.opengateway.Gateway1.Error.";

async fn call<B>(connection: &Connection, method: &str, body: &B) -> Result<Message, (String, String)>
where
    B: serde::Serialize + zbus::wire::DynamicType + Sync,
{
    match tokio::time::timeout(DEADLINE, connection.call_method(Some(NAME), ROOT, Some(MANAGER), method, body)).await.unwrap() {
        Ok(reply) => Ok(reply),
        Err(zbus::Error::MethodError(name, message, _)) => Err((name.to_string(), message.unwrap_or_default())),
        // The standard names come as a type of their own.
        Err(zbus::Error::FDO(error)) => {
            use zbus::DBusError as _;
            Err((error.name().to_string(), error.description().unwrap_or_default().to_owned()))
        }
        Err(error) => panic!("{method}: {error}"),
    }
}

type Options<'a> = HashMap<&'a str, Variant<'a>>;

/// Members of an interface with names, types, directions, and how changes are told.
fn members(xml: &str, interface: &str) -> BTreeSet<String> {
    let node = zbus_xml::Node::from_reader(xml.as_bytes()).unwrap();
    let found = node.interfaces().iter().find(|known| known.name() == interface).unwrap_or_else(|| panic!("no {interface}"));
    let arg = |arg: &zbus_xml::Arg<'_>, default: &str| {
        let direction = arg.direction().map_or_else(|| default.to_owned(), |direction| format!("{direction:?}").to_lowercase());
        format!("{}:{}:{direction}", arg.name().unwrap_or("?"), arg.ty())
    };
    let mut members = BTreeSet::new();
    for method in found.methods() {
        let args: Vec<String> = method.args().iter().map(|found| arg(found, "in")).collect();
        members.insert(format!("method {}({})", method.name(), args.join(", ")));
    }
    for signal in found.signals() {
        let args: Vec<String> = signal.args().iter().map(|found| arg(found, "out")).collect();
        members.insert(format!("signal {}({})", signal.name(), args.join(", ")));
    }
    for property in found.properties() {
        let told = property
            .annotations()
            .iter()
            .find(|annotation| annotation.name() == "org.freedesktop.DBus.Property.EmitsChangedSignal")
            .map_or("true", |annotation| annotation.value());
        members.insert(format!("property {}:{} {told}", property.name(), property.ty()));
    }
    members
}

#[tokio::test]
async fn live_objects_are_those_of_the_interface_files() {
    let Some(node) = Node::start("a", &["--connect", "gatewayai-poc"]).await else { return };
    let connection = node.bus.connect().await;
    let (job, _pipe): (OwnedObjectPath, zbus::OwnedFd) =
        call(&connection, "StartPrompt", &("", "x", Options::new())).await.unwrap().body().deserialize().unwrap();
    for (path, name, file) in [
        (ROOT, MANAGER, include_str!("../../dbus/org.opengateway.Gateway1.Manager.xml")),
        (
            "/org/opengateway/Gateway1/cluster/gatewayai_2dpoc",
            "org.opengateway.Gateway1.Cluster",
            include_str!("../../dbus/org.opengateway.Gateway1.Cluster.xml"),
        ),
        (job.as_str(), "org.opengateway.Gateway1.Job", include_str!("../../dbus/org.opengateway.Gateway1.Job.xml")),
    ] {
        let live: String = connection
            .call_method(Some(NAME), path, Some("org.freedesktop.DBus.Introspectable"), "Introspect", &())
            .await
            .unwrap()
            .body()
            .deserialize()
            .unwrap();
        assert_eq!(members(&live, name), members(file, name), "{name}");
    }
}

#[tokio::test]
async fn three_daemons_one_cluster_one_prompt() {
    let Some(a) = Node::start("NodeA", &["--serve", "--connect", "gatewayai-poc"]).await else { return };
    let boot = a.address().await;
    let b = Node::start("NodeB", &["--serve", "--connect", "gatewayai-poc", "--bootstrap", &boot]).await.unwrap();
    b.sees(&["NodeA"]).await;
    let c = Node::start("NodeC", &["--consume", "--connect", "gatewayai-poc", "--bootstrap", &boot]).await.unwrap();
    c.sees(&["NodeA", "NodeB"]).await;
    let said = c.ogctl(&["prompt", "What is 2+2?"]).await;
    assert_eq!((said.code, said.stdout.as_str()), (0, "What is 2+2?\n"), "{said:?}");
    assert!(said.stderr.contains("served by Node"), "{said:?}");
    let said = c.ogctl(&["prompt", "x", "--node", "NodeB"]).await;
    assert!(said.stderr.contains("served by NodeB"), "{said:?}");
    let said = c.ogctl(&["prompt", "x", "--node", "NodeX"]).await;
    assert_eq!(said.code, 5, "{said:?}");
    let said = c.ogctl(&["prompt", "x", "--model", "nonsense"]).await;
    assert!(said.code == 5 && said.stderr.contains("echo"), "{said:?}");
    assert!(a.log().contains("joined cluster gatewayai-poc"), "{}", a.log());
    assert!(c.log().contains("peers: NodeA, NodeB"), "{}", c.log());
}

#[tokio::test]
async fn a_prompt_that_nobody_can_serve_fails_at_once_with_a_reason() {
    let Some(node) = Node::start("alone", &["--consume", "--connect", "gatewayai-poc"]).await else { return };
    let said = node.ogctl(&["prompt", "x"]).await;
    assert!(said.code == 5 && said.stderr.contains("no other node is in cluster gatewayai-poc"), "{said:?}");
    let said = node.ogctl(&["prompt", "x", "--local-first"]).await;
    assert_eq!((said.code, said.stdout.as_str()), (0, "x\n"), "{said:?}");
    let error = node.json(&["prompt", "x"]).await;
    assert_eq!(error["error"]["name"], "NoEligiblePeer");
}

#[tokio::test]
async fn bad_arguments_have_the_documented_names() {
    let Some(node) = Node::start("a", &[]).await else { return };
    let connection = node.bus.connect().await;
    let none = Options::new();
    let own = |name: &str| format!("{ERROR}{name}");
    let invalid = "org.freedesktop.DBus.Error.InvalidArgs".to_owned();
    let nonsense = || Options::from([("Nonsense", Variant::from(true))]);
    let named = async |method: &str, cluster: &str, options: Options<'_>| call(&connection, method, &(cluster, options)).await.unwrap_err();
    assert_eq!(named("Connect", "../x", none.clone()).await.0, own("InvalidClusterId"));
    assert_eq!(named("Connect", &"x".repeat(65), none.clone()).await.0, own("InvalidClusterId"));
    assert_eq!(named("Connect", "x", nonsense()).await.0, invalid);
    let wrong_type = Options::from([("Serve", Variant::from("yes"))]);
    let (name, message) = named("Connect", "x", wrong_type).await;
    assert!(name == invalid && message.contains("Serve"), "{message}");
    let bad_address = Options::from([("Bootstrap", Variant::from(vec!["1.2.3.4"]))]);
    assert_eq!(named("Connect", "x", bad_address).await.0, invalid);
    assert_eq!(named("Disconnect", "x", none.clone()).await.0, own("NoSuchCluster"));
    assert_eq!(named("Disconnect", "x", nonsense()).await.0, invalid);
    assert_eq!(named("ListPeers", "x", none.clone()).await.0, own("NoSuchCluster"));
    assert_eq!(named("ListPeers", "", none.clone()).await.0, own("NotConnected"));
    assert_eq!(named("ListPeers", "x", Options::from([("Limit", Variant::from(513_u32))])).await.0, invalid);
    for method in ["GetResources", "ListEligible"] {
        assert_eq!(call(&connection, method, &(nonsense(),)).await.unwrap_err().0, invalid, "{method}");
    }
    let tier = Options::from([("Tier", Variant::from("GPT-9"))]);
    assert_eq!(call(&connection, "ListEligible", &(tier,)).await.unwrap_err().0, invalid);
    call(&connection, "Connect", &("x", none.clone())).await.unwrap();
    let prompt = async |text: &str, options: Options<'_>| call(&connection, "Prompt", &("x", text, options)).await.unwrap_err().0;
    assert_eq!(prompt("x", nonsense()).await, invalid);
    assert_eq!(prompt("x", Options::from([("Temperature", Variant::from(2.5))])).await, invalid);
    assert_eq!(prompt("x", Options::from([("Temperature", Variant::from(f64::NAN))])).await, invalid);
    assert_eq!(prompt("x", Options::from([("MaxTokens", Variant::from(0_u32))])).await, invalid);
    assert_eq!(prompt("x", Options::from([("Timeout", Variant::from(3_600_000_001_u64))])).await, invalid);
    assert_eq!(prompt("x", Options::from([("Peer", Variant::from("p")), ("Node", Variant::from("n"))])).await, invalid);
    assert_eq!(prompt(&"x".repeat((1 << 20) + 1), none).await, invalid);
    // Leaving twice.
    call(&connection, "Disconnect", &("x", Options::new())).await.unwrap();
    assert_eq!(named("Disconnect", "x", Options::new()).await.0, own("NotConnected"));
}

#[tokio::test]
async fn a_second_daemon_on_the_same_bus_or_state_is_refused_with_a_sentence() {
    let Some(node) = Node::start("a", &[]).await else { return };
    let other = tempfile::tempdir().unwrap();
    let run = |state: &Path| {
        let output = Command::new(env!("CARGO_BIN_EXE_opengatewayd"))
            .args(["--bus", node.bus.address(), "--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--no-mdns", "--state-dir"])
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
async fn serving_a_tier_needs_the_tier_and_consuming_does_not() {
    let Some(node) = Node::start("a", &[]).await else { return };
    let eligible = node.json(&["eligible"]).await;
    let tiers = eligible["tiers"].as_array().unwrap();
    let Some(beyond) = tiers.iter().find(|tier| tier["eligible"] == false) else {
        eprintln!("SKIPPED: this machine qualifies for every tier");
        return;
    };
    let name = beyond["tier"].as_str().or(beyond["name"].as_str()).or(beyond["id"].as_str()).unwrap();
    let said = node.ogctl(&["connect", name, "--serve", "--wait", "0"]).await;
    assert!(said.code == 6 && said.stderr.contains("missing"), "{said:?}");
    assert_eq!(node.ogctl(&["connect", name, "--consume", "--wait", "0"]).await.code, 0);
}

#[tokio::test]
async fn a_lost_bus_ends_the_daemon_for_systemd_to_start_it_again() {
    let Some(mut node) = Node::start("a", &[]).await else { return };
    node.bus.signal(rustix::process::Signal::KILL);
    assert_eq!(node.ended().await, Some(1));
    assert!(node.log().contains("the connection to the bus is lost"), "{}", node.log());
}

#[tokio::test]
async fn a_killed_server_is_gone_within_fifteen_seconds_and_a_stopped_one_at_once() {
    let Some(a) = Node::start("NodeA", &["--serve", "--connect", "gatewayai-poc"]).await else { return };
    let boot = a.address().await;
    let b = Node::start("NodeB", &["--serve", "--connect", "gatewayai-poc", "--bootstrap", &boot]).await.unwrap();
    let c = Node::start("NodeC", &["--consume", "--connect", "gatewayai-poc", "--bootstrap", &boot]).await.unwrap();
    c.sees(&["NodeA", "NodeB"]).await;
    let begun = Instant::now();
    b.signal(rustix::process::Signal::TERM);
    c.sees(&["NodeA"]).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let begun = Instant::now();
    a.signal(rustix::process::Signal::KILL);
    c.sees(&[]).await;
    assert!(begun.elapsed() < Duration::from_secs(16), "{:?}", begun.elapsed());
    let said = c.ogctl(&["prompt", "x"]).await;
    assert_eq!(said.code, 5, "{said:?}");
}

#[tokio::test]
async fn what_is_read_right_after_a_reply_is_fresh_and_signals_tell_the_rest() {
    let Some(node) = Node::start("a", &[]).await else { return };
    let connection = node.bus.connect().await;
    let rule = zbus::MatchRule::builder().msg_type(zbus::message::Type::Signal).sender(NAME).build().unwrap();
    let mut signals = MessageStream::for_match_rule(rule, &connection, None).await.unwrap();
    for round in 0..50 {
        let id = format!("c{}", round % 10);
        let path: OwnedObjectPath = call(&connection, "Connect", &(id.as_str(), Options::new())).await.unwrap().body().deserialize().unwrap();
        let shown: zbus::OwnedVariant = connection
            .call_method(Some(NAME), &path, Some("org.freedesktop.DBus.Properties"), "Get", &("org.opengateway.Gateway1.Cluster", "Id"))
            .await
            .unwrap_or_else(|error| panic!("{path}: {error}"))
            .body()
            .deserialize()
            .unwrap();
        assert_eq!(String::try_from(shown).unwrap(), id);
    }
    let changed = async {
        use futures::StreamExt as _;
        while let Some(Ok(signal)) = signals.next().await {
            if signal.header().member().is_some_and(|member| member.as_str() == "ClusterStateChanged") {
                return true;
            }
        }
        false
    };
    assert!(tokio::time::timeout(DEADLINE, changed).await.unwrap());
}

#[tokio::test]
async fn no_text_of_a_prompt_is_in_a_log_a_signal_or_the_state() {
    const CANARY: &str = "canary-8c1f";
    let Some(a) = Node::start("NodeA", &["--serve", "--connect", "gatewayai-poc", "--log", "trace"]).await else { return };
    let boot = a.address().await;
    let args = ["--consume", "--connect", "gatewayai-poc", "--bootstrap", &boot, "--log", "trace"];
    let c = Node::start("NodeC", &args).await.unwrap();
    c.sees(&["NodeA"]).await;
    // A monitor sees every message of the bus; only the call may hold the text, and the pipe is no message.
    let monitor = c.bus.connect().await;
    monitor
        .call_method(
            Some("org.freedesktop.DBus"),
            "/org/freedesktop/DBus",
            Some("org.freedesktop.DBus.Monitoring"),
            "BecomeMonitor",
            &(vec!["type='signal'", "type='error'", "type='method_return'"], 0_u32),
        )
        .await
        .unwrap();
    let mut messages = MessageStream::from(&monitor);
    for _ in 0..3 {
        let said = c.ogctl(&["prompt", CANARY]).await;
        assert_eq!(said.stdout.trim(), CANARY, "{said:?}");
    }
    let said = c.ogctl(&["prompt", CANARY, "--model", "nonsense"]).await;
    assert!(said.code == 5 && !said.stderr.contains(CANARY), "{said:?}");
    let seen = async {
        use futures::StreamExt as _;
        while let Some(Ok(message)) = messages.next().await {
            let bytes = message.data().to_vec();
            assert!(!bytes.windows(CANARY.len()).any(|window| window == CANARY.as_bytes()), "{message}");
        }
    };
    let _ = tokio::time::timeout(Duration::from_millis(300), seen).await;
    for node in [&a, &c] {
        assert!(node.log().len() > 1000, "the log is at trace level");
        assert!(!node.log().contains(CANARY));
        for entry in std::fs::read_dir(node.state_dir()).unwrap().flatten() {
            let bytes = std::fs::read(entry.path()).unwrap_or_default();
            assert!(!String::from_utf8_lossy(&bytes).contains(CANARY), "{entry:?}");
        }
    }
}

#[tokio::test]
async fn another_user_may_read_and_change_nothing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can become another user");
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI runs as root");
        return;
    }
    let Some(node) = Node::start("a", &["--connect", "gatewayai-poc"]).await else { return };
    use std::os::unix::fs::PermissionsExt as _;
    for path in [node.bus.dir().to_owned(), node.bus.dir().join("socket")] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    // The program must be where that user can read it.
    let copy = node.bus.dir().join("ogctl");
    std::fs::copy(env!("CARGO_BIN_EXE_ogctl"), &copy).unwrap();
    let other = |args: &[&str]| {
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&copy)
            .args(["--bus", node.bus.address()])
            .args(args)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = other(&["status"]);
    if said.contains("bus") && code == Some(8) {
        eprintln!("SKIPPED: this bus takes its own user alone: {said}");
        return;
    }
    assert_eq!(code, Some(0), "{said}");
    for args in [&["connect", "x", "--wait", "0"][..], &["disconnect", "gatewayai-poc"], &["prompt", "x"]] {
        let (code, said) = other(args);
        assert!(code == Some(4) && said.contains("org.opengateway.gateway1."), "{args:?}: {said}");
    }
    assert_eq!(node.json(&["clusters"]).await["clusters"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_caller_that_closes_its_stream_or_leaves_frees_the_slot() {
    // A server that never answers: its only slot is held until somebody lets go.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let (gone, mut closed) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = silent.accept().await {
            let gone = gone.clone();
            tokio::spawn(crate::openai::never_answers(stream, gone));
        }
    });
    let Some(bus) = bus_or_skip() else { return };
    let config = bus.dir().join("c.toml");
    std::fs::write(&config, format!("[[backend]]\nkind = \"openai\"\nurl = \"http://127.0.0.1:{port}/v1\"\nslots = 1\n")).unwrap();
    let plan = Plan::loopback("a", &["--config", config.to_str().unwrap(), "--connect", "gatewayai-poc"]);
    let mut node = Node::on(bus, plan);
    node.ready().await;
    node.until(&["status"], |status| status["backend"].as_str().is_some_and(|name| name.starts_with("openai"))).await;
    for how in ["interrupt", "kill", "cancel"] {
        let mut child = ogctl_on(&node.bus, &["prompt", "x", "--model", "slow"]).spawn().unwrap();
        let jobs = node.until(&["jobs"], |jobs| jobs["jobs"].as_array().is_some_and(|jobs| jobs.iter().any(|job| job["state"] == "queued"))).await;
        let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
        match how {
            "interrupt" => {
                rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
                assert_eq!(child.wait().await.unwrap().code(), Some(130));
            }
            "kill" => child.kill().await.unwrap(),
            _ => {
                let id = jobs["jobs"].as_array().unwrap().iter().find(|job| job["state"] == "queued").unwrap()["id"].as_u64().unwrap();
                let connection = node.bus.connect().await;
                let path = format!("/org/opengateway/Gateway1/job/{id}");
                connection.call_method(Some(NAME), path, Some("org.opengateway.Gateway1.Job"), "Cancel", &()).await.unwrap();
                assert_eq!(child.wait().await.unwrap().code(), Some(1));
            }
        }
        tokio::time::timeout(Duration::from_secs(5), closed.recv()).await.unwrap_or_else(|_| panic!("{how}: the upstream is still connected"));
    }
}
