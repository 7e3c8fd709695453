//! What the test binaries share: buses and daemons of their own.

// Each binary uses its part.
#![allow(dead_code)]

pub mod bus;
pub mod calls;
pub mod gguf;
pub mod node;
pub mod seeded;
pub mod system_bus;
