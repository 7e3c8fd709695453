//! The real `opengatewayd` on private buses of its own, on loopback, asked by the real `ogctl` and by raw D-Bus calls.

mod cluster;
mod contract;
mod damage;
mod faults;
mod hand;
mod kills;
mod lifecycle;
mod prompts;
mod random;
mod storage;
mod strace;
mod supervision;
mod users;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use zbus::{Connection, Message, MessageStream, OwnedObjectPath, Variant};

use crate::common::bus::{Bus, Said, bus_or_skip, ogctl, ogctl_on};
use crate::common::node::{DEADLINE, NAME, Node, Plan, skipped};

pub const ROOT: &str = "/org/opengateway/Gateway1";
pub const MANAGER: &str = "org.opengateway.Gateway1.Manager";
pub const ERROR: &str = "org.opengateway.Gateway1.Error.";

pub async fn call<B>(connection: &Connection, method: &str, body: &B) -> Result<Message, (String, String)>
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

pub type Options<'a> = HashMap<&'a str, Variant<'a>>;
