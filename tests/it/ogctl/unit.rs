//! A daemon that does not run: what systemd, played by the test, makes of the hint.

use opengateway::api::names::exit;
use zbus::{Connection, OwnedObjectPath};

use crate::common::bus::{Bus, bus_or_skip, ogctl};

const UNIT: &str = "/org/freedesktop/systemd1/unit/opengatewayd_2eservice";

struct Manager;

#[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
impl Manager {
    fn load_unit(&self, name: String) -> OwnedObjectPath {
        assert_eq!(name, "opengatewayd.service");
        OwnedObjectPath::try_from(UNIT).unwrap()
    }
}

struct Unit {
    active: &'static str,
}

#[zbus::interface(name = "org.freedesktop.systemd1.Unit")]
impl Unit {
    #[zbus(property)]
    fn load_state(&self) -> String {
        "loaded".into()
    }
    #[zbus(property)]
    fn active_state(&self) -> String {
        self.active.into()
    }
    #[zbus(property)]
    fn unit_file_state(&self) -> String {
        "enabled".into()
    }
}

struct Service {
    status: i32,
}

#[zbus::interface(name = "org.freedesktop.systemd1.Service")]
impl Service {
    #[zbus(property)]
    fn exec_main_status(&self) -> i32 {
        self.status
    }
}

async fn systemd(bus: &Bus, active: &'static str, status: i32) -> Connection {
    let builder = zbus::connection::Builder::address(bus.address())
        .serve_at("/org/freedesktop/systemd1", Manager)
        .serve_at(UNIT, Unit { active })
        .serve_at(UNIT, Service { status });
    builder.name("org.freedesktop.systemd1").build().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_unit_is_told_apart_from_a_stopped_one() {
    let Some(bus) = bus_or_skip() else { return };
    for (active, status, words) in [
        ("inactive", 0, vec!["systemctl start opengatewayd"]),
        ("failed", 78, vec!["journalctl -u opengatewayd -e", "ogctl config check", "systemctl start opengatewayd"]),
        ("failed", 1, vec!["exit status 1", "journalctl -u opengatewayd -e"]),
        ("activating", 0, vec!["ry again in a moment", "systemctl status opengatewayd"]),
    ] {
        let systemd = systemd(&bus, active, status).await;
        let said = ogctl(&bus, &["status"]).await;
        assert_eq!(said.code, exit::NO_DAEMON, "{said:?}");
        assert!(words.iter().all(|word| said.stderr.contains(word)), "{active}, {status}: {said:?}");
        systemd.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_bus_that_was_named_no_service_manager_is_asked() {
    let Some(bus) = bus_or_skip() else { return };
    let _systemd = systemd(&bus, "failed", 78).await;
    let said = ogctl(&bus, &["status", "--bus", bus.address()]).await;
    assert_eq!(said.code, exit::NO_DAEMON, "{said:?}");
    assert!(said.stderr.contains("--bus ADDRESS") && !said.stderr.contains("config check"), "{said:?}");
}
