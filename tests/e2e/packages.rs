//! The packages under test: `scripts/package.sh` makes them, `OPENGATEWAY_PACKAGES` names their folder.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::node::skipped;

/// The one file with this ending in `folder`.
fn only(ending: &str, folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let files: Vec<_> = files.filter(|file| file.extension().is_some_and(|extension| extension == ending)).collect();
    assert!(files.len() < 2, "more than one .{ending}: {files:?}");
    files.into_iter().next()
}

/// The .deb or the .rpm under test. `None`, said aloud, where there is none; a panic in CI.
pub fn package(ending: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("OPENGATEWAY_PACKAGES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/packages"), PathBuf::from);
    let package = only(ending, &folder);
    if package.is_none() {
        skipped(&format!("no .{ending} in {}: scripts/package.sh --out {0} makes one", folder.display()));
    }
    package
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// The next revision of a package: the same programs, packed again.
pub fn next_revision(package: &Path, folder: &Path) -> PathBuf {
    let ending = package.extension().unwrap().to_str().unwrap();
    let unpack = if ending == "deb" { "dpkg-deb -x \"$1\" \"$2\"" } else { "rpm2cpio \"$1\" | (cd \"$2\" && cpio -id --quiet)" };
    let (tree, out) = (folder.join("tree"), folder.join("packages"));
    std::fs::create_dir(&tree).unwrap();
    run(Command::new("sh").args(["-euc", unpack, "sh"]).args([package, &tree]));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/package.sh");
    run(Command::new(script).args([ending, "--revision", "2", "--binaries"]).arg(tree.join("usr/bin")).arg("--out").arg(&out));
    only(ending, &out).expect("it was just made")
}
