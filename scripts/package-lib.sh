# shellcheck shell=bash
# package-lib.sh - the parts of package.sh: what goes where, which programs may be packaged, what they need. Sourced by it
# and by the tests of the packages, after lib.sh; $binaries, $engine, $made and $work are package.sh's.
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
      @engine/*)
        [ -n "${engine-@engine}" ] || continue
        source=${engine-@engine}/${source#*/}
        ;;
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

# programs: everything that the loader reads: the two programs, the engine and its libraries.
programs() { printf '%s\n' "$binaries/opengatewayd" "$binaries/ogctl" ${engine:+"$engine/libexec/opengateway-engine" "$engine"/lib/opengateway/lib*.so*}; }

# check_program FILE ARCH: it is there, for that processor, stripped, runs on the oldest supported system, and looks for
# libraries nowhere but where they are installed.
check_program() {
  local machine symbols path
  [ -f "$1" ] || die "no program $1. Build it: cargo build --release --locked --bins; the engine: scripts/package.sh builds it"
  machine=$(readelf -h "$1" 2>/dev/null | sed -n 's/^ *Machine: *//p') || die "$1 is no ELF file"
  case $2:$machine in
    x86_64:*X86-64 | aarch64:AArch64) ;;
    *) die "$1 is a program for \"$machine\", not for $2. Choose with --arch" ;;
  esac
  if readelf -SW "$1" | grep -q ' \.symtab '; then die "$1 is not stripped. Build it with --release"; fi
  symbols=$(too_new "$1" $oldest_glibc)
  [ -z "$symbols" ] || die "$1 needs a newer C library than $oldest_glibc, the oldest supported: $symbols"
  path=$(search_path "$1")
  case $path in
    '' | "\$ORIGIN" | "\$ORIGIN/../lib/opengateway" | "\$ORIGIN/../lib/opengateway:\$ORIGIN") ;;
    *) die "$1 looks for libraries in $path, which is not where they are installed" ;;
  esac
}
search_path() { readelf -dW "$1" | sed -n 's/.*(R\(UN\)\?PATH).*\[\(.*\)\]/\2/p'; }

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
  local files
  mapfile -t files < <(programs)
  if [ "$(dpkg --print-architecture)" = "$1" ]; then
    mkdir -p "$work/shlibs/debian"
    : >"$work/shlibs/debian/control"
    # The engine's own libraries are of no package.
    (cd "$work/shlibs" && dpkg-shlibdeps -O ${engine:+--ignore-missing-info "-l$engine/lib/opengateway"} "${files[@]}" 2>"$work/shlibs.log") |
      sed -n 's/^shlibs:Depends=//p' | grep . || die "dpkg-shlibdeps failed: $(cat "$work/shlibs.log")"
  else
    library_packages_by_symbols "${files[@]}"
  fi
}
library_packages_by_symbols() {
  local libgcc cxx
  libgcc=$(newest GCC "$@" | cut -d. -f1,2)
  printf 'libc6 (>= %s)%s' "$(newest GLIBC "$@")" "${libgcc:+, libgcc-s1 (>= $libgcc)}"
  [ -z "$(newest GOMP "$@")" ] || printf ', libgomp1 (>= 6)'
  cxx=$(newest GLIBCXX "$@")
  # The last digits count the releases of GCC from 3.4.22, which is version 6's; each of the first had a few.
  case $cxx in
    '') ;;
    3.4.29) printf ', libstdc++6 (>= 11)' ;;
    3.4.30) printf ', libstdc++6 (>= 12)' ;;
    *) printf ', libstdc++6 (>= 9)' ;;
  esac
  echo
}

# rpm_requires: the same for RPM, which names libraries and not packages. By itself rpmbuild would also ask for the groups of
# sysusers.d, which no package provides.
rpm_requires() { programs | "$(rpm --eval '%{_rpmconfigdir}')/elfdeps" --requires | grep -vE '^lib(llama|ggml[a-z-]*)\.so' | sort -u; }

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
  listed rpm | awk '{print $4}' | sed -nE 's#^(/usr/lib/opengateway|/usr/share/opengateway(/models)?)/[^/]*$#\1#p' |
    sed 's#^/usr/share/opengateway/models$#&\n/usr/share/opengateway#' | sort -u | sed 's/^/%dir /'
}
