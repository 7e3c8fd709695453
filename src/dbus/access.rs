//! Who may do what: one place. Root may do everything; on a bus of one's own, so may the daemon's user; about everybody else
//! polkit decides. Reading is free.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use zbus::Connection;
use zbus::message::Header;
use zbus::names::OwnedUniqueName;

use super::errors::Error;
use super::polkit::{self, Verdict};
use super::turns::Turns;
use crate::api::names::ErrorName;

/// Callers whose uid is remembered. Unique names are never given twice on one bus, so an entry never goes stale.
const MAX_CALLERS: usize = 256;
/// Questions of one user that wait for polkit at once: what one user can make this daemon hold is bounded.
const MAX_QUESTIONS: usize = 32;
/// Those of all users: the system bus lets a connection wait for 128 replies, and refuses it every further call.
const MAX_ALL_QUESTIONS: usize = 96;

/// The bus itself answers at once, unless it is about to die.
const BUS_ANSWERS: Duration = Duration::from_secs(10);

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
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Connect, Self::Disconnect, Self::Prompt, Self::Configure, Self::Manage];

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
    /// The system bus: the daemon's own user has no rights on it.
    System,
    /// A session bus or a bus of one's own: this user may do everything, and there is no polkit.
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
    /// Questions to polkit in progress.
    questions: Turns,
}

