//! How many threads compute.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

/// Below this size one thread is faster: the threads' barriers take longer than the work between them.
const SMALL_FILE: u64 = 50_000_000;
/// From this many on, whole cores are counted instead of hardware threads: two threads of a core share its arithmetic.
const MANY_CORES: usize = 4;

/// Threads for a model of this size; `wanted` 0 chooses, anything else is bounded by what may be used.
pub fn threads(wanted: u32, usable: usize, file_bytes: u64) -> u32 {
    let usable = u32::try_from(usable).unwrap_or(u32::MAX).max(1);
    match wanted {
        0 if file_bytes < SMALL_FILE => 1,
        0 => usable,
        // More than may run at once would spin at each other's barriers.
        _ => wanted.min(usable),
    }
}

/// Cores that this process may use at once: its affinity, and the quota of its control group.
pub fn usable() -> usize {
    let cpus = affinity();
    let cores = whole_cores(&cpus, Path::new("/sys/devices/system/cpu"));
    let count = if cores >= MANY_CORES { cores } else { cpus.len() };
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    quota(&own, Path::new("/sys/fs/cgroup")).map_or(count, |quota| count.min(quota)).max(1)
}

fn affinity() -> Vec<usize> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return vec![0] };
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
}

/// Distinct cores among these hardware threads; 0 where the kernel does not tell.
fn whole_cores(cpus: &[usize], devices: &Path) -> usize {
    let siblings = |cpu| fs::read_to_string(devices.join(format!("cpu{cpu}/topology/thread_siblings_list"))).ok();
    cpus.iter().filter_map(siblings).collect::<HashSet<_>>().len()
}

/// The smallest quota of the control group and those above it, rounded up to whole cores.
fn quota(own: &str, root: &Path) -> Option<usize> {
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mut group = root.join(path);
    let mut least = None;
    while group.starts_with(root) {
        if let Some(cores) = fs::read_to_string(group.join("cpu.max")).ok().and_then(|text| cores(&text)) {
            least = Some(least.map_or(cores, |least: usize| least.min(cores)));
        }
        if !group.pop() {
            break;
        }
    }
    least
}

/// `cpu.max`: quota and period in microseconds, or "max".
fn cores(text: &str) -> Option<usize> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period) = (quota.parse::<usize>().ok()?, period.parse::<usize>().ok()?);
    (period > 0).then(|| quota.div_ceil(period).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files_take_one_thread_and_nobody_more_than_there_are() {
        assert_eq!(threads(0, 8, SMALL_FILE - 1), 1);
        assert_eq!(threads(0, 8, SMALL_FILE), 8);
        assert_eq!(threads(3, 8, 1), 3);
        assert_eq!(threads(u32::MAX, 8, 1), 8);
        assert_eq!(threads(0, 0, SMALL_FILE), 1);
        assert!(usable() >= 1);
    }

    #[test]
    fn a_quota_is_rounded_up_and_the_least_counts() {
        assert_eq!(cores("max 100000"), None);
        assert_eq!(cores("150000 100000"), Some(2));
        assert_eq!(cores("1000 100000"), Some(1));
        assert_eq!(cores("1 0"), None);
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("a/b");
        fs::create_dir_all(&group).unwrap();
        fs::write(group.join("cpu.max"), "400000 100000\n").unwrap();
        assert_eq!(quota("0::/a/b\n", root.path()), Some(4));
        fs::write(root.path().join("a/cpu.max"), "200000 100000\n").unwrap();
        assert_eq!(quota("0::/a/b\n", root.path()), Some(2));
        assert_eq!(quota("1:cpu:/a\n", root.path()), None);
    }
}
