//! Prompts that this machine asks: one outcome each, at the latest one second after the deadline.

mod handle;
mod job;
mod route;
#[cfg(test)]
mod simulation;
mod speed;
mod tally;
#[cfg(test)]
mod tests;

pub use handle::{Handle, Job, JobEvent, Options, ServedBy, Start, default_cluster};
pub use job::Router;
