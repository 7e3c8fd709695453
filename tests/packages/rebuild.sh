#!/bin/bash
# rebuild.sh - compiles and packs the last commit twice: in folders of different names, with the crates in different folders.
# The packages must be the same, byte for byte.
#
#   tests/packages/rebuild.sh        half an hour: before a release, not with every change
# shellcheck source=lib.sh
. "$(dirname "$(readlink -f "$0")")/../../scripts/lib.sh"

if [ $# -gt 0 ]; then sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "$0"; exit 2; fi
need git=git
need_rust
cargo_home=${CARGO_HOME:-$HOME/.cargo}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset CARGO_TARGET_DIR

# build CLONE CARGO_HOME PACKAGES. The commit is fixed: somebody may commit meanwhile.
commit=$(git -C "$here" rev-parse HEAD)
build() {
  git clone -q "file://$here" "$1"
  git -C "$1" checkout -q --detach "$commit"
  CARGO_HOME=$2 "$1/scripts/package.sh" --out "$3"
}
build "$scratch/one" "$cargo_home" "$scratch/packages-1"
mkdir -p "$scratch/elsewhere/registry"
for file in config.toml registry/index registry/cache; do
  [ ! -e "$cargo_home/$file" ] || cp -a "$cargo_home/$file" "$scratch/elsewhere/$file"
done
build "$scratch/a/much/longer/path/to/another" "$scratch/elsewhere" "$scratch/packages-2"

if diff <(cd "$scratch/packages-1" && sha256sum -- *) <(cd "$scratch/packages-2" && sha256sum -- *); then
  say "the same bytes:"
  (cd "$scratch/packages-1" && sha256sum -- *)
else
  for program in opengatewayd ogctl engine; do
    diff -rq "$scratch"/{one,a/much/longer/path/to/another}/target/"$(uname -m)"-unknown-linux-gnu/release/$program || true
  done
  die "two builds of one commit differ"
fi
