# shellcheck shell=bash
# package-lib.sh - the parts of package.sh: what goes where, which programs may be packaged, what they need. Sourced by it
# and by the tests of the packages, after lib.sh; $binaries, $made and $work are package.sh's.
# shellcheck disable=SC2034,SC2154

# The C library of the oldest systems that are supported: RHEL 9 has 2.34, Debian 12 2.36. (Ubuntu 22.04 has
# 2.35, and a systemd that the unit is too new for.)
readonly oldest_glibc=2.34

# source_date: the date that everything bears: SOURCE_DATE_EPOCH, else the last commit's.
source_date() {
  if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
    SOURCE_DATE_EPOCH=$(git -C "$here" log -1 --format=%ct 2>/dev/null) ||
      die "this is no clone, so the date of the sources is not known. Set SOURCE_DATE_EPOCH to it, in seconds since 1970"
  fi
  export SOURCE_DATE_EPOCH
}

# listed PACKAGES: the lines of packaging/files for deb, rpm or tar: SOURCE KIND MODE DESTINATION. Sources are whole paths,
# destinations whole names.
listed() {
  local wanted=$1 packages kind source destination file mode systemd=/usr/lib/systemd zsh=/usr/share/zsh/site-functions
  if [ "$wanted" = deb ]; then systemd=/lib/systemd zsh=/usr/share/zsh/vendor-completions; fi
  while read -r packages kind source destination; do
    case $packages in '' | '#'*) continue ;; esac
    case ,$packages, in *,all,* | *,"$wanted",*) ;; *) continue ;; esac
    destination=${destination//%systemd%/$systemd}
    destination=${destination//%zsh%/$zsh}
    case $source in
      @programs/*) source=${binaries-@programs}/${source#*/} ;;
      @made/*) source=${made-@made}/${source#*/} ;;
      *) source=$here/$source ;;
    esac
    mode=644
    [ "$kind" != program ] || mode=755
    for file in $source; do
      [[ $file != *'*'* ]] || continue
      case $destination in */) printf '%s %s %s %s' "$file" "$kind" "$mode" "$destination${file##*/}" ;;
        *) printf '%s %s %s %s' "$file" "$kind" "$mode" "$destination" ;; esac
      if [ "$kind" = gzip ]; then printf '.gz'; fi
      echo
    done
  done <"$here/packaging/files"
}

# stage PACKAGES ROOT: puts the listed files below ROOT.
stage() {
  local source kind mode destination
  mkdir -p "$2"
  chmod 755 "$2"
  while read -r source kind mode destination; do
    [ -e "$source" ] || die "packaging/files names a file that is not there: $source"
    (umask 022 && mkdir -p "$2$(dirname "$destination")")
    if [ "$kind" = gzip ]; then
      gzip -9nc "$source" >"$2$destination"
      chmod "$mode" "$2$destination"
    else
      install -m "$mode" "$source" "$2$destination"
    fi
  done < <(listed "$1")
}

# one_date ROOT: every file and folder below it gets the date of the sources.
one_date() { find "$1" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +; }

# installed_kib ROOT: what the files take, counted as Debian does: a file in whole KiB, a folder 1 KiB.
installed_kib() { find "$1" -mindepth 1 \( -type f -printf '%s\n' -o -printf '1\n' \) | awk '{n += int(($1 + 1023) / 1024)} END {print n}'; }

# build_programs TARGET: sets $built to the folder with the programs. Their bytes do not depend on where the sources, the
# crates and the compiler lie, nor on which registry brought the crates.
build_programs() {
  local maps map folder flags='' c_flags=''
  need_build
  need_target "$1"
  say "building opengatewayd and ogctl for $1 (link-time optimisation takes minutes) ..."
  (cd "$here" && cargo fetch --locked --target "$1") >&2 || die "the crates could not be fetched; see above"
  # The last one that matches counts.
  maps=("$here=/usr/src/opengateway" "${CARGO_TARGET_DIR:-$here/target}=/usr/src/opengateway/target")
  for folder in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*; do maps+=("$folder=/usr/src/crates"); done
  # What the compiler's own library is called where its sources are not installed.
  maps+=("$(rustc --print sysroot)/lib/rustlib/src/rust=/rustc/$(rustc -vV | sed -n 's/^commit-hash: //p')")
  for map in "${maps[@]}"; do
    flags+=${flags:+$'\x1f'}--remap-path-prefix=$map
    # These flags are separated by blanks.
    [[ $map == *[[:space:]]* ]] || c_flags+=" -ffile-prefix-map=$map"
  done
  (cd "$here" && CARGO_ENCODED_RUSTFLAGS=$flags CFLAGS="${CFLAGS:-}$c_flags" CXXFLAGS="${CXXFLAGS:-}$c_flags" \
    cargo build --release --locked --bins --target "$1") >&2 || die "the build failed; see above"
  built=${CARGO_TARGET_DIR:-$here/target}/$1/release
}

