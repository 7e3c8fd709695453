//! A download that was cut off.

use std::io::Write as _;
use std::process::{Command, Stdio};

const SCRIPT: &str = include_str!("../../scripts/install.sh");

/// The commands that bash runs when it is given this on its standard input, as `curl | bash` does.
fn run_by_bash(script: &str, work: &std::path::Path) -> Vec<String> {
    let mut bash = Command::new("/bin/bash");
    bash.arg("-x").current_dir(work).env_clear().env("PATH", "/usr/bin:/bin").env("HOME", work);
    let mut bash = bash.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It may end before it has read everything.
    let _ = bash.stdin.take().unwrap().write_all(script.as_bytes());
    let output = bash.wait_with_output().unwrap();
    assert!(output.stdout.is_empty(), "{output:?}");
    let traced = String::from_utf8_lossy(&output.stderr).into_owned();
    traced.lines().filter_map(|line| line.strip_prefix("+ ")).map(str::to_owned).collect()
}

fn assert_harmless(at: usize, work: &std::path::Path) {
    let ran = run_by_bash(&SCRIPT[..at], work);
    assert!(ran.is_empty(), "cut at byte {at}, it ran {ran:?}");
}

#[test]
fn a_script_that_was_cut_off_does_nothing() {
    let work = tempfile::tempdir().unwrap();
    let lines = SCRIPT.match_indices('\n').map(|(at, _)| at);
    let kibibytes = (1024..SCRIPT.len()).step_by(1024).map(|at| SCRIPT.floor_char_boundary(at));
    let end = SCRIPT.trim_end().len();
    let tail = end - 400..end;
    let mut places: Vec<usize> = lines.chain(kibibytes).chain(tail).filter(|&at| at < end).collect();
    places.sort_unstable();
    places.dedup();
    let half = places.len() / 2;
    std::thread::scope(|scope| {
        for part in [&places[..half], &places[half..]] {
            let work = work.path();
            scope.spawn(move || part.iter().for_each(|&at| assert_harmless(at, work)));
        }
    });
    assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 0, "nothing was written");
    // What sees a script that runs: the whole of it, which stops at its first option.
    let whole = format!("set -- --help\n{SCRIPT}");
    let mut bash =
        Command::new("bash").args(["-s", "--", "--help"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    bash.stdin.take().unwrap().write_all(whole.as_bytes()).unwrap();
    let output = bash.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("POC_CLUSTER_ID"), "{output:?}");
}
