//! What this process gives up before it does anything: environment, core dumps, its turn to survive when memory ends.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::panic;
use std::process::Command;

use rustix::process::{DumpableBehavior, Resource, Rlimit};

/// The kernel ends the child before the daemon, whose own score the unit puts at 500.
const OOM_SCORE: i32 = 800;

/// The whole environment. Without the first an assertion that fails starts gdb, and the process hangs for as long. With the
/// second a thread that waits for the others gives its processor back after some 0.1 ms rather than 10: on a machine that does
/// other things too that makes two threads several times as fast.
const ENVIRONMENT: [(&str, &str); 2] = [("GGML_NO_BACKTRACE", "1"), ("GOMP_SPINCOUNT", "2000")];

/// Starts the program anew where its environment is another: libraries have read theirs before `main`. Called first.
///
/// # Errors
/// When it cannot be started.
pub fn clean_environment() -> io::Result<()> {
    let own: Vec<_> = std::env::vars_os().collect();
    if own.len() == ENVIRONMENT.len()
        && ENVIRONMENT.iter().all(|(name, value)| std::env::var_os(name).is_some_and(|own| own == *value))
    {
        return Ok(());
    }
    let program = std::env::current_exe()?;
    Err(Command::new(program).args(std::env::args_os().skip(1)).env_clear().envs(ENVIRONMENT).exec())
}

/// Hardens the process, while there is one thread.
///
/// # Errors
/// When the kernel refuses what it never refuses.
pub fn harden() -> io::Result<()> {
    quiet_panics();
    // Before the process stops being dumpable: from then on /proc/self belongs to root.
    raise_oom_score();
    // A unit may forbid the call, having set the limit itself; not being dumpable is enough.
    let _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let null = File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(())
}

/// A panic ends the process whatever thread it is in, and tells the place only: its message may quote a prompt.
fn quiet_panics() {
    panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        eprintln!("opengateway-engine: a fault in the program at {place}");
        exit(Exit::Fault);
    }));
}

fn raise_oom_score() {
    let path = "/proc/self/oom_score_adj";
    let own = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    if own < OOM_SCORE
        && let Err(error) = std::fs::write(path, OOM_SCORE.to_string())
    {
        eprintln!("opengateway-engine: cannot raise its OOM score: {error}");
    }
}

/// How the process ends; part of the protocol.
#[derive(Debug, Clone, Copy)]
pub enum Exit {
    /// Told to, or the daemon is gone.
    Well = 0,
    /// Wrong command line, or a stream that is not the protocol.
    Usage = 2,
    /// The model cannot be loaded; the reason was told.
    Load = 3,
    /// A bug, or the C++ computes nothing any more.
    Fault = 101,
}

/// Ends the process at once, even while another thread is deep in C++.
#[allow(unsafe_code)]
pub fn exit(code: Exit) -> ! {
    // SAFETY: runs nothing of ours; no destructor may wait for a thread that computes.
    unsafe { libc::_exit(code as i32) }
}

/// Reads how much anonymous memory the process holds. Opened before the sandbox closes /proc.
#[derive(Debug)]
pub struct MemoryGauge(Option<File>);

impl MemoryGauge {
    /// Opens the gauge.
    pub fn open() -> Self {
        Self(File::open("/proc/self/status").ok())
    }

    /// Anonymous resident bytes.
    pub fn anonymous(&self) -> Option<u64> {
        let mut text = [0; 4096];
        let length = self.0.as_ref()?.read_at(&mut text, 0).ok()?;
        let text = String::from_utf8_lossy(&text[..length]);
        let kibibytes = text.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
        kibibytes.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|count| count * 1024)
    }
}
