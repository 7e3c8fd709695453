//! In-process and private-bus tests; one binary, a module for each part.

#[cfg(feature = "daemon")]
mod net;
mod ogctl;
