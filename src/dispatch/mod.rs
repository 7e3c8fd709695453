//! Prompts that this machine asks: one outcome each, at the latest one second after the deadline.

mod handle;

pub use handle::{Handle, Job, JobEvent, Options, ServedBy, Start};
