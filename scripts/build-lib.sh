# shellcheck shell=bash
# build-lib.sh - how a release builds the programs and the engine. Whatever builds the engine goes through here: its C++ takes
# minutes, and other flags would compile it anew. Sourced after lib.sh.
# shellcheck disable=SC2034,SC2154

# The folder of release builds for TARGET, and in it what packages take.
release_dir() { printf '%s' "${CARGO_TARGET_DIR:-$here/target}/$1/release"; }
host_target() { rustc -vV | sed -n 's/^host: //p'; }

# release_flags: sets $rust_flags, $c_flags and $engine_flags, with which bytes depend neither on where the sources, the crates
# and the compiler lie, nor on which registry brought the crates.
release_flags() {
  local maps map folder
  rust_flags='' c_flags='' engine_flags=''
  # The last one that matches counts.
  maps=("$here=/usr/src/opengateway" "${CARGO_TARGET_DIR:-$here/target}=/usr/src/opengateway/target")
  for folder in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*; do
    maps+=("$folder=/usr/src/crates")
    # llama.cpp lies in a crate. Without the folders above, a compiler cache serves every clone.
    [[ $folder == *[[:space:]]* ]] || engine_flags+=" -ffile-prefix-map=$folder=/usr/src/crates"
  done
  # What the compiler's own library is called where its sources are not installed.
  maps+=("$(rustc --print sysroot)/lib/rustlib/src/rust=/rustc/$(rustc -vV | sed -n 's/^commit-hash: //p')")
  for map in "${maps[@]}"; do
    rust_flags+=${rust_flags:+$'\x1f'}--remap-path-prefix=$map
    # These flags are separated by blanks.
    [[ $map == *[[:space:]]* ]] || c_flags+=" -ffile-prefix-map=$map"
  done
  # It reads files that strangers made. And its kernels are looked for where the engine says, never in the folder of the build.
  engine_flags+=" -fstack-protector-strong -D_FORTIFY_SOURCE=2 -UGGML_BACKEND_DIR"
}

fetch_crates() { (cd "$here" && cargo fetch --locked --target "$1") >&2 || die "the crates could not be fetched; see above"; }

# build_programs TARGET: sets $built to the folder with opengatewayd and ogctl.
build_programs() {
  local rust_flags c_flags engine_flags
  need_build
  need_target "$1"
  say "building opengatewayd and ogctl for $1 (link-time optimisation takes minutes) ..."
  fetch_crates "$1"
  release_flags
  (cd "$here" && CARGO_ENCODED_RUSTFLAGS=$rust_flags CFLAGS="${CFLAGS:-}$c_flags" CXXFLAGS="${CXXFLAGS:-}$c_flags" \
    cargo build --release --locked --bins --target "$1") >&2 || die "the build failed; see above"
  built=$(release_dir "$1")
}

# build_engine TARGET: the engine, its libraries and its kernels for every kind of processor, in the folder engine of
# release_dir, as they are installed below /usr.
build_engine() {
  local out folder libraries file name
  need_engine_build
  need_target "$1"
  can_compile_kernels "$1"
  say "building opengateway-engine for $1 (llama.cpp takes ten minutes the first time) ..."
  fetch_crates "$1"
  out=$(engine_cargo build "$1" --message-format=json-render-diagnostics) || die "the build of the engine failed; see above"
  out=$(grep '"reason":"build-script-executed"' <<<"$out" | grep 'llama-cpp-sys-2' | sed 's/.*"out_dir":"\([^"]*\)".*/\1/')
  [ -d "$out/backends" ] || die "the build of llama.cpp left no kernels in \"$out/backends\""
  folder=$(release_dir "$1")/engine libraries=$folder/lib/opengateway
  rm -rf "$folder"
  mkdir -p "$folder/libexec" "$libraries"
  cp "$(release_dir "$1")/opengateway-engine" "$folder/libexec/"
  # As engine/build.rs leaves them beside the program: without those that GCC 12 compiles wrongly.
  cp "$(release_dir "$1")"/ggml/libggml-cpu-*.so "$libraries/"
  # Under the names that programs ask the loader for.
  for name in llama ggml ggml-base; do
    for file in "$out"/lib*/lib"$name".so.?; do
      [ -e "$file" ] || die "the build of llama.cpp left no lib$name in $out"
      cp -L "$file" "$libraries/"
    done
  done
}

