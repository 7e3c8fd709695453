//! A prompt belongs to who asked it.

use std::os::fd::OwnedFd;

use super::*;

const JOB: &str = "org.opengateway.Gateway1.Job";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// A job that goes on: nobody reads its answer.
async fn start(connection: &Connection) -> (OwnedObjectPath, OwnedFd) {
    let text = "word ".repeat(100_000);
    let reply = manager(connection, "StartPrompt", &("", text, Options::new()), Ask::MayNot).await.unwrap();
    let (job, stream): (OwnedObjectPath, zbus::OwnedFd) = reply.body().deserialize().unwrap();
    (job, stream.into())
}

async fn listed(connection: &Connection) -> Vec<OwnedObjectPath> {
    let reply = manager(connection, "ListJobs", &(), Ask::MayNot).await.unwrap();
    let jobs: Vec<(u64, OwnedObjectPath, HashMap<String, OwnedVariant>)> = reply.body().deserialize().unwrap();
    jobs.into_iter().map(|(_, path, _)| path).collect()
}

async fn get(connection: &Connection, job: &str, property: &str) -> Result<Message, (String, String)> {
    ask(connection, job, PROPERTIES, "Get", &(JOB, property), Ask::MayNot).await
}

async fn all(connection: &Connection, job: &str) -> HashMap<String, OwnedVariant> {
    let reply = ask(connection, job, PROPERTIES, "GetAll", &JOB, Ask::MayNot).await.unwrap();
    reply.body().deserialize().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anothers_job_is_neither_listed_nor_read_nor_cancelled_but_by_who_manages() {
    let rules = r#"polkit.addRule(function(action, subject) {
        if (action.id == "org.opengateway.gateway1.prompt") { return polkit.Result.YES; }
    });"#;
    let Some(system) = SystemBus::start(&["--serve", "--connect", "gatewayai-poc"], rules).await else { return };
    let (root, alice, bob) = (system.connect(0).await, system.connect(ALICE).await, system.connect(BOB).await);
    let (job, _stream) = start(&alice).await;
    assert_eq!(listed(&alice).await, std::slice::from_ref(&job));
    assert_eq!(all(&alice, job.as_str()).await["Uid"], OwnedVariant::from(ALICE));

    let refused = format!("{ERROR}NotAuthorized");
    for (who, connection) in [("bob", &bob), ("the daemon's own user", &system.connect(SERVICE).await)] {
        assert!(listed(connection).await.is_empty(), "{who}");
        for property in ["Id", "ClusterId", "Uid", "CreatedAt", "State", "CompletionTokens"] {
            let (name, message) = get(connection, job.as_str(), property).await.unwrap_err();
            assert!(name == refused && message.contains("another user"), "{who}: {property}: {name}: {message}");
        }
        assert!(all(connection, job.as_str()).await.is_empty(), "{who}");
        let reply = ask(connection, ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", &(), Ask::MayNot).await;
        let objects: HashMap<OwnedObjectPath, HashMap<String, HashMap<String, OwnedVariant>>> =
            reply.unwrap().body().deserialize().unwrap();
        assert!(objects.get(&job).and_then(|interfaces| interfaces.get(JOB)).is_none_or(HashMap::is_empty), "{who}: {objects:?}");
        for (may_ask, error) in [(Ask::MayNot, INTERACTIVE), (Ask::May, &refused)] {
            let (name, message) = ask(connection, job.as_str(), JOB, "Cancel", &(), may_ask).await.unwrap_err();
            assert!(name == error && message.contains(&format!("{ACTION}manage")), "{who}: {name}: {message}");
        }
    }
    let state = format!("{:?}", all(&alice, job.as_str()).await["State"]);
    assert!(state.contains("queued") || state.contains("running"), "it does not go on: {state}");

    // Who manages the node, and the owner.
    system.members(&["og-bob"]);
    assert_eq!(listed(&bob).await, std::slice::from_ref(&job), "and what ListJobs tells of it is all that he reads");
    assert!(get(&bob, job.as_str(), "Uid").await.is_err());
    // Root, and another connection of the owner's, as soon as the service knows them.
    for connection in [system.connect(0).await, system.connect(ALICE).await] {
        assert!(get(&connection, job.as_str(), "Uid").await.unwrap_err().1.contains("call ListJobs first"));
        listed(&connection).await;
        assert_eq!(all(&connection, job.as_str()).await["Uid"], OwnedVariant::from(ALICE));
    }
    ask(&bob, job.as_str(), JOB, "Cancel", &(), Ask::MayNot).await.unwrap();
    let (job, _stream) = start(&alice).await;
    assert!(listed(&root).await.contains(&job));
    ask(&alice, job.as_str(), JOB, "Cancel", &(), Ask::MayNot).await.unwrap();
    let deadline = Instant::now() + DEADLINE;
    while active_jobs(&root).await > 0 {
        assert!(Instant::now() < deadline, "a cancelled job does not end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
