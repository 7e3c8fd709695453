//! In-process and private-bus tests; one binary, a module for each part.

#[cfg(feature = "daemon")]
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "daemon")]
mod daemon;
#[cfg(feature = "daemon")]
mod net;
mod ogctl;
#[cfg(feature = "daemon")]
mod openai;
