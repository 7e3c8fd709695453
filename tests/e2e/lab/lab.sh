#!/bin/bash
# lab.sh - hosts with a real systemd, system bus, polkit and journal, on one LAN of their own. Only root can make them.
#
#   lab.sh up N                    boot hosts a1 ... aN (10.71.0.11 ..., fd71::11 ...); LAB_BUS=broker: with the other bus
#   lab.sh start H... | poweroff H | kill H     boot, shut down, cut the power; the disk stays
#   lab.sh exec H COMMAND...       run as root in host H
#   lab.sh as H USER COMMAND...    as alice (a user like any other) or bob (may administrate; his password is "bob")
#   lab.sh install H FILE...       install .deb files with apt-get, .rpm files with rpm
#   lab.sh push H FILE DEST        copy a file to DEST, executable
#   lab.sh journal H [ARGS...]     journalctl of H
#   lab.sh cut H | heal H          pull the cable, plug it
#   lab.sh list
#   lab.sh down                    remove hosts, disks and network; safe at any time. The base tree stays
#
# LAB=NAME is another lab beside the first. Disks are in memory.
. "$(dirname "$(readlink -f "$0")")/env.sh"

# ---- network: the switch is a namespace too, so nothing touches the machine's own interfaces
ns() { printf '%s-%s' "$LAB" "$1"; }

make_switch() {
  [ ! -e "/run/netns/$(ns switch)" ] || return 0
  ip netns add "$(ns switch)"
  ip netns exec "$(ns switch)" sh -c 'echo 1 | tee /proc/sys/net/ipv6/conf/*/disable_ipv6 >/dev/null'
  ip -n "$(ns switch)" link add br0 type bridge stp_state 0 forward_delay 0
  ip -n "$(ns switch)" link set br0 up
}

