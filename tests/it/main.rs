//! In-process tests and tests on a private bus. `tests/netns` has those that need root.

#[cfg(feature = "daemon")]
mod net;
