//! System calls that fail, or kill, when they touch the state directory.

use std::ffi::{OsStr, OsString};
use std::process::Child;

use super::*;

/// The calls that change what is there. (Not every architecture has every one: hence the question marks.)
pub const CHANGES: [&str; 10] =
    ["openat", "write", "fsync", "?rename", "?renameat", "renameat2", "?unlink", "unlinkat", "ftruncate", "?mkdir"];

/// What happens at a system call.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// The daemon is killed.
    Kill,
    /// The call fails with this error.
    Error(&'static str),
}

/// One fault of one daemon: at the `step`-th time that one of its threads makes the call on a file of the state directory.
pub struct Strace {
    words: Vec<OsString>,
    log: PathBuf,
    tracer: Option<Child>,
}

impl Strace {
    /// Whether there is one that may trace; says aloud when not.
    pub fn is_here() -> bool {
        let tried = Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).output();
        let works = tried.is_ok_and(|output| output.status.success());
        if !works {
            skipped("there is no strace, or it may not trace here: apt-get install strace");
        }
        works
    }

    fn new(node: &Node, call: &str, step: usize, fault: Fault) -> Self {
        let log = node.bus.dir().join("strace.log");
        let _ = std::fs::remove_file(&log);
        let mut words: Vec<OsString> = ["strace", "-f", "-qq", "-o"].map(OsString::from).to_vec();
        words.push(log.clone().into());
        let state = node.state_dir();
        let files = ["identity.key", "identity.pub", "clusters.json", "clusters.json.prev"];
        let files = files.iter().flat_map(|name| [state.join(name), state.join(format!("{name}.tmp"))]);
        for path in files.chain([state.clone(), state.join("lock")]) {
            words.extend(["-P".into(), path.into()]);
        }
        let fault = match fault {
            Fault::Kill => "signal=SIGKILL".to_owned(),
            Fault::Error(name) => format!("error={name}"),
        };
        words.extend(["-e", "trace=%file,%desc", "-e", &format!("inject={call}:{fault}:when={step}")].map(OsString::from));
        Self { words, log, tracer: None }
    }

    /// Of a daemon from its start on, which this starts.
    pub fn launch(node: &mut Node, call: &str, step: usize, fault: Fault) -> Self {
        let mut strace = Self::new(node, call, step, fault);
        // The daemon stays the child of whoever starts this.
        strace.words.push("-D".into());
        node.launch_under(&strace.words.iter().map(OsString::as_os_str).collect::<Vec<&OsStr>>());
        strace
    }

    /// Of a daemon that runs, from now on.
    pub async fn attach(node: &Node, call: &str, step: usize, fault: Fault) -> Self {
        let mut strace = Self::new(node, call, step, fault);
        let pid = node.pid().to_string();
        strace.tracer = Some(Command::new(&strace.words[0]).args(&strace.words[1..]).args(["-p", &pid]).spawn().unwrap());
        let deadline = Instant::now() + DEADLINE;
        while !is_traced(&pid) {
            assert!(Instant::now() < deadline, "strace does not attach to {pid}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        strace
    }

    /// The calls that failed: ask when the daemon has ended.
    pub fn faults(&mut self) -> Vec<String> {
        if let Some(mut tracer) = self.tracer.take() {
            tracer.wait().unwrap();
        }
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().filter(|line| line.contains("(INJECTED)")).map(str::to_owned).collect()
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        if let Some(mut tracer) = self.tracer.take() {
            let _ = tracer.kill();
            let _ = tracer.wait();
        }
    }
}

/// Whether every thread has a tracer.
fn is_traced(pid: &str) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut statuses = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("status")).ok());
    statuses.all(|status| !status.contains("TracerPid:\t0\n"))
}
