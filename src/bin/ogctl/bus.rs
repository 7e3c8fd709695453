//! The one connection of a run, and how calls are made over it.
//!
//! Chooses the bus, bounds every call in time, and maps errors. Reading calls never start the daemon.
//! Changing calls are made without a question first; only when polkit says that a password would help, and
//! a person sits at a terminal, the call is repeated with polkit's own agent running: so an
//! allowed call costs one round trip and starts no other process.

use crate::agent::{Agent, Terminal};
use crate::args::Globals;
use crate::errors::Failure;
use crate::unit;
use opengateway::api::names::{BUS_NAME, ErrorName};
use opengateway::api::proxy::{ManagerProxy, ModelsProxy, NetworkProxy};
use std::time::Duration;
use zbus::connection::Builder;
use zbus::proxy::{CacheProperties, MethodFlags};
use zbus::wire::{DynamicDeserialize, DynamicType};
use zbus::{Connection, Proxy};

/// Most time that a call may take when `--timeout` does not say.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Most time for a person to type a password: a little more than the daemon gives, so that its refusal is what is told.
const PASSWORD_TIMEOUT: Duration = Duration::from_secs(5 * 60 + 10);

/// A connection to the bus that has the daemon.
#[derive(Debug)]
pub struct Bus {
    connection: Connection,
    manager: ManagerProxy<'static>,
    /// Whether the session bus may be tried when nobody is here.
    fallback: bool,
    /// Whether this is the system bus, where a service manager knows of the daemon.
    system: bool,
    limit: Duration,
    /// Asks for passwords until the command ends.
    agent: Option<Agent>,
}

/// A bus to connect to.
enum Target<'a> {
    System,
    Session,
    Address(&'a str),
}

impl Bus {
    /// Connects as the options and the environment say.
    pub async fn open(globals: &Globals) -> Result<Self, Failure> {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let target = match globals.bus.as_deref() {
            None | Some("system") => Target::System,
            Some("session") => Target::Session,
            Some(address) => Target::Address(address),
        };
        // Whoever names a bus means that bus.
        // systemd's user bus needs no address in the environment: a shell without a login of its own has none.
        let user_bus = std::env::var_os("XDG_RUNTIME_DIR").is_some_and(|dir| std::path::Path::new(&dir).join("bus").exists());
        let session = set("DBUS_SESSION_BUS_ADDRESS") || user_bus;
        let fallback = globals.bus.is_none() && !set("DBUS_SYSTEM_BUS_ADDRESS") && session;
        let limit = globals.timeout.unwrap_or(CALL_TIMEOUT);
        let system = matches!(target, Target::System);
        match connect(target, limit).await {
            Ok(connection) => Ok(Self { fallback, system, ..Self::new(connection, limit).await? }),
            Err(failure) if fallback => match session_with_daemon(limit).await {
                Some(connection) => Self::new(connection, limit).await,
                None => Err(failure),
            },
            Err(failure) => Err(failure),
        }
    }

    async fn new(connection: Connection, limit: Duration) -> Result<Self, Failure> {
        let manager = ManagerProxy::builder(&connection).cache_properties(CacheProperties::No).build().await;
        let manager = manager.map_err(|error| Failure::from_zbus(&error))?;
        Ok(Self { connection, manager, fallback: false, system: false, limit, agent: None })
    }

