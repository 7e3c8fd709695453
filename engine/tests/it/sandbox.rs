//! The sandbox, tried from inside.

use std::process::Command;

use crate::client::{demo, skipped};

#[test]
fn all_that_is_forbidden_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    std::fs::copy(demo(), &model).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_opengateway-engine")).arg("--probe-sandbox").arg(&model).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let landlock = told["strength"] != "calls-only";
    assert_eq!(told["allowed"], serde_json::json!({ "model": "done", "thread": "done" }));
    // Reading is Landlock's part: a kernel without it lets the child read until the model is loaded.
    let readable = ["passwd", "folder_of_model", "proc"];
    let refused = told["refused"].as_object().unwrap();
    assert!(refused.len() >= 20);
    for (attempt, outcome) in refused {
        let expected = landlock || !readable.contains(&attempt.as_str());
        assert!(!expected || outcome != "done", "{attempt}: {outcome}");
    }
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["model.gguf"]);
    if !landlock {
        skipped("this kernel has no Landlock: reading was not tried");
    }
}
