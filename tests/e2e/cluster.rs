//! The main job: hosts find each other and lend each other their models.

use std::time::{Duration, Instant};

use crate::lab::{Bus, DEADLINE, Host, Lab};
use crate::{CLUSTER, deployed, slow_upstream};

/// Waits until every host lists all the others.
fn everyone_lists_everyone(lab: &Lab) {
    lab.each(|host| {
        let others = lab.hosts().iter().filter(|other| other.name != host.name);
        let names: Vec<_> = others.map(|other| format!("grep -q '\"{}\"' /tmp/peers", other.name)).collect();
        host.until(DEADLINE, &format!("ogctl peers {CLUSTER} --json >/tmp/peers && {}", names.join(" && ")));
    });
}

/// Microseconds of the clock that all hosts share, when the service became active.
fn ready_at(host: &Host) -> u64 {
    host.property("ActiveEnterTimestampMonotonic").parse().unwrap()
}

fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000 + u64::try_from(now.tv_nsec).unwrap() / 1000
}

#[test]
fn three_hosts_one_cluster_one_prompt() {
    let Some(lab) = deployed(3, Bus::Daemon) else { return };
    let [a1, a2, a3] = lab.hosts() else { unreachable!() };
    for host in [a1, a2] {
        let said = host.ogctl(&["connect", CLUSTER, "--serve", "--wait", "0"]);
        assert_eq!(said.code, 0, "{said:?}");
    }
    assert_eq!(a3.ogctl(&["connect", CLUSTER, "--consume", "--wait", "30"]).code, 0);
    everyone_lists_everyone(&lab);
    // With nothing installed but the package, a language model answers: of another host, or of this one.
    a3.until(DEADLINE, "ogctl models --json | grep -q opengateway-demo");
    let said = a3.ogctl(&["prompt", "What is 2+2?", "--no-local"]);
    assert_eq!((said.code, said.stdout.as_str()), (0, "4\n"), "{said:?}");
    assert!(said.stderr.contains("served by a1") || said.stderr.contains("served by a2"), "who answered: {said:?}");
    for host in [a1, a2, a3] {
        let said = host.ogctl(&["prompt", "What is 3*3?"]);
        assert_eq!((said.code, said.stdout.as_str()), (0, "9\n"), "{said:?}");
    }
    // A model of unknown size is thought better than the demo model; the echo is what is asked for by name alone.
    slow_upstream(a1, 5, 0.05);
    a3.until(DEADLINE, "ogctl models --json | grep -q slow");
    let said = a3.ogctl(&["prompt", "What is 2+2?"]);
    assert_eq!((said.code, said.stdout.as_str()), (0, "word0 word1 word2 word3 word4 \n"), "{said:?}");
    assert!(said.stderr.contains("served by a1"), "who answered: {said:?}");
    let said = a3.ogctl(&["prompt", "What is 2+2?", "--model", "echo", "--node", "a2"]);
    assert_eq!((said.code, said.stdout.as_str()), (0, "What is 2+2?\n"), "{said:?}");
}

#[test]
fn hosts_that_are_switched_on_together_list_each_other_within_5_s() {
    let Some(lab) = deployed(3, Bus::Daemon) else { return };
    lab.each(|host| {
        host.sh("systemctl enable opengatewayd");
        assert_eq!(host.ogctl(&["connect", CLUSTER, "--serve", "--wait", "0"]).code, 0);
    });
    everyone_lists_everyone(&lab);
    lab.each(Host::power_cut);
    let begun = Instant::now();
    lab.each(Host::power_on);
    let booted = begun.elapsed();
    lab.each(|host| {
        host.until(DEADLINE, "systemctl is-active opengatewayd");
    });
    everyone_lists_everyone(&lab);
    let seen = now();
    let ready = lab.hosts().iter().map(ready_at).max().unwrap();
    let took = Duration::from_micros(seen - ready);
    eprintln!("MEASURED three hosts booted in {booted:.1?}; everyone listed everyone {took:.1?} after the last was ready");
    assert!(took <= Duration::from_secs(5), "{took:?}");
}
