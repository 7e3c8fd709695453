//! `org.freedesktop.LogControl1`, which `systemctl service-log-level opengatewayd` speaks to. The levels there are syslog's.

use std::sync::Arc;

use zbus::Connection;
use zbus::message::Header;

use super::access::Access;
use super::errors::Error;
use super::guard::Readers;
use crate::api::names::ErrorName;
use crate::logging::{LevelError, Log, SYSLOG_IDENTIFIER, Target};

/// Where systemd looks for it.
pub(super) const PATH: &str = "/org/freedesktop/LogControl1";

/// The object.
#[derive(Debug)]
pub(super) struct LogControl {
    pub log: Log,
    pub access: Arc<Access>,
}

/// Our level for one of syslog's.
fn from_syslog(level: &str) -> Option<&'static str> {
    Some(match level {
        "emerg" | "alert" | "crit" | "err" => "error",
        "warning" => "warn",
        "notice" | "info" => "info",
        "debug" => "debug",
        _ => return None,
    })
}

/// Syslog's level for ours. A filter, and "trace", say more than any of them: "debug" comes nearest.
fn to_syslog(level: &str) -> &'static str {
    match level {
        "error" => "err",
        "warn" => "warning",
        "info" => "info",
        _ => "debug",
    }
}

impl Readers for LogControl {}

impl LogControl {
    /// Root's and the owner's alone: no action of polkit's is about it. The bus policy says the same.
    async fn require(&self, connection: &Connection, header: Option<&Header<'_>>) -> Result<(), Error> {
        let refused = || Error::new(ErrorName::NotAuthorized, "only root sets the log of this service");
        let caller = self.access.caller(connection, header.ok_or_else(refused)?).await?;
        if self.access.allows(caller.uid) { Ok(()) } else { Err(refused()) }
    }
}

#[zbus::interface(name = "org.freedesktop.LogControl1", introspection_docs = false)]
impl LogControl {
    #[zbus(property(emits_changed_signal = "false"))]
    fn log_level(&self) -> String {
        to_syslog(&self.log.level()).to_owned()
    }

    #[zbus(property)]
    async fn set_log_level(
        &self,
        level: String,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(), Error> {
        self.require(connection, header.as_ref()).await?;
        let known = "emerg, alert, crit, err, warning, notice, info, debug";
        let ours = from_syslog(&level).ok_or_else(|| Error::invalid(format!("{level:?} is none of {known}")))?;
        self.log.set(ours).map_err(|error| match error {
            LevelError::Unknown(_) => Error::invalid(error.to_string()),
            LevelError::Fixed => Error::new(ErrorName::Failed, error.to_string()),
        })?;
        tracing::info!(level = ours, "log level {ours} set over the bus, until the next start");
        Ok(())
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn log_target(&self) -> &'static str {
        match self.log.target() {
            Target::Journal => "journal",
            Target::Console => "console",
        }
    }

    #[zbus(property)]
    async fn set_log_target(
        &self,
        target: String,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(), Error> {
        self.require(connection, header.as_ref()).await?;
        if target == "auto" || target == self.log_target() {
            return Ok(());
        }
        Err(Error::invalid(format!("the log goes to the {} while this process lives", self.log_target())))
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn syslog_identifier(&self) -> &'static str {
        SYSLOG_IDENTIFIER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_of_syslog_has_one_of_ours_and_back() {
        for level in ["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"] {
            let ours = from_syslog(level).unwrap();
            assert_eq!(from_syslog(to_syslog(ours)), Some(ours));
        }
        assert_eq!(from_syslog("trace"), None);
        assert_eq!(to_syslog("trace"), "debug");
        assert_eq!(to_syslog("info,opengateway::net=debug"), "debug");
    }
}
