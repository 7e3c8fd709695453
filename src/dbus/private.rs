//! An object that belongs to one user: to others it has no properties. Its methods see to themselves.
//!
//! D-Bus has no way to hide an object from some, so that it exists is seen by all: a number in a path. What it is about is not.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

use zbus::message::Header;
use zbus::names::{InterfaceName, MemberName, OwnedUniqueName};
use zbus::object_server::{DispatchResult, Interface, SignalEmitter};
use zbus::{Connection, DBusError, Message, ObjectServer, OwnedVariant, Variant, fdo};

use super::access::Access;
use super::errors::Error;
use crate::api::names::ErrorName;

/// An interface whose properties only its owner reads, and root. Who manages the node has `ListJobs`.
#[derive(Debug)]
pub(super) struct Private<I> {
    pub inner: I,
    /// The owner's uid.
    pub owner: u32,
    /// The connection that it is for.
    pub caller: Option<OwnedUniqueName>,
    pub access: Arc<Access>,
}

impl<I> Private<I> {
    /// Nobody in particular asks when there is no header: what follows is broadcast, or goes to whoever lists all objects.
    fn is_open(&self, header: Option<&Header<'_>>) -> bool {
        header.is_some_and(|header| {
            header.sender().is_some_and(|sender| self.caller.as_ref().is_some_and(|caller| caller.as_str() == sender.as_str()))
                || self.access.is_known_as(header, self.owner)
        })
    }
}

#[async_trait::async_trait]
impl<I: Interface> Interface for Private<I> {
    fn name() -> InterfaceName<'static> {
        I::name()
    }

    fn spawn_tasks_for_methods(&self) -> bool {
        self.inner.spawn_tasks_for_methods()
    }

    async fn get(
        &self,
        property_name: &str,
        server: &ObjectServer,
        connection: &Connection,
        header: Option<&Header<'_>>,
        emitter: &SignalEmitter<'_>,
    ) -> Option<Result<OwnedVariant, Box<dyn DBusError + Send + Sync>>> {
        if self.is_open(header) {
            return self.inner.get(property_name, server, connection, header, emitter).await;
        }
        let message = "this job belongs to another user, or to one that this service does not know yet: call ListJobs first";
        Some(Err(Box::new(Error::new(ErrorName::NotAuthorized, message))))
    }

    async fn get_all(
        &self,
        server: &ObjectServer,
        connection: &Connection,
        header: Option<&Header<'_>>,
        emitter: &SignalEmitter<'_>,
    ) -> fdo::Result<HashMap<String, OwnedVariant>> {
        if self.is_open(header) { self.inner.get_all(server, connection, header, emitter).await } else { Ok(HashMap::new()) }
    }

    fn set<'call>(
        &'call self,
        property_name: &'call str,
        value: &'call Variant<'_>,
        server: &'call ObjectServer,
        connection: &'call Connection,
        header: Option<&'call Header<'_>>,
        emitter: &'call SignalEmitter<'_>,
    ) -> DispatchResult<'call> {
        self.inner.set(property_name, value, server, connection, header, emitter)
    }

    async fn set_mut(
        &mut self,
        property_name: &str,
        value: &Variant<'_>,
        server: &ObjectServer,
        connection: &Connection,
        header: Option<&Header<'_>>,
        emitter: &SignalEmitter<'_>,
    ) -> Option<Result<(), Box<dyn DBusError + Send + Sync>>> {
        self.inner.set_mut(property_name, value, server, connection, header, emitter).await
    }

    fn call<'call>(
        &'call self,
        server: &'call ObjectServer,
        connection: &'call Connection,
        message: &'call Message,
        name: MemberName<'call>,
    ) -> DispatchResult<'call> {
        self.inner.call(server, connection, message, name)
    }

    fn call_mut<'call>(
        &'call mut self,
        server: &'call ObjectServer,
        connection: &'call Connection,
        message: &'call Message,
        name: MemberName<'call>,
    ) -> DispatchResult<'call> {
        self.inner.call_mut(server, connection, message, name)
    }

    fn introspect_to_writer(&self, writer: &mut dyn Write, level: usize) {
        self.inner.introspect_to_writer(writer, level);
    }
}
