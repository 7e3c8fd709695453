#!/bin/bash
# run-poc.sh - prints the cluster id and checks this machine's environment (Phase 1 of the proof of concept).
# It starts nothing and changes nothing. Exit 0: this machine can build and run a node; 1: something is missing.
. "$(dirname "$(readlink -f "$0")")/lib.sh"

printf 'Cluster: %s\n' "${POC_CLUSTER_ID:-gatewayai-poc}"
lacking=no
ok() { printf '  ok       %s\n' "$*"; }
lacks() {
  printf '  MISSING  %s\n' "$*"
  lacking=yes
}
note() { printf '  note     %s\n' "$*"; }
# tool COMMAND HINT: shows the first line of COMMAND --version.
tool() {
  if command -v "$1" >/dev/null; then ok "$("$1" --version 2>&1 | head -n 1 | cut -c 1-100)"; else lacks "$1: $2"; fi
}

if [ "$(uname -s)" = Linux ]; then ok "Linux $(uname -r)"; else lacks "Linux: this is $(uname -s)"; fi
case $(uname -m) in
  x86_64 | aarch64) ok "architecture $(uname -m)" ;;
  *) lacks "architecture x86_64 or aarch64: this is $(uname -m)" ;;
esac
tool curl "apt-get install curl"
tool dbus-daemon "apt-get install dbus-daemon"
tool cc "apt-get install gcc libc6-dev"
if have_rust; then ok "$(rustc --version)"; else lacks "Rust $(rust_wanted) or newer: https://rustup.rs"; fi
if command -v systemctl >/dev/null; then tool systemctl ""; else note "no systemd: run opengatewayd by hand"; fi
if command -v nvidia-smi >/dev/null; then
  ok "NVIDIA: $(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>&1 | head -n 1)"
else
  note "no nvidia-smi: fine, a GPU is optional"
fi
note "Python, EXO, Node.js and Hyperswarm are not needed: discovery is libp2p, and a running EXO is reached over HTTP"
cores=$(nproc)
memory=$(awk '/^MemTotal/ {printf "%.1f GiB", $2 / 1048576}' /proc/meminfo)
disk=$(df -Ph "$here" | awk 'NR == 2 {print $4}')
note "$cores cores, $memory of memory, $disk of disk free; what this machine can serve: ogctl eligible"
[ $lacking = no ]
