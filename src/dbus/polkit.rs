//! What polkit says of a caller. Fails closed: whatever is not a clear yes is a no.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use zbus::message::{Flags, Header};
use zbus::proxy::CacheProperties;
use zbus::{Connection, DBusError as _, Error as BusError};
use zbus_polkit::policykit1::{AuthorityProxy, AuthorizationResult, CheckAuthorizationFlags, Subject};

/// polkit decides by rules within milliseconds; the bus may have to start it first. Callers such as busctl wait 25 s.
const QUIET: Duration = Duration::from_secs(20);
/// Somebody is asked for a password; the dialogues of polkit's agents have no limit of their own.
const ASKING: Duration = Duration::from_secs(5 * 60);

/// What polkit says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Yes.
    Allowed,
    /// Not without a password, and the caller did not let anybody be asked for one.
    PasswordWouldHelp,
    /// No. Somebody may have been asked for a password.
    Refused {
        /// Nobody could be asked: the caller's session has no agent.
        without_agent: bool,
    },
    /// There is no answer; why.
    Unknown(String),
}

/// Whether the caller lets somebody be asked for a password.
pub(super) fn may_ask(header: &Header<'_>) -> bool {
    header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH)
}

/// Asks about the sender of a message: the connection that called, never a process id, which may be another's by now.
///
/// `open` is dropped when polkit has answered, which may be long after the verdict: the bus counts the answers that a
/// connection waits for, and one that waits for too many can ask nothing at all.
pub(super) async fn check(
    connection: &Connection,
    header: &Header<'_>,
    action: &'static str,
    ask: bool,
    open: impl Send + 'static,
) -> Verdict {
    let subject = match Subject::new_for_message_header(header) {
        Ok(subject) => subject,
        Err(error) => return Verdict::Unknown(error.to_string()),
    };
    let authority = AuthorityProxy::builder(connection).cache_properties(CacheProperties::No).build().await;
    let authority = match authority {
        Ok(authority) => authority,
        Err(error) => return Verdict::Unknown(unavailable(&error)),
    };
    let (flags, limit) =
        if ask { (CheckAuthorizationFlags::ALLOW_USER_INTERACTION, ASKING) } else { (CheckAuthorizationFlags::empty(), QUIET) };
    let cancellation = cancellation();
    let (asking, name) = (authority.clone(), cancellation.clone());
    let asked = tokio::spawn(async move {
        let answer = asking.check_authorization(&subject, action, &HashMap::new(), flags, &name).await;
        drop(open);
        answer
    });
    match tokio::time::timeout(limit, asked).await {
        Ok(Ok(Ok(result))) => verdict(&result, ask),
        Ok(Ok(Err(error))) => Verdict::Unknown(unavailable(&error)),
        Ok(Err(panicked)) => Verdict::Unknown(format!("polkit could not be asked: {panicked}")),
        Err(_) => {
            // Without waiting: a polkit that does not decide may not hear this either.
            let _ = authority.inner().call_noreply("CancelCheckAuthorization", &(cancellation.as_str(),)).await;
            Verdict::Unknown(format!("polkit did not decide within {} s", limit.as_secs()))
        }
    }
}

fn verdict(result: &AuthorizationResult, asked: bool) -> Verdict {
    if result.is_authorized {
        Verdict::Allowed
    } else if result.is_challenge && !asked {
        Verdict::PasswordWouldHelp
    } else {
        Verdict::Refused { without_agent: result.is_challenge }
    }
}

/// A sentence about a failed question.
fn unavailable(error: &BusError) -> String {
    let (name, said) = match error {
        BusError::MethodError(name, message, _) => (name.to_string(), message.clone()),
        // The standard names come as a type of their own.
        BusError::FDO(error) => (error.name().to_string(), error.description().map(str::to_owned)),
        error => return format!("polkit could not be asked: {error}"),
    };
    let not_there = name.starts_with("org.freedesktop.DBus.Error.Spawn.")
        || ["org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner"].contains(&name.as_str())
        || name.starts_with("org.freedesktop.systemd1.");
    let said = said.unwrap_or(name);
    if not_there {
        format!("polkit is not installed or cannot be started, and without it only root may ({said})")
    } else {
        format!("polkit could not be asked: {said}")
    }
}

/// Names one question, so that it can be taken back. polkit wants it to be unique on our connection.
fn cancellation() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("opengatewayd-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(is_authorized: bool, is_challenge: bool) -> AuthorizationResult {
        AuthorizationResult { is_authorized, is_challenge, details: HashMap::new() }
    }

    #[test]
    fn only_a_clear_yes_is_one() {
        for asked in [true, false] {
            assert_eq!(verdict(&said(true, false), asked), Verdict::Allowed);
            assert_eq!(verdict(&said(false, false), asked), Verdict::Refused { without_agent: false });
        }
        assert_eq!(verdict(&said(false, true), false), Verdict::PasswordWouldHelp);
        assert_eq!(verdict(&said(false, true), true), Verdict::Refused { without_agent: true });
    }

    #[test]
    fn a_polkit_that_is_not_there_is_told_from_one_that_does_not_answer() {
        let absent = BusError::FDO(Box::new(zbus::fdo::Error::ServiceUnknown("no such name".to_owned())));
        assert!(unavailable(&absent).contains("not installed") && unavailable(&absent).contains("no such name"));
        let silent = BusError::FDO(Box::new(zbus::fdo::Error::NoReply("it left".to_owned())));
        assert_eq!(unavailable(&silent), "polkit could not be asked: it left");
    }

    #[test]
    fn each_question_has_a_name_of_its_own() {
        assert_ne!(cancellation(), cancellation());
    }
}
