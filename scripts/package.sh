#!/bin/bash
# package.sh - the packages of a release: Debian's, RPM's, and a tarball for everything else.
#
#   scripts/package.sh [deb|rpm|tarball]... [OPTION]...      all three when none is named
#     --arch x86_64|aarch64   what the programs are for (default: this machine)
#     --binaries DIR          takes opengatewayd and ogctl from there instead of building them
#     --out DIR               where the packages go (default: dist)
#     --revision N            the packages' own revision of one version (default: 1)
#
# packaging/files says what goes where. The same programs give the same bytes: every date is that of the last commit
# (or SOURCE_DATE_EPOCH), every owner is root. Programs that need a newer C library than the oldest supported system has
# are refused.
. "$(dirname "$(readlink -f "$0")")/lib.sh"
. "$here/scripts/package-lib.sh"

formats=() arch=$(uname -m) binaries='' out=$here/dist revision=1
while [ $# -gt 0 ]; do
  case $1 in
    deb | rpm | tarball) formats+=("$1") ;;
    --arch | --binaries | --out | --revision)
      [ $# -ge 2 ] || { say "package.sh: $1 needs a value; see: $0 --help"; exit 2; }
      case $1 in --arch) arch=$2 ;; --binaries) binaries=$2 ;; --out) out=$2 ;; --revision) revision=$2 ;; esac
      shift
      ;;
    -h | --help) sed -n '2,/^\. /{/^\. /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) say "package.sh: unknown argument $1; see: $0 --help"; exit 2 ;;
  esac
  shift
done
[ ${#formats[@]} -gt 0 ] || formats=(deb rpm tarball)
case $arch in
  x86_64) debian_arch=amd64 target=x86_64-unknown-linux-gnu ;;
  aarch64) debian_arch=arm64 target=aarch64-unknown-linux-gnu ;;
  *) say "package.sh: unknown architecture $arch; there are x86_64 and aarch64"; exit 2 ;;
esac
[[ $revision =~ ^[1-9][0-9]*$ ]] || { say "package.sh: a revision is a number from 1: $revision"; exit 2; }

need python3=python3-minimal git=git readelf=binutils xz=xz-utils
need_rust
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/Cargo.toml" | head -n 1)
source_date
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "$binaries" ]; then
  build_programs "$target"
  binaries=$built
fi
binaries=$(cd "$binaries" && pwd) || die "no such folder: $binaries"
for program in opengatewayd ogctl; do check_program "$binaries/$program" "$arch"; done
mkdir -p "$out"
out=$(cd "$out" && pwd)

# What the packages say about themselves.
made=$work/made
mkdir "$made"
made() { python3 -B "$here/packaging/made.py" "$@"; }
made copyright "$target" >"$made/copyright"
made licenses "$target" >"$made/third-party-licenses"
made changelog deb "$revision" >"$made/changelog.Debian"

package_deb() {
  need dpkg-deb=dpkg dpkg-shlibdeps=dpkg-dev
  local root=$work/deb size file=opengateway_$version-${revision}_$debian_arch.deb
  stage deb "$root"
  size=$(installed_kib "$root")
  mkdir "$root/DEBIAN"
  sed -e "s/@VERSION@/$version-$revision/; s/@ARCHITECTURE@/$debian_arch/; s/@INSTALLED_SIZE@/$size/" \
    -e "s/@SHLIBS@/$(library_packages "$debian_arch")/" "$here/packaging/debian/control" >"$root/DEBIAN/control"
  install -m 755 "$here"/packaging/debian/{postinst,prerm,postrm} "$root/DEBIAN/"
  listed deb | awk '$2 == "config" {print $4}' >"$root/DEBIAN/conffiles"
  (cd "$root" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | LC_ALL=C sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
  chmod 644 "$root"/DEBIAN/{control,conffiles,md5sums}
  one_date "$root"
  # One thread: how xz splits its work would show in the bytes.
  dpkg-deb --root-owner-group --threads-max=1 -Zxz --build "$root" "$out/$file" >&2
}

package_rpm() {
  need rpmbuild=rpm
  local root=$work/rpm top=$work/rpmbuild
  stage rpm "$root"
  mkdir -p "$top"
  {
    rpm_requires | sed 's/^/Requires: /' >"$top/requires"
    rpm_files >"$top/files"
    made changelog rpm "$revision" >"$top/changelog"
  }
  one_date "$root"
  SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH rpmbuild -bb --quiet --target "$arch-linux" \
    --define "_topdir $top" --define "_rpmdir $out" --define "_tmppath $work" --define "_dbpath $work/rpmdb" \
    --define "og_version $version" --define "og_revision $revision" --define "og_root $root" --define "og_made $top" \
    "$here/packaging/rpm/opengateway.spec" >"$work/rpm.log" 2>&1 || die "rpmbuild failed: $(cat "$work/rpm.log")"
}

package_tarball() {
  local name=opengateway-$version-linux-$arch
  stage tar "$work/$name"
  one_date "$work/$name"
  tar -C "$work" --sort=name --format=ustar --owner=root:0 --group=root:0 --mtime="@$SOURCE_DATE_EPOCH" -c "$name" |
    gzip -9n >"$out/$name.tar.gz"
}

for format in "${formats[@]}"; do package_"$format"; done
