//! `org.opengateway.Gateway1.Http`: where the OpenAI endpoint is, and the keys for it.

use std::sync::Arc;

use zbus::Connection;
use zbus::message::Header;

use super::access::Action;
use super::errors::Error;
use super::guard::Readers;
use super::options::{self, Raw};
use super::shared::Shared;
use crate::api::names::ErrorName;
use crate::http::KeyError;

/// The endpoint, on the root object.
#[derive(Debug, Clone)]
pub(super) struct Http(pub Arc<Shared>);

impl Readers for Http {}

impl From<KeyError> for Error {
    fn from(error: KeyError) -> Self {
        let message = error.to_string();
        let name = match error {
            KeyError::Storage(_) | KeyError::TooMany => ErrorName::StorageFull,
            KeyError::Damaged(_) | KeyError::Failed(_) => ErrorName::Failed,
        };
        Self::new(name, message)
    }
}

#[zbus::interface(name = "org.opengateway.Gateway1.Http", introspection_docs = false)]
impl Http {
    #[zbus(out_args("key"))]
    async fn get_key(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Raw,
    ) -> Result<String, Error> {
        let renew = options::key(options)?;
        let caller = self.0.access.require(connection, &header, Action::Prompt).await?;
        Ok(self.0.http.key(caller.uid, renew).await?)
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn addresses(&self) -> Vec<String> {
        self.0.http.addresses()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn key_required(&self) -> bool {
        self.0.http.key_required()
    }
}
