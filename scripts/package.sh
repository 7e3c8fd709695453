#!/bin/bash
# package.sh - the packages of a release: Debian's, RPM's, and a tarball for everything else.
#
#   scripts/package.sh [deb|rpm|tarball]... [OPTION]...      all three when none is named
#     --arch x86_64|aarch64   what the programs are for (default: this machine)
#     --binaries DIR          takes opengatewayd and ogctl from there instead of building them, and the engine from DIR/engine
#                             or, as in an unpacked package, from beside DIR
#     --no-engine             without opengateway-engine: the node then serves what model servers beside it have. Its C++ takes
#                             ten minutes to build the first time. Packages for aarch64 have none: docs/release.md says why
#     --out DIR               where the packages go (default: dist)
#     --revision N            the packages' own revision of one version (default: 1)
#
# packaging/files says what goes where. The same programs give the same bytes: every date is that of the last commit
# (or SOURCE_DATE_EPOCH), every owner is root. Programs that need a newer C library than the oldest supported system has
# are refused.
. "$(dirname "$(readlink -f "$0")")/lib.sh"
. "$here/scripts/build-lib.sh"
. "$here/scripts/package-lib.sh"

formats=() arch=$(uname -m) binaries='' with_engine=yes out=$here/dist revision=1
while [ $# -gt 0 ]; do
  case $1 in
    deb | rpm | tarball) formats+=("$1") ;;
    --arch | --binaries | --out | --revision)
      [ $# -ge 2 ] || { say "package.sh: $1 needs a value; see: $0 --help"; exit 2; }
      case $1 in --arch) arch=$2 ;; --binaries) binaries=$2 ;; --out) out=$2 ;; --revision) revision=$2 ;; esac
      shift
      ;;
    --no-engine) with_engine='' ;;
    -h | --help) sed -n '2,/^\. /{/^\. /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) say "package.sh: unknown argument $1; see: $0 --help"; exit 2 ;;
  esac
  shift
done
[ ${#formats[@]} -gt 0 ] || formats=(deb rpm tarball)
case $arch in
  x86_64 | aarch64) target=$arch-unknown-linux-gnu ;;
  *) say "package.sh: unknown architecture $arch; there are x86_64 and aarch64"; exit 2 ;;
esac
[[ $revision =~ ^[1-9][0-9]*$ ]] || { say "package.sh: a revision is a number from 1: $revision"; exit 2; }

umask 022
need python3=python3 git=git readelf=binutils xz=xz-utils
need_rust
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/Cargo.toml" | head -n 1)
source_date
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

[ "$arch" = x86_64 ] || with_engine=''
if [ -z "$binaries" ]; then
  [ -z "$with_engine" ] || build_engine "$target"
  build_programs "$target"
  binaries=$built
fi
binaries=$(cd "$binaries" && pwd) || die "no such folder: $binaries"
engine=${with_engine:+$binaries/engine}
[ -z "$engine" ] || [ -e "$engine" ] || [ ! -e "$binaries/../libexec/opengateway-engine" ] || engine=$(dirname "$binaries")
[ -z "$engine" ] || [ -x "$engine/libexec/opengateway-engine" ] || die "no engine in $engine. Leave out --binaries to build it, or add --no-engine"
while read -r program; do check_program "$program" "$arch"; done < <(programs)
mkdir -p "$out"
out=$(cd "$out" && pwd)

# What the packages say about themselves.
about_engine="The engine for models in GGUF files is not in this build."
[ -z "$engine" ] || about_engine="The engine for models in GGUF files (llama.cpp, on the CPU) is in it too."
made=$work/made
mkdir "$made"
made() { python3 -B "$here/packaging/made.py" "$@"; }
made copyright "$target" ${engine:+engine} >"$made/copyright"
made licenses "$target" ${engine:+engine} >"$made/third-party-licenses"
made changelog deb "$revision" >"$made/changelog.Debian"

package_deb() {
  need dpkg-deb=dpkg dpkg-shlibdeps=dpkg-dev
  local tree=$work/deb architecture size depends
  architecture=$(debian_arch "$arch")
  stage deb "$tree"
  size=$(installed_kib "$tree")
  depends=$(library_packages "$architecture")
  mkdir "$tree/DEBIAN"
  sed -e "s/@VERSION@/$version-$revision/; s/@ARCHITECTURE@/$architecture/; s/@INSTALLED_SIZE@/$size/; s/@LIBRARIES@/$depends/; s/@ENGINE@/$about_engine/" \
    "$here/packaging/debian/control" >"$tree/DEBIAN/control"
  install -m 755 "$here"/packaging/debian/{postinst,prerm,postrm} "$tree/DEBIAN/"
  listed deb | awk '$2 == "config" {print $4}' >"$tree/DEBIAN/conffiles"
  (cd "$tree" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | LC_ALL=C sort -z | xargs -0 md5sum) >"$work/md5sums"
  mv "$work/md5sums" "$tree/DEBIAN/"
  chmod 644 "$tree"/DEBIAN/{control,conffiles,md5sums}
  one_date "$tree"
  # One thread: how xz splits its work would show in the bytes.
  dpkg-deb --root-owner-group --threads-max=1 -Zxz --build "$tree" "$out/opengateway_$version-${revision}_$architecture.deb" >"$work/log" ||
    die "dpkg-deb failed: $(cat "$work/log")"
}

package_rpm() {
  need rpmbuild=rpm
  local tree=$work/rpm lists=$work/rpm-lists
  stage rpm "$tree"
  one_date "$tree"
  mkdir "$lists"
  rpm_requires | sed 's/^/Requires: /' >"$lists/requires"
  rpm_files >"$lists/files"
  made changelog rpm "$revision" >"$lists/changelog"
  rpmbuild -bb --quiet --target "$arch-linux" --define "_topdir $work/rpmbuild" --define "_rpmdir $work/rpmbuild" \
    --define "_tmppath $work" --define "_dbpath $work/rpmdb" --define "og_version $version" --define "og_revision $revision" \
    --define "og_engine $about_engine" --define "og_tree $tree" --define "og_lists $lists" "$here/packaging/rpm/opengateway.spec" >"$work/log" 2>&1 ||
    die "rpmbuild failed: $(cat "$work/log")"
  mv "$work/rpmbuild/$arch/opengateway-$version-$revision.$arch.rpm" "$out/"
}

package_tarball() {
  local name=opengateway-$version-linux-$arch
  stage tar "$work/$name"
  one_date "$work/$name"
  tar -C "$work" --sort=name --format=ustar --owner=root:0 --group=root:0 --mtime="@$SOURCE_DATE_EPOCH" -c "$name" |
    gzip -9n >"$out/$name.tar.gz"
}

for format in "${formats[@]}"; do
  say "packing the $format ..."
  package_"$format"
done
