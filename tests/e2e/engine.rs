//! Real answers from the packages: the demo model on booted hosts, what its engine may do there, and how it ends.

use serde_json::Value;

use crate::lab::{Bus, DEADLINE, Host, Lab};
use crate::packages::{next_revision, package};
use crate::sandbox::in_the_units_place;
use crate::{CLUSTER, deployed, in_background};

const ENGINE: &str = "/usr/libexec/opengateway-engine";
const DEMO: &str = "/usr/share/opengateway/models/opengateway-demo.gguf";
/// Its whole command line: nothing but its name.
const RUNS: &str = "pgrep -fx /usr/libexec/opengateway-engine";

/// Asks this host's own model, until it answers; an engine that crashed is started again after a moment.
fn answers(host: &Host, question: &str, answer: &str) {
    host.until(DEADLINE, "ogctl models --json | grep -q opengateway-demo");
    host.until(DEADLINE, &format!("[ \"$(ogctl prompt --model opengateway-demo --local-first '{question}')\" = '{answer}' ]"));
}

/// A host whose engine has answered; and the process.
fn loaded() -> Option<(Lab, String)> {
    let lab = deployed(1, Bus::Daemon)?;
    let host = lab.host();
    assert_eq!(host.ogctl(&["connect", CLUSTER, "--serve", "--wait", "0"]).code, 0);
    answers(host, "What is 2+2?", "4");
    let pid = host.sh(RUNS);
    Some((lab, pid))
}

#[test]
fn inside_the_unit_an_engine_can_open_its_model_and_nothing_else() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    host.sh("systemctl stop opengatewayd");
    let said = in_the_units_place(host, &format!("{ENGINE} --probe-sandbox {DEMO}"));
    let found: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
    eprintln!("{found:#}");
    for (what, outcome) in found["allowed"].as_object().unwrap() {
        assert_eq!(outcome, "done", "{what}");
    }
    let refused = found["refused"].as_object().unwrap();
    assert!(
        ["tcp", "passwd", "exec", "create", "memory_as_code", "model_once_loaded"].iter().all(|what| refused.contains_key(*what))
    );
    for (what, outcome) in refused {
        assert_ne!(outcome, "done", "{what}");
    }
    // This machine's kernel is the host's.
    let landlock = std::fs::read_to_string("/proc/sys/kernel/osrelease").is_ok_and(|release| {
        let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
        (numbers.next(), numbers.next()) >= (Some(6), Some(12))
    });
    if landlock {
        assert_eq!(found["strength"], "full", "the unit lets it use all that the kernel has");
    } else {
        eprintln!("not shown: this kernel is too old for all of Landlock: {}", found["strength"]);
    }
}

