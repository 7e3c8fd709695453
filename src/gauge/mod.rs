//! What this machine has and can spare.
//!
//! Probes take the roots that they read from, so that recorded trees test them. What is unknown stays unknown.

mod cgroup;
mod cpu;
mod disk;
mod drm;
mod errand;
mod handle;
mod host;
mod memory;
mod nvml;
mod sampler;

pub use handle::{Command, Handle};
pub use host::HostProbe;
pub use sampler::{Config, spawn};