    /// The connection, for signals.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Most time of one call.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Sets the most time of one call.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Makes a reading call.
    ///
    /// # Errors
    /// Whatever the daemon or the bus says, or `Timeout`.
    pub async fn ask<T>(&mut self, call: impl AsyncFn(&ManagerProxy<'static>) -> zbus::Result<T>) -> Result<T, Failure> {
        let mut result = within(self.limit, call(&self.manager)).await;
        if result.as_ref().is_err_and(Failure::is_no_daemon) && self.try_session().await {
            result = within(self.limit, call(&self.manager)).await;
        }
        self.explained(result).await
    }

    /// Makes a reading call about models.
    ///
    /// # Errors
    /// As [`Bus::ask`].
    pub async fn ask_models<T>(&mut self, call: impl AsyncFn(&ModelsProxy<'static>) -> zbus::Result<T>) -> Result<T, Failure> {
        let mut result = within(self.limit, call(&models(&self.connection).await?)).await;
        if result.as_ref().is_err_and(Failure::is_no_daemon) && self.try_session().await {
            result = within(self.limit, call(&models(&self.connection).await?)).await;
        }
        self.explained(result).await
    }

    /// Makes a reading call about the network.
    ///
    /// # Errors
    /// As [`Bus::ask`].
    pub async fn ask_network<T>(&mut self, call: impl AsyncFn(&NetworkProxy<'static>) -> zbus::Result<T>) -> Result<T, Failure> {
        let mut result = within(self.limit, call(&network(&self.connection).await?)).await;
        if result.as_ref().is_err_and(Failure::is_no_daemon) && self.try_session().await {
            result = within(self.limit, call(&network(&self.connection).await?)).await;
        }
        self.explained(result).await
    }

    /// Makes a changing call to the Manager.
    ///
    /// # Errors
    /// As [`Bus::ask`]; a refusal of polkit that no password mends.
    pub async fn change<B, R>(&mut self, member: &str, body: &B) -> Result<R, Failure>
    where
        B: serde::Serialize + DynamicType,
        R: for<'d> DynamicDeserialize<'d>,
    {
        let mut result = within(self.limit, call(self.manager.inner(), member, None, body)).await;
        if result.as_ref().is_err_and(Failure::is_no_daemon) && self.try_session().await {
            result = within(self.limit, call(self.manager.inner(), member, None, body)).await;
        }
        let result = self.explained(result).await;
        let proxy = self.manager.inner().clone();
        self.with_password(result, &proxy, member, body).await
    }

    /// Makes a changing call to another object of the daemon.
    ///
    /// # Errors
    /// As [`Bus::change`].
    pub async fn change_at<B, R>(&mut self, path: &str, interface: &'static str, member: &str, body: &B) -> Result<R, Failure>
    where
        B: serde::Serialize + DynamicType,
        R: for<'d> DynamicDeserialize<'d>,
    {
        let proxy = Proxy::new_owned(self.connection.clone(), BUS_NAME, path.to_owned(), interface).await;
        let proxy = proxy.map_err(|error| Failure::from_zbus(&error))?;
        let result = within(self.limit, call(&proxy, member, None, body)).await;
        self.with_password(result, &proxy, member, body).await
    }

    /// Repeats a call that polkit would allow after a password, when there is somebody to type one.
    async fn with_password<B, R>(
        &mut self,
        result: Result<R, Failure>,
        proxy: &Proxy<'_>,
        member: &str,
        body: &B,
    ) -> Result<R, Failure>
    where
        B: serde::Serialize + DynamicType,
        R: for<'d> DynamicDeserialize<'d>,
    {
        let wanted = ErrorName::InteractiveAuthorizationRequired.short();
        if !result.as_ref().is_err_and(|failure| failure.name == wanted) {
            return result;
        }
        let Some(terminal) = Terminal::of_process() else {
            return result;
        };
        if self.agent.is_none() {
            self.agent = Agent::start(terminal).await;
        }
        // Without an agent of ours the person's desktop may have one.
        let flags = MethodFlags::ALLOW_INTERACTIVE_AUTH;
        let result = within(PASSWORD_TIMEOUT, call(proxy, member, Some(flags), body)).await;
        let refused = |failure: &Failure| [wanted, ErrorName::NotAuthorized.short()].contains(&failure.name.as_str());
        match result {
            Err(failure) if self.agent.is_none() && refused(&failure) => Err(Failure {
                hint: format!("to be asked for a password here, pkttyagent (of polkit) must be installed; or {}", failure.hint),
                ..failure
            }),
            result => result,
        }
    }

    /// A daemon that is not there, with what the service manager knows of it.
    async fn explained<T>(&self, result: Result<T, Failure>) -> Result<T, Failure> {
        match result {
            Err(failure) if self.system && failure.is_not_running() => Err(unit::explain(&self.connection, failure).await),
            result => result,
        }
    }

    /// Moves to the session bus if that was not tried yet and a daemon is there.
    async fn try_session(&mut self) -> bool {
        if !std::mem::take(&mut self.fallback) {
            return false;
        }
        let Some(connection) = session_with_daemon(self.limit).await else {
            return false;
        };
        match Self::new(connection, self.limit).await {
            Ok(bus) => {
                *self = bus;
                true
            }
            Err(_) => false,
        }
    }
}

async fn models(connection: &Connection) -> Result<ModelsProxy<'static>, Failure> {
    let proxy = ModelsProxy::builder(connection).cache_properties(CacheProperties::No).build().await;
    proxy.map_err(|error| Failure::from_zbus(&error))
}

async fn network(connection: &Connection) -> Result<NetworkProxy<'static>, Failure> {
    let proxy = NetworkProxy::builder(connection).cache_properties(CacheProperties::No).build().await;
    proxy.map_err(|error| Failure::from_zbus(&error))
}

async fn call<B, R>(proxy: &Proxy<'_>, member: &str, flags: Option<MethodFlags>, body: &B) -> zbus::Result<R>
where
    B: serde::Serialize + DynamicType,
    R: for<'d> DynamicDeserialize<'d>,
{
    let flags = flags.unwrap_or(MethodFlags::empty());
    proxy.call_with_flags(member, flags, body).await?.ok_or(zbus::Error::InvalidReply)
}

/// Bounds a call: zbus waits for ever, and its own `method_timeout` does not cover calls with flags.
pub async fn within<T>(limit: Duration, call: impl Future<Output = zbus::Result<T>>) -> Result<T, Failure> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(reply)) => Ok(reply),
        Ok(Err(error)) => Err(Failure::from_zbus(&error)),
        Err(_) => Err(Failure::timeout(format!("opengatewayd did not answer within {} s", limit.as_secs_f32()))),
    }
}

