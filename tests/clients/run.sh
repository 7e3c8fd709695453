#!/bin/bash
# run.sh - real clients (the openai SDK, litellm, llm, curl) against the OpenAI endpoint of a daemon of its own.
#
#   ./tests/clients/run.sh [DIRECTORY]   with the opengatewayd and ogctl in DIRECTORY (default: target/debug, built first)
#
# The clients are installed from PyPI, pinned, into a virtual environment below target/. The daemon runs on a bus of its
# own; its upstream is tests/clients/stub.py, which has known answers. Everything ends with this script.
# shellcheck source=lib.sh
. "$(dirname "$(readlink -f "$0")")/../../scripts/lib.sh"
cd "$here"

need dbus-daemon=dbus-daemon curl=curl python3=python3
python3 -c 'import ensurepip, venv' 2>/dev/null || need missing-python-venv=python3-venv
programs=${1:-}
if [ -z "$programs" ]; then
  need_build
  cargo build --locked --bin opengatewayd --bin ogctl
  programs=${CARGO_TARGET_DIR:-target}/debug
fi

environment=target/clients-venv
if ! cmp -s tests/clients/requirements.txt "$environment/installed"; then
  rm -rf "$environment"
  python3 -m venv "$environment"
  if ! "$environment/bin/pip" install -q --disable-pip-version-check -r tests/clients/requirements.txt; then
    say "SKIPPED: the clients could not be installed from PyPI"
    [ "${CI:-}" != true ] || exit 1
    exit 0
  fi
  cp tests/clients/requirements.txt "$environment/installed"
fi

work=$(mktemp -d)
started=()
# shellcheck disable=SC2317,SC2329 # called by the trap
clean() {
  for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait
  rm -rf "$work"
}
trap clean EXIT

python3 tests/clients/stub.py "$work/port" &
started+=($!)
sed "s|@DIR@|$work|" >"$work/bus.conf" <<'CONF'
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path=@DIR@/bus</listen>
<policy context="default"><allow user="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/>
<allow own="*"/></policy></busconfig>
CONF
dbus-daemon --nofork --nopidfile --config-file "$work/bus.conf" 2>/dev/null &
started+=($!)
until_ 10 test -s "$work/port" -a -S "$work/bus" || die "the upstream or the bus did not start"
stub=http://127.0.0.1:$(cat "$work/port")

cat >"$work/config.toml" <<CONF
[http]
listen = "127.0.0.1:0"
[network]
mdns = false
listen = ["/ip4/127.0.0.1/udp/0/quic-v1"]
[[backend]]
kind = "openai"
url = "$stub/v1"
slots = 64
queue = 256
running_per_peer = 64
queued_per_peer = 256
CONF
bus=unix:path=$work/bus
env -u OPENGATEWAY_POC_ROOT "$programs/opengatewayd" --config "$work/config.toml" --bus "$bus" --state-dir "$work/state" \
  --node-name clients --log warn &
started+=($!)
# shellcheck disable=SC2317,SC2329 # called by until_
serves() { "$programs/ogctl" --bus "$bus" env >"$work/env" && curl -fsS "$(sed -n 's|.*URL=\(.*\)/v1$|\1|p' "$work/env")/health" | grep -q '"ok"'; }
until_ 30 serves || die "the daemon does not serve its upstream"

# shellcheck disable=SC1091 # written just now
. "$work/env"
# No client may talk to anybody else, nor use what this user has configured.
export HOME=$work XDG_CONFIG_HOME=$work/config LLM_USER_PATH=$work/llm STUB=$stub LITELLM_LOCAL_MODEL_COST_MAP=True NO_PROXY=127.0.0.1
"$environment/bin/python" tests/clients/clients.py
