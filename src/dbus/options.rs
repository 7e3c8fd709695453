//! The `a{sv}` of a call, read strictly: an unknown key or a wrong type is `InvalidArgs`, since a typo must not pass.

use std::collections::HashMap;
use std::time::Duration;

use zbus::{OwnedVariant, Variant};

use super::control::ConnectOptions;
use super::errors::Error;
use crate::api::keys::{
    connect_option, disconnect_option, key_option, models_option, network_option, peers_option, prompt_option, resources_option,
    sharing_option,
};
use crate::config::{MAX_ADDRESS_BYTES, MAX_ADDRESSES};
use crate::dispatch;
use crate::domain::prompt::{
    Ask, DEFAULT_TIMEOUT, MAX_PROMPT_BYTES, MAX_STOP_BYTES, MAX_STOPS, MAX_TIMEOUT, MAX_TURNS, Role, Text, Turn,
};
use crate::domain::resources::Lent;
use crate::wire::limits::MAX_MODEL_NAME_BYTES;

/// Of what a caller wrote, so many characters are repeated to it in an error.
pub(super) const MAX_SHOWN: usize = 64;

/// Longest name or peer id of a peer that is asked about: ids are 52 characters, names at most 64 bytes.
const MAX_PEER_BYTES: usize = 128;

/// The options of a call, as they arrive.
pub(super) type Raw = HashMap<String, OwnedVariant>;

/// Takes options out by key; what is left at the end is unknown.
pub(super) struct Options(Raw);

impl Options {
    pub(super) fn new(raw: Raw, known: &[&str]) -> Result<Self, Error> {
        match raw.keys().find(|key| !known.contains(&key.as_str())) {
            Some(unknown) => Err(Error::invalid(format!(
                "option {:?} is not known here; known are: {}",
                unknown.chars().take(MAX_SHOWN).collect::<String>(),
                known.join(", ")
            ))),
            None => Ok(Self(raw)),
        }
    }

    fn wrong(key: &str, wanted: &str) -> Error {
        Error::invalid(format!("option {key} is not of D-Bus type {wanted}"))
    }

    fn text(&mut self, key: &str) -> Result<Option<String>, Error> {
        match self.0.remove(key).map(Variant::from) {
            None => Ok(None),
            Some(Variant::Str(text)) => Ok(Some(text.as_str().to_owned())),
            Some(_) => Err(Self::wrong(key, "s")),
        }
    }

