//! Main memory: of the machine, and what the control group leaves of it.

use std::fs;
use std::path::Path;

use super::cgroup::Groups;
use crate::domain::resources::Memory;

/// `MemTotal` and `MemAvailable` in bytes. The two lines are read by hand: containers trim the file, and a reader that wants
/// all of it would find nothing in such a one.
fn machine(proc_root: &Path) -> (Option<u64>, Option<u64>) {
    let bytes = fs::read(proc_root.join("meminfo")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let line = |key: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        let mut fields = value.split_whitespace();
        let number: u64 = fields.next()?.parse().ok()?;
        match fields.next() {
            Some("kB") => number.checked_mul(1024),
            None => Some(number),
            Some(_) => None,
        }
    };
    // No machine has no memory: a zero means that the total is not known there.
    (line("MemTotal").filter(|total| *total > 0), line("MemAvailable"))
}

/// Measures.
pub(super) fn probe(proc_root: &Path, groups: &Groups, warnings: &mut Vec<String>) -> Memory {
    let (total, available) = machine(proc_root);
    if total.is_none() {
        warnings.push("the amount of memory cannot be read from /proc/meminfo".to_owned());
    }
    // A limit above what the machine has limits nothing.
    let limits: Vec<(u64, u64)> =
        groups.memory().into_iter().filter(|(limit, _)| total.is_none_or(|total| *limit < total)).collect();
    let limit = limits.iter().map(|(limit, _)| *limit).min();
    let left = limits.iter().map(|(limit, used)| limit.saturating_sub(*used)).min();
    let least = |a: Option<u64>, b: Option<u64>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    Memory { total: least(total, limit), available: least(available, left), limit }
}
