#!/bin/bash
# engine.sh - builds and tests opengateway-engine, the program that runs a model file with llama.cpp: with the flags of a release,
# so that packages, demonstration and tests share one build of its C++ (ten minutes the first time on two cores).
#
#   scripts/engine.sh [build]                  builds it and prints where it is; opengatewayd takes it as [engine] program
#   scripts/engine.sh test|clippy ARGUMENT...  the same of cargo, for this package
#   scripts/engine.sh cargo COMMAND ARGUMENT...
. "$(dirname "$(readlink -f "$0")")/lib.sh"
. "$here/scripts/build-lib.sh"

command=${1:-build}
[ $# = 0 ] || shift
case $command in
  build)
    [ $# = 0 ] || { say "engine.sh: build takes no argument; see: $0 --help"; exit 2; }
    need_rust
    build_engine "$(host_target)"
    printf '%s\n' "$(release_dir "$(host_target)")/engine/libexec/opengateway-engine"
    exit 0
    ;;
  test | clippy) ;;
  cargo)
    command=${1:?a command of cargo}
    shift
    ;;
  -h | --help) sed -n '2,/^\. /{/^\. /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
  *) say "engine.sh: unknown command $command; see: $0 --help"; exit 2 ;;
esac
need_engine_build
engine_cargo "$command" "$(host_target)" "$@"
