//! What this machine says of its own network: interfaces, firewall, clock, suspends. Read from files that everybody may
//! read; what they do not tell stays unknown.

use std::path::PathBuf;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::domain::doctor::Host;
use crate::domain::network::InterfaceFacts;

/// Reads it.
#[derive(Debug, Clone)]
pub struct HostProbe {
    /// Usually `/`.
    root: PathBuf,
    /// How long the machine had slept when this was made.
    slept: Duration,
}

/// How long the machine has slept since it was booted.
fn slept() -> Duration {
    let read = |clock| {
        let time = clock_gettime(clock);
        Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
    };
    // In this order the difference is never too small by what passes between the two.
    let awake = read(ClockId::Monotonic);
    read(ClockId::Boottime).saturating_sub(awake)
}

impl HostProbe {
    /// Of the machine that this runs on; suspends are counted from now.
    pub fn of_machine() -> Self {
        Self { root: PathBuf::from("/"), slept: slept() }
    }

    /// What is known now. Blocks for as long as reading a few files takes.
    pub fn read(&self) -> (Vec<InterfaceFacts>, Host) {
        let suspended_s = slept().saturating_sub(self.slept).as_secs();
        (Vec::new(), Host { suspended_s, ..Host::default() })
    }
}
