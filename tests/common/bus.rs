//! A private `dbus-daemon`, and the real `ogctl` on it.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use opengateway::api::names::BUS_NAME;
use tokio::process::Command;
use zbus::Connection;

/// Most time that one run of `ogctl` may take.
pub const LIMIT: Duration = Duration::from_secs(30);

/// What a run of `ogctl` left.
#[derive(Debug)]
pub struct Said {
    pub code: u8,
    pub stdout: String,
    pub stderr: String,
}

/// A bus of this test's own; ends with it.
#[derive(Debug)]
pub struct Bus {
    daemon: Child,
    address: String,
    dir: tempfile::TempDir,
}

/// Starts a bus. `None`, said aloud, where there is no `dbus-daemon`; a panic where CI demands one.
pub fn bus_or_skip() -> Option<Bus> {
    let dir = tempfile::tempdir().unwrap();
    let services = dir.path().join("services");
    std::fs::create_dir(&services).unwrap();
    let config = dir.path().join("bus.conf");
    let text = format!(
        r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={}</listen><servicedir>{}</servicedir>
<policy context="default"><allow user="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>"#,
        dir.path().join("socket").display(),
        services.display()
    );
    std::fs::write(&config, text).unwrap();
    let mut command = std::process::Command::new("dbus-daemon");
    command.arg("--nofork").arg("--print-address=1").arg("--config-file").arg(&config);
    let mut daemon = match command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn() {
        Ok(daemon) => daemon,
        Err(error) if std::env::var_os("CI").is_some_and(|ci| ci == "true") => panic!("CI needs dbus-daemon: {error}"),
        Err(error) => {
            eprintln!("SKIPPED: no dbus-daemon: {error}");
            return None;
        }
    };
    let mut address = String::new();
    BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut address).unwrap();
    Some(Bus { daemon, address: address.trim().to_owned(), dir })
}

impl Bus {
    pub fn address(&self) -> &str {
        &self.address
    }
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
    pub async fn connect(&self) -> Connection {
        zbus::connection::Builder::address(self.address.as_str()).build().await.unwrap()
    }
    /// Makes the daemon's name startable by `exec`.
    pub async fn add_service(&self, exec: &str) {
        let file = self.dir().join("services").join(format!("{BUS_NAME}.service"));
        std::fs::write(file, format!("[D-BUS Service]\nName={BUS_NAME}\nExec={exec}\n")).unwrap();
        let bus = self.connect().await;
        bus.call_method(Some("org.freedesktop.DBus"), "/org/freedesktop/DBus", Some("org.freedesktop.DBus"), "ReloadConfig", &())
            .await
            .unwrap();
    }
    /// Lets other users connect, as far as the bus does.
    pub fn open_to_all(&self) {
        use std::os::unix::fs::PermissionsExt as _;
        for path in [self.dir().to_owned(), self.dir().join("socket")] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
        }
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.daemon.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// `ogctl` with `args`, meant for `bus`, with pipes at its ends.
pub fn ogctl_on(bus: &Bus, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ogctl"));
    command.args(args).env("DBUS_SYSTEM_BUS_ADDRESS", bus.address()).env_remove("DBUS_SESSION_BUS_ADDRESS");
    command.env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE").env_remove("COLUMNS");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// Runs `ogctl` to its end.
pub async fn ogctl(bus: &Bus, args: &[&str]) -> Said {
    let out = tokio::time::timeout(LIMIT, ogctl_on(bus, args).output()).await.expect("ogctl ends").unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let code = out.status.code().and_then(|code| u8::try_from(code).ok()).expect("ogctl exits by itself");
    Said { code, stdout: text(out.stdout), stderr: text(out.stderr) }
}