impl Access {
    /// For this kind of bus.
    pub fn new(mode: Mode) -> Self {
        Self { mode, uids: Mutex::default(), questions: Turns::new(MAX_QUESTIONS, MAX_ALL_QUESTIONS) }
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
                let uid = uid_of(connection, &name).await.map_err(unknown)?;
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

    /// Whether `uid` may do everything, without polkit being asked. Minimal systems have no polkit, and root's word needs none.
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
    /// `NotAuthorized` or `InteractiveAuthorizationRequired`, naming the action; `Busy` past the limit of open questions.
    pub async fn require(&self, connection: &Connection, header: &Header<'_>, action: Action) -> Result<Caller, Error> {
        let caller = self.caller(connection, header).await?;
        if self.allows(caller.uid) {
            return Ok(caller);
        }
        if let Mode::PerUser(owner) = self.mode {
            let why = format!("this daemon is of user {owner}, and takes orders from it and root alone");
            return Err(refusal(caller.uid, action, &Verdict::Unknown(why)));
        }
        match self.ask(connection, header, caller.uid, action, polkit::may_ask(header)).await? {
            // A password takes minutes. Who has given up meanwhile does not want it done any more.
            Verdict::Allowed => match &caller.name {
                Some(name) if uid_of(connection, name).await.is_err() => {
                    Err(Error::new(ErrorName::NotAuthorized, "the caller has left the bus"))
                }
                _ => Ok(caller),
            },
            verdict => Err(refusal(caller.uid, action, &verdict)),
        }
    }

    /// Whether the sender is known to be `owner` or somebody who may everything. Asks nobody: a property that waits holds a
    /// lock of zbus's, and the answer to what it asked may wait behind that. Who has called a method of this service before
    /// is known.
    pub fn is_known_as(&self, header: &Header<'_>, owner: u32) -> bool {
        let uid = match self.mode {
            Mode::PeerToPeer(uid) => Some(uid),
            Mode::System | Mode::PerUser(_) => header.sender().and_then(|name| {
                let name: OwnedUniqueName = name.to_owned().into();
                self.uids.lock().unwrap_or_else(PoisonError::into_inner).get(&name).copied()
            }),
        };
        uid.is_some_and(|uid| uid == owner || self.allows(uid))
    }

    /// Whether the caller manages this node. Nobody is asked for a password.
    pub async fn manages(&self, connection: &Connection, header: &Header<'_>, caller: &Caller) -> bool {
        self.allows(caller.uid)
            || matches!(self.ask(connection, header, caller.uid, Action::Manage, false).await, Ok(Verdict::Allowed))
    }

    async fn ask(
        &self,
        connection: &Connection,
        header: &Header<'_>,
        uid: u32,
        action: Action,
        ask: bool,
    ) -> Result<Verdict, Error> {
        if self.mode != Mode::System {
            // There is no polkit on a bus of one's own, and its owner was let through before.
            return Ok(Verdict::Refused { without_agent: false });
        }
        let question = self.questions.take(uid);
        let question = question.map_err(|full| Error::new(ErrorName::Busy, full.sentence("calls", uid, "wait for polkit")))?;
        Ok(polkit::check(connection, header, action.id(), ask, question).await)
    }
}

/// The uid behind a name, as the bus knows it; else why not.
async fn uid_of(connection: &Connection, name: &OwnedUniqueName) -> Result<u32, String> {
    let bus = "org.freedesktop.DBus";
    let name = (name.as_str(),);
    let asked = connection.call_method(Some(bus), "/org/freedesktop/DBus", Some(bus), "GetConnectionUnixUser", &name);
    match tokio::time::timeout(BUS_ANSWERS, asked).await {
        Ok(Ok(reply)) => reply.body().deserialize().map_err(|error| error.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("the bus did not answer within {} s", BUS_ANSWERS.as_secs())),
    }
}

/// The refusal of one caller.
fn refusal(uid: u32, action: Action, verdict: &Verdict) -> Error {
    let id = action.id();
    let not_authorized = |why: &str| Error::new(ErrorName::NotAuthorized, format!("user {uid} may not do this ({id}): {why}"));
    match verdict {
        Verdict::PasswordWouldHelp => Error::new(
            ErrorName::InteractiveAuthorizationRequired,
            format!("user {uid} may do this ({id}) with an administrator's password"),
        ),
        Verdict::Refused { without_agent: true } => {
            not_authorized("an administrator's password is needed, and it was not given or there is nobody to ask")
        }
        Verdict::Refused { without_agent: false } | Verdict::Allowed => not_authorized("its administrator has not allowed it"),
        Verdict::Unknown(why) => not_authorized(why),
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

    #[test]
    fn every_refusal_names_the_action_and_says_why() {
        let cases = [
            (Verdict::PasswordWouldHelp, ErrorName::InteractiveAuthorizationRequired, "password"),
            (Verdict::Refused { without_agent: true }, ErrorName::NotAuthorized, "nobody to ask"),
            (Verdict::Refused { without_agent: false }, ErrorName::NotAuthorized, "not allowed"),
            (Verdict::Unknown("polkit is not installed".into()), ErrorName::NotAuthorized, "not installed"),
        ];
        for (verdict, name, why) in cases {
            let error = refusal(1000, Action::Prompt, &verdict);
            assert_eq!(error.name, name);
            assert!(error.message.contains(why) && error.message.contains("org.opengateway.gateway1.prompt"), "{error}");
        }
    }

    #[test]
    fn a_user_has_so_many_open_questions_and_not_one_more() {
        let access = Access::new(Mode::System);
        let held: Vec<_> = (0..MAX_QUESTIONS).map(|_| access.questions.take(1000).unwrap()).collect();
        assert!(access.questions.take(1000).is_err() && access.questions.take(1001).is_ok());
        drop(held);
        let uid = |number: usize| u32::try_from(number / MAX_QUESTIONS).unwrap();
        let all: Vec<_> = (0..MAX_ALL_QUESTIONS).map(|number| access.questions.take(uid(number)).unwrap()).collect();
        assert!(access.questions.take(1000).is_err());
        drop(all);
        assert!(access.questions.take(1000).is_ok());
    }

    #[test]
    fn the_installed_policy_has_these_actions_and_no_other_each_owned_by_the_services_user() {
        let policy = include_str!("../../dbus/org.opengateway.gateway1.policy");
        let declared: Vec<&str> = policy.split("<action id=\"").skip(1).map(|rest| rest.split_once('"').unwrap().0).collect();
        let known: Vec<&str> = Action::ALL.iter().map(|action| action.id()).collect();
        assert_eq!(declared, known);
        // Without it polkitd tells a daemon that is not root nothing about its callers.
        let owner = "<annotate key=\"org.freedesktop.policykit.owner\">unix-user:opengateway</annotate>";
        assert_eq!(policy.matches(owner).count(), Action::ALL.len());
        assert!(include_str!("../../systemd/opengatewayd.service").lines().any(|line| line == "User=opengateway"));
        assert!(
            include_str!("../../systemd/sysusers.d/opengateway.conf").lines().any(|line| line.starts_with("u     opengateway "))
        );
    }
}
