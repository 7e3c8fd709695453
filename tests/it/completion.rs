//! Completion in real shells, which ask the real `ogctl`, which asks a daemon: one played by the test, and the real one.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::Command;

use crate::common::bus::{Bus, LIMIT, bus_or_skip, ogctl};
use crate::common::node::{Node, skipped};
use crate::ogctl::fake::{self, Fake};

const BASH: &str = r#"
source "$1"
COMP_WORDBREAKS=$' \t\n"\'><=;|&(:'
COMP_LINE=$2 COMP_POINT=${#2} COMP_TYPE=9 COMP_KEY=9
_ogctl ogctl "" ""
(( ${#COMPREPLY[@]} )) && printf '%s\n' "${COMPREPLY[@]}"
exit 0
"#;

/// The function as the line editor of zsh calls it, and what it hands on.
const ZSH: &str = r#"
compdef() { : }
_describe() { local -a given=("${(@P)3}"); print -rl -- "${given[@]}" }
source "$1"
words=("${(@z)2}") CURRENT=${#words} PREFIX=${words[-1]}
[[ $2 == *' ' ]] && { words+=(''); CURRENT=${#words} PREFIX= }
_ogctl
exit 0
"#;

const FISH: &str = r#"
source $argv[1]
complete --do-complete $argv[2]
"#;

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/completions").join(name)
}

/// What a shell offers at the end of `line`. `None`, said aloud, where there is no such shell.
async fn offered(shell: &str, bus: &Bus, line: &str) -> Option<Vec<String>> {
    let (arguments, code, file): (&[&str], _, _) = match shell {
        "bash" => (&["--norc", "-c", BASH, "bash"], BASH, "ogctl.bash"),
        "zsh" => (&["-f", "-c", ZSH, "zsh"], ZSH, "_ogctl"),
        "fish" => (&["--no-config", "-c", FISH], FISH, "ogctl.fish"),
        other => panic!("{other}"),
    };
    assert!(arguments.contains(&code));
    let programs = Path::new(env!("CARGO_BIN_EXE_ogctl")).parent().unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(shell);
    command.args(arguments).arg(script(file)).arg(line).env("PATH", path).env("HOME", bus.dir()).env("LC_ALL", "C.UTF-8");
    command.env("DBUS_SYSTEM_BUS_ADDRESS", bus.address()).env_remove("DBUS_SESSION_BUS_ADDRESS");
    command.stdin(Stdio::null()).stderr(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    let output = match command.spawn() {
        Ok(child) => tokio::time::timeout(LIMIT, child.wait_with_output()).await.expect("the shell ends").unwrap(),
        Err(error) => {
            skipped(&format!("no {shell}: {error}"));
            return None;
        }
    };
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{shell}: {line}");
    Some(String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_prints_the_scripts_that_are_installed() {
    let Some(bus) = bus_or_skip() else { return };
    for (shell, file) in [("bash", "ogctl.bash"), ("zsh", "_ogctl"), ("fish", "ogctl.fish")] {
        let said = ogctl(&bus, &["completion", shell]).await;
        assert_eq!((said.code, said.stdout), (0, std::fs::read_to_string(script(file)).unwrap()), "{shell}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bash_puts_words_so_that_it_reads_them_back() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    for (line, wanted) in [
        ("ogctl conn", vec!["connect"]),
        ("ogctl prompt --mod", vec!["--model"]),
        ("ogctl prompt -c ", vec!["gatewayai-poc"]),
        ("ogctl disconnect ", vec!["gatewayai-poc"]),
        ("ogctl prompt --model ll", vec!["llama3.2:3b"]),
        ("ogctl prompt --model llama3.2:", vec!["3b"]),
        ("ogctl prompt --model=ll", vec!["llama3.2:3b"]),
        // A name that would steer the terminal goes by its peer id; a quote and blanks are escaped.
        ("ogctl prompt --node ", vec!["12D3KooWa", r"Ann\'s\ node"]),
        ("ogctl prompt --node \"An", vec!["Ann's node"]),
        ("ogctl prompt --node 'An", vec![r"Ann'\''s node"]),
        ("ogctl prompt --node 12D3KooWb", vec!["12D3KooWb"]),
        ("ogctl jobs --cancel ", vec!["1"]),
        ("ogctl eligible --tier Llama-3.1", vec!["Llama-3.1-8B"]),
        ("ogctl models rm ", vec!["broken", "demo"]),
        ("ogctl models ver", vec!["verify"]),
        ("ogctl chat --model ll", vec!["llama3.2:3b"]),
        ("ogctl chat -c ", vec!["gatewayai-poc"]),
        ("ogctl prompt ", vec![]),
        ("ogctl monitor ", vec![]),
    ] {
        let Some(offered) = offered("bash", &bus, line).await else { return };
        assert_eq!(offered, wanted, "{line}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zsh_and_fish_are_told_what_each_word_is() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    for (line, zsh, fish) in [
        ("ogctl conn", "connect:Join a cluster", "connect\tJoin a cluster"),
        ("ogctl prompt --model ll", r"llama3.2\:3b:1 node", "llama3.2:3b\t1 node"),
        ("ogctl prompt --node An", "Ann's node:llama3.2:3b, -", "Ann's node\tllama3.2:3b, -"),
        ("ogctl jobs --cancel ", "1:running, gatewayai-poc", "1\trunning, gatewayai-poc"),
    ] {
        for (shell, wanted) in [("zsh", zsh), ("fish", fish)] {
            if let Some(offered) = offered(shell, &bus, line).await {
                assert_eq!(offered, [wanted], "{shell}: {line}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clusters_come_from_the_real_daemon() {
    let Some(node) = Node::start("NodeA", &["--connect", "room"]).await else { return };
    assert_eq!(node.ogctl(&["connect", "attic", "--wait", "0"]).await.code, 0);
    assert_eq!(node.ogctl(&["disconnect", "attic"]).await.code, 0);
    for (line, wanted) in [
        ("ogctl connect ", vec!["attic", "gatewayai-poc", "room"]),
        ("ogctl disconnect ", vec!["room"]),
        ("ogctl disconnect --forget ", vec!["attic", "room"]),
        ("ogctl peers ", vec!["room"]),
        ("ogctl models r", vec!["rm", "room"]),
        ("ogctl eligible --tier Smol", vec!["SmolLM-360M", "SmolLM-1.7B"]),
    ] {
        let Some(offered) = offered("bash", &node.bus, line).await else { return };
        assert_eq!(offered, wanted, "{line}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_answer_there_is_silence_and_soon() {
    let Some(bus) = bus_or_skip() else { return };
    let marker = bus.dir().join("started");
    bus.add_service(&format!("/bin/sh -c 'touch {}; exit 1'", marker.display())).await;
    let line = ["__complete", "fish", "ogctl", "prompt", "--node", ""];
    let absent = ogctl(&bus, &line).await;
    assert_eq!((absent.code, absent.stdout.as_str(), absent.stderr.as_str()), (0, "", ""));
    assert!(!marker.exists(), "completion starts no daemon");

    let _daemon = Fake::serve(&bus).await;
    assert!(ogctl(&bus, &line).await.stdout.contains("Ann's node"));
    // A bus that hangs: the time limit, with room for a busy machine.
    bus.signal(rustix::process::Signal::STOP);
    let begun = Instant::now();
    let hung = ogctl(&bus, &line).await;
    let took = begun.elapsed();
    bus.signal(rustix::process::Signal::CONT);
    assert_eq!((hung.code, hung.stdout.as_str()), (0, ""));
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_shell_is_handed_what_steers_a_terminal() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    for shell in ["zsh", "fish"] {
        let said = ogctl(&bus, &["__complete", shell, "ogctl", "prompt", "--node", "1"]).await;
        assert!(said.stdout.starts_with("12D3KooWa\tevil"), "{said:?}");
        assert!(!said.stdout.chars().any(|c| c.is_control() && c != '\n' && c != '\t'), "{said:?}");
        assert!(!said.stdout.contains(fake::EVIL_NAME));
    }
}
