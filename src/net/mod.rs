//! The libp2p swarm and its only owner.
//!
//! Other layers hold a [`Handle`] and read [`Snapshot`]s; nothing of libp2p leaves this module.

mod address;
mod admission;
mod agenda;
mod alarm;
mod answer;
mod arrival;
mod ask;
mod behaviour;
mod book;
mod bootstrap;
mod config;
mod dedup;
mod dht;
mod dial;
mod discovery;
mod duplicates;
mod events;
mod facts;
mod gate;
mod guard;
mod handle;
mod hasty;
pub mod identity;
mod inbound;
mod joining;
mod known;
mod lanes;
mod ledger;
mod links;
mod listen;
mod lobby;
mod local;
mod mdns;
mod members;
mod membership;
mod mesh;
mod meter;
mod nat;
mod offers;
mod persistent;
mod ping;
mod places;
mod port;
mod publish;
mod punch;
mod reach;
mod recover;
mod relaying;
mod remember;
mod rivals;
mod room;
mod session;
mod sieve;
#[cfg(test)]
mod simulation;
mod store;
mod streams;
mod supervise;
mod task;
#[cfg(test)]
mod tests;
mod transport;
mod views;

pub use behaviour::ConnectionCaps;
pub use config::{Config, Mesh, Relaying, Remembered, Timings};
pub use handle::{
    AnswerEvent, AnswerNow, AnswerStream, Command, Event, Handle, InboundPrompt, JoinError, JoinOptions, LeaveError, Replier,
    Scripted, Service, Snapshot,
};
pub use ping::MAX_PINGS;
pub use supervise::{Stopped, start};
pub use task::{MAX_CLUSTERS, StartError};

use std::time::Duration;

/// `period`, shortened or lengthened by up to a fifth, so that nodes that started together do not stay in step.
fn jitter(period: Duration) -> Duration {
    let mut random = [0_u8; 2];
    // Without random numbers the period is as it is: nothing depends on it being secret.
    if getrandom::fill(&mut random).is_err() {
        return period;
    }
    period.mul_f64(0.8 + 0.4 * f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX))
}

/// A number below `below`; 0 when `below` is 0 or there are no random numbers. Fairness hangs on it, no secret.
fn random_below(below: usize) -> usize {
    if below == 0 { 0 } else { usize::try_from(random_u64() % below as u64).unwrap_or(0) }
}

/// Eight random bytes; 0 where the system gives none.
fn random_u64() -> u64 {
    let mut bytes = [0; 8];
    let _ = getrandom::fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// Shuffles a list.
fn shuffle<T>(list: &mut [T]) {
    for at in (1..list.len()).rev() {
        list.swap(at, random_below(at + 1));
    }
}
