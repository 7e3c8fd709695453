//! Values that only the running daemon knows: clusters, nodes, models, tiers, jobs.
//!
//! Asked when one of them is to be completed and not before. A daemon that is absent, slow or of another version
//! gives no values; it is never started by the question.

use super::is_safe;
use crate::args::{Color, Globals};
use crate::bus::Bus;
use crate::commands::is_joined;
use crate::details::Read as _;
use crate::errors::Failure;
use crate::render::latency;
use clap::Command;
use clap::builder::StyledStr;
use clap_complete::engine::{ArgValueCandidates, ArgValueCompleter, CompletionCandidate};
use opengateway::api::names::DEFAULT_CLUSTER;
use opengateway::api::proxy::{Details, Options};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

/// Most time for all questions of one completion: nobody waits for a key press.
pub const LIMIT: Duration = Duration::from_millis(300);

/// What was typed before the cursor and decides whom to ask what.
#[derive(Debug, Default)]
struct Typed {
    /// Value of `--bus`.
    bus: Option<String>,
    /// Value of `--cluster`; empty is the default one.
    cluster: String,
    /// `--forget` was given.
    forget: bool,
}

impl Typed {
    /// Reads the words before the last one, the way clap would.
    fn read(words: &[String]) -> Self {
        let before = &words[..words.len().saturating_sub(1)];
        let value = |long: &str, short: &str| {
            before.iter().enumerate().rev().find_map(|(at, word)| {
                if word == long || word == short {
                    return before.get(at + 1).cloned();
                }
                word.strip_prefix(long).and_then(|rest| rest.strip_prefix('=')).map(str::to_owned)
            })
        };
        Self {
            bus: value("--bus", "--bus"),
            cluster: value("--cluster", "-c").unwrap_or_default(),
            forget: before.iter().any(|word| word == "--forget"),
        }
    }

