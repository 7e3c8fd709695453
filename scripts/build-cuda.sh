#!/bin/bash
# build-cuda.sh - builds libggml-cuda.so, with which the engine of a package computes on NVIDIA GPUs: llama.cpp's kernels for CUDA,
# from the sources that the engine itself was built from. docs/gpu.md says where it goes.
#
#   scripts/build-cuda.sh [OPTION]... [-- CMAKE-OPTION...]
#     --arch LIST     compute capabilities of the GPUs without the dot, such as 90 or "86;89" (default: those of this machine)
#     --sources DIR   llama.cpp's folder "ggml" (default: that of the crate which Cargo.lock names; it is fetched)
#     --out DIR       where the library goes (default: target/cuda)
#     --jobs N        compilers at once (default: one for each processor)
#
# It needs CUDA's compiler and cuBLAS (package cuda-toolkit of NVIDIA's repositories) and compiles for minutes, for each kind of GPU.
. "$(dirname "$(readlink -f "$0")")/lib.sh"

arch='' sources='' out=${CARGO_TARGET_DIR:-$here/target}/cuda jobs=$(nproc)
while [ $# -gt 0 ]; do
  case $1 in
    --arch | --sources | --out | --jobs)
      [ $# -ge 2 ] || { say "build-cuda.sh: $1 needs a value; see: $0 --help"; exit 2; }
      case $1 in --arch) arch=$2 ;; --sources) sources=$2 ;; --out) out=$2 ;; --jobs) jobs=$2 ;; esac
      shift
      ;;
    -h | --help) sed -n '2,/^\. /{/^\. /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --) shift; break ;;
    *) say "build-cuda.sh: unknown argument $1; see: $0 --help"; exit 2 ;;
  esac
  shift
done

# nvcc: the newest toolkit that is installed, else that of the distribution.
nvcc=${CUDACXX:-}
for file in /usr/local/cuda/bin/nvcc "$(command -v nvcc || true)"; do
  [ -n "$nvcc" ] || [ ! -x "$file" ] || nvcc=$file
done
[ -n "$nvcc" ] || die "CUDA's compiler (nvcc) is not here. Install cuda-toolkit from https://developer.nvidia.com/cuda-downloads"
nvcc=$(readlink -f "$nvcc")
need cmake=cmake c++=g++
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); else need make=make; fi

if [ -z "$arch" ]; then
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u | paste -sd ';') || arch=''
  [[ $arch =~ ^[0-9]+(\;[0-9]+)*$ ]] || die "no NVIDIA GPU answers on this machine. Name what to build for, such as: --arch 86"
fi
[[ $arch =~ ^[0-9]+(\;[0-9]+)*$ ]] || die "--arch is numbers such as 90 or \"86;89\": $arch"

if [ -z "$sources" ]; then
  need_rust
  PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
  (cd "$here" && cargo fetch --locked) >&2 || die "the crates could not be fetched; see above"
  crate=llama-cpp-sys-2-$(sed -n '/^name = "llama-cpp-sys-2"$/{n;s/^version = "\(.*\)"$/\1/p}' "$here/Cargo.lock")
  for sources in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"$crate"/llama.cpp/ggml; do [ ! -d "$sources" ] || break; done
fi
[ -e "$sources/src/ggml-cuda/CMakeLists.txt" ] || die "$sources is not llama.cpp's folder \"ggml\""
sources=$(cd "$sources" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)

# The crate has ggml without what it needs to be a project of its own.
cat >"$out/CMakeLists.txt" <<C
cmake_minimum_required(VERSION 3.18)
project(opengateway-cuda C CXX)
add_subdirectory("$sources" ggml)
C
# Its environment is empty: LD_LIBRARY_PATH finds nothing for the engine, so the library knows where CUDA's lie.
rpath=
for folder in "$(dirname "$nvcc")"/../lib64 "$(dirname "$nvcc")"/../targets/*/lib; do
  [ -n "$rpath" ] || [ ! -d "$folder" ] || rpath=$(readlink -f "$folder")
done
# Of one architecture alone ("real"): what the driver would compile at run time is code, which the engine's sandbox refuses.
say "building libggml-cuda.so for $arch with $nvcc (minutes) ..."
cmake -S "$out" -B "$out/build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_COMPILER="$nvcc" "-DCMAKE_CUDA_ARCHITECTURES=${arch//;/-real;}-real" \
  -DBUILD_SHARED_LIBS=ON -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF -DGGML_CPU=OFF -DGGML_CUDA=ON -DGGML_CUDA_GRAPHS=ON -DGGML_CUDA_NCCL=OFF \
  -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON "-DCMAKE_INSTALL_RPATH=\$ORIGIN${rpath:+;$rpath}" -DCMAKE_MODULE_LINKER_FLAGS=-Wl,-s,-z,relro,-z,now "$@" >&2 ||
  die "CMake cannot set the build up; see above"
cmake --build "$out/build" --target ggml-cuda --parallel "$jobs" >&2 || die "the build failed; see above"
cp -L "$out/build/bin/libggml-cuda.so" "$out/libggml-cuda.so"
absent=$(ldd "$out/libggml-cuda.so" | grep 'not found' | grep -v libggml-base || true)
[ -z "$absent" ] || say "warning: the engine will not find these, and computes on the processor then:"$'\n'"$absent"
printf '%s\n' "$out/libggml-cuda.so"
