# shellcheck shell=bash
# lib.sh - what the scripts beside it share: words, and what a machine needs to build and test. Sourced, never run.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly here

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# need COMMAND=PACKAGE...  Installs with apt the packages whose command is missing. Only this needs root.
need() {
  local pair missing=()
  for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null 2>&1 || missing+=("${pair#*=}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  local root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null 2>&1 || die "missing: ${missing[*]}. Install as root: apt-get install ${missing[*]}"
    root=(sudo)
  fi
  command -v apt-get >/dev/null 2>&1 || die "missing: ${missing[*]}. Install them with this system's package manager"
  say "installing with apt: ${missing[*]}"
  "${root[@]}" apt-get update -qq >&2 || say "warning: apt-get update failed; trying with the package lists that are there"
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2 </dev/null ||
    die "apt could not install: ${missing[*]}"
}

# The Rust version that Cargo.toml names, and whether it or a newer one is here.
rust_wanted() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$here/Cargo.toml"; }
have_rust() {
  local have
  PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
  have=$(rustc --version 2>/dev/null | awk '{print $2}') || return 1
  [ -n "$have" ] && [ "$(printf '%s\n%s\n' "$(rust_wanted)" "$have" | sort -V | head -n 1)" = "$(rust_wanted)" ]
}

# Debian 12 has an older Rust than we need, so rustup brings it, for this user only.
need_rust() {
  if have_rust; then return 0; fi
  say "installing Rust (stable, $(rust_wanted) or newer) with rustup into ${CARGO_HOME:-$HOME/.cargo}"
  need curl=curl
  [ -e /etc/ssl/certs/ca-certificates.crt ] || need missing-certificates=ca-certificates
  if command -v rustup >/dev/null 2>&1; then
    rustup toolchain install stable --profile minimal >&2 && rustup default stable >&2
  else
    curl --proto '=https' --tlsv1.2 -fsSL https://sh.rustup.rs | sh -s -- -y --profile minimal --default-toolchain stable >&2
  fi || die "Rust could not be installed. Install Rust $(rust_wanted) or newer (https://rustup.rs) and run this again"
}

# What building needs: a C compiler and linker (the cryptography has assembly), and Rust.
need_build() {
  need cc=gcc ld=binutils
  [ -e /usr/include/stdlib.h ] || need missing-libc-headers=libc6-dev
  need_rust
}

# What building the engine needs besides: CMake and a C++ compiler for llama.cpp, libclang to read its headers. ccache spares
# the next clone the ten minutes.
need_engine_build() {
  need_build
  need cmake=cmake make=make c++=g++ ccache=ccache
  have_libclang || need missing-libclang=libclang-dev
}
have_libclang() {
  local file
  for file in "${LIBCLANG_PATH:-/nowhere}"/libclang.so* /usr/lib/llvm-*/lib/libclang.so* /usr/lib/*/libclang-[0-9]*.so* /usr/lib64/libclang.so*; do
    [ ! -e "$file" ] || return 0
  done
  return 1
}

# until_ SECONDS COMMAND...  Waits until COMMAND succeeds; fails when it has not within SECONDS.
until_() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$deadline" ] || return 1
    sleep 0.05
  done
}
