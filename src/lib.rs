//! OpenGateway: Linux machines lend each other their language models.
//!
//! The binaries are thin; this library is the program. Dependencies point one way:
//!
//! ```text
//! bin → daemon → dbus → dispatch → { net, serve } → { wire, domain }
//!         │        └──→ gauge, state ──────────────→ domain
//!         └→ config → domain          api ← ogctl (api and domain import nothing of ours)
//! ```
//!
//! | module | owns |
//! | --- | --- |
//! | [`api`] | the D-Bus contract: names, error names, option and detail types, client proxies |
//! | [`domain`] | plain data and decisions; no async, no I/O, no clock |
//! | `config` | the configuration as written (`raw`) and as checked (`settings`) |
//! | `wire` | what peers say to each other: frames, limits, cluster keys, the hello |
//! | `logging` | where log lines go, and which |
//! | `gauge` | what this machine has and can spare |
//! | `state` | the state directory: lock, atomic files, identity bytes, saved clusters |
//! | `models` | the model files of this machine, and the engines that run them |
//! | `net` | the libp2p swarm and its only owner |
//! | `serve` | prompts that this machine answers: queue, fair shares, backends |
//! | `dispatch` | prompts that this machine asks: route, retry, deadline |
//! | `http` | the OpenAI endpoint: any program that speaks that API asks through it |
//! | `diagnosis` | what the doctor is told: the facts of `net` and those of this machine, joined |
//! | `dbus` | the bus objects: translate, authorise, delegate |
//! | `daemon` | wiring and lifecycle |

pub mod api;
pub mod domain;

pub mod config;
#[cfg(feature = "daemon")]
pub mod daemon;
#[cfg(feature = "daemon")]
pub mod dbus;
#[cfg(feature = "daemon")]
pub mod diagnosis;
#[cfg(feature = "daemon")]
pub mod dispatch;
#[cfg(feature = "daemon")]
pub mod gauge;
#[cfg(feature = "daemon")]
pub mod http;
#[cfg(feature = "daemon")]
pub mod logging;
#[cfg(feature = "daemon")]
pub mod models;
#[cfg(feature = "daemon")]
pub mod net;
#[cfg(feature = "daemon")]
pub mod serve;
#[cfg(feature = "daemon")]
pub mod state;
#[cfg(feature = "daemon")]
pub mod wire;
