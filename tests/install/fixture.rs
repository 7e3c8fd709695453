//! What installations are tried with: the real programs, packed into a small signed release.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

/// Packs $1 (this repository) and the programs in $2 into a release in $3, signed with the key $4. The packages are no
/// packages: those who install them are played by others.
const PACK: &str = r#"
set -eu
repository=$1 programs=$2 release=$3 key=$4 version=${5:-0.1.0}
tree=$(mktemp -d)
top=$tree/opengateway-$version-linux-$(uname -m)
file() { install -D -m "$1" "$2" "$top$3"; }
mkdir -p "$top/usr/bin" "$release"
# A debug build is large: what is installed leads to it.
for program in opengatewayd ogctl; do
  printf '#!/bin/sh\nexec %s/%s "$@"\n' /fixture/programs "$program" >"$top/usr/bin/$program"
  chmod 755 "$top/usr/bin/$program"
done
# The engine too, where one is built; its libraries lie where it is, and what is installed stands for them.
if [ -n "${ENGINE:-}" ]; then
  mkdir -p "$top/usr/libexec" "$top/usr/lib/opengateway"
  printf '#!/bin/sh\nexec /fixture/libexec/opengateway-engine "$@"\n' >"$top/usr/libexec/opengateway-engine"
  chmod 755 "$top/usr/libexec/opengateway-engine"
  echo library >"$top/usr/lib/opengateway/libllama.so.0"
fi
file 644 "$repository/models/opengateway-demo.gguf" /usr/share/opengateway/models/opengateway-demo.gguf
file 644 "$repository/packaging/opengatewayd.toml" /etc/opengateway/opengatewayd.toml
file 644 "$repository/packaging/opengatewayd.default" /etc/default/opengatewayd
file 644 "$repository/systemd/opengatewayd.service" /usr/lib/systemd/system/opengatewayd.service
file 644 "$repository/systemd/sysusers.d/opengateway.conf" /usr/lib/sysusers.d/opengateway.conf
file 644 "$repository/systemd/tmpfiles.d/opengateway.conf" /usr/lib/tmpfiles.d/opengateway.conf
file 644 "$repository/systemd/opengatewayd-user.service" /usr/share/opengateway/opengatewayd-user.service
file 644 "$repository/LICENSE" /usr/share/doc/opengateway/copyright
tar -czf "$release/$(basename "$top").tar.gz" -C "$tree" "$(basename "$top")"
rm -rf "$tree"
case $(uname -m) in x86_64) deb=amd64 ;; *) deb=arm64 ;; esac
echo deb >"$release/opengateway_$version-1_$deb.deb"
echo rpm >"$release/opengateway-$version-1.$(uname -m).rpm"
sed "s|^release_key=''\$|release_key='$(cat "$key.pub")'|" "$repository/scripts/install.sh" >"$release/install.sh"
printf 'version=%s\n' "$version" >"$release/RELEASE"
cd "$release"
sha256sum -- * >SHA256SUMS
ssh-keygen -q -Y sign -n opengateway-release -f "$key" SHA256SUMS
"#;

const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");

fn must(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}

fn readable(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A new key, of which nobody knows anything.
fn make_key(path: &Path) {
    must(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"]).arg(path));
}

fn pack(release: &Path, key: &Path, version: &str) {
    let mut command = Command::new("bash");
    command.args(["-c", PACK, "pack", REPOSITORY, "-"]).arg(release).arg(key).arg(version);
    if let Some(engine) = engine() {
        command.env("ENGINE", engine);
    }
    must(&mut command);
}

/// The folder of a built engine, as `scripts/engine.sh` lays it out.
pub fn engine() -> Option<PathBuf> {
    let program = PathBuf::from(std::env::var_os("OPENGATEWAY_ENGINE")?);
    Some(program.parent()?.parent()?.to_owned())
}

fn make() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    readable(root);
    fs::create_dir(root.join("programs")).unwrap();
    readable(&root.join("programs"));
    for (name, program) in [("opengatewayd", env!("CARGO_BIN_EXE_opengatewayd")), ("ogctl", env!("CARGO_BIN_EXE_ogctl"))] {
        fs::copy(program, root.join("programs").join(name)).unwrap();
        readable(&root.join("programs").join(name));
    }
    if let Some(engine) = engine() {
        // Beside the programs, as the daemon looks for it.
        must(Command::new("cp").arg("-r").args([engine.join("libexec"), engine.join("lib")]).arg(root));
    }
    make_key(&root.join("key"));
    make_key(&root.join("other-key"));
    pack(&root.join("release"), &root.join("key"), "0.1.0");
    pack(&root.join("newer"), &root.join("key"), "0.2.0");
    directory
}

/// The directory that a sandbox sees as /fixture: `release`, `newer` (the next version), `programs` with the engine
/// beside them, `key`, `other-key`.
pub fn directory() -> &'static Path {
    static MADE: OnceLock<TempDir> = OnceLock::new();
    MADE.get_or_init(make).path()
}
