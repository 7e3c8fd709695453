//! Releases of the packages under test, put into hosts as folders.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::lab::Host;
use crate::packages::{next_revision, package};

const RELEASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/release.sh");
/// Where a host has the release, and the next one.
pub const FOLDER: &str = "/srv/release";
pub const NEWER: &str = "/srv/newer";

/// A folder `release` with its throwaway keys beside it, and a folder `newer` with the next revision of the .deb, signed with
/// the same key.
struct Made(TempDir);

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}

fn make(packages: &Path) -> Made {
    let folder = tempfile::tempdir().unwrap();
    let release = folder.path().join("release");
    run(Command::new(RELEASE).args(["--test-keys", "--allow-dirty", "--packages"]).arg(packages).arg("--out").arg(&release));
    let work = folder.path().join("work");
    std::fs::create_dir(&work).unwrap();
    let deb = next_revision(&package("deb").expect("the release has one"), &work);
    let sign = "mkdir \"$2\" && cp \"$1\" \"$3/install.sh\" \"$2/\" && cd \"$2\" && sha256sum -- * >SHA256SUMS &&
                ssh-keygen -q -Y sign -n opengateway-release -f \"$3.keys/release\" SHA256SUMS";
    run(Command::new("sh").args(["-euc", sign, "sh"]).args([&deb, &folder.path().join("newer"), &release]));
    Made(folder)
}

/// Puts the release into these hosts, at [`FOLDER`] and [`NEWER`]. `None`, said aloud, where there are no packages.
pub fn put(hosts: &[Host]) -> Option<()> {
    static MADE: OnceLock<Made> = OnceLock::new();
    let packages = package("deb")?.parent().map(PathBuf::from)?;
    let made = MADE.get_or_init(|| make(&packages));
    for host in hosts {
        for folder in ["release", "newer"] {
            run(Command::new("cp").arg("-r").arg(made.0.path().join(folder)).arg(host.path("/srv")));
        }
    }
    Some(())
}
