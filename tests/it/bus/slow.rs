//! No call waits for another: zbus's locks, and the one thread of the daemon.

use std::time::Instant;

use super::*;

/// As long as a call may take while others wait. The usual time is below a millisecond; a busy machine stretches it.
const LIMIT: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_else_answers_at_once_while_every_slow_call_waits() {
    let Some(mut played) = Played::start().await else { return };
    let busy = played.bus.connect().await;
    let none = Options::new;
    let fresh = || Options::from([("Fresh", Variant::from(true))]);
    let waiting: Vec<tokio::task::JoinHandle<()>> = vec![
        waits(&busy, "Prompt", ("", "x", none())),
        waits(&busy, "Connect", ("new", none())),
        waits(&busy, "Disconnect", ("gatewayai-poc", Options::from([("Drain", Variant::from(3_600_000_000_u64))]))),
        waits(&busy, "GetResources", (fresh(),)),
        waits(&busy, "ListEligible", (fresh(),)),
        waits(&busy, "SetSharing", (true, none())),
        waits(&busy, "Reload", ()),
    ];
    // Each is where it waits: nobody answers it.
    let _prompt = played.started().await;
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(within(played.requests.recv()).await.unwrap());
    }
    let mut measuring = Vec::new();
    for _ in 0..2 {
        measuring.push(within(played.measures.recv()).await.unwrap());
    }
    let (_job, _stream) = start_prompt(&busy, "x").await;
    let _streamed = played.started().await;
    // The same connection, and another: neither waits.
    for connection in [&busy, &played.bus.connect().await] {
        for path in ["/", "/org", ROOT, "/org/opengateway/Gateway1/cluster/gatewayai_2dpoc"] {
            let begun = Instant::now();
            let introspected =
                connection.call_method(Some(NAME), path, Some("org.freedesktop.DBus.Introspectable"), "Introspect", &());
            within(introspected).await.unwrap();
            assert!(begun.elapsed() < LIMIT, "Introspect {path}: {:?}", begun.elapsed());
        }
        for (interface, member) in [
            (MANAGER, "GetStatus"),
            (MANAGER, "ListClusters"),
            (MANAGER, "ListJobs"),
            ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects"),
        ] {
            let begun = Instant::now();
            within(connection.call_method(Some(NAME), ROOT, Some(interface), member, &())).await.unwrap();
            assert!(begun.elapsed() < LIMIT, "{member}: {:?}", begun.elapsed());
        }
        let begun = Instant::now();
        property(connection, ROOT, MANAGER, "State").await.unwrap();
        assert!(begun.elapsed() < LIMIT, "Get: {:?}", begun.elapsed());
    }
    assert!(waiting.iter().all(|call| !call.is_finished()), "the slow calls still wait: that was the test");
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
}

fn waits<B>(connection: &Connection, method: &'static str, body: B) -> tokio::task::JoinHandle<()>
where
    B: serde::Serialize + zbus::wire::DynamicType + Send + Sync + 'static,
{
    let connection = connection.clone();
    tokio::spawn(async move {
        let _ = connection.call_method(Some(NAME), ROOT, Some(MANAGER), method, &body).await;
    })
}
