//! Whether the clock is right, from the system's own word: any service that sets it tells the kernel, and
//! `org.freedesktop.timedate1` tells what the kernel says.

use std::time::Duration;

use zbus::Connection;
use zbus::OwnedVariant;

/// The service may have to be started first.
const PATIENCE: Duration = Duration::from_millis(1500);

/// What is `known`, else what the system says; `None` where nobody says anything.
pub(super) async fn synchronised(known: Option<bool>) -> Option<bool> {
    if known.is_some() {
        return known;
    }
    let asked = async {
        let bus = Connection::system().await.ok()?;
        let (path, properties) = ("/org/freedesktop/timedate1", "org.freedesktop.DBus.Properties");
        let arguments = ("org.freedesktop.timedate1", "NTPSynchronized");
        let reply = bus.call_method(Some("org.freedesktop.timedate1"), path, Some(properties), "Get", &arguments).await.ok()?;
        bool::try_from(reply.body().deserialize::<OwnedVariant>().ok()?).ok()
    };
    tokio::time::timeout(PATIENCE, asked).await.ok().flatten()
}
