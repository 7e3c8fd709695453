//! Tells a release build which commit it is made from.
//!
//! `OPENGATEWAY_COMMIT` in the environment wins (a build from an archive has no git). Debug builds are not told: they would be
//! compiled anew after each commit.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=OPENGATEWAY_COMMIT");
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("OPENGATEWAY_COMMIT").is_some() || std::env::var("PROFILE").as_deref() != Ok("release") {
        return;
    }
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
    };
    // A clone of something else around an unpacked archive must not lend us its commit.
    let manifest = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    if git(&["rev-parse", "--show-toplevel"]).is_none_or(|top| std::path::Path::new(&top) != std::path::Path::new(&manifest)) {
        return;
    }
    if let (Some(commit), Some(log)) = (git(&["rev-parse", "--short=12", "HEAD"]), git(&["rev-parse", "--git-path", "logs/HEAD"]))
    {
        println!("cargo::rustc-env=OPENGATEWAY_COMMIT={commit}");
        println!("cargo::rerun-if-changed={log}");
    }
}
