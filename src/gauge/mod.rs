//! What this machine has and can spare.

mod handle;

pub use handle::{Command, Handle};