# Two of llama.cpp's kernels for arm64 use SME, and it cannot be told to leave them out.
can_compile_kernels() {
  case $1 in x86_64-*) return 0 ;; esac
  echo 'int x;' | c++ -x c++ -march=armv9.2-a+sme -c -o /dev/null - 2>/dev/null ||
    die "this C++ compiler ($(c++ -dumpversion)) cannot build the engine for $1: that needs GCC 14 or newer. The rest works without: --no-engine"
}

# engine_cargo COMMAND TARGET ARGUMENT...: cargo on the package of the engine, always with the same flags and one profile.
engine_cargo() {
  local command=$1 target=$2 rust_flags c_flags engine_flags commit launcher=()
  shift 2
  release_flags
  forget_other_flags "$target" "$engine_flags"
  commit=$(built_commit)
  ! command -v ccache >/dev/null || launcher=(CMAKE_C_COMPILER_LAUNCHER=ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache)
  (cd "$here" && env CARGO_ENCODED_RUSTFLAGS="$rust_flags" CFLAGS="${CFLAGS:-}$engine_flags" CXXFLAGS="${CXXFLAGS:-}$engine_flags" \
    CMAKE_PROJECT_INCLUDE_BEFORE="$here/engine/llama.cmake" CMAKE_SHARED_LINKER_FLAGS="-Wl,-s,-z,relro,-z,now" CMAKE_MODULE_LINKER_FLAGS="-Wl,-s,-z,relro,-z,now" "${launcher[@]}" \
    ${commit:+OPENGATEWAY_COMMIT="$commit"} cargo "$command" --release --locked --target "$target" -p opengateway-engine "$@")
}

# The commit that is built; none where this is no clone, for a clone around it must not lend its own.
built_commit() {
  [ "$(git -C "$here" rev-parse --show-toplevel 2>/dev/null)" != "$here" ] || printf '%s' "${OPENGATEWAY_COMMIT:-$(git -C "$here" rev-parse --short=12 HEAD)}"
}

# forget_other_flags TARGET FLAGS: cargo does not notice that llama.cpp was built with other flags, by a plain `cargo build`.
forget_other_flags() {
  local cache folder
  folder=$(release_dir "$1")
  [ -d "$folder" ] || return 0
  # Links of an earlier build that lead nowhere: llama.cpp's build script fails where it finds them.
  find "$folder" -maxdepth 2 -name 'lib*.so' -xtype l -delete
  for cache in "$folder"/build/llama-cpp-sys-2-*/out/build/CMakeCache.txt; do
    if [ ! -e "$cache" ] || { grep -qF -- "$2" "$cache" && grep -qF "$here/engine/llama.cmake" "$cache"; }; then continue; fi
    say "llama.cpp was built with other flags in ${cache%/out/*}: building it again"
    rm -rf "${cache%/out/*}"
  done
}

# need_target TARGET: what building for it needs. For the other processor that is Debian's cross compiler.
need_target() {
  [ "$1" != "$(host_target)" ] || return 0
  local triple=${1/-unknown/} name=${1//-/_}
  need "$triple-gcc=gcc-${triple/x86_64/x86-64}"
  [ -e "/usr/$triple/include/stdlib.h" ] || need "missing-libc-headers=libc6-dev-$(debian_arch "${1%%-*}")-cross"
  [ -e "$(rustc --print target-libdir --target "$1")" ] || rustup target add "$1" >&2 ||
    die "Rust has no library for $1. With rustup: rustup target add $1"
  export "CARGO_TARGET_${name^^}_LINKER=$triple-gcc"
}
debian_arch() { case $1 in x86_64) echo amd64 ;; aarch64) echo arm64 ;; esac; }