    /// Asks the daemon; `None` for whatever goes wrong, and for too late.
    fn ask<T>(&self, question: impl AsyncFnOnce(&mut Bus) -> Result<T, Failure>) -> Option<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
        let globals = Globals { bus: self.bus.clone(), json: false, color: Color::Never, timeout: Some(LIMIT) };
        let answer = async { question(&mut Bus::open(&globals).await?).await };
        runtime.block_on(async { tokio::time::timeout(LIMIT, answer).await }).ok()?.ok()
    }

    /// Known clusters, of which `wanted` says which, by its state and whether it is remembered.
    fn clusters(&self, wanted: impl Fn(&str, bool) -> bool) -> Vec<CompletionCandidate> {
        let clusters = self.ask(async |bus| bus.ask(async |manager| manager.list_clusters().await).await);
        let state = |details: &Details| details.text_or_empty("State");
        let wanted = |details: &Details| wanted(&state(details), details.flag("Configured").unwrap_or(false));
        let clusters = clusters.unwrap_or_default().into_iter().filter(|(_, _, details)| wanted(details));
        clusters.filter_map(|(id, _, details)| candidate(&id, &state(&details))).collect()
    }

    /// What can be joined. The default cluster is known to everybody.
    fn to_join(&self) -> Vec<CompletionCandidate> {
        let Some(clusters) = self.ask(async |bus| bus.ask(async |manager| manager.list_clusters().await).await) else {
            return Vec::new();
        };
        let mut known: BTreeMap<String, String> =
            clusters.into_iter().map(|(id, _, details)| (id, details.text_or_empty("State"))).collect();
        if !known.keys().any(|id| id.eq_ignore_ascii_case(DEFAULT_CLUSTER)) {
            known.insert(DEFAULT_CLUSTER.to_owned(), "the default cluster".to_owned());
        }
        known.iter().filter_map(|(id, state)| candidate(id, state)).collect()
    }

    /// What can be left; with `--forget`, what can be forgotten too.
    fn to_leave(&self) -> Vec<CompletionCandidate> {
        self.clusters(|state, remembered| is_joined(state) || self.forget && remembered)
    }

    fn peers(&self) -> Vec<(String, Details)> {
        let peers = self.ask(async |bus| bus.ask(async |manager| manager.list_peers(&self.cluster, &Options::new()).await).await);
        peers.unwrap_or_default()
    }

    /// Members of the cluster that was typed.
    fn nodes(&self, current: &OsStr) -> Vec<CompletionCandidate> {
        named(&self.peers(), current)
    }

    /// Members of every joined cluster, by name or peer id.
    fn everybody(&self, current: &OsStr) -> Vec<CompletionCandidate> {
        let joined = self.ask(async |bus| {
            let clusters = bus.ask(async |manager| manager.list_clusters().await).await?;
            let mut peers = BTreeMap::new();
            for (id, _, details) in clusters {
                if is_joined(&details.text_or_empty("State")) {
                    peers.extend(bus.ask(async |manager| manager.list_peers(&id, &Options::new()).await).await?);
                }
            }
            Ok(peers)
        });
        named(&joined.unwrap_or_default().into_iter().collect::<Vec<_>>(), current)
    }

    /// Models that can be asked for, with how many nodes have them.
    fn models(&self) -> Vec<CompletionCandidate> {
        let list =
            async |bus: &mut Bus| bus.ask_models(async |models| models.list_models(&self.cluster, &Options::new()).await).await;
        let nodes = |count: usize| if count == 1 { "1 node".to_owned() } else { format!("{count} nodes") };
        let about = |details: &Details| nodes(details.inners("Nodes").len());
        self.ask(list).unwrap_or_default().iter().filter_map(|(model, details)| candidate(model, &about(details))).collect()
    }

    /// Model files of this machine, with how each is.
    fn files(&self) -> Vec<CompletionCandidate> {
        let list = async |bus: &mut Bus| bus.ask_models(async |models| models.list_local().await).await;
        let files = self.ask(list).unwrap_or_default();
        files.iter().filter_map(|(model, details)| candidate(model, &details.text_or_empty("State"))).collect()
    }

    /// Model tiers, with whether this machine qualifies.
    fn tiers(&self) -> Vec<CompletionCandidate> {
        let tiers = self.ask(async |bus| bus.ask(async |manager| manager.list_eligible(&Options::new()).await).await);
        let about = |eligible| if eligible { "this machine qualifies" } else { "more than this machine has" };
        tiers.unwrap_or_default().iter().filter_map(|(tier, eligible, ..)| candidate(tier, about(*eligible))).collect()
    }

    /// Jobs that can still be cancelled.
    fn jobs(&self) -> Vec<CompletionCandidate> {
        let jobs = self.ask(async |bus| bus.ask(async |manager| manager.list_jobs().await).await).unwrap_or_default();
        let job = |(id, _, details): &(u64, zbus::OwnedObjectPath, Details)| {
            let state = details.text_or_empty("State");
            let ended = matches!(state.as_str(), "done" | "cancelled" | "failed");
            let about = format!("{state}, {}", details.text_or_empty("ClusterId"));
            if ended { None } else { candidate(&id.to_string(), &about) }
        };
        jobs.iter().filter_map(job).collect()
    }
}

/// Peers by name. One whose name could not be typed, or is that of two, goes by its peer id; and so does each one when a
/// peer id is begun.
fn named(peers: &[(String, Details)], current: &OsStr) -> Vec<CompletionCandidate> {
    let begun = current.to_str().filter(|begun| !begun.is_empty());
    let mut found = Vec::new();
    for (peer_id, details) in peers {
        let name = details.text_or_empty("Name");
        let namesakes = peers.iter().filter(|(_, other)| other.text_or_empty("Name") == name).count();
        let about = format!("{}, {}", details.texts("Models").join(" "), latency(details.number("LatencyUSec")));
        let by_name = is_safe(&name) && !name.starts_with('-') && namesakes == 1;
        if by_name {
            found.extend(candidate(&name, &about));
        }
        if !by_name || begun.is_some_and(|begun| peer_id.starts_with(begun)) {
            found.extend(candidate(peer_id, &name));
        }
    }
    let begun = begun.unwrap_or_default();
    found.retain(|candidate| candidate.get_value().to_str().is_some_and(|value| value.starts_with(begun)));
    found
}

