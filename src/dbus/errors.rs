//! Errors as a caller on the bus sees them: one name, one sentence. The exhaustive tables from the layers below end here.

use zbus::message::Header;
use zbus::names::ErrorName as WireName;
use zbus::{DBusError, Message};

use super::control::ControlError;
use crate::api::names::ErrorName;
use crate::domain::cluster::ClusterIdError;
use crate::domain::prompt::{Failure, FailureKind};
use crate::models::ModelError;

/// A D-Bus error with a name of the table in `api::names`.
///
/// zbus's derive would send its own name for wrapped errors; this sends the documented one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The name.
    pub name: ErrorName,
    /// A sentence for people.
    pub message: String,
}

impl Error {
    /// An error with this name.
    pub fn new(name: ErrorName, message: impl Into<String>) -> Self {
        Self { name, message: without_nul(message.into()) }
    }

    /// A bad argument or option.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorName::InvalidArgs, message)
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.name, self.message)
    }
}

impl std::error::Error for Error {}

impl DBusError for Error {
    fn create_reply(&self, call: &Header<'_>) -> zbus::Result<Message> {
        Message::error(call, self.name()).build(&(&self.message,))
    }

    fn name(&self) -> WireName<'_> {
        WireName::from_static_str_unchecked(self.name.as_str())
    }

    fn description(&self) -> Option<&str> {
        Some(&self.message)
    }
}

/// A D-Bus string holds no NUL, zbus does not check what it sends, and the bus cuts off who sends one: no text that comes
/// from elsewhere goes out without this.
pub(super) fn without_nul(text: String) -> String {
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
}

/// The bus name of a prompt's failure.
pub(crate) const fn failure_name(kind: FailureKind) -> ErrorName {
    match kind {
        FailureKind::NoEligiblePeer => ErrorName::NoEligiblePeer,
        FailureKind::ModelUnavailable => ErrorName::ModelUnavailable,
        FailureKind::Busy => ErrorName::Busy,
        FailureKind::QuotaExceeded => ErrorName::QuotaExceeded,
        FailureKind::DeadlineExceeded => ErrorName::DeadlineExceeded,
        FailureKind::Stalled => ErrorName::Stalled,
        FailureKind::SlowConsumer => ErrorName::SlowConsumer,
        FailureKind::AnswerTooLarge => ErrorName::AnswerTooLarge,
        FailureKind::RelayLimit => ErrorName::RelayLimit,
        FailureKind::EngineCrashed => ErrorName::EngineCrashed,
        FailureKind::BackendFailed => ErrorName::BackendFailed,
        FailureKind::PeerLost => ErrorName::PeerLost,
        FailureKind::Interrupted => ErrorName::Interrupted,
        FailureKind::Cancelled => ErrorName::Cancelled,
        FailureKind::NotAuthorized => ErrorName::NotAuthorized,
        FailureKind::InvalidRequest => ErrorName::InvalidArgs,
        FailureKind::ProtocolError => ErrorName::ProtocolError,
        FailureKind::Duplicate => ErrorName::Duplicate,
        FailureKind::ShuttingDown => ErrorName::ShuttingDown,
        FailureKind::ContextOverflow => ErrorName::ContextOverflow,
        FailureKind::ModelLoading => ErrorName::ModelLoading,
        FailureKind::PromptQuarantined => ErrorName::PromptQuarantined,
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::new(failure_name(failure.kind), failure.detail)
    }
}

impl From<ClusterIdError> for Error {
    fn from(error: ClusterIdError) -> Self {
        Self::new(ErrorName::InvalidClusterId, error.to_string())
    }
}

impl From<ModelError> for Error {
    fn from(error: ModelError) -> Self {
        let message = error.to_string();
        let name = match error {
            ModelError::NoSuchModel(_) => ErrorName::NoSuchModel,
            ModelError::Exists(_) => ErrorName::ModelExists,
            ModelError::Invalid(_) => ErrorName::InvalidModel,
            ModelError::Storage(_) => ErrorName::StorageFull,
            ModelError::Refused(_) => ErrorName::ModelRefused,
            ModelError::NoEngine(_) => ErrorName::NoEngine,
            ModelError::Busy => ErrorName::Busy,
            ModelError::ShuttingDown => ErrorName::ShuttingDown,
        };
        Self::new(name, message)
    }
}

impl From<ControlError> for Error {
    fn from(error: ControlError) -> Self {
        let message = error.to_string();
        let name = match error {
            ControlError::TooManyClusters(_) => ErrorName::TooManyClusters,
            ControlError::NotEligible(_) => ErrorName::NotEligible,
            ControlError::NoSuchCluster(_) => ErrorName::NoSuchCluster,
            ControlError::NotConnected(_) => ErrorName::NotConnected,
            ControlError::InvalidArgument(_) => ErrorName::InvalidArgs,
            ControlError::Storage(_) => ErrorName::StorageFull,
            ControlError::InvalidConfiguration(_) => ErrorName::InvalidConfiguration,
            ControlError::Busy(_) => ErrorName::Busy,
            ControlError::ShuttingDown => ErrorName::ShuttingDown,
        };
        Self::new(name, message)
    }
}
