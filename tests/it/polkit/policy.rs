//! The bus policy, on a bus that obeys it.

use zbus::fdo::RequestNameFlags;

use super::*;

const DENIED: &str = "org.freedesktop.DBus.Error.AccessDenied";
const LOG_CONTROL: &str = "/org/freedesktop/LogControl1";

/// Sets the log level through the bus.
async fn set_level(connection: &Connection) -> Result<Message, (String, String)> {
    let body = ("org.freedesktop.LogControl1", "LogLevel", Variant::from("info"));
    ask(connection, LOG_CONTROL, "org.freedesktop.DBus.Properties", "Set", &body, Ask::MayNot).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_service_has_its_name_and_only_root_its_log_level() {
    let Some(system) = SystemBus::start(&["--connect", "gatewayai-poc"], "").await else { return };
    for uid in [ALICE, SERVICE] {
        let (name, message) = set_level(&system.connect(uid).await).await.unwrap_err();
        assert_eq!(name, DENIED, "{uid}: {message}");
    }
    set_level(&system.connect(0).await).await.unwrap();
    // What is there for everybody.
    let alice = system.connect(ALICE).await;
    for path in [ROOT, "/org/opengateway/Gateway1/cluster/gatewayai_2dpoc"] {
        for (interface, method) in [("org.freedesktop.DBus.Introspectable", "Introspect"), ("org.freedesktop.DBus.Peer", "Ping")]
        {
            ask(&alice, path, interface, method, &(), Ask::MayNot).await.unwrap();
        }
    }
    // And what is for nobody but root.
    let (name, _) = ask(&alice, ROOT, "org.opengateway.Gateway1.Later", "Anything", &(), Ask::MayNot).await.unwrap_err();
    assert_eq!(name, DENIED);

    let Some(empty) = SystemBus::without_polkit("").await else { return };
    for (uid, may) in [(ALICE, false), (BOB, false), (SERVICE, true), (0, true)] {
        let owned = empty.connect(uid).await.request_name_with_flags(NAME, RequestNameFlags::DO_NOT_QUEUE).await;
        assert_eq!(owned.is_ok(), may, "{uid}: {owned:?}");
    }
}
