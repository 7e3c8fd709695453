//! The one connection of a run, and how calls are made over it.
//!
//! Chooses the bus, bounds every call in time, and maps errors. Reading calls never start the daemon.
//! Changing calls are made without a question first; only when polkit says that a password would help, and
//! a person sits at a terminal, the call is repeated with polkit's own agent running: so an
//! allowed call costs one round trip and starts no other process.

use crate::args::Globals;
use crate::errors::Failure;
use opengateway::api::names::{BUS_NAME, ErrorName};
use opengateway::api::proxy::ManagerProxy;
use std::io::{IsTerminal as _, Read as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use zbus::connection::Builder;
use zbus::proxy::{CacheProperties, MethodFlags};
use zbus::wire::{DynamicDeserialize, DynamicType};
use zbus::{Connection, Proxy};

/// Most time that a call may take when `--timeout` does not say.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Most time for a person to type a password.
const PASSWORD_TIMEOUT: Duration = Duration::from_secs(120);

/// A connection to the bus that has the daemon.
#[derive(Debug)]
pub struct Bus {
    connection: Connection,
    manager: ManagerProxy<'static>,
    /// Whether the session bus may be tried when nobody is here.
    fallback: bool,
    limit: Duration,
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
        let fallback = globals.bus.is_none() && !set("DBUS_SYSTEM_BUS_ADDRESS") && set("DBUS_SESSION_BUS_ADDRESS");
        let limit = globals.timeout.unwrap_or(CALL_TIMEOUT);
        match connect(target, limit).await {
            Ok(connection) => Self::new(connection, fallback, limit).await,
            Err(failure) if fallback => match session_with_daemon(limit).await {
                Some(connection) => Self::new(connection, false, limit).await,
                None => Err(failure),
            },
            Err(failure) => Err(failure),
        }
    }

    async fn new(connection: Connection, fallback: bool, limit: Duration) -> Result<Self, Failure> {
        let manager = ManagerProxy::builder(&connection).cache_properties(CacheProperties::No).build().await;
        let manager = manager.map_err(|error| Failure::from_zbus(&error))?;
        Ok(Self { connection, manager, fallback, limit, agent: None })
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
        match within(self.limit, call(&self.manager)).await {
            Err(failure) if failure.is_no_daemon() && self.try_session().await => within(self.limit, call(&self.manager)).await,
            result => result,
        }
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
        if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
            return result;
        }
        self.agent = Agent::start();
        let flags = MethodFlags::ALLOW_INTERACTIVE_AUTH;
        within(PASSWORD_TIMEOUT, call(proxy, member, Some(flags), body)).await
    }

    /// Moves to the session bus if that was not tried yet and a daemon is there.
    async fn try_session(&mut self) -> bool {
        if !std::mem::take(&mut self.fallback) {
            return false;
        }
        let Some(connection) = session_with_daemon(self.limit).await else {
            return false;
        };
        match Self::new(connection, false, self.limit).await {
            Ok(bus) => {
                *self = bus;
                true
            }
            Err(_) => false,
        }
    }
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

/// Polkit's agent for terminals, which asks for the password. Ends with this process.
#[derive(Debug)]
struct Agent(Child);

impl Agent {
    /// Starts it and waits until polkit knows it. `None` where it is not installed.
    fn start() -> Option<Self> {
        // No close-on-exec: the child closes its end when it is registered, which is how systemctl waits too.
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::empty()).ok()?;
        let notify = std::os::fd::AsRawFd::as_raw_fd(&write).to_string();
        let child = Command::new("pkttyagent")
            .args(["--process", &std::process::id().to_string(), "--fallback", "--notify-fd", &notify])
            .stdout(Stdio::null())
            .spawn()
            .ok()?;
        drop(write);
        let _ = std::fs::File::from(read).read(&mut [0]);
        Some(Self(child))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
