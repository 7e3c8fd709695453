//! What this machine says of its own network: interfaces, firewall, clock, suspends. Read from files that everybody may
//! read, in the sandbox of the service too; what they do not tell stays unknown.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::domain::doctor::Host;
use crate::domain::network::InterfaceFacts;

/// Flags of an interface, as in `linux/if.h`.
const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
const IFF_MULTICAST: u32 = 0x1000;
/// Interfaces that are told of; a host of containers has hundreds.
const MAX_INTERFACES: usize = 64;

/// Reads it.
#[derive(Debug, Clone)]
pub struct HostProbe {
    /// Usually `/`.
    root: PathBuf,
    /// How long the machine had slept when this was made.
    slept: Duration,
}

/// How long the machine has slept since it was booted.
fn slept() -> Duration {
    let read = |clock| {
        let time = clock_gettime(clock);
        Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
    };
    // In this order the difference is too small by what passes between the two, never too great.
    let all = read(ClockId::Boottime);
    all.saturating_sub(read(ClockId::Monotonic))
}

/// The addresses of each interface, the loopback's too.
fn addresses() -> BTreeMap<String, Vec<IpAddr>> {
    let mut found: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for interface in if_addrs::get_if_addrs().unwrap_or_default() {
        found.entry(interface.name.clone()).or_default().push(interface.ip());
    }
    found
}

impl HostProbe {
    /// Of the machine that this runs on; suspends are counted from now.
    pub fn of_machine() -> Self {
        Self { root: PathBuf::from("/"), slept: slept() }
    }

    /// What is known now. Blocks for as long as reading a few files takes.
    pub fn read(&self) -> (Vec<InterfaceFacts>, Host) {
        let firewall = self.firewall();
        let rule = match firewall.as_deref() {
            Some("firewalld") => Some("usr/lib/firewalld/services/opengateway.xml"),
            Some("ufw") => Some("etc/ufw/applications.d/opengateway"),
            _ => None,
        };
        let host = Host {
            firewall_rule: rule.is_some_and(|rule| self.path(rule).exists()),
            firewall,
            clock_synchronised: self.clock(),
            suspended_s: slept().saturating_sub(self.slept).as_secs(),
        };
        (self.interfaces_now(), host)
    }

    /// The interfaces alone.
    pub fn interfaces_now(&self) -> Vec<InterfaceFacts> {
        self.interfaces(addresses())
    }

    fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// Interfaces but the loopback, and but those that are a part of another one (ports of a bridge) or that nobody uses (a
    /// bridge without ports).
    fn interfaces(&self, mut addresses: BTreeMap<String, Vec<IpAddr>>) -> Vec<InterfaceFacts> {
        let class = self.path("sys/class/net");
        let mut names: Vec<String> = fs::read_dir(&class)
            .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
            .unwrap_or_default();
        names.extend(addresses.keys().filter(|name| !names.contains(name)).cloned().collect::<Vec<_>>());
        names.sort();
        let mut found = Vec::new();
        for name in names {
            let own = addresses.remove(&name).unwrap_or_default();
            let directory = class.join(&name);
            let flags = flags(&directory);
            let loopback = flags.map_or_else(|| own.iter().all(IpAddr::is_loopback), |flags| flags & IFF_LOOPBACK != 0);
            // Without a carrier (a file that cannot be read while the interface is down) nothing is sent.
            let carrier = read(&directory.join("carrier")).is_none_or(|carrier| carrier != "0");
            let part = own.is_empty() && directory.join("master").exists();
            let unused = directory.join("bridge").exists() && !carrier;
            if loopback || part || unused || (flags.is_none() && own.is_empty()) {
                continue;
            }
            found.push(InterfaceFacts {
                name,
                up: flags.is_none_or(|flags| flags & IFF_UP != 0) && carrier,
                multicast: flags.is_none_or(|flags| flags & IFF_MULTICAST != 0),
                addresses: own.iter().map(ToString::to_string).collect(),
            });
        }
        // Those with addresses are of interest first.
        found.sort_by_key(|interface| interface.addresses.is_empty());
        found.truncate(MAX_INTERFACES);
        found
    }

    /// Whether a service of the system runs: it has a control group then.
    fn runs(&self, unit: &str) -> bool {
        ["sys/fs/cgroup/system.slice", "sys/fs/cgroup/systemd/system.slice", "sys/fs/cgroup/unified/system.slice"]
            .iter()
            .any(|slice| self.path(slice).join(unit).is_dir())
    }

    /// Whether a service is started with the machine.
    fn enabled(&self, unit: &str) -> bool {
        ["sysinit.target.wants", "multi-user.target.wants"]
            .iter()
            .any(|target| self.path("etc/systemd/system").join(target).join(unit).symlink_metadata().is_ok())
    }

    /// The rules themselves are for root alone; which service makes them is not.
    fn firewall(&self) -> Option<String> {
        let ufw = read(&self.path("etc/ufw/ufw.conf")).is_some_and(|text| {
            text.lines()
                .filter_map(|line| line.trim().strip_prefix("ENABLED="))
                .any(|value| value.trim().eq_ignore_ascii_case("yes"))
        });
        let found = if self.runs("firewalld.service") {
            "firewalld"
        } else if ufw {
            "ufw"
        } else if self.enabled("nftables.service") {
            "nftables"
        } else if ["netfilter-persistent.service", "iptables.service"].iter().any(|unit| self.enabled(unit)) {
            "iptables"
        } else {
            return None;
        };
        Some(found.to_owned())
    }

