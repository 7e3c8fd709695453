#!/bin/bash
# demo.sh - three nodes, one cluster, one prompt: NodeC, which has no model, asks "What is 2+2?", and the language model of
# NodeA answers.
#
#   ./scripts/demo.sh             installs what is missing, builds, runs, stops everything, leaves nothing behind
#   ./scripts/demo.sh --no-engine without the engine, whose C++ takes ten minutes to build the first time: the echo answers
#   ./scripts/demo.sh --keep      leaves the three nodes running and says how to go on
#   ./scripts/demo.sh --stop      stops what --keep left
#   ./scripts/demo.sh --one-host  three processes on this machine, also as root
#   ./scripts/demo.sh --release   the optimised build, which takes longer to make
#
# NodeA serves models/opengateway-demo.gguf, a model of 0.9 MB that knows small sums; NodeB serves the echo, which repeats the
# prompt. As root the nodes are three network namespaces on one bridge: three machines on one LAN, found by mDNS. Otherwise they
# are three processes on loopback, which has no multicast, so NodeB and NodeC are given NodeA's address.
. "$(dirname "$(readlink -f "$0")")/lib.sh"
. "$here/scripts/build-lib.sh"

keep='' stop='' profile=debug build=() namespaces='' with_engine=yes
[ "$(id -u)" = 0 ] && namespaces=yes
for option in "$@"; do
  case $option in
    --keep) keep=yes ;;
    --stop) stop=yes ;;
    --one-host) namespaces='' ;;
    --no-engine) with_engine='' ;;
    --release) profile=release build=(--release) ;;
    -h | --help) sed -n '2,/^\. /{/^\. /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) say "demo.sh: unknown option $option; see: $0 --help"; exit 2 ;;
  esac
done

cluster=${POC_CLUSTER_ID:-gatewayai-poc}
question=${POC_PROMPT:-What is 2+2?}
# One demonstration a user at a time: --stop finds it here.
run=${TMPDIR:-/tmp}/opengateway-demo-$(id -u)
net=ogdemo

# Ends every process and namespace of a demonstration; safe at any time, any number of times.
down() {
  local pid file name
  for file in "$run"/*/daemon.pid "$run"/*/bus.pid; do
    [ -e "$file" ] || continue
    pid=$(cat "$file")
    # A pid that was used again belongs to somebody else.
    grep -qzF -- "$run/" "/proc/$pid/cmdline" 2>/dev/null || continue
    kill "$pid" 2>/dev/null || continue
    until_ 10 test ! -e "/proc/$pid" || kill -KILL "$pid" 2>/dev/null || true
  done
  if [ "$(id -u)" = 0 ] && [ -e "$run/namespaces" ]; then
    for name in a b c switch; do
      if [ -e "/run/netns/$net-$name" ]; then ip netns del "$net-$name" || true; fi
    done
  fi
  rm -rf "$run"
}

if [ -n "$stop" ]; then
  [ -d "$run" ] || { say "no demonstration is running"; exit 0; }
  down
  say "stopped; nothing is left"
  exit 0
fi

if [ -d "$run" ]; then
  say "a demonstration is running, or was cut off, in $run; stop it first with: $0 --stop"
  exit 1
fi

need_build
need dbus-daemon=dbus-daemon
[ -z "$namespaces" ] || need ip=iproute2
engine=''
if [ -n "$with_engine" ]; then
  build_engine "$(host_target)"
  engine=$(release_dir "$(host_target)")/engine/libexec/opengateway-engine
fi
say "building opengatewayd and ogctl ($profile) ..."
(cd "$here" && cargo build --locked "${build[@]}" --bins) >&2 || die "the build failed; see above"
bin=${CARGO_TARGET_DIR:-$here/target}/$profile

