# shellcheck shell=bash
# env.sh - settings and words that the scripts of the lab share. Sourced, never run.
#
# All of a lab lies below $LAB_DIR/labs/$LAB, in network namespaces called "$LAB-...", and in the cgroup "/$LAB": `lab.sh down`
# removes that and nothing else. Two labs at once need two values of LAB.
lab_here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
readonly lab_here
# shellcheck source=../../../scripts/lib.sh
. "$lab_here/../../../scripts/lib.sh"

LAB=${LAB:-oglab}
LAB_DIR=${LAB_DIR:-/var/lib/opengateway-lab}
# Release of the hosts: by default the one that this machine runs.
LAB_SUITE=${LAB_SUITE:-$(. /etc/os-release && echo "${VERSION_CODENAME:-stable}")}
# Where the packages of the base tree come from: empty for this machine's own apt sources, else "deb URL SUITE COMPONENTS" lines.
LAB_MIRROR=${LAB_MIRROR:-}
# The bus of a host: daemon (Debian's) or broker (Fedora's).
LAB_BUS=${LAB_BUS:-daemon}

base=$LAB_DIR/base-$LAB_SUITE
hosts=$LAB_DIR/labs/$LAB
# shellcheck disable=SC2034  # for the scripts that source this one
readonly base hosts
export LAB LAB_DIR LAB_SUITE LAB_MIRROR LAB_BUS

need_root() { [ "$(id -u)" = 0 ] || die "booting hosts needs root: sudo $0 $*"; }

need_lab() {
  need systemd-nspawn=systemd-container mmdebstrap=mmdebstrap nsenter=util-linux ip=iproute2 python3=python3 flock=util-linux
}

# PID 1 of a host, as this machine counts.
leader() { cat "$hosts/$1/leader" 2>/dev/null; }
is_up() {
  local pid
  pid=$(leader "$1") && [ -n "$pid" ] && [ -d "/proc/$pid" ]
}

# in_host HOST COMMAND...  As root, in all namespaces of the host, with a clean environment. Takes the place of this shell.
in_host() {
  local pid
  is_up "$1" || die "host $1 is not up"
  pid=$(leader "$1")
  shift
  exec nsenter --target "$pid" --all env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb "$@"
}
