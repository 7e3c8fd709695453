#!/bin/bash
# sandbox.sh CASE FIXTURE - runs CASE/script.sh as root in a copy of this machine whose changes are thrown away.
#
# The copy is an overlay over /, without systemd (an empty /run) and with no network but loopback. CASE is there as /case and
# FIXTURE as /fixture. CASE/setup.sh prepares it; then CASE/before and CASE/after list what differs from this machine before
# and after the script. Exit 77 and a reason: this machine allows no such copy.
set -euo pipefail
case=$1 fixture=$2

if [ "${3:-}" != inside ]; then
  unshare --mount --net --pid true 2>/dev/null || { echo "this machine allows no namespaces"; exit 77; }
  exec unshare --mount --net --pid --fork --kill-child "$0" "$case" "$fixture" inside
fi

box=$case/box
mkdir -p "$box"
mount --make-rprivate /
mount -t tmpfs -o size=1g sandbox "$box"
mkdir "$box/upper" "$box/work" "$box/root"
mount -t overlay -o "lowerdir=/,upperdir=$box/upper,workdir=$box/work" overlay "$box/root" 2>/dev/null ||
  { echo "this machine allows no overlay over /"; exit 77; }
mount -t proc proc "$box/root/proc"
mount --rbind /dev "$box/root/dev"
mount -t tmpfs run "$box/root/run"
mkdir -p "$box/root/case" "$box/root/fixture" "$box/root/stubs"
mount --bind "$case" "$box/root/case"
mount --bind -o ro "$fixture" "$box/root/fixture"
ip link set lo up

inside() { chroot "$box/root" env -i PATH=/stubs:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb bash -eu "$1"; }

# Files with their hashes, and directories that this machine does not have.
listing() {
  (
    cd "$box/upper"
    find . -mindepth 1 ! -type d -printf '%y %m %U:%G %P %l\n'
    find . -type f -exec sha256sum {} +
    find . -mindepth 1 -type d -printf '%P\n' | while read -r path; do [ -d "/$path" ] || printf 'd %s\n' "$path"; done
  ) | LC_ALL=C sort
}

inside /case/setup.sh >&2
listing >"$case/before"
code=0
inside /case/script.sh || code=$?
listing >"$case/after"
exit $code