plug() {
  local number=$((10 + ${1#a}))
  ip netns add "$(ns "$1")"
  ip link add eth0 netns "$(ns "$1")" type veth peer name "p-$1" netns "$(ns switch)"
  ip -n "$(ns switch)" link set "p-$1" master br0 up
  ip -n "$(ns "$1")" -batch - <<END
link set lo up
addr add 10.71.0.$number/24 dev eth0
addr add fd71::$number/64 dev eth0 nodad
link set eth0 up
END
}

unplug_all() {
  local name pid
  for name in /run/netns/"$LAB"-*; do
    [ -e "$name" ] || continue
    name=${name##*/}
    for pid in $(ip netns pids "$name"); do kill -KILL "$pid" 2>/dev/null || true; done
    ip netns del "$name"
  done
}

# ---- cgroups: nspawn names its own after its parent's, so each host gets one, or all would share it
cgroup_roots() {
  local root
  for root in /sys/fs/cgroup/unified /sys/fs/cgroup/systemd; do [ ! -d "$root" ] || echo "$root"; done
  [ "$(stat -fc %T /sys/fs/cgroup)" != cgroup2fs ] || echo /sys/fs/cgroup
}

remove_cgroup() {
  local root
  # The last processes leave a cgroup a moment after they died.
  for root in $(cgroup_roots); do
    [ ! -d "$root/$1" ] || until_ 5 remove_directories "$root/$1" || say "warning: $root/$1 stays"
  done
}
remove_directories() { find "$1" -depth -type d -exec rmdir {} + 2>/dev/null || [ ! -d "$1" ]; }

# ---- one host
gone() { [ ! -d "/proc/$1" ] || [ "$(awk '{print $3}' "/proc/$1/stat" 2>/dev/null)" = Z ]; }

make_disk() {
  ! mountpoint -q "$1/root" || return 0
  mkdir -p "$1/disk" "$1/root"
  mountpoint -q "$1/disk" || mount -t tmpfs -o size=2g,mode=0755 "$LAB" "$1/disk"
  mkdir -p "$1/disk/upper" "$1/disk/work"
  mount -t overlay -o "lowerdir=$base,upperdir=$1/disk/upper,workdir=$1/disk/work" "$LAB" "$1/root"
  if [ "$LAB_BUS" = broker ]; then
    ln -sfn /usr/lib/systemd/system/dbus-broker.service "$1/root/etc/systemd/system/dbus.service"
  fi
}

unmount() { ! mountpoint -q "$1" || until_ 3 umount "$1" || umount --lazy "$1"; }

# Every systemd holds some tens of inotify instances of root's, who may have 128 as a rule. They stay raised.
raise_limits() {
  local limit file
  for limit in max_user_instances:4096 max_user_watches:524288; do
    file=/proc/sys/fs/inotify/${limit%%:*}
    [ "$(cat "$file")" -ge "${limit##*:}" ] || echo "${limit##*:}" >"$file"
  done
}

# nspawn cleans its propagation directory only where that is on a tmpfs, as /run is on every machine with systemd.
make_propagation() {
  mkdir -p /run/systemd/nspawn
  (
    flock 9
    [ "$(stat -fc %T /run/systemd/nspawn)" = tmpfs ] || mount -t tmpfs -o mode=0755,size=16m opengateway-lab /run/systemd/nspawn
  ) 9>"$LAB_DIR/nspawn.lock"
}

# A whole cgroup2 tree, all capabilities and no filter of nspawn's own: without these the host's systemd silently leaves out
# IPAddressDeny= and DevicePolicy=.
spawn() {
  local dir=$hosts/$1 root
  for root in $(cgroup_roots); do
    mkdir -p "$root/$LAB/$1"
    echo "$BASHPID" >"$root/$LAB/$1/cgroup.procs"
  done
  export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_SECCOMP=0
  exec setsid python3 "$lab_here/nspawn-wait.py" "$dir" systemd-nspawn --quiet --register=no --keep-unit --notify-ready=yes \
    --directory="$dir/root" --machine="$(ns "$1")" --hostname="$1" --network-namespace-path="/run/netns/$(ns "$1")" \
    --capability=all --resolv-conf=off --timezone=off --console=read-only --boot </dev/null >"$dir/console.log" 2>&1
}

start() {
  local dir=$hosts/$1
  ! is_up "$1" || return 0
  [ -e "/run/netns/$(ns "$1")" ] || die "lab $LAB has no host $1: lab.sh up N makes a1 ... aN"
  make_disk "$dir"
  rm -f "$dir/ready" "$dir/exit"
  (spawn "$1") &
  until_ 120 test -s "$dir/ready" -o -s "$dir/exit" || die "$1 did not boot in 120 s; see $dir/console.log"
  [ ! -s "$dir/exit" ] || die "$1 did not boot: $(tail -n 3 "$dir/console.log")"
}

# stop HOST SIGNAL: TERM shuts down, KILL cuts the power.
stop() {
  local dir=$hosts/$1 supervisor
  supervisor=$(cat "$dir/supervisor" 2>/dev/null) || return 0
  if is_up "$1" && [ "$2" = TERM ]; then
    kill -TERM "$supervisor"
    until_ 60 gone "$supervisor" || say "$1 does not shut down: cutting its power"
  fi
  ! is_up "$1" || kill -KILL "$(leader "$1")" 2>/dev/null || true
  until_ 20 gone "$supervisor" || die "nspawn of $1 does not end"
  rm -f "$dir/leader" "$dir/supervisor" "$dir/ready" "$dir/notify"
  remove_cgroup "$LAB/$1"
}

start_all() {
  local host pid pids=()
  raise_limits
  make_propagation
  for host in "$@"; do
    start "$host" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || die "not all of these came up: $*"; done
}

up() {
  local number names=()
  "$lab_here/base.sh" >/dev/null
  down
  mkdir -p "$hosts"
  make_switch
  for ((number = 1; number <= $1; number++)); do
    plug "a$number"
    names+=("a$number")
  done
  start_all "${names[@]}"
}

down() {
  local dir
  for dir in "$hosts"/*/; do
    [ -d "$dir" ] || continue
    dir=${dir%/}
    stop "${dir##*/}" KILL
    unmount "$dir/root"
    unmount "$dir/disk"
    rm -rf --one-file-system "$dir"
  done
  unplug_all
  remove_cgroup "$LAB"
  rm -rf --one-file-system "$hosts"
}

install_files() {
  local host=$1 file debs=() rpms=()
  shift
  for file in "$@"; do
    [ -f "$file" ] || die "no such package: $file"
    # apt reads packages as a user that sees no home directory.
    install -m 0644 "$file" "$hosts/$host/root/var/tmp/"
    case $file in
      *.deb) debs+=("/var/tmp/${file##*/}") ;;
      *.rpm) rpms+=("/var/tmp/${file##*/}") ;;
      *) die "neither .deb nor .rpm: $file" ;;
    esac
  done
  if [ ${#debs[@]} -gt 0 ]; then
    (in_host "$host" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --allow-downgrades --reinstall "${debs[@]}" </dev/null)
  fi
  if [ ${#rpms[@]} -gt 0 ]; then
    (in_host "$host" bash -s <"$lab_here/rpm-provides.sh")
    (in_host "$host" rpm --force-debian -U --replacepkgs --oldpackage "${rpms[@]}" </dev/null)
  fi
}

list() {
  local dir host
  for dir in "$hosts"/*/; do
    [ -d "$dir" ] || continue
    host=$(basename "$dir")
    if is_up "$host"; then echo "$host up $(leader "$host")"; else echo "$host down"; fi
  done
}

verb=${1:-help}
[ $# = 0 ] || shift
case $verb in
  help | -h | --help) sed -n '2,/^\. /{/^\. /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
esac
need_root "$verb" "$@"
case $verb in
  up) need_lab; up "${1:?how many hosts}" ;;
  down) down ;;
  start) start_all "$@" ;;
  poweroff) stop "$1" TERM ;;
  kill) stop "$1" KILL ;;
  exec) in_host "$@" ;;
  as)
    host=$1 user=$2
    shift 2
    in_host "$host" setpriv --reuid "$user" --regid "$user" --init-groups env HOME="/home/$user" USER="$user" "$@"
    ;;
  journal)
    host=$1
    shift
    in_host "$host" journalctl --no-pager "$@"
    ;;
  install) install_files "$@" ;;
  push) install -D -m 0755 "$2" "$hosts/$1/root/$3" ;;
  cut) ip -n "$(ns switch)" link set "p-$1" down ;;
  heal) ip -n "$(ns switch)" link set "p-$1" up ;;
  list) list ;;
  *) die "unknown verb $verb; see: $0 --help" ;;
esac
