//! What the process may still do once it knows its model: read that one file, compute, and talk over the descriptors it has.
//!
//! Landlock (Linux 5.13) says which files: the model, for reading. seccomp says which system calls: an allow-list, so that
//! there is no socket, no other program, no other process, no file to write. A call that is not on the list fails with
//! `EPERM` rather than killing the process: a newer C library may try a new call before an old one, and a program that gets
//! `EPERM` gets no further either. Once the model is loaded, no file can be opened at all.
//!
//! A driver of a GPU is code in this process that has to speak to its device. NVIDIA's has opened all that it needs and has its
//! context by the time that the sandbox closes: it keeps one more system call, `ioctl` of its own kinds, and the rest holds as
//! it stands. Its threads are older than the sandbox: seccomp is put on them too, and only Landlock leaves them out, so that
//! they could read files until the model is loaded. Of other drivers nobody has tried what they need: they get more of everything.
//!
//! A kernel without Landlock leaves seccomp: no file can be written or created, but any that the user may read can be read
//! until the model is loaded. A kernel without seccomp is refused.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};

use crate::seccomp;

/// Newest kernel interface that the rules know.
const ABI: ABI = ABI::V6;

/// What computes in this process besides the kernels for the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// Nothing.
    None,
    /// NVIDIA's.
    Cuda,
    /// That of another GPU.
    Other,
}

/// How much of the sandbox this kernel can build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strength {
    /// Everything.
    Full,
    /// Landlock of an older kernel: files are guarded, some newer kind of access is not.
    Partial,
    /// No Landlock: seccomp alone.
    CallsOnly,
}

impl Strength {
    /// For the log and the probe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Partial => "partial",
            Self::CallsOnly => "calls-only",
        }
    }
}

/// Closes the sandbox around this thread and all that it starts. For ever.
///
/// # Errors
/// A sentence: the kernel cannot guard this process at all.
pub fn enter(model: &Path, driver: Driver) -> Result<Strength, String> {
    let strength = restrict_files(model, driver).map_err(|error| format!("cannot restrict file access: {error}"))?;
    seccomp::restrict_calls(driver).map_err(|error| format!("cannot restrict system calls: {error}"))?;
    Ok(strength)
}

/// Nothing more is opened: the model is loaded.
///
/// # Errors
/// As [`enter`].
pub fn close_files(driver: Driver) -> Result<(), String> {
    // It may open its devices whenever it likes.
    if driver == Driver::Other {
        return Ok(());
    }
    seccomp::refuse_open().map_err(|error| format!("cannot restrict system calls: {error}"))
}

fn restrict_files(model: &Path, driver: Driver) -> Result<Strength, Box<dyn std::error::Error>> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI))?
        .handle_access(AccessNet::from_all(ABI))?
        .scope(Scope::from_all(ABI))?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new(model)?, AccessFs::ReadFile))?;
    for path in driver_files(driver) {
        // What this machine does not have need not be allowed.
        if let Ok(file) = PathFd::new(path) {
            rules =
                rules.add_rule(PathBeneath::new(file, AccessFs::from_read(ABI) | AccessFs::WriteFile | AccessFs::IoctlDev))?;
        }
    }
    Ok(match rules.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Strength::Full,
        RulesetStatus::PartiallyEnforced => Strength::Partial,
        RulesetStatus::NotEnforced => Strength::CallsOnly,
    })
}

/// What drivers of GPUs read and write once the sandbox is closed.
fn driver_files(driver: Driver) -> &'static [&'static str] {
    match driver {
        Driver::None | Driver::Cuda => &[],
        Driver::Other => &[
            "/dev/dri",
            "/dev/shm",
            "/proc",
            "/sys",
            "/usr/lib",
            "/usr/lib64",
            "/usr/share",
            "/etc/vulkan",
            "/etc/OpenCL",
            "/etc/ld.so.cache",
            "/dev/nvidia0",
            "/dev/nvidia1",
            "/dev/nvidia2",
            "/dev/nvidia3",
            "/dev/nvidia4",
            "/dev/nvidia5",
            "/dev/nvidia6",
            "/dev/nvidia7",
            "/dev/nvidiactl",
            "/dev/nvidia-uvm",
            "/dev/nvidia-uvm-tools",
        ],
    }
}
