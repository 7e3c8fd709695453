//! The live objects against the interface files, and the errors of bad arguments.

use super::*;

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
        (ROOT, MANAGER, include_str!("../../../dbus/org.opengateway.Gateway1.Manager.xml")),
        (ROOT, "org.opengateway.Gateway1.Models", include_str!("../../../dbus/org.opengateway.Gateway1.Models.xml")),
        (
            "/org/opengateway/Gateway1/cluster/gatewayai_2dpoc",
            "org.opengateway.Gateway1.Cluster",
            include_str!("../../../dbus/org.opengateway.Gateway1.Cluster.xml"),
        ),
        (ROOT, "org.opengateway.Gateway1.Network", include_str!("../../../dbus/org.opengateway.Gateway1.Network.xml")),
        (ROOT, "org.opengateway.Gateway1.Http", include_str!("../../../dbus/org.opengateway.Gateway1.Http.xml")),
        (job.as_str(), "org.opengateway.Gateway1.Job", include_str!("../../../dbus/org.opengateway.Gateway1.Job.xml")),
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
async fn bad_arguments_have_the_documented_names() {
    let Some(node) = Node::start("a", &[]).await else { return };
    let connection = node.bus.connect().await;
    let none = Options::new();
    let own = |name: &str| format!("{ERROR}{name}");
    let invalid = "org.freedesktop.DBus.Error.InvalidArgs".to_owned();
    let nonsense = || Options::from([("Nonsense", Variant::from(true))]);
    let named = async |method: &str, cluster: &str, options: Options<'_>| {
        call(&connection, method, &(cluster, options)).await.unwrap_err()
    };
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
    let messages = |role: &'static str, count: usize| Options::from([("Messages", Variant::from(vec![(role, "x"); count]))]);
    assert_eq!(prompt("x", messages("robot", 1)).await, invalid);
    assert_eq!(prompt("x", messages("user", 1025)).await, invalid);
    assert_eq!(prompt("x", Options::from([("Messages", Variant::from(vec!["x"]))])).await, invalid);
    assert_eq!(prompt("x", Options::from([("Messages", Variant::from("x"))])).await, invalid);
    let most = (1 << 20) - 1;
    let earlier = |bytes: usize| Options::from([("Messages", Variant::from(vec![("user", "x".repeat(bytes))]))]);
    assert_eq!(prompt("x", earlier(most + 1)).await, invalid, "together with the prompt it is one byte too much");
    for top_p in [0.0, 1.01, f64::NAN] {
        assert_eq!(prompt("x", Options::from([("TopP", Variant::from(top_p))])).await, invalid, "{top_p}");
    }
    let stop = |text: &str, count: usize| Options::from([("Stop", Variant::from(vec![text.to_owned(); count]))]);
    assert_eq!(prompt("x", stop("", 1)).await, invalid);
    assert_eq!(prompt("x", stop(&"x".repeat(257), 1)).await, invalid);
    assert_eq!(prompt("x", stop("x", 17)).await, invalid);
    for other in [("System", Variant::from("s")), ("Messages", Variant::from(vec![("user", "x")]))] {
        assert_eq!(prompt("x", Options::from([("Raw", Variant::from(true)), other])).await, invalid);
    }
    // At the limits nothing is wrong with the arguments.
    for fine in
        [messages("assistant", 1024), stop(&"x".repeat(256), 16), Options::from([("TopP", Variant::from(1.0))]), earlier(most)]
    {
        let answered = call(&connection, "Prompt", &("x", "x", fine)).await;
        assert!(answered.is_ok() || answered.as_ref().is_err_and(|(name, _)| *name != invalid), "{answered:?}");
    }
    assert_eq!(prompt("x", Options::from([("Peer", Variant::from("p")), ("Node", Variant::from("n"))])).await, invalid);
    assert_eq!(prompt(&"x".repeat((1 << 20) + 1), none).await, invalid);
    // Leaving twice.
    call(&connection, "Disconnect", &("x", Options::new())).await.unwrap();
    assert_eq!(named("Disconnect", "x", Options::new()).await.0, own("NotConnected"));
}

#[tokio::test]
async fn what_is_read_right_after_a_reply_is_fresh_and_signals_tell_the_rest() {
    let Some(node) = Node::start("a", &[]).await else { return };
    let connection = node.bus.connect().await;
    let rule = zbus::MatchRule::builder().msg_type(zbus::message::Type::Signal).sender(NAME).build().unwrap();
    let mut signals = MessageStream::for_match_rule(rule, &connection, None).await.unwrap();
    for round in 0..50 {
        let id = format!("c{}", round % 10);
        let path: OwnedObjectPath =
            call(&connection, "Connect", &(id.as_str(), Options::new())).await.unwrap().body().deserialize().unwrap();
        let shown: zbus::OwnedVariant = connection
            .call_method(
                Some(NAME),
                &path,
                Some("org.freedesktop.DBus.Properties"),
                "Get",
                &("org.opengateway.Gateway1.Cluster", "Id"),
            )
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