    fn boolean(&mut self, key: &str) -> Result<Option<bool>, Error> {
        match self.0.remove(key).map(Variant::from) {
            None => Ok(None),
            Some(Variant::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(Self::wrong(key, "b")),
        }
    }

    fn u32(&mut self, key: &str) -> Result<Option<u32>, Error> {
        match self.0.remove(key).map(Variant::from) {
            None => Ok(None),
            Some(Variant::U32(number)) => Ok(Some(number)),
            Some(_) => Err(Self::wrong(key, "u")),
        }
    }

    fn u64(&mut self, key: &str) -> Result<Option<u64>, Error> {
        match self.0.remove(key).map(Variant::from) {
            None => Ok(None),
            Some(Variant::U64(number)) => Ok(Some(number)),
            Some(_) => Err(Self::wrong(key, "t")),
        }
    }

    fn f64(&mut self, key: &str) -> Result<Option<f64>, Error> {
        match self.0.remove(key).map(Variant::from) {
            None => Ok(None),
            Some(Variant::F64(number)) if number.is_finite() => Ok(Some(number)),
            Some(Variant::F64(_)) => Err(Error::invalid(format!("option {key} is not a finite number"))),
            Some(_) => Err(Self::wrong(key, "d")),
        }
    }

    fn texts(&mut self, key: &str) -> Result<Vec<String>, Error> {
        match self.0.remove(key) {
            None => Ok(Vec::new()),
            Some(list) => Vec::<String>::try_from(list).map_err(|_| Self::wrong(key, "as")),
        }
    }

    fn messages(&mut self, key: &str) -> Result<Vec<Turn>, Error> {
        let Some(list) = self.0.remove(key) else { return Ok(Vec::new()) };
        let Variant::Array(list) = Variant::from(list) else { return Err(Self::wrong(key, "a(ss)")) };
        if list.len() > MAX_TURNS {
            return Err(Error::invalid(format!("option {key} has {} messages; at most {MAX_TURNS} are taken", list.len())));
        }
        let list = Vec::<(String, String)>::try_from(list).map_err(|_| Self::wrong(key, "a(ss)"))?;
        let turn = |(role, text): (String, String)| {
            let role = Role::from_name(&role).ok_or_else(|| {
                let role: String = role.chars().take(MAX_SHOWN).collect();
                Error::invalid(format!("option {key} has a message of role {role:?}; roles are: system, user, assistant"))
            })?;
            Ok(Turn { role, text: text_of("a message of option Messages", &text)? })
        };
        list.into_iter().map(turn).collect()
    }

    fn fd(&mut self, key: &str) -> Result<Option<std::os::fd::OwnedFd>, Error> {
        match self.0.remove(key).map(Variant::from) {
            None => Ok(None),
            Some(Variant::Fd(fd)) => fd.try_into().map(Some).map_err(|_| Self::wrong(key, "h")),
            Some(_) => Err(Self::wrong(key, "h")),
        }
    }
}

/// What a prompt's options say.
#[derive(Debug)]
pub(super) struct PromptOptions {
    pub ask: Ask,
    pub options: dispatch::Options,
    pub prompt_fd: Option<std::os::fd::OwnedFd>,
}

/// Text that may be asked: not too long, and without NUL.
pub(super) fn text_of(what: &str, text: &str) -> Result<Text, Error> {
    if text.len() > MAX_PROMPT_BYTES {
        return Err(Error::invalid(format!("{what} is {} bytes long; at most {MAX_PROMPT_BYTES} are taken", text.len())));
    }
    if text.contains('\0') {
        return Err(Error::invalid(format!("{what} contains a NUL character")));
    }
    Ok(Text::new(text))
}

pub(super) fn prompt(text: &str, raw: Raw, known: &[&str]) -> Result<PromptOptions, Error> {
    let mut options = Options::new(raw, known)?;
    let timeout = match options.u64(prompt_option::TIMEOUT)? {
        None => DEFAULT_TIMEOUT,
        Some(0) => return Err(Error::invalid("option Timeout is 0")),
        Some(microseconds) => Duration::from_micros(microseconds),
    };
    if timeout > MAX_TIMEOUT {
        return Err(Error::invalid(format!("option Timeout is above the limit of {} s", MAX_TIMEOUT.as_secs())));
    }
    let (peer, node) = (options.text(prompt_option::PEER)?, options.text(prompt_option::NODE)?);
    if peer.is_some() && node.is_some() {
        return Err(Error::invalid("options Peer and Node exclude each other"));
    }
    let local_first = options.boolean(prompt_option::LOCAL_FIRST)?.unwrap_or(false);
    let no_local = options.boolean(prompt_option::NO_LOCAL)?.unwrap_or(false);
    if local_first && no_local {
        return Err(Error::invalid("options LocalFirst and NoLocal exclude each other"));
    }
    let ask = Ask {
        model: options.text(prompt_option::MODEL)?,
        prompt: text_of("the prompt", text)?,
        system: options.text(prompt_option::SYSTEM)?.map(|system| text_of("option System", &system)).transpose()?,
        max_tokens: options.u32(prompt_option::MAX_TOKENS)?,
        temperature: options.f64(prompt_option::TEMPERATURE)?,
        seed: options.u64(prompt_option::SEED)?,
        top_p: options.f64(prompt_option::TOP_P)?,
        stop: stops(options.texts(prompt_option::STOP)?)?,
        history: options.messages(prompt_option::MESSAGES)?,
        raw: options.boolean(prompt_option::RAW)?.unwrap_or(false),
    };
    if ask.top_p.is_some_and(|top_p| top_p <= 0.0 || top_p > 1.0) {
        return Err(Error::invalid("option TopP is not above 0 and at most 1"));
    }
    if ask.raw && (ask.system.is_some() || !ask.history.is_empty()) {
        return Err(Error::invalid("option Raw excludes System and Messages: there is no template to put them into"));
    }
    crate::wire::infer::check(&ask).map_err(|error| Error::invalid(error.to_string()))?;
    Ok(PromptOptions {
        ask,
        options: dispatch::Options { peer, node, tier: options.text(prompt_option::TIER)?, local_first, no_local, timeout },
        prompt_fd: options.fd(prompt_option::PROMPT_FD)?,
    })
}

fn stops(stops: Vec<String>) -> Result<Vec<Text>, Error> {
    if stops.len() > MAX_STOPS {
        return Err(Error::invalid(format!("option Stop has {} texts; at most {MAX_STOPS} are taken", stops.len())));
    }
    let stop = |stop: String| match stop.len() {
        0 => Err(Error::invalid("option Stop has an empty text")),
        length if length > MAX_STOP_BYTES => {
            Err(Error::invalid(format!("option Stop has a text of {length} bytes; at most {MAX_STOP_BYTES} are taken")))
        }
        _ => text_of("option Stop", &stop),
    };
    stops.into_iter().map(stop).collect()
}

/// With earlier messages, all that is asked fits into one prompt.
pub(super) fn check_whole(ask: &Ask) -> Result<(), Error> {
    let earlier: usize = ask.history.iter().map(|turn| turn.text.as_str().len()).sum();
    let whole = ask.prompt.as_str().len() + ask.system.as_ref().map_or(0, |system| system.as_str().len()) + earlier;
    if earlier > 0 && whole > MAX_PROMPT_BYTES {
        return Err(Error::invalid(format!(
            "the prompt, option System and option Messages are {whole} bytes long together; at most {MAX_PROMPT_BYTES} are taken"
        )));
    }
    Ok(())
}

/// Which model alone is listed.
pub(super) fn list_models(raw: Raw) -> Result<Option<String>, Error> {
    Options::new(raw, &[models_option::MODEL])?.text(models_option::MODEL)
}

/// The digest that a file must have.
pub(super) fn add(raw: Raw) -> Result<Option<[u8; 32]>, Error> {
    let Some(text) = Options::new(raw, &[models_option::DIGEST])?.text(models_option::DIGEST)? else { return Ok(None) };
    let digest =
        crate::models::unhex(&text).ok_or_else(|| Error::invalid("option Digest is no SHA-256: 64 hexadecimal digits"))?;
    Ok(Some(digest))
}

/// No option is known here yet.
pub(super) fn none(raw: Raw) -> Result<(), Error> {
    match raw.keys().next() {
        Some(unknown) => {
            let unknown: String = unknown.chars().take(MAX_SHOWN).collect();
            Err(Error::invalid(format!("option {unknown:?} is not known here; there are none")))
        }
        None => Ok(()),
    }
}

/// A name that can be a model's; whether there is one, and whether a file may have it, the models know.
pub(super) fn model_name(name: String) -> Result<String, Error> {
    match name.len() {
        0 => Err(Error::invalid("the model's name is empty")),
        length if length > MAX_MODEL_NAME_BYTES => {
            Err(Error::invalid(format!("the model's name is {length} bytes long; at most {MAX_MODEL_NAME_BYTES} are taken")))
        }
        _ if name.contains('\0') => Err(Error::invalid("the model's name contains a NUL character")),
        _ => Ok(name),
    }
}

pub(super) fn connect(raw: Raw) -> Result<ConnectOptions, Error> {
    let mut options = Options::new(raw, connect_option::ALL)?;
    if options.fd(connect_option::SECRET)?.is_some() {
        return Err(Error::invalid("option Secret: private clusters are not part of this version"));
    }
    // Connect returns at once; how long a client waits for the first member is its own affair.
    options.u64(connect_option::TIMEOUT)?;
    let bootstrap = options.texts(connect_option::BOOTSTRAP)?;
    // They are saved: what is too much here would be too much at the next start.
    if bootstrap.len() > MAX_ADDRESSES {
        return Err(Error::invalid(format!(
            "option Bootstrap has {} addresses; at most {MAX_ADDRESSES} are taken",
            bootstrap.len()
        )));
    }
    if let Some(long) = bootstrap.iter().find(|address| address.len() > MAX_ADDRESS_BYTES) {
        return Err(Error::invalid(format!(
            "option Bootstrap: an address is {} bytes long; at most {MAX_ADDRESS_BYTES} are taken",
            long.len()
        )));
    }
    Ok(ConnectOptions {
        bootstrap,
        serve: options.boolean(connect_option::SERVE)?,
        auto_connect: options.boolean(connect_option::AUTO_CONNECT)?,
    })
}

/// Forget, and the time to let work end.
pub(super) fn disconnect(raw: Raw) -> Result<(bool, Duration), Error> {
    let mut options = Options::new(raw, disconnect_option::ALL)?;
    let drain = options.u64(disconnect_option::DRAIN)?.map_or(Duration::from_secs(10), Duration::from_micros);
    Ok((options.boolean(disconnect_option::FORGET)?.unwrap_or(false), drain.min(MAX_TIMEOUT)))
}

/// Whether another key is made.
pub(super) fn key(raw: Raw) -> Result<bool, Error> {
    Ok(Options::new(raw, key_option::ALL)?.boolean(key_option::RENEW)?.unwrap_or(false))
}

/// Which peer or cluster is asked about.
pub(super) fn diagnose(raw: Raw) -> Result<(Option<String>, Option<String>), Error> {
    let mut options = Options::new(raw, network_option::DIAGNOSE)?;
    let peer = options.text(network_option::PEER)?.map(peer_name).transpose()?;
    let cluster = options.text(network_option::CLUSTER)?;
    if peer.is_some() && cluster.is_some() {
        return Err(Error::invalid("options Peer and Cluster exclude each other"));
    }
    Ok((peer, cluster))
}

/// Whom to ask for signs of life, and how often.
pub(super) fn ping(peer: String, raw: Raw) -> Result<(String, u32), Error> {
    let mut options = Options::new(raw, network_option::PING)?;
    let count = options.u32(network_option::COUNT)?.unwrap_or(1);
    if count == 0 || count > network_option::MAX_COUNT {
        return Err(Error::invalid(format!("option Count is not between 1 and {}", network_option::MAX_COUNT)));
    }
    Ok((peer_name(peer)?, count))
}

/// What can be the id or the name of a peer; whether there is one, the network knows.
fn peer_name(name: String) -> Result<String, Error> {
    match name.len() {
        0 => Err(Error::invalid("the peer's name is empty")),
        length if length > MAX_PEER_BYTES => {
            Err(Error::invalid(format!("the peer's name is {length} bytes long; at most {MAX_PEER_BYTES} are taken")))
        }
        _ => Ok(name),
    }
}

/// How many peers, after which.
pub(super) fn peers(raw: Raw) -> Result<(usize, Option<String>), Error> {
    let mut options = Options::new(raw, peers_option::ALL)?;
    let limit = options.u32(peers_option::LIMIT)?.unwrap_or(peers_option::MAX_LIMIT);
    if limit == 0 || limit > peers_option::MAX_LIMIT {
        return Err(Error::invalid(format!("option Limit is not between 1 and {}", peers_option::MAX_LIMIT)));
    }
    Ok((limit as usize, options.text(peers_option::AFTER)?))
}

/// Whether to measure now.
pub(super) fn resources(raw: Raw) -> Result<bool, Error> {
    let mut options = Options::new(raw, &[resources_option::FRESH])?;
    Ok(options.boolean(resources_option::FRESH)?.unwrap_or(false))
}

/// Which tier, and whether to measure now.
pub(super) fn eligible(raw: Raw) -> Result<(Option<String>, bool), Error> {
    let mut options = Options::new(raw, &[resources_option::FRESH, resources_option::TIER])?;
    Ok((options.text(resources_option::TIER)?, options.boolean(resources_option::FRESH)?.unwrap_or(false)))
}

/// How much is lent, and whether only until the next start.
pub(super) fn sharing(raw: Raw) -> Result<(Lent, bool), Error> {
    let mut options = Options::new(raw, sharing_option::ALL)?;
    let cores = options.f64(sharing_option::CORES)?;
    if cores.is_some_and(|cores| cores <= 0.0) {
        return Err(Error::invalid("option Cores is not above 0"));
    }
    let lent = Lent {
        cores,
        memory: options.u64(sharing_option::MEMORY)?,
        storage: options.u64(sharing_option::STORAGE)?,
        vram: options.u64(sharing_option::VRAM)?,
    };
    Ok((lent, options.boolean(sharing_option::RUNTIME)?.unwrap_or(false)))
}
