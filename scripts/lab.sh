#!/bin/bash
# lab.sh - the long proofs in networks made of namespaces, and their tables.
#
#   sudo ./scripts/lab.sh [--out FILE] [--release] [PART...]
#
#     topologies   which nodes come together where, how fast, by which path, what the doctor says     3 min
#     punch        hole punching, 20 runs for each kind of router and transport; a relay's limit      25 min
#     back         suspend, new addresses, restarted bootstraps and relays                            5 min
#     weather      loss, delay, reordering, small packets, blocked UDP, a slow link, a bad cable       20 min
#     partition    25 nodes and 25 lose each other and come together again, ten times                 10 min
#     churn        50 nodes, every 2 s one is killed and one starts, 5 minutes                        8 min
#     scale        50, 100 and 200 nodes with one bootstrap node                                      15 min
#     floods       floods and liars, while honest members go on                                       15 min
#
# Without PART all of them, an hour and three quarters on two cores. What was measured goes to FILE in Markdown (target/lab.md), what the
# tests said besides into the directory FILE.logs. --release measures what users install; it builds for ten minutes.
# It needs root and installs what is missing with apt. Nothing is connected to this machine's own network.
. "$(dirname "$(readlink -f "$0")")/lib.sh"

all=(topologies punch back weather partition churn scale floods)
out=$here/target/lab.md build=() parts=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^\. /{/^\. /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --out) [ $# -gt 1 ] || { say "lab.sh: --out needs a FILE"; exit 2; }; out=$(realpath -m "$2"); shift ;;
    --release) build=(--release) ;;
    *) [[ " ${all[*]} " == *" $1 "* ]] || { say "lab.sh: unknown part $1; see: $0 --help"; exit 2; }; parts+=("$1") ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
[ "$(id -u)" = 0 ] || die "only root can make network namespaces: sudo $0"

need_build
need ip=iproute2 tc=iproute2 nft=nftables dbus-daemon=dbus-daemon python3=python3-minimal
say "building the tests ..."
(cd "$here" && cargo test --locked "${build[@]}" --test netns --no-run) || die "the build failed; see above"

logs=$out.logs
mkdir -p "$logs"
failed=()

# filters PART: the tests of a part, as the names of their modules.
filters() {
  case $1 in
    back) printf '%s\n' comeback:: nat::a_relay_that_dies ;;
    punch) printf '%s\n' punch:: nat::a_relay_carries ;;
    *) echo "$1::" ;;
  esac
}

# measure PART: its tests, one at a time, so that what is measured does not wait for another test's nodes; and of the scale the
# real crowds, which no test starts.
measure() {
  local wanted
  mapfile -t wanted < <(filters "$1")
  (cd "$here" && OPENGATEWAY_LAB=long OPENGATEWAY_FLOODS=full CI=true \
    cargo test --locked "${build[@]}" --test netns -- --nocapture --test-threads=1 "${wanted[@]}") || return
  if [ "$1" = scale ]; then
    echo '### Crowds that start together'
    "$here/scripts/lab/scale.py" --daemon "$here/target/$([ ${#build[@]} -gt 0 ] && echo release || echo debug)/opengatewayd"
  fi
}

for part in "${parts[@]}"; do
  start=$SECONDS
  printf '%-12s' "$part" >&2
  if measure "$part" >"$logs/$part.log" 2>&1 </dev/null; then
    if grep -q '^running 0 tests' "$logs/$part.log"; then say "has no tests"; failed+=("$part"); continue; fi
    say "ok      $((SECONDS - start)) s$(awk '/^test result:/ {n += $4} END {if (n) printf ", %d tests", n}' "$logs/$part.log")"
  else
    say "FAILED  $((SECONDS - start)) s; see $logs/$part.log"
    failed+=("$part")
  fi
done

# tables LOG...: rows of tables with one title put together, then the single measurements.
tables() {
  awk '
    /^### / { title = $0; if (!(title in seen)) { order[++count] = title; seen[title] = 1 }; line = 0; next }
    /^\|.*\|$/ && title { if (++line <= 2) { if (!((title, line) in head)) head[title, line] = $0; next }; rows[title] = rows[title] $0 "\n"; next }
    # A row without a title: its head is in the documentation.
    /^\|.*\|$/ { loose = loose $0 "\n"; columns = gsub(/\|/, "|") - 1; next }
    { if ($0 != "") title = "" }
    /^MEASURED / { sub(/^MEASURED /, ""); single = single "* " $0 "\n" }
    END {
      for (at = 1; at <= count; at++) { t = order[at]; printf "%s\n\n%s\n%s\n%s\n", t, head[t, 1], head[t, 2], rows[t] }
      if (loose) { for (at = 0; at < columns; at++) { top = top "| "; under = under "|---" }; printf "%s|\n%s|\n%s\n", top, under, loose }
      if (single) printf "%s\n", single
    }' "$@"
}

{
  printf '# Measured in the network lab\n\n'
  # shellcheck disable=SC2016 # the backticks are Markdown
  printf 'With `scripts/lab.sh %s` on %s: kernel %s, %s cores, %s GiB of memory, load %s at the end, %s build, commit %s.\n\n' \
    "${parts[*]}" "$(date -u +%Y-%m-%d)" "$(uname -r)" "$(nproc)" "$(awk '/^MemTotal/ {printf "%.0f", $2 / 1048576}' /proc/meminfo)" \
    "$(cut -d' ' -f1-3 /proc/loadavg)" "$([ ${#build[@]} -gt 0 ] && echo release || echo debug)" \
    "$(git -C "$here" rev-parse --short HEAD 2>/dev/null || echo unknown)"
  for part in "${parts[@]}"; do
    printf '## %s\n\n' "$part"
    tables "$logs/$part.log"
  done
} >"$out"
say
say "the tables are in $out"
if [ ${#failed[@]} -gt 0 ]; then
  say "FAILED: ${failed[*]}"
  exit 1
fi
say "all held in $SECONDS s"
