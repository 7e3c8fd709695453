//! In-process and private-bus tests; one binary, a module for each part.

#[cfg(feature = "daemon")]
mod daemon;
#[cfg(feature = "daemon")]
mod gauge;
#[cfg(feature = "daemon")]
mod net;
mod ogctl;
#[cfg(feature = "daemon")]
mod openai;
#[cfg(feature = "daemon")]
mod wire;
