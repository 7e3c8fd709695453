#!/bin/bash
# real.sh - a daemon in front of a real llama-server, which answers with the demo model.
#
#   tests/upstreams/real.sh
#
# The server comes from PyPI as a wheel (nothing is compiled), into target/upstreams. Without the network, or without a wheel for
# this machine, it says SKIPPED. Ollama, LM Studio and llama.cpp's own binaries are in no registry that it could use.
# shellcheck source=lib.sh
. "$(dirname "$(readlink -f "$0")")/../../scripts/lib.sh"
cd "$here"

readonly server=xllamacpp==2026.10.11549
readonly venv=$here/target/upstreams
model=${OPENGATEWAY_DEMO_MODEL:-$here/models/opengateway-demo.gguf}

skip() {
  say "SKIPPED: $*"
  [ "${CI:-}" != true ] || exit 1
  exit 0
}

[ -f "$model" ] || die "no demo model at $model"
need_build
need dbus-daemon=dbus-daemon python3=python3 curl=curl
python3 -c 'import ensurepip' 2>/dev/null || need missing-venv=python3-venv
[ -x "$venv/bin/python" ] || python3 -m venv "$venv" || die "python3 -m venv failed; install python3-venv"
"$venv/bin/pip" install -q --disable-pip-version-check --only-binary :all: "$server" >&2 ||
  skip "$server cannot be installed: no network, or no wheel for this machine"
if [ -z "${OPENGATEWAY_BIN:-}" ]; then cargo build --locked --bins >&2; fi
bin=${OPENGATEWAY_BIN:-$here/target/debug}

run=$(mktemp -d)
pids=()
finish() {
  local pid
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$run"
}
trap finish EXIT

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$venv/bin/python" tests/upstreams/llama_server.py "$model" "$port" 512 2 >"$run/server.log" 2>&1 &
pids+=($!)
until_ 60 curl -fs "http://127.0.0.1:$port/health" || die "llama-server did not start: $(tail -n 5 "$run/server.log")"

cat >"$run/bus.conf" <<C
<busconfig><type>session</type><listen>unix:path=$run/bus</listen><policy context="default"><allow user="*"/>
<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>
C
dbus-daemon --nofork --nopidfile --config-file="$run/bus.conf" &
pids+=($!)
until_ 10 test -S "$run/bus" || die "no bus"
printf '[[backend]]\nkind = "openai"\nurl = "http://127.0.0.1:%s/v1"\n' "$port" >"$run/daemon.toml"

# node NAME BUS ARGS...
node() {
  local name=$1 bus=$2
  shift 2
  "$bin/opengatewayd" --bus "unix:path=$bus" --state-dir "$run/$name" --node-name "$name" --no-mdns --no-discover \
    --listen /ip4/127.0.0.1/udp/0/quic-v1 "$@" >"$run/$name.log" 2>&1 &
  pids+=($!)
  until_ 20 "$bin/ogctl" --bus "unix:path=$bus" status || die "$name did not start: $(cat "$run/$name.log")"
}
serving() { "$bin/ogctl" --bus "unix:path=$run/bus" "$@"; }
asking() { "$bin/ogctl" --bus "unix:path=$run/bus2" "$@"; }

node NodeA "$run/bus" --config "$run/daemon.toml" --serve --connect gatewayai-poc
at=$(serving status --json | sed 's/.*"addresses":\["\([^"]*\)".*/\1/')
sed "s|$run/bus<|$run/bus2<|" "$run/bus.conf" >"$run/bus2.conf"
dbus-daemon --nofork --nopidfile --config-file="$run/bus2.conf" &
pids+=($!)
until_ 10 test -S "$run/bus2" || die "no second bus"
node NodeC "$run/bus2" --consume --connect gatewayai-poc --bootstrap "$at"

has_model() { asking peers gatewayai-poc --json | grep -q '"opengateway-demo'; }
until_ 30 has_model || die "the model of the server is not told: $(asking peers gatewayai-poc)"
name=$(asking peers gatewayai-poc --json | grep -o '"opengateway-demo[^"]*"' | head -n 1 | tr -d '"')

expect() {
  local wanted=$1 got
  shift
  got=$(asking prompt --timeout 60 --temperature 0 "$@" 2>"$run/said") || die "no answer: $(cat "$run/said")"
  [ "$got" = "$wanted" ] || die "\"$wanted\" was expected, not \"$got\""
}
expect 4 "What is 2+2?"
expect 4 --model "$name" "What is 2+2?"
say "llama-server answered 4 to NodeC through NodeA: $(cat "$run/said")"

# A prompt that does not fit has its name.
long=$(printf 'word %.0s' $(seq 1 3000))
if asking prompt --timeout 60 --model "$name" -- "$long" >/dev/null 2>"$run/said"; then die "3000 words fitted into 512 tokens"; fi
grep -q "context" "$run/said" || die "the failure does not say that it did not fit: $(cat "$run/said")"

# Letting go of an answer frees the slot of the server within a second.
busy() { curl -fs "http://127.0.0.1:$port/slots" | grep -q '"is_processing":true'; }
idle() { ! busy; }
asking prompt --timeout 60 --model "$name" -- "Count to 50" >/dev/null 2>&1 &
asker=$!
until_ 5 busy || say "the answer was done before it could be cancelled"
kill -INT "$asker" 2>/dev/null || true
until_ 1 idle || die "the slot of the server is not free a second after the asker let go"

say "ok"