#[test]
fn a_running_engine_has_no_privilege_no_network_and_goes_first_when_memory_ends() {
    let Some((lab, pid)) = loaded() else { return };
    let host = lab.host();
    let status = host.sh(&format!("cat /proc/{pid}/status"));
    for line in ["CapPrm:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    // Null, the log, and the socket to the daemon; the model was closed when it was mapped.
    let open = host.sh(&format!("readlink /proc/{pid}/fd/*"));
    let strange: Vec<_> = open
        .lines()
        .filter(|file| *file != "/dev/null" && !file.starts_with("socket:") && !file.starts_with("pipe:") && *file != DEMO)
        .filter(|file| *file != format!("/proc/{pid}/status"))
        .collect();
    assert!(strange.is_empty() && open.lines().filter(|file| file.starts_with("socket:")).count() <= 2, "{open}");
    let environment = host.sh(&format!("tr '\\0' '\\n' </proc/{pid}/environ"));
    let foreign: Vec<_> = environment.lines().filter(|line| !line.starts_with("GGML_") && !line.starts_with("GOMP_")).collect();
    assert!(foreign.is_empty(), "no variable of the daemon's: {foreign:?}");
    assert_eq!(host.sh(&format!("cat /proc/{pid}/oom_score_adj")), "800");
    assert_eq!(host.sh(&format!("cat /proc/{}/oom_score_adj", host.property("MainPID"))), "500");
    assert_eq!((host.property("OOMPolicy"), host.property("MemoryDenyWriteExecute")), ("continue".to_owned(), "yes".to_owned()));
    assert_ne!(host.property("MemoryMax"), "infinity");
    let cgroup = host.sh(&format!("cat /proc/{pid}/cgroup"));
    assert!(cgroup.contains("opengatewayd.service"), "what it holds counts as the service's: {cgroup}");
}

#[test]
fn a_killed_engine_fails_its_prompt_by_name_and_the_next_one_is_answered() {
    let Some((lab, pid)) = loaded() else { return };
    let host = lab.host();
    let daemon = host.property("MainPID");
    // It answers too fast to be hit while it does: it is held first.
    host.sh(&format!("kill -STOP {pid}"));
    let asked = in_background(host.command(&[
        "ogctl",
        "prompt",
        "Count to 50",
        "--model",
        "opengateway-demo",
        "--local-first",
        "--json",
    ]));
    host.until(DEADLINE, "ogctl jobs --json | grep -qE '\"state\":\"(queued|running)\"'");
    host.sh(&format!("kill -KILL {pid}"));
    let said = asked.join().unwrap();
    assert!(said.code != 0 && said.stdout.contains("\"EngineCrashed\""), "{said:?}");
    answers(host, "What is 2+2?", "4");
    assert_ne!(host.sh(RUNS), pid);
    assert_eq!((host.property("MainPID"), host.property("NRestarts")), (daemon, "0".to_owned()), "the daemon is unmoved");
}

#[test]
fn no_engine_outlives_its_daemon() {
    let Some((lab, pid)) = loaded() else { return };
    let host = lab.host();
    host.sh("systemctl kill --kill-who=main --signal=KILL opengatewayd");
    let took = host.until(DEADLINE, &format!("! kill -0 {pid}"));
    eprintln!("MEASURED the daemon was killed, its engine gone after {:.2} s", took.as_secs_f64());
    host.until(DEADLINE, "systemctl is-active opengatewayd");
    answers(host, "What is 2+2?", "4");
    host.sh("systemctl stop opengatewayd");
    assert_ne!(host.exec(RUNS).code, 0, "stopped, and an engine runs");
    assert_eq!(host.property("Result"), "success");
}

#[test]
fn a_model_is_added_kept_over_an_upgrade_that_finds_it_loaded_and_purged() {
    let Some(first) = package("deb") else { return };
    let folder = tempfile::tempdir().unwrap();
    let second = next_revision(&first, folder.path());
    let Some((lab, pid)) = loaded() else { return };
    let host = lab.host();
    // In a home, where the daemon sees nothing.
    host.sh(&format!("cp {DEMO} /home/alice/mine.gguf; chown alice: /home/alice/mine.gguf"));
    let said = host.as_user("alice", "ogctl models add /home/alice/mine.gguf");
    assert_eq!(said.code, 4, "not everybody may: {said:?}");
    host.sh("ogctl models add /home/alice/mine.gguf");
    host.sh("test -e /var/lib/opengateway/models/mine.gguf");
    let mine = "[ \"$(ogctl prompt --model mine --local-first 'What is 3*3?')\" = 9 ]";
    host.until(DEADLINE, mine);

    host.install(&[&second]);
    host.until(DEADLINE, mine);
    answers(host, "What is 2+2?", "4");
    assert!(!host.sh(RUNS).lines().any(|engine| engine == pid), "an engine of before is there");
    assert_eq!(host.property("NRestarts"), "0");

    host.sh("apt-get remove -y -q opengateway && test -e /var/lib/opengateway/models/mine.gguf");
    host.sh("apt-get purge -y -q opengateway && ! test -e /var/lib/opengateway && ! test -e /usr/share/opengateway");
    assert_ne!(host.exec(RUNS).code, 0);
}

#[test]
fn a_node_whose_engine_is_gone_says_what_is_missing_and_serves_on() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    host.sh(&format!("mv {ENGINE} {ENGINE}.away; systemctl restart opengatewayd"));
    assert_eq!(host.ogctl(&["connect", CLUSTER, "--serve", "--wait", "0"]).code, 0);
    let said = host.ogctl(&["prompt", "--model", "echo", "hello"]);
    assert_eq!((said.code, said.stdout.as_str()), (0, "hello\n"), "{said:?}");
    let said = host.ogctl(&["prompt", "--model", "opengateway-demo", "hello"]);
    assert_ne!(said.code, 0, "{said:?}");
    let status = host.ogctl(&["status"]).stdout;
    assert!(status.contains(ENGINE), "it names what is missing: {status}");
}