# need_target TARGET: what building for it needs. For the other processor that is Debian's cross compiler.
need_target() {
  [ "$1" != "$(rustc -vV | sed -n 's/^host: //p')" ] || return 0
  local triple=${1/-unknown/} name=${1//-/_}
  need "$triple-gcc=gcc-${triple/x86_64/x86-64}"
  [ -e "/usr/$triple/include/stdlib.h" ] || need "missing-libc-headers=libc6-dev-$(debian_arch "${1%%-*}")-cross"
  [ -e "$(rustc --print target-libdir --target "$1")" ] || rustup target add "$1" >&2 ||
    die "Rust has no library for $1. With rustup: rustup target add $1"
  export "CARGO_TARGET_${name^^}_LINKER=$triple-gcc"
}
debian_arch() { case $1 in x86_64) echo amd64 ;; aarch64) echo arm64 ;; esac; }

# check_program FILE ARCH: it is there, for that processor, stripped, and runs on the oldest supported system.
check_program() {
  local machine symbols
  [ -f "$1" ] || die "no program $1. Build it: cargo build --release --locked --bins"
  machine=$(readelf -h "$1" 2>/dev/null | sed -n 's/^ *Machine: *//p') || die "$1 is no ELF file"
  case $2:$machine in
    x86_64:*X86-64 | aarch64:AArch64) ;;
    *) die "$1 is a program for \"$machine\", not for $2. Choose with --arch" ;;
  esac
  if readelf -SW "$1" | grep -q ' \.symtab '; then die "$1 is not stripped. Build it with --release"; fi
  symbols=$(too_new "$1" $oldest_glibc)
  [ -z "$symbols" ] || die "$1 needs a newer C library than $oldest_glibc, the oldest supported: $symbols"
}

# too_new FILE VERSION: the symbols that want a newer C library than VERSION.
too_new() {
  local symbol needs
  readelf -W --dyn-syms "$1" | sed -n 's/.* UND \([^ ]*\)@GLIBC_\([0-9.]*\).*/\1 \2/p' | sort -u |
    while read -r symbol needs; do
      [ "$(printf '%s\n' "$needs" "$2" | sort -V | tail -n 1)" = "$2" ] || printf '%s@GLIBC_%s ' "$symbol" "$needs"
    done
}

# newest PREFIX FILE...: the highest symbol version with that prefix that the files want, "" for none.
newest() {
  local prefix=$1
  shift
  readelf -W --dyn-syms "$@" | sed -n "s/.*@${prefix}_\([0-9.]*\).*/\1/p" | sort -Vu | tail -n 1
}

# library_packages DEBIAN_ARCH: the packages with the libraries that the programs are linked with, as Debian's tool says. It
# needs the libraries themselves; for another processor they are not here, and the symbols tell the same.
library_packages() {
  local programs=("$binaries/opengatewayd" "$binaries/ogctl")
  if [ "$(dpkg --print-architecture)" = "$1" ]; then
    mkdir -p "$work/shlibs/debian"
    : >"$work/shlibs/debian/control"
    (cd "$work/shlibs" && dpkg-shlibdeps -O "${programs[@]}" 2>"$work/shlibs.log") | sed -n 's/^shlibs:Depends=//p' | grep . ||
      die "dpkg-shlibdeps failed: $(cat "$work/shlibs.log")"
  else
    library_packages_by_symbols "${programs[@]}"
  fi
}
library_packages_by_symbols() {
  local libgcc
  libgcc=$(newest GCC "$@" | cut -d. -f1,2)
  printf 'libc6 (>= %s)%s\n' "$(newest GLIBC "$@")" "${libgcc:+, libgcc-s1 (>= $libgcc)}"
}

# rpm_requires: the same for RPM, which names libraries and not packages. By itself rpmbuild would also ask for the groups of
# sysusers.d, which no package provides.
rpm_requires() { printf '%s\n' "$binaries/opengatewayd" "$binaries/ogctl" | "$(rpm --eval '%{_rpmconfigdir}')/elfdeps" --requires | sort -u; }

# rpm_files: the %files of the .rpm.
rpm_files() {
  local source kind mode destination
  echo '%defattr(-,root,root,755)'
  while read -r source kind mode destination; do
    case $destination in
      /usr/share/doc/*) printf '%%doc ' ;;
      /usr/share/licenses/*) printf '%%license ' ;;
    esac
    [ "$kind" != config ] || printf '%%config(noreplace) '
    printf '%%attr(%s,root,root) %s\n' "$mode" "$destination"
  done < <(listed rpm)
  # systemd-tmpfiles makes it; listed, it goes with the package.
  echo '%ghost %dir %attr(700,root,root) /etc/opengateway/credentials'
  printf '%%dir %s\n' /etc/opengateway /usr/share/doc/opengateway /usr/share/licenses/opengateway
}
