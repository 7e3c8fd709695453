//! Who may do what: one place. Until polkit is asked here too, root may do everything, and in the per-user mode the
//! daemon's own user; everybody else may read.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use zbus::Connection;
use zbus::message::Header;
use zbus::names::OwnedUniqueName;

use super::errors::Error;
use crate::api::names::ErrorName;

/// Callers whose uid is remembered. Unique names are never given twice on one bus, so an entry never goes stale.
const MAX_CALLERS: usize = 256;

/// What a caller wants to do: the polkit actions of the installed policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Join a cluster.
    Connect,
    /// Leave one.
    Disconnect,
    /// Ask.
    Prompt,
    /// Change how this machine serves.
    Configure,
    /// Touch what belongs to others.
    Manage,
}

impl Action {
    /// The polkit action.
    pub const fn id(self) -> &'static str {
        match self {
            Self::Connect => "org.opengateway.gateway1.connect",
            Self::Disconnect => "org.opengateway.gateway1.disconnect",
            Self::Prompt => "org.opengateway.gateway1.prompt",
            Self::Configure => "org.opengateway.gateway1.configure",
            Self::Manage => "org.opengateway.gateway1.manage",
        }
    }
}

/// Whose bus it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The system bus: the daemon's own user has no rights on it (an engine child has the same uid).
    System,
    /// A session bus or a bus of one's own: this user may do everything.
    PerUser(u32),
    /// A connection without a bus, for tests: every caller has this uid.
    PeerToPeer(u32),
}

/// Who called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Its uid.
    pub uid: u32,
    /// Its unique name; `None` without a bus.
    pub name: Option<OwnedUniqueName>,
}

/// Decides.
#[derive(Debug)]
pub struct Access {
    mode: Mode,
    uids: Mutex<HashMap<OwnedUniqueName, u32>>,
}

impl Access {
    /// For this kind of bus.
    pub fn new(mode: Mode) -> Self {
        Self { mode, uids: Mutex::default() }
    }

    /// Who called, as the bus knows it.
    ///
    /// # Errors
    /// `NotAuthorized`: the bus does not say, or the caller is gone.
    pub async fn caller(&self, connection: &Connection, header: &Header<'_>) -> Result<Caller, Error> {
        if let Mode::PeerToPeer(uid) = self.mode {
            return Ok(Caller { uid, name: None });
        }
        let unknown = |why: String| Error::new(ErrorName::NotAuthorized, format!("the caller's user is unknown: {why}"));
        let name: OwnedUniqueName = header.sender().ok_or_else(|| unknown("no sender".to_owned()))?.to_owned().into();
        let known = self.uids.lock().unwrap_or_else(PoisonError::into_inner).get(&name).copied();
        let uid = match known {
            Some(uid) => uid,
            None => {
                let reply = connection
                    .call_method(
                        Some("org.freedesktop.DBus"),
                        "/org/freedesktop/DBus",
                        Some("org.freedesktop.DBus"),
                        "GetConnectionUnixUser",
                        &(name.as_str(),),
                    )
                    .await
                    .map_err(|error| unknown(error.to_string()))?;
                let uid: u32 = reply.body().deserialize().map_err(|error| unknown(error.to_string()))?;
                let mut uids = self.uids.lock().unwrap_or_else(PoisonError::into_inner);
                if uids.len() >= MAX_CALLERS {
                    uids.clear();
                }
                uids.insert(name.clone(), uid);
                uid
            }
        };
        Ok(Caller { uid, name: Some(name) })
    }

    /// Whether `uid` may do it without being asked anything.
    pub fn allows(&self, uid: u32) -> bool {
        uid == 0
            || match self.mode {
                Mode::System => false,
                Mode::PerUser(owner) => uid == owner,
                Mode::PeerToPeer(_) => true,
            }
    }

    /// Lets the caller do `action`, or says why not.
    ///
    /// # Errors
    /// `NotAuthorized`, naming the action.
    pub async fn require(&self, connection: &Connection, header: &Header<'_>, action: Action) -> Result<Caller, Error> {
        let caller = self.caller(connection, header).await?;
        if self.allows(caller.uid) {
            return Ok(caller);
        }
        Err(Error::new(
            ErrorName::NotAuthorized,
            format!("user {} may not do this: it needs {}, which only root has on this bus", caller.uid, action.id()),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_always_the_owner_on_his_own_bus_and_nobody_else() {
        let system = Access::new(Mode::System);
        assert!(system.allows(0) && !system.allows(1000));
        let own = Access::new(Mode::PerUser(1000));
        assert!(own.allows(0) && own.allows(1000) && !own.allows(1001));
    }
}
