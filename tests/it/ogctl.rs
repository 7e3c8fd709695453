//! The real `ogctl` binary against a private bus and a daemon played by the test.

#![cfg(feature = "daemon")]

mod authorisation;
mod chat;
pub mod fake;
mod models;
mod network;
mod unit;

use crate::common::bus::{LIMIT, bus_or_skip, ogctl, ogctl_on};
use fake::Fake;
use opengateway::api::names::{ErrorName, Origin, exit};
use opengateway::api::stream::{JobLine, JobNow, ServedBy};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

fn parse(stdout: &str) -> Value {
    assert_eq!(stdout.lines().count(), 1, "one object on one line: {stdout:?}");
    let value: Value = serde_json::from_str(stdout).unwrap();
    assert_eq!(value["schema"], 1);
    value
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_tells_problems_first_and_the_same_in_json() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    let text = ogctl(&bus, &["status"]).await;
    assert_eq!(text.code, 0, "{text:?}");
    assert!(text.stdout.starts_with("! no peer can serve; start one\n  more: ogctl doctor\n"), "{text:?}");
    assert!(text.stdout.contains("/ip4/192.0.2.1/udp/4001/quic-v1/p2p/12D3KooWself"), "{text:?}");
    assert!(!text.stdout.contains('\u{1b}'));

    let status = parse(&ogctl(&bus, &["status", "--json"]).await.stdout);
    assert_eq!(status["running"], true);
    assert_eq!(status["node_name"], "NodeC");
    assert_eq!(status["problems"], json!(["no peer can serve; start one"]));
    assert_eq!(
        status["clusters"],
        json!([{"id": "gatewayai-poc", "state": "degraded", "peer_count": 2, "member_count": null, "role": "serve"}])
    );
    assert_eq!(status["addresses"], json!(["/ip4/192.0.2.1/udp/4001/quic-v1/p2p/12D3KooWself"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn colour_comes_only_when_asked_for_in_a_pipe() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    assert!(ogctl(&bus, &["status", "--color", "always"]).await.stdout.contains('\u{1b}'));
    assert!(!ogctl(&bus, &["status", "--color", "never"]).await.stdout.contains('\u{1b}'));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_names_steer_no_terminal_and_lose_nothing_in_json() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    let text = ogctl(&bus, &["peers"]).await;
    assert_eq!(text.code, 0, "{text:?}");
    assert!(!text.stdout.contains(['\u{1b}', '\u{9b}', '\u{202e}']), "{text:?}");
    assert!(text.stdout.contains("evil") && text.stdout.contains("\\u{202e}"), "{text:?}");

    let json = ogctl(&bus, &["peers", "--json"]).await;
    assert!(!json.stdout.contains(['\u{1b}', '\u{9b}', '\u{202e}']), "{json:?}");
    let peers = parse(&json.stdout);
    assert_eq!(peers["cluster"], "gatewayai-poc");
    let peer = &peers["peers"][0];
    assert_eq!(peer["name"], fake::EVIL_NAME);
    assert_eq!((&peer["peer_id"], &peer["direct"], &peer["latency_us"]), (&json!("12D3KooWa"), &json!(true), &json!(850)));
    assert_eq!(
        (&peer["liveness"], &peer["models"], &peer["tiers"]),
        (&json!("alive"), &json!(["echo"]), &json!(["Llama-3.2-3B"]))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_commands_print_text_and_json() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    for (command, key, text) in [
        ("clusters", "clusters", "gatewayai-poc"),
        ("resources", "cpu", "7.6 GiB"),
        ("eligible", "tiers", "needs 16 GB"),
        ("models", "models", "echo"),
        ("jobs", "jobs", "running"),
    ] {
        let shown = ogctl(&bus, &[command]).await;
        assert_eq!(shown.code, 0, "{command}: {shown:?}");
        assert!(shown.stdout.contains(text), "{command}: {shown:?}");
        assert!(!parse(&ogctl(&bus, &[command, "--json"]).await.stdout)[key].is_null(), "{command}");
    }
    let tiers = parse(&ogctl(&bus, &["eligible", "--json", "--fresh"]).await.stdout);
    assert_eq!(tiers["tiers"][0]["fits_now"], true);
    assert_eq!(tiers["tiers"][1]["missing"]["memory"], 8_000_000_000u64);
    assert_eq!(tiers["tiers"][1]["unmet"][0]["code"], "memory");
    assert_eq!(tiers["tiers"][0]["estimate"]["kv_cache"], 469_762_048u64);
    let explained = ogctl(&bus, &["eligible", "--explain"]).await.stdout;
    assert!(explained.contains("2.0 GB") && explained.contains("469.8 MB") && explained.contains("within 8 %"), "{explained}");
    assert!(!ogctl(&bus, &["eligible"]).await.stdout.contains("KV CACHE"));
    let jobs = parse(&ogctl(&bus, &["jobs", "--json"]).await.stdout);
    assert_eq!((&jobs["jobs"][0]["model"], &jobs["jobs"][0]["served_by"]), (&json!("demo"), &json!("NodeB")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_answers_on_stdout_and_tells_who_on_stderr() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let said = ogctl(&bus, &["prompt", "hello", "world"]).await;
    assert_eq!((said.code, said.stdout.as_str()), (0, "hello world\n"), "{said:?}");
    assert_eq!(said.stderr, "served by NodeA, echo, 12 tokens, 0.05 s to first, 110 tok/s\n");
    let call = daemon.last_prompt();
    assert_eq!(call.cluster, "", "the daemon knows the default cluster");
    assert!(call.options.is_empty(), "{call:?}");
    assert_eq!(daemon.calls(), ["StartPrompt"], "one call is all that a prompt costs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompt_options_reach_the_daemon() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let args = "prompt x --cluster c --model m --tier t --node n --max-tokens 5 --temperature 0.5 --seed 7 --top-p 0.9 --stop A --stop B --system s --timeout 9 --no-local";
    let said = ogctl(&bus, &args.split(' ').collect::<Vec<_>>()).await;
    assert_eq!(said.code, 0, "{said:?}");
    let call = daemon.last_prompt();
    assert_eq!((call.cluster.as_str(), call.prompt.as_str()), ("c", "x"));
    let expected = [
        "MaxTokens=5",
        "Model=m",
        "NoLocal=true",
        "Node=n",
        "Seed=7",
        r#"Stop=["A", "B"]"#,
        "System=s",
        "Temperature=0.5",
        "Tier=t",
        "Timeout=9000000",
        "TopP=0.9",
    ];
    assert_eq!(call.options, expected);
    assert_eq!(ogctl(&bus, &["prompt", "x", "--no-template"]).await.code, 0);
    assert_eq!(daemon.last_prompt().options, ["Raw=true"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_as_json_is_one_object_or_one_a_line() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    let whole = parse(&ogctl(&bus, &["--json", "prompt", "hello world"]).await.stdout);
    assert_eq!(whole["text"], "hello world");
    assert_eq!(whole["served_by"], json!({"peer_id": "12D3KooWa", "name": "NodeA"}));
    assert_eq!((&whole["model"], &whole["finish_reason"]), (&json!("echo"), &json!("stop")));
    assert_eq!(whole["usage"], json!({"prompt_tokens": 2, "completion_tokens": 12}));
    assert_eq!(whole["timings"], json!({"first_token_us": 50_000, "duration_us": 150_000}));

    let lines = ogctl(&bus, &["--json", "prompt", "--stream", "queued"]).await.stdout;
    let first = parse(lines.lines().next().unwrap());
    assert_eq!((&first["type"], &first["position"]), (&json!("queued"), &json!(3)));
    assert_eq!(ogctl(&bus, &["prompt", "queued"]).await.stderr.lines().count(), 1, "no terminal, no place in the queue");
    let lines = ogctl(&bus, &["--json", "prompt", "--stream", "hello world"]).await.stdout;
    let kinds: Vec<Value> = lines.lines().map(|line| parse(line)["type"].clone()).collect();
    assert_eq!(kinds, ["start", "text", "text", "end"], "{lines}");
    for contradiction in [&["prompt", "x", "--stream"][..], &["--json", "prompt", "x", "--raw"]] {
        assert_eq!(ogctl(&bus, contradiction).await.code, exit::USAGE, "{contradiction:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answer_is_filtered_across_frames_unless_raw() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    assert_eq!(ogctl(&bus, &["prompt", "escape"]).await.stdout, "ab\n");
    assert_eq!(ogctl(&bus, &["prompt", "--raw", "escape"]).await.stdout, "a\u{1b}[31mb");
    assert_eq!(ogctl(&bus, &["prompt", "--no-stream", "escape"]).await.stdout, "ab\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_comes_from_standard_input() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    for (bytes, code) in [(1 << 20, exit::OK), ((1 << 20) + 1, exit::USAGE), (0, exit::USAGE)] {
        let mut child = ogctl_on(&bus, &["prompt", "-", "--no-stream"]).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let writer = tokio::spawn(async move {
            // A refused prompt is not read to its end.
            let _ = stdin.write_all(&vec![b'a'; bytes]).await;
        });
        let out = child.wait_with_output().await.unwrap();
        writer.await.unwrap();
        assert_eq!(out.status.code(), Some(i32::from(code)), "{bytes} bytes: {}", String::from_utf8_lossy(&out.stderr));
    }
    assert_eq!(daemon.last_prompt().prompt.len(), 1 << 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_is_printed_as_it_comes_and_an_interrupt_cancels_the_work() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let mut child = ogctl_on(&bus, &["prompt", "endless"]).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = tokio::time::timeout(LIMIT, stdout.next_line()).await.unwrap().unwrap();
    assert_eq!(first.as_deref(), Some("tick"), "the stream has no end yet");
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let status = tokio::time::timeout(LIMIT, child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(i32::from(exit::INTERRUPTED)));
    daemon.wait_for(|seen| seen.closed_pipes == 1 && seen.calls.iter().any(|call| call == "Cancel")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_goes_away_ends_it_quietly_and_cancels_the_work() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let mut child = ogctl_on(&bus, &["prompt", "endless"]).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    tokio::time::timeout(LIMIT, stdout.read_line(&mut line)).await.unwrap().unwrap();
    drop(stdout); // as `head -1` does
    let out = tokio::time::timeout(LIMIT, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!((out.status.code(), out.stderr.as_slice()), (Some(0), b"".as_slice()));
    daemon.wait_for(|seen| seen.closed_pipes == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_goes_away_before_there_is_any_text_cancels_the_work() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let mut child = ogctl_on(&bus, &["prompt", "waiting"]).spawn().unwrap();
    daemon.wait_for(|seen| seen.calls.iter().any(|call| call == "StartPrompt")).await;
    drop(child.stdout.take());
    let out = tokio::time::timeout(LIMIT, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!((out.status.code(), out.stderr.as_slice()), (Some(0), b"".as_slice()));
    daemon.wait_for(|seen| seen.closed_pipes == 1 && seen.calls.iter().any(|call| call == "Cancel")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_just_stops_is_no_answer() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    let said = ogctl(&bus, &["prompt", "cut"]).await;
    assert_eq!((said.code, said.stdout.as_str()), (exit::NO_DAEMON, "half\n"), "{said:?}");
    assert!(said.stderr.contains("went away"), "{said:?}");
    let said = ogctl(&bus, &["--json", "prompt", "cut"]).await;
    assert_eq!(parse(&said.stdout)["error"]["name"], "DaemonGone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_error_name_has_its_exit_code_as_reply_and_in_the_stream() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    for name in ErrorName::ALL.iter().filter(|name| name.origin() != Origin::Bus) {
        let said = ogctl(&bus, &["--json", "prompt", &format!("reply {name}")]).await;
        assert_eq!(said.code, name.exit_code(), "{name}: {said:?}");
        let error = &parse(&said.stdout)["error"];
        assert_eq!((&error["name"], &error["hint"]), (&json!(name.short()), &json!(name.hint())));
        assert_eq!(error["message"], "why");
    }
    let said = ogctl(&bus, &["prompt", &format!("stream {}", ErrorName::Interrupted)]).await;
    assert_eq!((said.code, said.stdout.as_str()), (exit::FAILED, "half\n"), "{said:?}");
    assert!(said.stderr.starts_with("ogctl: why. The text above"), "{said:?}");
    assert_eq!(said.stderr.lines().count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_daemon_has_three_sentences_and_one_exit_code() {
    let Some(bus) = bus_or_skip() else { return };
    let stopped = ogctl(&bus, &["status"]).await;
    assert_eq!(stopped.code, exit::NO_DAEMON, "{stopped:?}");
    assert!(stopped.stderr.contains("is not running") && stopped.stderr.contains("systemctl start opengatewayd"), "{stopped:?}");

    let marker = bus.dir().join("started");
    bus.add_service(&format!("/bin/sh -c 'touch {}; exit 1'", marker.display())).await;
    let asked = ogctl(&bus, &["status"]).await;
    assert_eq!(asked.code, exit::NO_DAEMON, "{asked:?}");
    assert!(!marker.exists(), "asking starts nothing");
    let failed = ogctl(&bus, &["prompt", "x"]).await;
    assert_eq!(failed.code, exit::NO_DAEMON, "{failed:?}");
    assert!(failed.stderr.contains("could not be started") && marker.exists(), "{failed:?}");

    let nowhere = format!("unix:path={}", bus.dir().join("nowhere").display());
    let no_bus = ogctl(&bus, &["status", "--bus", &nowhere]).await;
    assert_eq!(no_bus.code, exit::NO_DAEMON, "{no_bus:?}");
    assert!(no_bus.stderr.contains("cannot connect to the given bus"), "{no_bus:?}");
    let no_bus = ogctl(&bus, &["status", "--json", "--bus", &nowhere]).await;
    assert_eq!(parse(&no_bus.stdout)["error"]["name"], "NoBus");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_or_a_bus_that_hangs_is_a_clear_timeout() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    daemon.hang();
    let hung = ogctl(&bus, &["status", "--timeout", "0.3"]).await;
    assert_eq!(hung.code, exit::TIMEOUT, "{hung:?}");
    assert!(hung.stderr.contains("did not answer within 0.3 s"), "{hung:?}");

    bus.signal(rustix::process::Signal::STOP);
    let hung = ogctl(&bus, &["status", "--timeout", "0.3"]).await;
    bus.signal(rustix::process::Signal::CONT);
    assert_eq!(hung.code, exit::TIMEOUT, "{hung:?}");
    assert!(hung.stderr.contains("bus did not answer"), "{hung:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn joining_waits_for_company_and_says_when_it_is_alone() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let secret = bus.dir().join("secret");
    std::fs::write(&secret, "s3cret").unwrap();
    let secret = secret.to_str().unwrap();
    let joined = ogctl(&bus, &["join", "room", "--serve", "--bootstrap", "/ip4/192.0.2.7/tcp/1", "--secret-file", secret]).await;
    assert_eq!((joined.code, joined.stdout.as_str()), (0, "Joined room; 2 peers.\n"), "{joined:?}");
    assert_eq!(daemon.calls()[0], r#"Connect room ["/ip4/192.0.2.7/tcp/1"] serve=Some(true) secret=s3cret"#);

    let alone = ogctl(&bus, &["connect", "alone", "--wait", "0.2"]).await;
    assert_eq!(alone.code, exit::MEMBERSHIP, "{alone:?}");
    let alone = ogctl(&bus, &["connect", "alone", "--wait", "0", "--json"]).await;
    assert_eq!((alone.code, &parse(&alone.stdout)["peer_count"]), (0, &json!(0)));
    let failed = ogctl(&bus, &["connect", "broken"]).await;
    assert_eq!(failed.code, exit::MEMBERSHIP, "{failed:?}");
    assert!(failed.stderr.contains("speaks version 9"), "{failed:?}");

    let left = ogctl(&bus, &["leave", "room", "--forget"]).await;
    assert_eq!((left.code, left.stdout.as_str()), (0, "Left room and forgot it.\n"), "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_cancelled_by_its_number() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let cancelled = ogctl(&bus, &["jobs", "--cancel", "1"]).await;
    assert_eq!(cancelled.code, 0, "{cancelled:?}");
    daemon.wait_for(|seen| seen.calls.iter().any(|call| call == "Cancel")).await;
    assert_eq!(ogctl(&bus, &["jobs", "--cancel", "99"]).await.code, exit::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn monitor_tells_what_happens_and_survives_a_restart_of_the_daemon() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let mut child = ogctl_on(&bus, &["monitor", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut event = async || -> Value {
        let line = tokio::time::timeout(LIMIT, lines.next_line()).await.unwrap().unwrap().unwrap();
        parse(&line)
    };
    assert_eq!(event().await["event"], "node");
    assert_eq!(event().await["state"], "degraded");
    let waits = event().await;
    assert_eq!((&waits["event"], &waits["state"], &waits["position"]), (&json!("job"), &json!("queued"), &json!(3)));
    // A stranger's signal is not the daemon's.
    bus.connect()
        .await
        .emit_signal(None::<&str>, "/org/opengateway/Gateway1", "org.opengateway.Gateway1.Manager", "PrepareForShutdown", &true)
        .await
        .unwrap();
    daemon.emit_peer_connected().await;
    daemon.emit_model_changed().await;
    let peer = event().await;
    let model = event().await;
    assert_eq!((&model["event"], &model["model"], &model["progress"]), (&json!("model_changed"), &json!("demo"), &json!(0.4)));
    assert_eq!(
        (&peer["event"], &peer["cluster"], &peer["name"]),
        (&json!("peer_connected"), &json!("gatewayai-poc"), &json!("NodeB"))
    );
    daemon.emit_peer_changed().await;
    let changed = event().await;
    assert_eq!((&changed["event"], &changed["changed"]), (&json!("peer_changed"), &json!(["Direct", "Relay"])));
    assert_eq!((&changed["direct"], &changed["relay_name"]), (&json!(false), &json!("NodeW")));
    for code in ["alone", ""] {
        daemon.emit_worst_finding(code).await;
        let finding = event().await;
        assert_eq!(finding["event"], "finding");
        assert_eq!(finding["code"], if code.is_empty() { Value::Null } else { json!(code) });
    }
    let by = ServedBy { peer_id: "12D3KooWa".into(), name: "NodeA".into() };
    let done = JobNow { id: 1, state: "failed".into(), model: Some("demo".into()), served_by: Some(by), ..JobNow::default() };
    let done = JobNow { completion_tokens: 12, duration_us: 7, error: Some(ErrorName::Interrupted.to_string()), ..done };
    daemon.tell_job(JobLine::Job(done)).await;
    let done = event().await;
    assert_eq!(
        (&done["event"], &done["state"], &done["error"], &done["completion_tokens"]),
        (&json!("job"), &json!("failed"), &json!("Interrupted"), &json!(12))
    );
    assert_eq!((&done["served_by"]["name"], &done["prompt_tokens"]), (&json!("NodeA"), &Value::Null));
    daemon.tell_job(JobLine::Skipped { count: 5 }).await;
    assert_eq!(event().await["count"], 5);
    daemon.stop().await;
    assert_eq!(event().await["event"], "stopped");
    let _again = Fake::serve(&bus).await;
    assert_eq!(event().await["event"], "node");
    assert_eq!(event().await["event"], "cluster");
    assert_eq!(event().await["event"], "job", "it watches the jobs of the new one");
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(event().await["error"]["name"], "UserInterrupt");
    let status = tokio::time::timeout(LIMIT, child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(i32::from(exit::INTERRUPTED)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_choice_the_session_bus_is_used_only_when_the_daemon_is_there_alone() {
    let (Some(system), Some(session)) = (bus_or_skip(), bus_or_skip()) else {
        return;
    };
    let _daemon = Fake::serve(&session).await;
    let run = async |args: &[&str]| {
        let mut command = ogctl_on(&session, args);
        command.env_remove("DBUS_SYSTEM_BUS_ADDRESS").env("DBUS_SESSION_BUS_ADDRESS", session.address());
        command.output().await.unwrap().status.code()
    };
    assert_eq!(run(&["status"]).await, Some(0));
    assert_eq!(run(&["prompt", "hello"]).await, Some(0));
    assert_eq!(run(&["status", "--bus", "session"]).await, Some(0));
    assert_eq!(run(&["status", "--bus", system.address()]).await, Some(i32::from(exit::NO_DAEMON)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_and_completion_need_no_daemon() {
    let Some(bus) = bus_or_skip() else { return };
    let version = parse(&ogctl(&bus, &["version", "--json"]).await.stdout);
    assert_eq!((&version["client"]["version"], &version["daemon"]), (&json!(env!("CARGO_PKG_VERSION")), &Value::Null));
    let _daemon = Fake::serve(&bus).await;
    let skewed = ogctl(&bus, &["version"]).await;
    assert!(skewed.stdout.contains("different versions"), "{skewed:?}");
    for shell in ["bash", "zsh", "fish"] {
        let script = ogctl(&bus, &["completion", shell]).await;
        assert!(script.code == 0 && script.stdout.contains("ogctl"), "{shell}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn usage_errors_are_objects_with_json() {
    let Some(bus) = bus_or_skip() else { return };
    for args in [
        &["--json", "nonsense"][..],
        &["--json", "prompt"],
        &["--json", "prompt", " "],
        &["--json", "status", "--bus", "nonsense"],
    ] {
        let said = ogctl(&bus, args).await;
        assert_eq!(said.code, exit::USAGE, "{args:?}: {said:?}");
        assert_eq!(parse(&said.stdout)["error"]["name"], "Usage", "{args:?}");
    }
}
