//! A panic in a method or a property becomes an error reply. zbus sends none, and its caller would wait for ever. And the
//! properties of an object that belongs to somebody are for its readers.
//!
//! D-Bus has no way to hide an object from some, so that it exists is seen by all: a number in a path. What it is about is not.

use std::any::Any;
use std::collections::HashMap;
use std::fmt::Write;
use std::panic::AssertUnwindSafe;

use futures::FutureExt as _;
use zbus::message::Header;
use zbus::names::{InterfaceName, MemberName};
use zbus::object_server::{DispatchResult, Interface, SignalEmitter};
use zbus::{Connection, Message, ObjectServer, OwnedVariant, Variant, fdo};

use super::errors::Error;
use crate::api::names::ErrorName;

type BoxedError = Box<dyn zbus::DBusError + Send + Sync>;

/// Who may read the properties of an object: everybody, where it does not say otherwise.
pub trait Readers {
    /// Whether the sender may. Nobody in particular asks when there is no header: what follows is broadcast, or goes to
    /// whoever lists all objects. Waits for nothing: see [`super::Access::is_known_as`].
    fn may_read(&self, _header: Option<&Header<'_>>) -> bool {
        true
    }
}

/// An interface whose panics are answered, and whose properties are for its readers. Every object of this service is
/// registered inside one.
#[derive(Debug)]
pub struct Guarded<I>(pub I);

/// The reply to a call that panicked. What the panic said is in the log alone: it may quote what must not be told.
fn panicked(member: &str, payload: &(dyn Any + Send)) -> Error {
    let said = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let said = said.unwrap_or_default();
    tracing::error!(member, said, "a mistake in this program: a panic while {member} was served on the bus: {said}");
    Error::new(ErrorName::Failed, format!("a mistake in opengatewayd itself: serving {member} failed"))
}

// The state behind the interfaces is behind locks that outlive a panic, so the next call finds it whole.
#[async_trait::async_trait]
impl<I: Interface + Readers> Interface for Guarded<I> {
    fn name() -> InterfaceName<'static> {
        I::name()
    }

    fn spawn_tasks_for_methods(&self) -> bool {
        self.0.spawn_tasks_for_methods()
    }

    async fn get(
        &self,
        property_name: &str,
        server: &ObjectServer,
        connection: &Connection,
        header: Option<&Header<'_>>,
        emitter: &SignalEmitter<'_>,
    ) -> Option<Result<OwnedVariant, BoxedError>> {
        if !self.0.may_read(header) {
            let message =
                "this object belongs to another user, or to one that this service does not know yet: call ListJobs first";
            return Some(Err(Box::new(Error::new(ErrorName::NotAuthorized, message))));
        }
        match AssertUnwindSafe(self.0.get(property_name, server, connection, header, emitter)).catch_unwind().await {
            Ok(found) => found,
            Err(payload) => Some(Err(Box::new(panicked(property_name, &*payload)))),
        }
    }

    async fn get_all(
        &self,
        server: &ObjectServer,
        connection: &Connection,
        header: Option<&Header<'_>>,
        emitter: &SignalEmitter<'_>,
    ) -> fdo::Result<HashMap<String, OwnedVariant>> {
        if !self.0.may_read(header) {
            return Ok(HashMap::new());
        }
        match AssertUnwindSafe(self.0.get_all(server, connection, header, emitter)).catch_unwind().await {
            Ok(found) => found,
            Err(payload) => Err(fdo::Error::Failed(panicked("GetAll", &*payload).message)),
        }
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
        self.0.set(property_name, value, server, connection, header, emitter)
    }

    async fn set_mut(
        &mut self,
        property_name: &str,
        value: &Variant<'_>,
        server: &ObjectServer,
        connection: &Connection,
        header: Option<&Header<'_>>,
        emitter: &SignalEmitter<'_>,
    ) -> Option<Result<(), BoxedError>> {
        self.0.set_mut(property_name, value, server, connection, header, emitter).await
    }

    fn call<'call>(
        &'call self,
        server: &'call ObjectServer,
        connection: &'call Connection,
        message: &'call Message,
        name: MemberName<'call>,
    ) -> DispatchResult<'call> {
        match self.0.call(server, connection, message, name.clone()) {
            DispatchResult::Async(answering) => DispatchResult::Async(Box::pin(async move {
                match AssertUnwindSafe(answering).catch_unwind().await {
                    Ok(answered) => answered,
                    Err(payload) => Err(Box::new(panicked(name.as_str(), &*payload)) as BoxedError),
                }
            })),
            other => other,
        }
    }

    fn call_mut<'call>(
        &'call mut self,
        server: &'call ObjectServer,
        connection: &'call Connection,
        message: &'call Message,
        name: MemberName<'call>,
    ) -> DispatchResult<'call> {
        self.0.call_mut(server, connection, message, name)
    }

    fn introspect_to_writer(&self, writer: &mut dyn Write, level: usize) {
        self.0.introspect_to_writer(writer, level);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_object_of_the_service_is_registered_inside_a_guard() {
        let sources = [include_str!("mod.rs"), include_str!("manager.rs"), include_str!("publish.rs")];
        let registered =
            |line: &&str| line.contains(".serve_at(") || line.contains("object_server().at(") || line.contains("server.at(");
        let lines: Vec<&str> = sources.iter().flat_map(|source| source.lines()).filter(registered).collect();
        assert_eq!(lines.len(), 8, "{lines:?}");
        for line in lines {
            assert!(line.contains("Guarded(") || line.contains("ObjectManager"), "{line}");
        }
    }
}