mkdir -m 700 "$run"
ended() {
  local code=$?
  trap - EXIT INT TERM
  if [ "$code" = 0 ] && [ -n "$keep" ]; then return; fi
  if [ "$code" != 0 ]; then
    for log in "$run"/*/log; do
      [ -e "$log" ] || continue
      say "--- last lines of $(basename "$(dirname "$log")")"
      tail -n 15 "$log" >&2
    done
  fi
  down
  exit "$code"
}
trap ended EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ -n "$namespaces" ]; then
  # Three machines on one LAN: a namespace each, and one that is the switch.
  touch "$run/namespaces"
  ip netns add $net-switch
  ip -n $net-switch link add lan type bridge mcast_snooping 0
  ip -n $net-switch link set lan up
  number=10
  for name in a b c; do
    number=$((number + 1))
    ip netns add $net-$name
    ip -n $net-$name link set lo up
    ip -n $net-$name link add eth0 type veth peer name port-$name netns $net-switch
    ip -n $net-switch link set port-$name master lan up
    ip -n $net-$name addr add 10.74.0.$number/24 dev eth0
    ip -n $net-$name link set eth0 up
    ip -n $net-$name route add default dev eth0
  done
  say "three network namespaces on one bridge: 10.74.0.11, .12 and .13"
else
  say "three processes on this machine (as root they would be three network namespaces)"
fi

# config NAME: NodeA alone has a model.
config() {
  printf '[models]\ndirectory = "%s"\nalso = [%s]\n[upstreams]\ndiscover = false\n[engine]\n' "$run/$1/models" "$([ "$1" != NodeA ] || printf '"%s"' "$here/models")"
  if [ -n "$engine" ]; then printf 'program = "%s"\n' "$engine"; else printf 'enabled = false\n'; fi
}

# node NAME: its own bus, its own state, its own network.
node() {
  local name=$1 short dir=$run/$1 inside=() options=()
  short=$(printf '%s' "${name#Node}" | tr '[:upper:]' '[:lower:]')
  mkdir -p "$dir/models"
  config "$name" >"$dir/opengatewayd.toml"
  cat >"$dir/bus.conf" <<C
<busconfig><type>session</type><listen>unix:path=$dir/bus</listen><policy context="default"><allow user="*"/>
<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>
C
  dbus-daemon --nofork --nopidfile --config-file="$dir/bus.conf" >"$dir/bus.log" 2>&1 &
  echo $! >"$dir/bus.pid"
  until_ 10 test -S "$dir/bus" || die "$name has no bus: $(cat "$dir/bus.log")"
  if [ -n "$namespaces" ]; then inside=(ip netns exec "$net-$short"); else options=(--no-mdns --listen /ip4/127.0.0.1/udp/0/quic-v1); fi
  "${inside[@]}" "$bin/opengatewayd" --config "$dir/opengatewayd.toml" --bus "unix:path=$dir/bus" --state-dir "$dir/state" --node-name "$name" "${options[@]}" \
    >"$dir/log" 2>&1 &
  echo $! >"$dir/daemon.pid"
  until_ 20 og "$name" status || die "$name did not start"
}

og() {
  local name=$1
  shift
  "$bin/ogctl" --bus "unix:path=$run/$name/bus" "$@"
}

# sees NAME OTHER...: NAME lists every OTHER as a member.
sees() {
  local name=$1 list other
  shift
  list=$(og "$name" peers "$cluster" --json) || return 1
  for other in "$@"; do
    case $list in *"\"name\":\"$other\""*) ;; *) return 1 ;; esac
  done
}

offers() { [[ $(og "$1" models --json) == *"\"model\":\"$2\""* ]]; }

shows() {
  local name=$1
  shift
  until_ 20 sees "$name" "$@" || die "$name does not see $*: $(og "$name" peers "$cluster" 2>&1)"
  say "  $name sees: $*"
}

bootstrap=()
for name in NodeA NodeB NodeC; do
  role=--serve
  [ "$name" != NodeC ] || role=--consume
  node "$name"
  og "$name" connect "$cluster" $role --wait 0 "${bootstrap[@]}" >/dev/null || die "$name could not join $cluster"
  say "$name joined $cluster ($( [ $role = --serve ] && echo serves || echo asks ))"
  case $name in
    NodeA) [ -n "$namespaces" ] || bootstrap=(--bootstrap "$(og NodeA status --json | sed 's/.*"addresses":\["\([^"]*\)".*/\1/')") ;;
    NodeB) shows NodeB NodeA; shows NodeA NodeB ;;
    NodeC) shows NodeC NodeA NodeB ;;
  esac
done

if [ -n "$engine" ]; then
  until_ 20 offers NodeC opengateway-demo || die "NodeC does not see the model of NodeA: $(og NodeC models 2>&1)"
  say "  NodeC sees the model opengateway-demo of NodeA"
fi

say "NodeC asks: $question"
answer=$(og NodeC prompt --cluster "$cluster" --timeout 30 -- "$question" 2>"$run/served-by") ||
  die "no answer: $(cat "$run/served-by")"
say "  the answer, $(cat "$run/served-by"):"
printf '%s\n' "$answer"
if [ -n "$engine" ]; then
  grep -q '^served by NodeA' "$run/served-by" || die "another node than NodeA gave the answer"
  [ "$question" != "What is 2+2?" ] || [ "$answer" = 4 ] || die "the answer is not 4"
else
  grep -qE '^served by Node[AB]' "$run/served-by" || die "neither NodeA nor NodeB gave the answer"
  say "That was the echo. A language model answers without --no-engine."
fi

if [ -n "$keep" ]; then
  say
  say "The nodes keep running. Go on with:"
  for name in NodeA NodeB NodeC; do say "  $bin/ogctl --bus unix:path=$run/$name/bus status"; done
  say "  $bin/ogctl --bus unix:path=$run/NodeC/bus peers"
  say "  $bin/ogctl --bus unix:path=$run/NodeC/bus prompt --node NodeB 'Hello'"
  say "  tail -f $run/NodeA/log"
  say "Stop them with: $0 --stop"
fi
