//! The child as the daemon sees it: a real process, a real model, frames over a socket.
//!
//! Needs llama.cpp, so only `cargo test --release --target x86_64-unknown-linux-gnu -p opengateway-engine` runs it.

#![allow(clippy::unwrap_used, reason = "tests say what they expect by panicking")]

mod answers;
mod client;
mod gguf;
mod hostile;
mod life;
mod limits;
mod old_processors;
mod sandbox;
mod shapes;
mod templates;
