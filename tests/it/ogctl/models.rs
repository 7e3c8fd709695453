//! `ogctl models` against a daemon played by the test.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_of_a_cluster_are_a_table_and_json_and_steer_no_terminal() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    let shown = ogctl(&bus, &["models"]).await;
    assert_eq!(shown.code, 0, "{shown:?}");
    let llama = shown.stdout.lines().find(|line| line.starts_with("llama3.2:3b")).unwrap();
    for part in ["Ann's node", "4096", "Q4_K_M", "2.0 GB", "ready"] {
        assert!(llama.contains(part), "{llama}");
    }
    assert!(shown.stdout.contains("goes to llama3.2:3b") && !shown.stdout.contains('\u{1b}'), "{shown:?}");
    assert!(ogctl(&bus, &["models", "gatewayai-poc", "-v"]).await.stdout.contains(&"ab".repeat(32)));
    let models = parse(&ogctl(&bus, &["models", "--json"]).await.stdout);
    assert_eq!(models["cluster"], "gatewayai-poc");
    let (echo, llama) = (&models["models"][0], &models["models"][1]);
    assert_eq!((&echo["model"], &echo["free_slots"], &echo["digest"]), (&json!("echo"), &json!(4), &Value::Null));
    assert_eq!((&llama["default"], &llama["tokens_per_second"]), (&json!(true), &json!(31.5)));
    assert_eq!(llama["nodes"][0]["digest"], "ab".repeat(32));
    assert_eq!(ogctl(&bus, &["models", "nowhere"]).await.code, exit::NOT_FOUND);

    let local = ogctl(&bus, &["models", "--local"]).await;
    assert!(local.stdout.contains("! broken: the file is cut off") && local.stdout.contains("0.9 MB"), "{local:?}");
    let local = parse(&ogctl(&bus, &["models", "--local", "--json"]).await.stdout);
    assert_eq!((&local["models"][1]["answered"], &local["models"][1]["digest"]), (&json!(7), &Value::Null));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_added_by_its_descriptor_under_its_own_name_or_another() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let file = bus.dir().join("Tiny.Q8_0.gguf");
    std::fs::write(&file, b"GGUF and more").unwrap();
    let path = file.to_str().unwrap();
    let added = ogctl(&bus, &["models", "add", path]).await;
    let said = format!("Added Tiny.Q8_0 (13 B, SHA-256 {}).\n", "cd".repeat(32));
    assert_eq!((added.code, added.stdout.as_str(), added.stderr.as_str()), (0, said.as_str(), ""), "{added:?}");
    let seen = |seen: &fake::Seen, name: &str| seen.added.0 == name && seen.added.1 == b"GGUF and more";
    daemon.wait_for(|now| seen(now, "Tiny.Q8_0") && now.added.2.is_none()).await;
    let digest = format!("sha256:{}", "EF".repeat(32));
    let added = parse(&ogctl(&bus, &["models", "add", path, "--name", "t", "--sha256", &digest, "--json"]).await.stdout);
    assert_eq!((&added["added"], &added["size"]), (&json!("t"), &json!(13)));
    daemon.wait_for(|now| seen(now, "t") && now.added.2.as_deref() == Some(&*"ef".repeat(32))).await;

    // From a pipe.
    let mut child = ogctl_on(&bus, &["models", "add", "-", "--name", "piped"]).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"GGUF and more").await.unwrap();
    drop(stdin);
    let out = tokio::time::timeout(LIMIT, child.wait_with_output()).await.unwrap().unwrap();
    assert!(out.status.success(), "{out:?}");
    daemon.wait_for(|now| seen(now, "piped")).await;

    for (args, code, said) in [
        (&["models", "add", path, "--name", "there"][..], exit::FAILED, "why. Remove the old one"),
        (&["models", "add", path, "--name", "refused"], exit::REFUSED, "why"),
        (&["models", "add", path, "--name", "cut"], exit::NO_DAEMON, "nothing was changed"),
        (&["models", "add", "/nowhere.gguf"], exit::USAGE, "cannot read /nowhere.gguf"),
        (&["models", "add", "-"], exit::USAGE, "--name"),
        (&["models", "add", "/"], exit::USAGE, "name"),
        (&["models", "add", path, "--sha256", "12"], exit::USAGE, "SHA-256"),
    ] {
        let refused = ogctl(&bus, args).await;
        assert!(refused.code == code && refused.stderr.to_lowercase().contains(&said.to_lowercase()), "{args:?}: {refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupt_cancels_what_is_being_copied() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let file = bus.dir().join("slow.gguf");
    std::fs::write(&file, b"GGUF").unwrap();
    let child = ogctl_on(&bus, &["models", "add", file.to_str().unwrap()]).spawn().unwrap();
    daemon.wait_for(|seen| seen.added.0 == "slow").await;
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let out = tokio::time::timeout(LIMIT, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(out.status.code(), Some(i32::from(exit::INTERRUPTED)), "{out:?}");
    daemon.wait_for(|seen| seen.closed_pipes == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_checked_removed_loaded_and_unloaded_by_name() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    for (word, call, json_key) in [("rm", "Remove", "removed"), ("load", "Load", "loading"), ("unload", "Unload", "unloaded")] {
        let done = ogctl(&bus, &["models", word, "demo", "--json"]).await;
        assert_eq!((done.code, &parse(&done.stdout)[json_key]), (0, &json!("demo")), "{word}: {done:?}");
        assert!(daemon.calls().contains(&format!("{call} demo")));
        let unknown = ogctl(&bus, &["models", word, "nonsense"]).await;
        assert!(unknown.code == exit::NOT_FOUND && unknown.stderr.contains("ogctl models --local"), "{word}: {unknown:?}");
    }
    let intact = ogctl(&bus, &["models", "verify", "demo"]).await;
    assert!(intact.code == 0 && intact.stdout.starts_with("demo is intact"), "{intact:?}");
    let changed = ogctl(&bus, &["models", "verify", "changed"]).await;
    assert!(changed.code == exit::FAILED && changed.stderr.contains("has changed"), "{changed:?}");
    let unknown = parse(&ogctl(&bus, &["models", "verify", "new", "--json"]).await.stdout);
    assert_eq!((&unknown["intact"], &unknown["expected"]), (&Value::Null, &Value::Null));
}
