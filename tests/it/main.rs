//! In-process and private-bus tests; one binary, a module for each part.

#![allow(clippy::unwrap_used)] // a test says what it expects by panicking

#[cfg(feature = "daemon")]
mod bus;
#[cfg(feature = "daemon")]
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "daemon")]
mod completion;
mod config;
#[cfg(feature = "daemon")]
mod daemon;
#[cfg(feature = "daemon")]
mod engine;
#[cfg(feature = "daemon")]
mod gauge;
#[cfg(feature = "daemon")]
mod http;
#[cfg(feature = "daemon")]
mod installed;
#[cfg(feature = "daemon")]
mod man;
#[cfg(feature = "daemon")]
mod net;
mod ogctl;
#[cfg(feature = "daemon")]
mod openai;
#[cfg(feature = "daemon")]
mod polkit;
#[cfg(feature = "daemon")]
mod real;
#[cfg(feature = "daemon")]
mod routing;
#[cfg(feature = "daemon")]
mod upstreams;
#[cfg(feature = "daemon")]
mod wire;
