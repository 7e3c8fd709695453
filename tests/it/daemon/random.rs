//! Two thousand calls of every method with whatever a caller may send: the daemon answers, lives, and does not grow.

use super::*;
use crate::common::calls;
use crate::common::seeded::{Seeded, seed};

const CALLS: usize = 2000;
/// Calls under way at once.
const AT_ONCE: usize = 16;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_arguments_of_any_call_stop_it_or_make_it_grow() {
    let mut random = Seeded(seed());
    let Some(node) = Node::start("a", &["--serve", "--connect", "gatewayai-poc"]).await else {
        return;
    };
    let connection = node.bus.connect().await;
    let mut running = tokio::task::JoinSet::new();
    let mut answered: HashMap<String, usize> = HashMap::new();
    let mut before = None;
    // The first round warms up: buffers, threads and the tables of the allocator are there after it.
    for round in [200, CALLS] {
        for (interface, method, types) in calls::METHODS {
            for _ in 0..round {
                let body = calls::arguments(&mut random, types);
                let path = calls::path(&mut random, method);
                let connection = connection.clone();
                running.spawn(async move {
                    let call = async {
                        match &body {
                            Some(body) => connection.call_method(Some(NAME), path, Some(*interface), *method, body).await,
                            None => connection.call_method(Some(NAME), path, Some(*interface), *method, &()).await,
                        }
                    };
                    calls::outcome(method, call).await
                });
                while running.len() >= AT_ONCE {
                    *answered.entry(running.join_next().await.unwrap().unwrap()).or_default() += 1;
                }
            }
        }
        while let Some(answer) = running.join_next().await {
            *answered.entry(answer.unwrap()).or_default() += 1;
        }
        before.get_or_insert_with(|| (node.kib("VmRSS"), node.descriptors()));
    }
    eprintln!("{answered:?}");
    assert!(answered["ok"] > CALLS && answered.len() > 5, "{answered:?}");
    assert!(!answered.contains_key("org.freedesktop.DBus.Error.NoReply"), "{answered:?}");
    assert!(!answered.contains_key(&format!("{ERROR}ShuttingDown")), "it does not stop: {answered:?}");
    assert!(!answered.contains_key("org.freedesktop.DBus.Error.Failed"), "a panic: {}", node.log());
    call(&connection, "GetStatus", &()).await.unwrap();
    let (resident, descriptors) = before.unwrap();
    let now = node.kib("VmRSS");
    eprintln!("resident: {resident} KiB, then {now} KiB");
    assert!(now < resident + 24 * 1024, "it grew from {resident} to {now} KiB");
    // Descriptors that came with calls are closed again; those of streams when their readers are.
    drop(connection);
    let deadline = Instant::now() + DEADLINE;
    while node.descriptors() > descriptors + 20 {
        assert!(Instant::now() < deadline, "{} descriptors, {descriptors} before", node.descriptors());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_callers_that_leave_right_after_their_call_cost_nothing() {
    let Some(node) = Node::start("a", &["--serve", "--connect", "gatewayai-poc"]).await else {
        return;
    };
    let mut before = None;
    for round in [100, 1000] {
        for number in 0..round {
            let connection = node.bus.connect().await;
            let method = ["StartPrompt", "Prompt", "GetStatus"][number % 3];
            let body = ("", "x", Options::new());
            let message = Message::method_call(ROOT, method).destination(NAME).interface(MANAGER);
            let message = if method == "GetStatus" { message.build(&()) } else { message.build(&body) };
            connection.send(&message.unwrap()).await.unwrap();
            connection.close().await.unwrap();
        }
        node.until(&["status"], |status| status["jobs"] == 0).await;
        before.get_or_insert_with(|| node.kib("VmRSS"));
    }
    let (before, now) = (before.unwrap(), node.kib("VmRSS"));
    assert!(now < before + 24 * 1024, "it grew from {before} to {now} KiB");
}