/// A word and what it is; nothing for a word that cannot be offered.
fn candidate(word: &str, about: &str) -> Option<CompletionCandidate> {
    let about = (!about.is_empty()).then(|| StyledStr::from(about.to_owned()));
    is_safe(word).then(|| CompletionCandidate::new(word).help(about))
}

/// The command line with live values where there are some.
pub fn attach(command: Command, words: &[String]) -> Command {
    let typed = Arc::new(Typed::read(words));
    let live = |values: fn(&Typed) -> Vec<CompletionCandidate>| {
        let typed = Arc::clone(&typed);
        ArgValueCandidates::new(move || values(&typed))
    };
    let nodes = {
        let typed = Arc::clone(&typed);
        ArgValueCompleter::new(move |current: &OsStr| typed.nodes(current))
    };
    let everybody = {
        let typed = Arc::clone(&typed);
        ArgValueCompleter::new(move |current: &OsStr| typed.everybody(current))
    };
    let joined = || live(|typed| typed.clusters(|state, _| is_joined(state)));
    let wishes = |sub: Command| {
        let nodes = nodes.clone();
        sub.mut_arg("cluster", |arg| arg.add(joined()))
            .mut_arg("model", |arg| arg.add(live(Typed::models)))
            .mut_arg("tier", |arg| arg.add(live(Typed::tiers)))
            .mut_arg("node", |arg| arg.add(nodes))
    };
    command
        .mut_arg("bus", |arg| {
            let buses = [("system", "the default"), ("session", "the bus of your own session")];
            arg.add(ArgValueCandidates::new(move || buses.iter().filter_map(|(bus, about)| candidate(bus, about)).collect()))
        })
        .mut_subcommand("connect", |sub| sub.mut_arg("cluster", |arg| arg.add(live(Typed::to_join))))
        .mut_subcommand("disconnect", |sub| sub.mut_arg("cluster", |arg| arg.add(live(Typed::to_leave))))
        .mut_subcommand("peers", |sub| sub.mut_arg("cluster", |arg| arg.add(joined())))
        .mut_subcommand("doctor", |sub| {
            sub.mut_arg("peer", |arg| arg.add(everybody.clone())).mut_arg("cluster", |arg| arg.add(joined()))
        })
        .mut_subcommand("ping", |sub| sub.mut_arg("peer", |arg| arg.add(everybody.clone())))
        .mut_subcommand("models", |sub| {
            let mut sub = sub.mut_arg("cluster", |arg| arg.add(joined()));
            for command in ["rm", "verify", "load", "unload"] {
                sub = sub.mut_subcommand(command, |sub| sub.mut_arg("name", |arg| arg.add(live(Typed::files))));
            }
            sub
        })
        .mut_subcommand("eligible", |sub| sub.mut_arg("tier", |arg| arg.add(live(Typed::tiers))))
        .mut_subcommand("jobs", |sub| sub.mut_arg("cancel", |arg| arg.add(live(Typed::jobs))))
        .mut_subcommand("prompt", wishes)
        .mut_subcommand("chat", wishes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_typed_before_decides_whom_to_ask_what() {
        let typed = |line: &str| Typed::read(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let one = typed("ogctl --bus=session prompt -c room --node N");
        assert_eq!((one.bus.as_deref(), one.cluster.as_str(), one.forget), (Some("session"), "room", false));
        let two = typed("ogctl prompt --cluster=a --cluster b --bus");
        assert_eq!((two.bus, two.cluster.as_str()), (None, "b"));
        assert!(typed("ogctl leave --forget x").forget);
    }

    #[test]
    fn words_that_steer_a_terminal_are_no_candidates() {
        for bad in ["", "a\u{1b}[2Jb", "a\nb", "a\tb", "a\u{202e}b"] {
            assert!(candidate(bad, "").is_none(), "{bad:?}");
        }
    }
}
