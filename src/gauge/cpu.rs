//! Processors: how many, how many of them may be used, which.

use std::fs;
use std::path::Path;

use super::cgroup::Groups;
use crate::domain::resources::Cpu;

/// Logical processors named in `/sys/devices/system/cpu/online`: "0-3,8".
fn online(sys_root: &Path) -> Option<u32> {
    let text = fs::read_to_string(sys_root.join("devices/system/cpu/online")).ok()?;
    text.trim()
        .split(',')
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
            (last >= first).then(|| last - first + 1)
        })
        .sum()
}

fn model(cpuinfo: &str) -> Option<String> {
    // x86 says "model name", many ARM boards "Model" or "Hardware".
    ["model name", "Model", "Hardware", "cpu model"].iter().find_map(|wanted| {
        let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == *wanted))?;
        let value = line.split_once(':')?.1.split_whitespace().collect::<Vec<_>>().join(" ");
        (!value.is_empty()).then_some(value)
    })
}

/// Measures. `affinity` is how many processors this process may run on, by its affinity mask.
pub(super) fn probe(proc_root: &Path, sys_root: &Path, groups: &Groups, affinity: Option<u32>, warnings: &mut Vec<String>) -> Cpu {
    let cpuinfo = fs::read_to_string(proc_root.join("cpuinfo")).unwrap_or_default();
    let listed = u32::try_from(cpuinfo.lines().filter(|line| line.starts_with("processor")).count()).ok().filter(|count| *count > 0);
    let logical = online(sys_root).or(listed).or(affinity).unwrap_or_else(|| {
        warnings.push("the number of processors cannot be read; one is assumed".to_owned());
        1
    });
    let allowed = f64::from(affinity.unwrap_or(logical).min(logical));
    let load1 = fs::read_to_string(proc_root.join("loadavg")).ok().and_then(|text| text.split_whitespace().next()?.parse().ok());
    Cpu {
        logical,
        usable: groups.cores().map_or(allowed, |quota| quota.min(allowed)),
        model: model(&cpuinfo),
        arch: std::env::consts::ARCH.to_owned(),
        load1,
    }
}
