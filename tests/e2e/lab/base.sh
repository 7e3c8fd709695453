#!/bin/bash
# base.sh - builds, once, the tree that every host of the lab has as its read-only lower layer (about 400 MB, half a minute).
#
#   base.sh             builds it when it is missing or was made from another list of packages
#   base.sh --rebuild   throws it away first
#
# It prints the path of the tree. Hosts have no way out, so what a test needs in one has to be in this list.
. "$(dirname "$(readlink -f "$0")")/env.sh"

packages=(
  # a small server: service manager, bus, polkit, logins
  systemd systemd-sysv dbus polkitd libpam-systemd libnss-systemd dbus-user-session sudo
  iproute2 iputils-ping procps curl ca-certificates
  # what the package depends on and a small server may lack
  libgomp1
  # the other bus, and the other package manager
  dbus-broker rpm dnf
  # what an installation checks signatures with, and what tests run inside
  openssh-client gpg python3 python3-dbus python3-gi
)

# This machine's own sources of the suite and its updates, without third-party repositories.
own_sources() {
  # shellcheck disable=SC2016  # $(...) is apt's own format language
  apt-get indextargets --format '$(ORIGIN)|$(CODENAME)|$(SIGNED_BY)|$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    awk -F'|' -v suite="$LAB_SUITE" '
      $1 ~ /^(Debian|Ubuntu)$/ && ($2 == suite || index($2, suite "-") == 1) {
        print "deb " ($3 ~ /^\// ? "[signed-by=" $3 "] " : "") $4
      }' | sort -u
}

sources() {
  if [ -n "$LAB_MIRROR" ]; then
    printf '%s\n' "$LAB_MIRROR"
    return
  fi
  [ -n "$(own_sources)" ] || apt-get update -qq >&2
  own_sources
}

# Quieter journals and faster boots: a host needs no logins on consoles, timers or clock.
silence() {
  local unit
  for unit in getty@.service console-getty.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer fstrim.timer dnf-makecache.timer systemd-timesyncd.service; do
    ln -sfn /dev/null "$1/etc/systemd/system/$unit"
  done
  mkdir -p "$1/etc/systemd/journald.conf.d"
  printf '[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n' >"$1/etc/systemd/journald.conf.d/lab.conf"
}

build() {
  local new=$base.new from
  mapfile -t from < <(sources)
  [ -n "${from[0]:-}" ] || die "no apt source of this machine has $LAB_SUITE: set LAB_SUITE, or LAB_MIRROR to a line of sources.list"
  say "building the tree of the lab's hosts ($LAB_SUITE) in $base, once"
  rm -rf --one-file-system "$base" "$new"
  mmdebstrap --quiet --mode=root --variant=minbase --include="$(printf '%s,' "${packages[@]}")" "$LAB_SUITE" "$new" "${from[@]}" \
    </dev/null >&2
  rm -f "$new/etc/hostname" "$new/etc/resolv.conf"
  : >"$new/etc/machine-id" # each host gets its own at its first boot
  printf '127.0.0.1 localhost\n::1 localhost\n' >"$new/etc/hosts"
  # Debian's dbus-broker makes itself the bus when it is installed: a host has the one that LAB_BUS names.
  rm -f "$new/etc/systemd/system/dbus.service"
  silence "$new"
  # alice is a user like any other; bob may administrate, with his password.
  chroot "$new" useradd --create-home --shell /bin/bash --uid 1000 alice
  chroot "$new" useradd --create-home --shell /bin/bash --uid 1001 --groups sudo bob
  printf 'bob:bob\n' | chroot "$new" chpasswd
  mv "$new" "$base"
  printf '%s' "$wanted" >"$base.stamp"
}

need_root "$@"
need_lab
mkdir -p "$LAB_DIR"
chmod 0755 "$LAB_DIR"
wanted="$LAB_SUITE $LAB_MIRROR ${packages[*]} $(sha256sum <"$0")"
exec 9>"$LAB_DIR/base.lock"
flock 9
[ "${1:-}" != --rebuild ] || rm -f "$base.stamp"
if [ ! -d "$base/usr" ] || [ "$(cat "$base.stamp" 2>/dev/null)" != "$wanted" ]; then build; fi
printf '%s\n' "$base"
