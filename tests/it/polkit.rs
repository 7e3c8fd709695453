//! The daemon as it is installed: a user that is not root, on a system bus with the installed policy, with the real polkitd.

mod decisions;
mod hostile;
mod jobs;
mod policy;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use zbus::{Connection, Message, OwnedObjectPath, OwnedVariant, Variant};

use crate::common::node::{DEADLINE, NAME};
use crate::common::system_bus::{ALICE, Ask, BOB, SERVICE, SystemBus, ask};
use crate::daemon::{ERROR, MANAGER, Options, ROOT};

const INTERACTIVE: &str = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired";
const ACTION: &str = "org.opengateway.gateway1.";

/// The verbs that need a right, with the action that each needs.
const VERBS: [(&str, &str); 6] = [
    ("Connect", "connect"),
    ("Prompt", "prompt"),
    ("StartPrompt", "prompt"),
    ("SetSharing", "configure"),
    ("Reload", "configure"),
    ("Disconnect", "disconnect"),
];

/// Uses a verb; in this order they all succeed for who may.
async fn verb(connection: &Connection, name: &str, may_ask: Ask) -> Result<Message, (String, String)> {
    match name {
        "Connect" | "Disconnect" => manager(connection, name, &("room", Options::new()), may_ask).await,
        "Prompt" | "StartPrompt" => manager(connection, name, &("room", "x", Options::new()), may_ask).await,
        "SetSharing" => manager(connection, name, &(true, Options::new()), may_ask).await,
        _ => manager(connection, name, &(), may_ask).await,
    }
}

async fn manager<B>(connection: &Connection, method: &str, body: &B, may_ask: Ask) -> Result<Message, (String, String)>
where
    B: serde::Serialize + zbus::wire::DynamicType + Sync,
{
    ask(connection, ROOT, MANAGER, method, body, may_ask).await
}

/// Every verb succeeds.
async fn may_all(connection: &Connection, told: &str) {
    for (name, _) in VERBS {
        let done = verb(connection, name, Ask::MayNot).await;
        assert!(done.is_ok(), "{told}: {name}: {done:?}");
    }
}

/// Every verb is refused, with its action named.
async fn may_nothing(connection: &Connection, may_ask: Ask, error: &str, says: &str) {
    for (name, action) in VERBS {
        let (said, message) = verb(connection, name, may_ask).await.expect_err(name);
        assert_eq!(said, error, "{name}: {message}");
        assert!(message.contains(&format!("{ACTION}{action}")) && message.contains(says), "{name}: {message}");
    }
}

/// The ids of all clusters that the daemon knows.
async fn clusters(connection: &Connection) -> Vec<String> {
    let reply = manager(connection, "ListClusters", &(), Ask::MayNot).await.unwrap();
    let listed: Vec<(String, OwnedObjectPath, HashMap<String, OwnedVariant>)> = reply.body().deserialize().unwrap();
    listed.into_iter().map(|(id, ..)| id).collect()
}

async fn active_jobs(connection: &Connection) -> u32 {
    let reply = manager(connection, "GetStatus", &(), Ask::MayNot).await.unwrap();
    let status: HashMap<String, OwnedVariant> = reply.body().deserialize().unwrap();
    u32::try_from(status["Jobs"].try_clone().unwrap()).unwrap()
}
