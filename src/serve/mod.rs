//! Prompts that this machine answers: a bounded queue with fair shares in front of each backend.

pub mod backend;
pub mod discover;
mod echo;
pub mod engine;
mod handle;
mod openai;
mod queue;
#[cfg(test)]
mod tests;
mod worker;

pub use echo::Echo;
pub use handle::{BackendId, Handle, Requester, Served};
pub use openai::{OpenAi, OpenAiError, OpenAiSettings};
pub use worker::{Config, spawn};