    /// systemd-timesyncd leaves a mark; of the other services `diagnosis` asks the bus.
    fn clock(&self) -> Option<bool> {
        if self.path("run/systemd/timesync/synchronized").exists() {
            return Some(true);
        }
        self.runs("systemd-timesyncd.service").then_some(false)
    }
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn flags(directory: &Path) -> Option<u32> {
    let text = read(&directory.join("flags"))?;
    u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(self, path: &str, text: &str) -> Self {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }

        fn interface(self, name: &str, flags: &str, carrier: &str) -> Self {
            self.write(&format!("sys/class/net/{name}/flags"), flags).write(&format!("sys/class/net/{name}/carrier"), carrier)
        }

        fn probe(&self) -> HostProbe {
            HostProbe { root: self.0.path().to_owned(), slept: Duration::ZERO }
        }
    }

    fn with(addresses: &[(&str, &str)]) -> BTreeMap<String, Vec<IpAddr>> {
        addresses.iter().map(|(name, ip)| ((*name).to_owned(), vec![ip.parse().unwrap()])).collect()
    }

    #[test]
    fn interfaces_are_told_with_carrier_and_multicast_and_what_is_of_no_interest_is_not() {
        let tree = Tree::new()
            .interface("lo", "0x9\n", "1\n")
            .interface("eth0", "0x1003\n", "1\n")
            .interface("eth1", "0x1003\n", "0\n")
            .interface("wg0", "0x91\n", "1\n")
            .interface("docker0", "0x1003\n", "0\n")
            .write("sys/class/net/docker0/bridge/bridge_id", "8000\n")
            .interface("veth1", "0x1003\n", "1\n")
            .write("sys/class/net/veth1/master/x", "")
            .write("sys/class/net/bonding_masters", "\n");
        let addresses = with(&[
            ("lo", "127.0.0.1"),
            ("eth0", "10.0.0.1"),
            ("eth1", "10.1.0.1"),
            ("wg0", "10.9.0.1"),
            ("docker0", "172.17.0.1"),
        ]);
        let told = tree.probe().interfaces(addresses);
        let told: Vec<_> = told.iter().map(|told| (told.name.as_str(), told.up, told.multicast)).collect();
        assert_eq!(told, [("eth0", true, true), ("eth1", false, true), ("wg0", true, false)]);
    }

    #[test]
    fn an_interface_that_only_the_kernel_names_is_taken_to_work() {
        let told = Tree::new().probe().interfaces(with(&[("lo", "127.0.0.1"), ("eth0", "10.0.0.1")]));
        assert_eq!(told.len(), 1);
        assert!(told[0].up && told[0].multicast && told[0].addresses == ["10.0.0.1"]);
    }

    #[test]
    fn interfaces_are_bounded_and_those_with_addresses_come_first() {
        let mut tree = Tree::new();
        for number in 0..MAX_INTERFACES + 1 {
            tree = tree.interface(&format!("a{number}"), "0x1003", "1");
        }
        let told = tree.interface("z0", "0x1003", "1").probe().interfaces(with(&[("z0", "10.0.0.1")]));
        assert_eq!((told.len(), told[0].name.as_str()), (MAX_INTERFACES, "z0"));
    }

    #[test]
    fn a_firewall_is_named_only_where_one_is_known_to_be() {
        let firewall = |tree: Tree| tree.probe().firewall();
        assert_eq!(firewall(Tree::new()), None);
        let running = |unit: &str| Tree::new().write(&format!("sys/fs/cgroup/system.slice/{unit}/cgroup.procs"), "1\n");
        assert_eq!(firewall(running("firewalld.service")).as_deref(), Some("firewalld"));
        assert_eq!(firewall(Tree::new().write("etc/ufw/ufw.conf", "# ENABLED=yes\nENABLED=no\n")), None);
        assert_eq!(firewall(Tree::new().write("etc/ufw/ufw.conf", "LOGLEVEL=low\nENABLED=yes\n")).as_deref(), Some("ufw"));
        let enabled = Tree::new().write("etc/systemd/system/sysinit.target.wants/nftables.service", "");
        assert_eq!(firewall(enabled).as_deref(), Some("nftables"));
        let enabled = Tree::new().write("etc/systemd/system/multi-user.target.wants/netfilter-persistent.service", "");
        assert_eq!(firewall(enabled).as_deref(), Some("iptables"));
    }

    #[test]
    fn a_clock_of_which_nobody_says_anything_is_unknown() {
        assert_eq!(Tree::new().probe().clock(), None);
        let running = || Tree::new().write("sys/fs/cgroup/system.slice/systemd-timesyncd.service/cgroup.procs", "1\n");
        assert_eq!(running().probe().clock(), Some(false));
        assert_eq!(running().write("run/systemd/timesync/synchronized", "").probe().clock(), Some(true));
    }

    #[test]
    fn this_machine_can_be_read_and_has_not_slept_since_just_now() {
        let (interfaces, host) = HostProbe::of_machine().read();
        assert_eq!(host.suspended_s, 0);
        assert!(interfaces.iter().all(|interface| interface.name != "lo"), "{interfaces:?}");
    }
}
