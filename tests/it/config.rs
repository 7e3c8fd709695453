//! The shipped configuration file: accepted as it is and with every key uncommented, whole, and true about the defaults.

use std::path::{Path, PathBuf};
use std::process::Command;

use opengateway::config::{self, BackendKind, EngineSettings, Environment, Overrides, Roots, Settings};

const SHIPPED: &str = include_str!("../../packaging/opengatewayd.toml");
const RAW: &str = include_str!("../../src/config/raw.rs");

/// Takes the `# ` from every `# key = value` and `# [[table]]`; what is left of the comments is prose.
fn uncommented() -> String {
    let is_key = |text: &str| {
        text.split_once(" = ").is_some_and(|(key, _)| !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
    };
    SHIPPED
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(text) if text.starts_with("[[") || is_key(text) => text,
            _ => line,
        })
        .flat_map(|line| [line, "\n"])
        .collect()
}

fn load(text: &str) -> Settings {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("opengatewayd.toml");
    std::fs::write(&file, text).unwrap();
    config::load(&Roots::system().with_main(file), &Environment::default(), &Overrides::default()).unwrap()
}

#[test]
fn the_shipped_file_changes_nothing() {
    assert_eq!(load(SHIPPED), load(""));
}

#[test]
fn uncommented_it_names_every_key_that_there_is() {
    let table: toml::Table = uncommented().parse().unwrap();
    let (mut section, mut keys) = (String::new(), 0);
    // What is skipped comes from elsewhere than a file.
    let skipped = "    #[serde(skip)]\n    pub ";
    for line in RAW.split("macro_rules!").next().unwrap().replace(skipped, "").lines() {
        if let Some(name) = line.strip_prefix("pub struct ") {
            section = name.trim_end_matches(" {").to_ascii_lowercase();
        } else if let Some((key, _)) = line.strip_prefix("    pub ").and_then(|field| field.split_once(':')) {
            let place = if section == "raw" { Some(&table) } else { None };
            let found = place.is_some_and(|table| table.contains_key(key))
                || table.get(&section).is_some_and(|value| match value {
                    toml::Value::Array(blocks) => blocks.iter().any(|block| block.get(key).is_some()),
                    value => value.get(key).is_some(),
                });
            assert!(found, "{section}.{key} is not in packaging/opengatewayd.toml");
            keys += 1;
        }
    }
    assert!(keys > 30, "{keys} keys were read from raw.rs");
}

#[test]
fn uncommented_it_shows_the_defaults_where_it_says_so() {
    let (shown, default) = (load(&uncommented()), load(""));
    assert_eq!(
        Settings {
            // The examples.
            node_name: default.node_name.clone(),
            bootstrap: default.bootstrap.clone(),
            announce: default.announce.clone(),
            lent: default.lent.clone(),
            clusters: default.clusters.clone(),
            backends: default.backends.clone(),
            any_port: default.any_port,
            engine: EngineSettings {
                program: default.engine.program.clone(),
                keep: default.engine.keep.clone(),
                gpu_layers: default.engine.gpu_layers,
                ..shown.engine.clone()
            },
            ..shown.clone()
        },
        // In another order, which means nothing.
        Settings { listen: shown.listen.clone(), ..default.clone() }
    );
    let sorted = |settings: &Settings| {
        let mut listen = settings.listen.clone();
        listen.sort();
        listen
    };
    assert_eq!(sorted(&shown), sorted(&default));
    assert_eq!(shown.backends[2], default.backends[0], "the echo");
    let bare = load("[[backend]]\nkind = \"openai\"\nurl = \"http://127.0.0.1:11434/v1\"");
    let limits = |settings: &Settings| {
        let backend = &settings.backends[0];
        assert!(matches!(backend.kind, BackendKind::OpenAi { .. }));
        (backend.slots, backend.queue, backend.running_per_peer, backend.queued_per_peer)
    };
    assert_eq!(limits(&shown), limits(&bare));
    // What a cluster is not told follows the machine: the example says the same.
    assert_eq!(shown.clusters[0].serve, Some(default.serve));
}

fn check(file: &Path) -> (Option<i32>, serde_json::Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_ogctl"))
        .args(["config", "check", "--json", "--config"])
        .arg(file)
        .env_clear()
        .output()
        .unwrap();
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn ogctl_config_check_says_what_the_daemon_would() {
    let shipped = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/opengatewayd.toml"));
    let (code, said) = check(&shipped);
    assert_eq!((code, &said["valid"], said["files"].as_array().map(Vec::len)), (Some(0), &true.into(), Some(1)), "{said}");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("opengatewayd.toml");
    std::fs::write(&file, uncommented()).unwrap();
    std::fs::create_dir(directory.path().join("opengatewayd.toml.d")).unwrap();
    std::fs::write(directory.path().join("opengatewayd.toml.d/50-x.toml"), "[node]\nname = \"x\"\n").unwrap();
    let (code, said) = check(&file);
    assert_eq!((code, said["files"].as_array().map(Vec::len)), (Some(0), Some(2)), "{said}");
    std::fs::write(directory.path().join("opengatewayd.toml.d/60-y.toml"), "[network]\nmnds = true\n").unwrap();
    let (code, said) = check(&file);
    let message = said["error"]["message"].as_str().unwrap();
    assert!(code == Some(1) && said["error"]["name"] == "InvalidConfiguration", "{said}");
    assert!(message.contains("60-y.toml:2:1") && message.contains("did you mean \"mdns\""), "{message}");
    let (code, said) = check(&directory.path().join("none.toml"));
    assert!(code == Some(1) && said["error"]["name"] == "InvalidConfiguration", "{said}");
}
