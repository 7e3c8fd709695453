//! The manual pages: they are what their sources give, groff has nothing to say about them, and nothing is missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::node::skipped;

#[path = "../../examples/man-pages/pages/mod.rs"]
mod pages;

const REWRITE: &str = "cargo run --example man-pages -- packaging/man   (or: just man)";

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/man")
}

fn page(name: &str) -> String {
    std::fs::read_to_string(directory().join(name)).unwrap_or_else(|error| panic!("{name}: {error}; write it with: {REWRITE}"))
}

#[test]
fn the_pages_are_those_that_the_sources_give() {
    let pages = pages::all();
    for (name, text) in &pages {
        assert!(*text == page(name), "packaging/man/{name} is out of date; write it anew with: {REWRITE}");
    }
    let there = std::fs::read_dir(directory()).unwrap().count();
    assert_eq!(there, pages.len(), "packaging/man has a page without a source");
}

#[test]
fn groff_has_nothing_to_say() {
    for (name, _) in pages::all() {
        let mut command = Command::new("man");
        command.args(["--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"]).arg(directory().join(name));
        // As lintian runs it: a width at which nothing that can be broken is too long.
        command.env("MANROFFSEQ", "").env("MANWIDTH", "80").env("LC_ALL", "C.UTF-8");
        match command.output() {
            Ok(output) => {
                assert!(output.status.success(), "{name}: {output:?}");
                assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{name}");
            }
            Err(error) => return skipped(&format!("no man: {error}")),
        }
    }
}

#[test]
fn every_key_of_the_configuration_has_its_entry() {
    let text = page("opengatewayd.toml.5");
    let shipped = include_str!("../../packaging/opengatewayd.toml");
    let keys = shipped.lines().filter_map(|line| line.strip_prefix("# ")?.split_once(" = ")).map(|(key, _)| key);
    let mut count = 0;
    for key in keys.filter(|key| key.chars().all(|c| c.is_ascii_lowercase() || c == '_')) {
        let entry = |name: &str| text.contains(&format!(".TP\n\\fB{name}\\fR"));
        let sections = ["models", "http", "log"].map(|section| format!("{section}.{key}"));
        assert!(entry(key) || sections.iter().any(|name| entry(name)), "{key} has no entry");
        count += 1;
    }
    assert!(count > 20, "{count} keys");
}

#[test]
fn every_command_and_option_has_its_entry() {
    for (name, help) in [("opengatewayd.8", env!("CARGO_BIN_EXE_opengatewayd")), ("ogctl.1", env!("CARGO_BIN_EXE_ogctl"))] {
        let text = page(name);
        let help = Command::new(help).arg("--help").output().unwrap().stdout;
        let help = String::from_utf8(help).unwrap();
        let words = help.lines().map(str::trim_start).filter(|line| line.starts_with('-')).flat_map(str::split_whitespace);
        for option in words.filter(|word| word.starts_with("--") && word.len() > 2) {
            let option = option.trim_end_matches(',').replace('-', "\\-");
            assert!(text.contains(&format!("\\fB{option}\\fR")), "{name} has no {option}");
        }
    }
}
