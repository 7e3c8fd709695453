//! Why the daemon does not run: what systemd knows of its unit, when it can be asked.

use crate::errors::Failure;
use opengateway::api::names::exit;
use std::time::Duration;
use zbus::proxy::{CacheProperties, MethodFlags};
use zbus::{Connection, OwnedObjectPath, Proxy};

const SYSTEMD: &str = "org.freedesktop.systemd1";
const UNIT: &str = "opengatewayd.service";
/// Most time for the questions: the answer only makes a hint better.
const LIMIT: Duration = Duration::from_secs(1);
/// With this status the daemon says that a restart does not mend it.
const STATUS_CONFIG: i32 = 78;

/// What decides the hint.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Unit {
    load: String,
    active: String,
    /// "enabled", "disabled", …
    file: String,
    /// Exit code of the last run.
    status: i32,
}

/// `failure`, said as well as the service manager's knowledge allows. For a daemon that is not on the system bus.
pub async fn explain(connection: &Connection, failure: Failure) -> Failure {
    match tokio::time::timeout(LIMIT, Unit::ask(connection)).await {
        Ok(Ok(unit)) => unit.told(failure),
        // No systemd here, or one that does not answer: the hint that is always true stands.
        _ => failure,
    }
}

impl Unit {
    async fn ask(connection: &Connection) -> zbus::Result<Self> {
        let manager = proxy(connection, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager").await?;
        let unit: Option<OwnedObjectPath> = manager.call_with_flags("LoadUnit", MethodFlags::NO_AUTO_START, &UNIT).await?;
        let path = unit.ok_or(zbus::Error::InvalidReply)?.as_str().to_owned();
        let unit = proxy(connection, &path, "org.freedesktop.systemd1.Unit").await?;
        let service = proxy(connection, &path, "org.freedesktop.systemd1.Service").await?;
        Ok(Self {
            load: unit.get_property("LoadState").await?,
            active: unit.get_property("ActiveState").await?,
            file: unit.get_property("UnitFileState").await?,
            status: service.get_property("ExecMainStatus").await?,
        })
    }

    fn told(&self, failure: Failure) -> Failure {
        let not_running = |why: String, hint: &str| Failure::new(&failure.name, why, hint, exit::NO_DAEMON);
        match (self.load.as_str(), self.active.as_str()) {
            ("not-found", _) => not_running(
                "opengatewayd is not running, and not installed as a service".into(),
                "install the package opengateway, or start one on a bus of your own: opengatewayd --bus ADDRESS",
            ),
            ("masked", _) => not_running(
                "opengatewayd is not running: its unit is masked".into(),
                "allow it with: systemctl unmask opengatewayd",
            ),
            (_, "failed") if self.status == STATUS_CONFIG => not_running(
                "opengatewayd is not running: its configuration or its state is wrong, and it waits to be mended".into(),
                "see what is wrong with: journalctl -u opengatewayd -e, and ogctl config check; then: systemctl start opengatewayd",
            ),
            (_, "failed") => not_running(
                format!("opengatewayd is not running: it failed (exit status {})", self.status),
                "see why with: journalctl -u opengatewayd -e; then: systemctl start opengatewayd",
            ),
            (_, "activating" | "reloading" | "active") => not_running(
                "opengatewayd is being started, and not on the bus yet".into(),
                "try again in a moment; see: systemctl status opengatewayd",
            ),
            _ if self.file == "disabled" => not_running(
                failure.message.clone(),
                "start it with: systemctl start opengatewayd, or now and at each boot: systemctl enable --now opengatewayd",
            ),
            _ => not_running(failure.message.clone(), "start it with: systemctl start opengatewayd"),
        }
    }
}

async fn proxy<'a>(connection: &Connection, path: &'a str, interface: &'static str) -> zbus::Result<Proxy<'a>> {
    let builder = zbus::proxy::Builder::<Proxy<'_>>::new(connection);
    builder.destination(SYSTEMD).path(path).interface(interface).cache_properties(CacheProperties::No).build().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use opengateway::api::names::ErrorName;

    fn told(load: &str, active: &str, file: &str, status: i32) -> String {
        let unit = Unit { load: load.into(), active: active.into(), file: file.into(), status };
        let failure = unit.told(Failure::named(ErrorName::NameHasNoOwner.as_str(), ""));
        assert_eq!((failure.code, failure.name.as_str()), (exit::NO_DAEMON, "NameHasNoOwner"));
        format!("{}. {}", failure.message, failure.hint)
    }

    #[test]
    fn every_state_has_its_next_command() {
        assert!(told("loaded", "inactive", "enabled", 0).ends_with("start it with: systemctl start opengatewayd"));
        assert!(told("loaded", "inactive", "disabled", 0).contains("systemctl enable --now opengatewayd"));
        let wrong = told("loaded", "failed", "enabled", 78);
        assert!(wrong.contains("journalctl -u opengatewayd -e") && wrong.contains("ogctl config check"), "{wrong}");
        assert!(told("loaded", "failed", "enabled", 1).contains("exit status 1"));
        assert!(told("not-found", "inactive", "", 0).contains("install the package"));
        assert!(told("masked", "inactive", "masked", 0).contains("unmask"));
        assert!(told("loaded", "activating", "enabled", 0).contains("try again"));
    }
}
