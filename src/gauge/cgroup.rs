//! Limits of this process's control group, v1 and v2, its parents included: the least one counts.

use std::fs;
use std::path::{Path, PathBuf};

/// A limit above this is none: v1 writes the largest page-aligned number for "no limit".
const NO_LIMIT: u64 = 1 << 60;

/// Where the groups of this process are.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Groups {
    /// Directory of the v2 group.
    v2: Option<PathBuf>,
    /// Directory of the v1 cpu group.
    v1_cpu: Option<PathBuf>,
    /// Directory of the v1 memory group.
    v1_memory: Option<PathBuf>,
    root: PathBuf,
}

fn first_existing(candidates: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    candidates.into_iter().find(|path| path.is_dir())
}

impl Groups {
    /// Reads `proc_root/self/cgroup` and finds the directories below `root` (usually `/sys/fs/cgroup`).
    pub(super) fn find(proc_root: &Path, root: &Path) -> Self {
        let text = fs::read_to_string(proc_root.join("self/cgroup")).unwrap_or_default();
        let mut groups = Self { root: root.to_owned(), ..Self::default() };
        // On a machine with both versions the v2 hierarchy is mounted beside those of v1.
        let unified = root.join("unified");
        let v2_root = if unified.is_dir() { unified } else { root.to_owned() };
        for line in text.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(hierarchy), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
                continue;
            };
            // A process outside of its namespace's root is named by a path with "..": nothing of ours lies there.
            let path = if path.split('/').any(|part| part == "..") { "" } else { path.trim_start_matches('/') };
            // In a container the path is often that of the host, and the group itself is mounted at the root.
            let below = |base: PathBuf| first_existing([base.join(path), base]);
            if hierarchy == "0" && controllers.is_empty() {
                groups.v2 = below(v2_root.clone());
            } else if controllers.split(',').any(|controller| controller == "cpu") {
                groups.v1_cpu = below(root.join("cpu,cpuacct")).or_else(|| below(root.join("cpu")));
            } else if controllers.split(',').any(|controller| controller == "memory") {
                groups.v1_memory = below(root.join("memory"));
            }
        }
        groups
    }

    /// `group` and its parents up to the root of the hierarchy.
    fn upwards<'a>(&'a self, group: &'a Path) -> impl Iterator<Item = &'a Path> {
        group.ancestors().take_while(|path| path.starts_with(&self.root))
    }

    /// Cores that the quota leaves; `None` when there is none.
    pub(super) fn cores(&self) -> Option<f64> {
        let v2 = self.v2.iter().flat_map(|group| self.upwards(group)).filter_map(|group| {
            let text = fs::read_to_string(group.join("cpu.max")).ok()?;
            let mut fields = text.split_whitespace();
            let quota: f64 = fields.next()?.parse().ok()?;
            let period: f64 = fields.next()?.parse().ok()?;
            (quota > 0.0 && period > 0.0).then(|| quota / period)
        });
        let v1 = self.v1_cpu.iter().flat_map(|group| self.upwards(group)).filter_map(|group| {
            let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<f64>().ok();
            let (quota, period) = (number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?);
            (quota > 0.0 && period > 0.0).then(|| quota / period)
        });
        v2.chain(v1).min_by(f64::total_cmp)
    }

    /// Limit and present use of memory, of the group with the least left; empty when nothing limits.
    pub(super) fn memory(&self) -> Vec<(u64, u64)> {
        let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let v2 = self.v2.iter().flat_map(|group| self.upwards(group)).filter_map(move |group| {
            Some((number(group.join("memory.max"))?, number(group.join("memory.current")).unwrap_or(0)))
        });
        let v1 = self.v1_memory.iter().flat_map(|group| self.upwards(group)).filter_map(move |group| {
            let limit = number(group.join("memory.limit_in_bytes"))?;
            Some((limit, number(group.join("memory.usage_in_bytes")).unwrap_or(0)))
        });
        v2.chain(v1).filter(|(limit, _)| *limit < NO_LIMIT).collect()
    }
}
