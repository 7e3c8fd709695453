//! Main memory: of the machine, and what the control group leaves of it.

use std::fs;
use std::path::Path;

use procfs::FromRead as _;

use super::cgroup::Groups;
use crate::domain::resources::Memory;

/// `MemTotal` and `MemAvailable` in bytes. Containers trim the file, which the crate takes for an error: then the two lines
/// are read by hand.
fn machine(proc_root: &Path) -> (Option<u64>, Option<u64>) {
    let path = proc_root.join("meminfo");
    if let Ok(info) = procfs::Meminfo::from_file(&path) {
        return (Some(info.mem_total), info.mem_available);
    }
    let text = fs::read_to_string(&path).unwrap_or_default();
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
    (line("MemTotal"), line("MemAvailable"))
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
