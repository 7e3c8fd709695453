//! Prompts that this machine answers: a bounded queue with fair shares in front of the backends.

pub mod backend;
mod handle;

pub use handle::{Handle, Requester, Served};