async fn connect(target: Target<'_>, limit: Duration) -> Result<Connection, Failure> {
    let target_address = if let Target::Address(address) = target { Some(address) } else { None };
    let (name, builder) = match target {
        Target::System => ("system", Builder::system()),
        Target::Session => ("session", Builder::session()),
        Target::Address(address) => ("given", Builder::address(address)),
    };
    match tokio::time::timeout(limit, builder.build()).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(zbus::Error::Connection(why, address))) => Err(Failure::no_bus(name, format!("{why} ({address})"))),
        Ok(Err(zbus::Error::Address(_))) => Err(Failure::usage(match target_address {
            Some(address) => {
                format!("{address:?} is neither \"system\" nor \"session\" nor a D-Bus address such as unix:path=/run/bus")
            }
            None => format!("the address of the {name} bus in the environment is no D-Bus address"),
        })),
        Ok(Err(why)) => Err(Failure::no_bus(name, why)),
        Err(_) => Err(Failure::timeout(format!("the {name} bus did not answer within {} s", limit.as_secs_f32()))),
    }
}

/// The session bus, if the daemon is on it.
async fn session_with_daemon(limit: Duration) -> Option<Connection> {
    let connection = connect(Target::Session, limit).await.ok()?;
    let owned = zbus::fdo::DBusProxy::builder(&connection).cache_properties(CacheProperties::No).build().await.ok()?;
    let owned = tokio::time::timeout(limit, owned.name_has_owner(BUS_NAME.try_into().ok()?)).await.ok()?.ok()?;
    owned.then_some(connection)
}
