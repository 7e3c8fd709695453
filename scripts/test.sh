#!/bin/bash
# test.sh - everything that this machine can run, then a summary of what was skipped and why.
#
#   ./scripts/test.sh              all rings
#   ./scripts/test.sh RING...      some of them:
#     lint      formatting, clippy, shell scripts, interface files, the client alone (without libp2p), the daemon without an engine
#     engine    opengateway-engine: clippy, its own tests, the demo model's answers, hostile files, its sandbox
#     unit      beside the code: pure functions, codecs, limits
#     it        in one process, and the real daemon on private buses
#     clients   programs that speak the OpenAI API against the endpoint
#     upstreams real model servers behind a node
#     netns     the real daemon in network namespaces; needs root
#     packages  the .deb, the .rpm, the tarball and the release, without a booted host
#     install   install.sh on copies of this machine; needs root
#     e2e       the packages on booted hosts: systemd, bus, polkit; needs root
#
# It installs what is missing and says so; only apt packages need root. The engine is built once, which takes ten minutes the
# first time. With CI=true a skipped test is a failed one.
. "$(dirname "$(readlink -f "$0")")/lib.sh"
. "$here/scripts/build-lib.sh"

rings=()
for argument in "$@"; do
  case $argument in
    lint | engine | unit | it | clients | upstreams | netns | packages | install | e2e) rings+=("$argument") ;;
    -h | --help) sed -n '2,/^\. /{/^\. /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) say "test.sh: unknown ring $argument; see: $0 --help"; exit 2 ;;
  esac
done
[ ${#rings[@]} -gt 0 ] || rings=(lint engine unit it clients upstreams netns packages install e2e)
# wants RING...: whether one of them is to run.
wants() {
  local ring
  for ring in "$@"; do [[ " ${rings[*]} " != *" $ring "* ]] || return 0; done
  return 1
}

cd "$here"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failed=() skipped=()
skip() {
  skipped+=("$1: $2")
  if [ "${CI:-}" = true ]; then failed+=("$1 (skipped, and CI=true forbids that: $2)"); fi
}

# step NAME COMMAND...: runs it quietly; shows its output when it fails.
step() {
  local name=$1 start=$SECONDS log=$logs/${1// /-}
  shift
  printf '%-40s' "$name" >&2
  if "$@" >"$log" 2>&1 </dev/null; then
    say "ok      $((SECONDS - start)) s$(awk '/^test result:/ {n += $4} END {if (n) printf ", %d tests", n}' "$log")"
  else
    say "FAILED  $((SECONDS - start)) s"
    failed+=("$name")
    tail -n 200 "$log" >&2
  fi
  # A test that cannot run here prints why.
  while read -r reason; do skipped+=("$name: $reason"); done < <(sed -n 's/.*SKIPPED: //p' "$log" | sort -u)
}


need_build
need dbus-daemon=dbus-daemon
if wants it; then need tmux=tmux; fi
if wants it && [ "$(id -u)" = 0 ]; then need strace=strace pkaction=polkitd; fi
if wants netns && [ "$(id -u)" = 0 ]; then need ip=iproute2 tc=iproute2 nft=nftables python3=python3-minimal; fi

if wants lint; then
  if cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt >/dev/null 2>&1; then
    step "formatting" cargo fmt --all --check
  else
    skip "formatting" "rustfmt is not here: rustup component add rustfmt"
  fi
  if cargo clippy --version >/dev/null 2>&1 || rustup component add clippy >/dev/null 2>&1; then
    step "clippy" cargo clippy --locked --all-targets -- -D warnings
  else
    skip "clippy" "clippy is not here: rustup component add clippy"
  fi
  if [ "$(id -u)" = 0 ]; then need shellcheck=shellcheck xmllint=libxml2-utils; fi
  if command -v shellcheck >/dev/null; then
    step "shell scripts" shellcheck -x -P scripts -P tests/e2e/lab scripts/*.sh tests/*/*.sh tests/e2e/lab/*.sh .ci/run
  else
    skip "shell scripts" "shellcheck is not here: apt-get install shellcheck"
  fi
  if command -v xmllint >/dev/null; then
    step "interface files" xmllint --noout --nonet dbus/*.xml dbus/*.conf dbus/*.policy packaging/firewall/*.xml
  else
    skip "interface files" "xmllint is not here: apt-get install libxml2-utils"
  fi
  client_has_no_daemon() {
    ! cargo tree --locked --no-default-features --edges normal --prefix none | grep -E '^(libp2p|procfs|nvml-wrapper|hyper) ' &&
      cargo check --locked --no-default-features --bin ogctl
  }
  step "the client alone" client_has_no_daemon
  step "the daemon without an engine" cargo check --locked --no-default-features --features daemon --bins
fi

target=$(host_target)
programs=$(release_dir "$target")
if wants engine it packages install e2e; then
  step "building the engine" ./scripts/engine.sh build
  # For the tests that want real answers; without it they say so.
  export OPENGATEWAY_ENGINE=$programs/engine/libexec/opengateway-engine
fi
if wants engine; then
  if cargo clippy --version >/dev/null 2>&1; then
    step "clippy of the engine" ./scripts/engine.sh clippy --all-targets -- -D warnings
  else
    skip "clippy of the engine" "clippy is not here: rustup component add clippy"
  fi
  step "the engine" ./scripts/engine.sh test -- --show-output
fi

# root_ring NAME TEST ARGUMENT...
root_ring() {
  local name=$1 test=$2
  shift 2
  if [ "$(id -u)" = 0 ]; then
    step "$name" cargo test --locked --test "$test" -- --show-output "$@"
  else
    skip "$name" "needs root"
  fi
}
if wants unit it clients upstreams netns install e2e; then step "building the tests" cargo test --locked --no-run; fi
if wants unit; then step "unit tests" cargo test --locked --lib --bins -- --show-output; fi
if wants it; then step "in process and on private buses" cargo test --locked --test it -- --show-output; fi
if wants clients; then step "real clients at the endpoint" ./tests/clients/run.sh; fi
if wants upstreams; then step "real model servers behind a node" ./tests/upstreams/real.sh; fi
if wants netns; then root_ring "in network namespaces" netns --test-threads=3; fi

# The rings below test what users install: release programs, built as a release builds them.
export OPENGATEWAY_PACKAGES=$here/target/packages
if wants packages install e2e; then
  rm -rf "$OPENGATEWAY_PACKAGES"
  step "building the packages" ./scripts/package.sh --out "$OPENGATEWAY_PACKAGES"
fi
if wants packages; then step "packages and release" ./tests/packages/check.sh --binaries "$programs" --packages "$OPENGATEWAY_PACKAGES"; fi
if wants install; then root_ring "install.sh on copies of this machine" install; fi
if wants e2e; then root_ring "on booted hosts" e2e --test-threads=8; fi

say
if [ ${#skipped[@]} -gt 0 ]; then
  say "skipped here:"
  printf '  %s\n' "${skipped[@]}" >&2
else
  say "nothing was skipped"
fi
if [ ${#failed[@]} -gt 0 ]; then
  say "FAILED:"
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
fi
say "all passed in $SECONDS s"
