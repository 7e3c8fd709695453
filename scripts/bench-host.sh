#!/bin/bash
# bench-host.sh - what the service costs on a booted host: start, boot, join, one command, memory, size. Measures, judges nothing.
#
#   scripts/bench-host.sh [--packages DIR] [--rounds N]
#
# DIR has the .deb that scripts/package.sh made (default: target/packages); N rounds of what is repeated (default: 20). Only
# root can boot hosts; nothing else should run meanwhile.
. "$(dirname "$(readlink -f "$0")")/lib.sh"

packages=$here/target/packages rounds=20
while [ $# -gt 0 ]; do
  case $1 in
    --packages) packages=${2:?}; shift ;;
    --rounds) rounds=${2:?}; shift ;;
    -h | --help) sed -n '2,/^\. /{/^\. /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) say "bench-host.sh: unknown argument $1; see: $0 --help"; exit 2 ;;
  esac
  shift
done
deb=$(find "$packages" -maxdepth 1 -name '*.deb' 2>/dev/null | head -n 1)
[ -n "$deb" ] || die "no .deb in $packages: scripts/package.sh deb --out $packages makes one"

export LAB=ogbench
lab() { "$here/tests/e2e/lab/lab.sh" "$@"; }
on() { lab exec "$1" sh -c "$2"; }
trap 'lab down' EXIT

# Of numbers, one a line: the median, and the largest.
median() { sort -n | awk '{v[NR] = $1} END {printf "%s (worst %s)", v[int((NR + 1) / 2)], v[NR]}'; }
report() { printf '%-52s %s\n' "$1" "$2"; }
property() { on "$1" "systemctl show --property=$2 --value opengatewayd"; }
all() {
  local host pids=()
  for host in a1 a2 a3; do
    "$@" "$host" &
    pids+=($!)
  done
  wait "${pids[@]}"
}

start_time() { # milliseconds from the start of the unit to READY
  on a1 'systemctl stop opengatewayd; systemctl start opengatewayd'
  echo $((($(property a1 ActiveEnterTimestampMonotonic) - $(property a1 InactiveExitTimestampMonotonic)) / 1000))
}

boot_time() { # milliseconds until the host's systemd had booted
  lab kill a1
  lab start a1
  on a1 'systemctl is-system-running --wait >/dev/null || :; systemctl show --property=FinishTimestampMonotonic,UserspaceTimestampMonotonic --value' |
    awk 'NR == 1 {first = $1} NR == 2 {d = $1 - first; print int((d < 0 ? -d : d) / 1000)}'
}

await_members() {
  # shellcheck disable=SC2016  # of the host's shell
  on "$1" 'until [ "$(ogctl peers gatewayai-poc --json 2>/dev/null | grep -o "\"peer_id\"" | wc -l)" = 2 ]; do sleep 0.02; done
    awk "{print int(\$1 * 1000)}" /proc/uptime'
}

join_time() { # milliseconds after the last of three was ready until each lists the two others
  local ready seen
  all lab kill
  all lab start
  seen=$(all await_members | sort -n | tail -n 1)
  ready=$(all ready_at | sort -n | tail -n 1)
  echo $((seen - ready))
}
ready_at() { echo $(($(property "$1" ActiveEnterTimestampMonotonic) / 1000)); }

command_time() { # milliseconds of so many whole processes, one a line
  on a1 "python3 -c '
import subprocess, sys, time
for _ in range($1):
    begun = time.perf_counter()
    subprocess.run([\"ogctl\", \"status\"], stdout=subprocess.DEVNULL, check=True)
    print(round((time.perf_counter() - begun) * 1000, 1))'"
}

idle() { # resident MiB, and percent of one core over so many seconds
  on a1 "pid=\$(systemctl show -P MainPID opengatewayd)
    ticks() { awk '{print \$14 + \$15}' /proc/\$pid/stat; }
    before=\$(ticks); sleep $1; after=\$(ticks)
    awk -v ticks=\$((after - before)) -v hertz=\$(getconf CLK_TCK) '/^VmRSS/ {printf \"%.1f MiB, %.2f %% of a core\", \$2 / 1024, ticks * 100 / hertz / $1}' /proc/\$pid/status"
}

lab up 3
say "measuring ..."
report "boot without the package (ms)" "$(for ((i = 0; i < 5; i++)); do boot_time; done | median)"
install_one() { lab install "$1" "$deb" >/dev/null 2>&1; }
all install_one
report "package (bytes)" "$(stat -c %s "$deb")"
# shellcheck disable=SC2016  # of the host's shell
report "installed (bytes)" "$(on a1 'dpkg -L opengateway | while read -r f; do [ ! -f "$f" ] || stat -c %s "$f"; done' | awk '{n += $1} END {print n}')"
report "systemctl start to READY (ms)" "$(for ((i = 0; i < rounds; i++)); do start_time; done | median)"
enable_one() { on "$1" 'systemctl enable --now --quiet opengatewayd; ogctl connect gatewayai-poc --serve --wait 0 >/dev/null'; }
all enable_one
report "boot with the service enabled (ms)" "$(for ((i = 0; i < 5; i++)); do boot_time; done | median)"
on a1 'systemd-analyze critical-chain --no-pager multi-user.target' | sed 's/^/    /'
report "three hosts switched on: all joined after READY (ms)" "$(for ((i = 0; i < 5; i++)); do join_time; done | median)"
report "ogctl status, whole process (ms)" "$(command_time 200 | median)"
report "idle in a cluster of three, 30 s" "$(idle 30)"
