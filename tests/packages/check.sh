#!/bin/bash
# check.sh - the packages, the maintainer scripts and the release, as far as they can be judged without a booted host.
#
#   tests/packages/check.sh [OPTION]...
#     --binaries DIR    DIR holds opengatewayd, ogctl and the folder engine (default: they are built)
#     --packages DIR    DIR holds what package.sh made of them (default: they are packed)
#
# Prints a line for each check, and SKIPPED: with the reason for what cannot run here; with CI=true
# that is a failure.
# shellcheck source=lib.sh
. "$(dirname "$(readlink -f "$0")")/../../scripts/lib.sh"
# shellcheck source=build-lib.sh
. "$here/scripts/build-lib.sh"
# shellcheck source=package-lib.sh
. "$here/scripts/package-lib.sh"

binaries='' packages=''
while [ $# -gt 0 ]; do
  case $1 in
    --binaries) binaries=${2:?--binaries needs a folder}; shift ;;
    --packages) packages=${2:?--packages needs a folder}; shift ;;
    -h | --help) sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) say "check.sh: unknown argument $1; see: $0 --help"; exit 2 ;;
  esac
  shift
done

need rpm=rpm rpm2cpio=rpm2cpio cpio=cpio strings=binutils dpkg-parsechangelog=dpkg-dev python3=python3
if [ "$(id -u)" = 0 ]; then need lintian=lintian rpmlint=rpmlint unshare=util-linux; fi
need_rust
source_date
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
arch=$(uname -m)
failed=0

# check NAME COMMAND...: runs it apart, so that one failure does not hide the next.
check() {
  local name=$1 code=0
  shift
  (set -e; "$@") >"$scratch/log" 2>&1 </dev/null || code=$?
  case $code in
    0) printf 'ok       %s\n' "$name" ;;
    77)
      printf 'SKIPPED: %s: %s\n' "$name" "$(tail -n 1 "$scratch/log")"
      [ "${CI:-}" != true ] || failed=$((failed + 1))
      ;;
    *)
      printf 'FAILED   %s\n' "$name"
      sed 's/^/         /' "$scratch/log"
      failed=$((failed + 1))
      ;;
  esac
}
cannot() { echo "$*"; exit 77; }
# same WHAT EXPECTED FOUND
same() {
  diff -u --label "$1: expected" --label "$1: found" <(printf '%s\n' "$2") <(printf '%s\n' "$3") || exit 1
}

if [ -z "$binaries" ]; then
  build_engine "$arch-unknown-linux-gnu"
  build_programs "$arch-unknown-linux-gnu"
  binaries=$built
fi
engine=$binaries/engine
if [ -n "$packages" ]; then
  cp -r "$packages" "$scratch/packages"
else
  "$here/scripts/package.sh" --binaries "$binaries" --out "$scratch/packages"
fi
deb=$(echo "$scratch"/packages/*.deb)
rpm=$(echo "$scratch"/packages/*.rpm)
tarball=$(echo "$scratch"/packages/*.tar.gz)

# shellcheck source=../tests/packages/contents.sh
. "$here/tests/packages/contents.sh"
# shellcheck source=../tests/packages/scriptlets.sh
. "$here/tests/packages/scriptlets.sh"
# shellcheck source=../tests/packages/release.sh
. "$here/tests/packages/release.sh"

[ $failed = 0 ] || die "$failed checks of the packages failed"
