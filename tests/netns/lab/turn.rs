//! Whose turn it is: a few labs at a time on a machine, and none where there can be none.
//!
//! The owner of a lab holds the lock of its place, so every namespace with the prefix of that place that is there when the
//! lock is taken belongs to a process that died.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::fs::FlockOperation;

pub const PREFIX: &str = "ogtest";
/// Labs at once: most tests wait most of the time, and the nodes of three labs leave two cores room to be in time.
const PLACES: usize = 3;
/// A lab with more hosts than this takes all places: what it measures should not wait for others.
const SMALL: usize = 8;

/// The kernel keeps the link addresses of all namespaces' neighbours in one table for each family, of 1,024 entries as a rule:
/// fifty hosts that talk to each other need 2,450 in each. What finds no room is not sent ("neighbor table overflow" in the
/// kernel's log), and looks like a network that loses everything now and then.
#[derive(Debug)]
struct Neighbours {
    before: Vec<(PathBuf, String)>,
}

impl Neighbours {
    fn make_room() -> std::io::Result<Self> {
        let mut before = Vec::new();
        for family in ["ipv4", "ipv6"] {
            // The highest first: the kernel does not mind, whoever reads them meanwhile may.
            for bound in ["gc_thresh3", "gc_thresh2", "gc_thresh1"] {
                let path = PathBuf::from(format!("/proc/sys/net/{family}/neigh/default/{bound}"));
                before.push((path.clone(), std::fs::read_to_string(&path)?));
                std::fs::write(&path, "100000")?;
            }
        }
        Ok(Self { before })
    }
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        for (path, value) in self.before.iter().rev() {
            if let Err(error) = std::fs::write(path, value) {
                eprintln!("{} stays as it is: {error}", path.display());
            }
        }
    }
}

/// Places for labs that are held, by their locks.
#[derive(Debug)]
pub struct Turn {
    place: usize,
    /// Of a large lab, which is alone. Given back before the locks are.
    _neighbours: Option<Neighbours>,
    locks: Vec<File>,
}

impl Turn {
    /// Where the names of namespaces begin that are this turn's alone.
    pub fn prefix(&self) -> String {
        format!("{PREFIX}{}", self.place)
    }

    /// The same of all places that this turn holds.
    pub fn prefixes(&self) -> impl Iterator<Item = String> {
        let places = if self.locks.len() > 1 { 0..PLACES } else { self.place..self.place + 1 };
        places.map(|place| format!("{PREFIX}{place}-"))
    }
}

/// The lock of a place: held by an open file and not by a process, so the tests of one process wait for each other too.
fn lock(place: usize) -> std::io::Result<File> {
    File::options().create(true).truncate(false).write(true).open(format!("/run/opengateway-netns-test-{place}.lock"))
}

/// Waits for a free place, or for all of them in order.
fn take(all: bool) -> std::io::Result<Turn> {
    if all {
        let locks = (0..PLACES).map(|place| {
            let lock = lock(place)?;
            rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
            Ok(lock)
        });
        let locks = locks.collect::<std::io::Result<_>>()?;
        return Ok(Turn { place: 0, _neighbours: Neighbours::make_room().ok(), locks });
    }
    loop {
        for place in 0..PLACES {
            let lock = lock(place)?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Turn { place, _neighbours: None, locks: vec![lock] }),
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Why there can be no lab here, if so.
fn obstacle() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root can make network namespaces".to_owned());
    }
    for (tool, argument) in [("ip", "-V"), ("tc", "-V"), ("nft", "--version"), ("dbus-daemon", "--version"), ("python3", "-V")] {
        let found = Command::new(tool).arg(argument).stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !found.is_ok_and(|status| status.success()) {
            return Some(format!("no {tool}"));
        }
    }
    // Root of a container is not allowed everything.
    static PROBES: AtomicU32 = AtomicU32::new(0);
    let probe = format!("probe-{PREFIX}-{}-{}", std::process::id(), PROBES.fetch_add(1, Ordering::Relaxed));
    let made = Command::new("ip").args(["netns", "add", &probe]).output().unwrap();
    let _ = Command::new("ip").args(["netns", "del", &probe]).output();
    (!made.status.success()).then(|| format!("namespaces are not allowed: {}", String::from_utf8_lossy(&made.stderr).trim()))
}

/// Waits for its turn among all tests of this machine. `None`, said aloud, where there can be no lab; a panic in CI.
pub fn turn(hosts: usize) -> Option<Turn> {
    let obstacle = match take(hosts > SMALL) {
        Ok(turn) => match obstacle() {
            None => return Some(turn),
            Some(obstacle) => obstacle,
        },
        Err(error) => format!("no lock below /run: {error}"),
    };
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs the namespace tests: {obstacle}");
    eprintln!("SKIPPED: {obstacle}");
    None
}
