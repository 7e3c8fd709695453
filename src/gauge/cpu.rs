//! Processors: how many, how many of them may be used, which.

use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

use super::cgroup::Groups;
use crate::domain::resources::Cpu;

/// No machine has a processor with a higher number: what says otherwise is damaged.
const HIGHEST: u32 = 65_535;

/// Processors as the kernel lists them: "0-3,8".
#[derive(Debug)]
struct List(Vec<RangeInclusive<u32>>);

impl List {
    fn read(text: &str) -> Option<Self> {
        let ranges = text.trim().split(',').map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
            (first <= last && last <= HIGHEST).then_some(first..=last)
        });
        ranges.collect::<Option<_>>().map(Self)
    }

    fn count(&self) -> u32 {
        self.0.iter().map(|range| range.end() - range.start() + 1).fold(0, u32::saturating_add)
    }

    fn and(&self, other: &Self) -> Self {
        let both = |a: &RangeInclusive<u32>, b: &RangeInclusive<u32>| *a.start().max(b.start())..=*a.end().min(b.end());
        let overlaps = self.0.iter().flat_map(|a| other.0.iter().map(move |b| both(a, b)));
        Self(overlaps.filter(|range| !range.is_empty()).collect())
    }
}

fn online(sys_root: &Path) -> Option<List> {
    List::read(&fs::read_to_string(sys_root.join("devices/system/cpu/online")).ok()?)
}

/// Where this process may run, by its affinity mask (`sched_getaffinity` tells the same, but not of a recorded machine).
/// May name processors that are not online.
fn affinity(proc_root: &Path) -> Option<List> {
    let status = fs::read_to_string(proc_root.join("self/status")).ok()?;
    List::read(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?)
}

fn model(cpuinfo: &str) -> Option<String> {
    // x86 says "model name", many ARM boards "Model" or "Hardware".
    ["model name", "Model", "Hardware", "cpu model"].iter().find_map(|wanted| {
        let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == *wanted))?;
        let value = line.split_once(':')?.1.split_whitespace().collect::<Vec<_>>().join(" ");
        (!value.is_empty()).then_some(value)
    })
}

/// Measures.
pub(super) fn probe(proc_root: &Path, sys_root: &Path, groups: &Groups, warnings: &mut Vec<String>) -> Cpu {
    let cpuinfo = fs::read_to_string(proc_root.join("cpuinfo")).unwrap_or_default();
    let listed =
        u32::try_from(cpuinfo.lines().filter(|line| line.starts_with("processor")).count()).ok().filter(|count| *count > 0);
    let (online, affinity) = (online(sys_root), affinity(proc_root));
    let logical = online.as_ref().map(List::count).or(listed).or(affinity.as_ref().map(List::count)).unwrap_or_else(|| {
        warnings.push("the number of processors cannot be read; one is assumed".to_owned());
        1
    });
    let allowed = match (&affinity, &online) {
        (Some(affinity), Some(online)) => affinity.and(online).count(),
        (Some(affinity), None) => affinity.count(),
        (None, _) => logical,
    };
    // None at all cannot be: somebody is running this.
    let allowed = f64::from(if allowed == 0 { logical } else { allowed.min(logical) });
    let load1 = fs::read_to_string(proc_root.join("loadavg"))
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .filter(|load: &f64| load.is_finite() && *load >= 0.0);
    Cpu {
        logical,
        usable: groups.cores().map_or(allowed, |quota| quota.min(allowed)),
        model: model(&cpuinfo),
        arch: std::env::consts::ARCH.to_owned(),
        load1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists_of_the_kernel_are_read_and_others_refused() {
        for (text, count) in [("0", Some(1)), ("0-3,8\n", Some(5)), ("0-65535", Some(65_536))] {
            assert_eq!(List::read(text).map(|list| list.count()), count, "{text}");
        }
        for text in ["", "x", "3-1", "0-", "-1", "0-4294967295", "0-65536", "1,,2"] {
            assert!(List::read(text).is_none(), "{text}");
        }
    }

    #[test]
    fn only_processors_in_both_lists_can_be_used() {
        let both = |a: &str, b: &str| List::read(a).unwrap().and(&List::read(b).unwrap()).count();
        assert_eq!(both("0-127", "0-7"), 8);
        assert_eq!(both("2-5,9", "0-3,8-9"), 3);
        assert_eq!(both("4", "0-3"), 0);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "[0-9,\\- x]{0,40}") {
            let _ = List::read(&text).map(|list| list.count());
        }
    }
}
