//! Failures: what went wrong, why, and the next command.
//!
//! Errors of the daemon are mapped by name through the table of `api::names`, never by message text.

use crate::term;
use opengateway::api::names::{ErrorName, Origin, exit};
use std::io;
use zbus::DBusError as _;

/// A command that failed.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Stable name for scripts: the last part of a D-Bus error name, or one of `ogctl`'s own.
    pub name: String,
    /// What and why; foreign text in it is safe to show.
    pub message: String,
    /// The next thing to do; may be empty.
    pub hint: String,
    /// Exit code.
    pub code: u8,
}

/// Why a command ended early.
#[derive(Debug)]
pub enum Stop {
    /// It failed.
    Failed(Box<Failure>),
    /// Nobody reads standard output any more: end quietly, the reader has what it wanted.
    Closed,
    /// The user interrupted it.
    Interrupted,
    /// It printed what it found, which has this exit code.
    Found(u8),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(Box::new(failure))
    }
}

impl From<io::Error> for Stop {
    /// For errors of writing to standard output.
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::Closed;
        }
        Failure::new("Output", format!("cannot write the output: {error}"), "", exit::FAILED).into()
    }
}

impl Failure {
    /// A failure with a name of `ogctl`'s own.
    pub fn new(name: &str, message: impl Into<String>, hint: impl Into<String>, code: u8) -> Self {
        Self { name: name.into(), message: message.into(), hint: hint.into(), code }
    }

    /// The command line is wrong in a way that only showed later.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new("Usage", message, "see: ogctl help", exit::USAGE)
    }

    /// The daemon (or the bus) did not answer in time.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new("Timeout", message, "see whether it hangs with: systemctl status opengatewayd", exit::TIMEOUT)
    }

    /// The daemon died or closed the stream while it worked for us.
    pub fn daemon_gone() -> Self {
        let hint = "what was printed may not be whole; see: journalctl -u opengatewayd";
        Self::new("DaemonGone", "opengatewayd went away before the answer was whole", hint, exit::NO_DAEMON)
    }

    /// There is no bus to talk over.
    pub fn no_bus(bus: &str, why: impl std::fmt::Display) -> Self {
        let message = format!("cannot connect to the {bus} bus: {why}");
        Self::new(
            "NoBus",
            message,
            "is D-Bus running? Try: systemctl start dbus, or choose another bus with --bus",
            exit::NO_DAEMON,
        )
    }

    /// An error with this D-Bus name.
    pub fn named(name: &str, message: &str) -> Self {
        let said = term::line(message);
        let Ok(known) = name.parse::<ErrorName>() else {
            if name.starts_with("org.freedesktop.DBus.Error.Spawn.") || name.starts_with("org.freedesktop.systemd1.") {
                let what = format!("opengatewayd could not be started by the bus: {said}");
                let known = ErrorName::ServiceUnknown;
                return Self::new(known.short(), what, ErrorName::TimedOut.hint(), known.exit_code());
            }
            let short = name.rsplit('.').next().unwrap_or(name);
            let hint = "the daemon may be newer than ogctl; compare with: ogctl version";
            return Self::new(&term::line(short), format!("{short}: {said}"), hint, exit::FAILED);
        };
        let message = match known {
            ErrorName::NameHasNoOwner => "opengatewayd is not running".to_owned(),
            ErrorName::ServiceUnknown => "opengatewayd is not running, and the bus knows no way to start it".to_owned(),
            ErrorName::TimedOut => format!("opengatewayd could not be started by the bus: {said}"),
            ErrorName::NoReply => format!("opengatewayd went away without an answer: {said}"),
            _ if said.is_empty() => known.short().to_owned(),
            _ => said,
        };
        Self::new(known.short(), message, known.hint(), known.exit_code())
    }

    /// Any error of a call.
    pub fn from_zbus(error: &zbus::Error) -> Self {
        match error {
            zbus::Error::MethodError(name, message, _) => Self::named(name.as_str(), message.as_deref().unwrap_or_default()),
            zbus::Error::FDO(fdo) => match fdo.as_ref() {
                zbus::fdo::Error::ZBus(inner) => Self::from_zbus(inner),
                named => Self::named(named.name().as_str(), named.description().unwrap_or_default()),
            },
            zbus::Error::InputOutput(error) => {
                Self::named(ErrorName::Disconnected.as_str(), &format!("the connection to the bus is lost: {error}"))
            }
            other => {
                let hint = ErrorName::UnknownMethod.hint();
                Self::new("InvalidReply", format!("the reply of opengatewayd is not understood: {other}"), hint, exit::FAILED)
            }
        }
    }

    /// For `connect` and `disconnect`: failures without a code of their own are "join or leave failed".
    pub fn of_membership(mut self) -> Self {
        let own = |name: &&ErrorName| name.short() == self.name && name.origin() == Origin::Service;
        if self.code == exit::FAILED && ErrorName::ALL.iter().any(|name| own(&name)) {
            self.code = exit::MEMBERSHIP;
        }
        self
    }

    /// Whether no daemon answered at all, so that another bus may be tried.
    pub fn is_no_daemon(&self) -> bool {
        matches!(self.name.as_str(), "NameHasNoOwner" | "ServiceUnknown" | "NoBus")
    }

    /// Whether there is a bus, and no daemon on it.
    pub fn is_not_running(&self) -> bool {
        matches!(self.name.as_str(), "NameHasNoOwner" | "ServiceUnknown" | "TimedOut")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_names_take_code_and_hint_from_the_table() {
        for name in ErrorName::ALL {
            let failure = Failure::named(name.as_str(), "why");
            assert_eq!(
                (failure.code, failure.hint.as_str(), failure.name.as_str()),
                (name.exit_code(), name.hint(), name.short())
            );
        }
    }

    #[test]
    fn unknown_names_are_plain_failures_that_keep_the_message() {
        let failure = Failure::named("org.opengateway.Gateway1.Error.Newer", "because\u{1b}[2J");
        assert_eq!((failure.code, failure.name.as_str(), failure.message.as_str()), (exit::FAILED, "Newer", "Newer: because"));
    }

    #[test]
    fn a_failed_start_is_told_apart_from_a_stopped_daemon() {
        let spawn = Failure::named("org.freedesktop.DBus.Error.Spawn.ChildExited", "exited with status 1");
        let stopped = Failure::named(ErrorName::NameHasNoOwner.as_str(), "");
        assert_eq!((spawn.code, stopped.code), (exit::NO_DAEMON, exit::NO_DAEMON));
        assert_ne!(spawn.message, stopped.message);
        assert!(spawn.message.contains("exited with status 1") && stopped.hint.contains("systemctl start"));
    }

    #[test]
    fn joining_and_leaving_have_their_own_code_for_what_has_none() {
        let of = |name: ErrorName| Failure::named(name.as_str(), "").of_membership().code;
        assert_eq!(of(ErrorName::ShuttingDown), exit::MEMBERSHIP);
        assert_eq!(of(ErrorName::NotAuthorized), exit::REFUSED);
        assert_eq!(of(ErrorName::NoSuchCluster), exit::NOT_FOUND);
        assert_eq!(of(ErrorName::Disconnected), exit::FAILED);
    }
}
