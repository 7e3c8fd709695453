#!/bin/bash
# release.sh - everything that a release consists of, in one folder: packages, tarball, install.sh, SBOM, checksums, signature,
# and signed repositories for apt and dnf. docs/release.md tells how to keep the keys and what users verify.
#
#   scripts/release.sh --key FILE --gpg-key FILE [OPTION]...
#     --key FILE        the private ssh key (ed25519) that signs SHA256SUMS
#     --gpg-key FILE    an exported secret key of gpg without a passphrase, which signs the repositories
#     --test-keys       makes throwaway keys instead, in OUT.keys: for tests, never for a release that others install
#     --binaries DIR, --no-engine, --revision N
#                       as scripts/package.sh has them
#     --packages DIR    takes what package.sh made there, for one processor or more, instead of making it for this machine's
#     --out DIR         the folder (default: dist). What an earlier release left in it is replaced
#     --allow-dirty     also from a tree with changes that are not committed; RELEASE says so
. "$(dirname "$(readlink -f "$0")")/lib.sh"
. "$here/scripts/build-lib.sh"
. "$here/scripts/package-lib.sh"

key='' gpg_key='' test_keys='' packages='' out=$here/dist dirty='' package=()
while [ $# -gt 0 ]; do
  case $1 in
    --test-keys) test_keys=yes ;;
    --no-engine) package+=("$1") ;;
    --allow-dirty) dirty=yes ;;
    --key | --gpg-key | --packages | --binaries | --revision | --out)
      [ $# -ge 2 ] || { say "release.sh: $1 needs a value; see: $0 --help"; exit 2; }
      case $1 in
        --key) key=$2 ;;
        --gpg-key) gpg_key=$2 ;;
        --packages) packages=$2 ;;
        --out) out=$2 ;;
        *) package+=("$1" "$2") ;;
      esac
      shift
      ;;
    -h | --help) sed -n '2,/^\. /{/^\. /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) say "release.sh: unknown argument $1; see: $0 --help"; exit 2 ;;
  esac
  shift
done
if [ -z "$test_keys" ] && { [ -z "$key" ] || [ -z "$gpg_key" ]; }; then
  say "release.sh: --key and --gpg-key are needed, or --test-keys; see: $0 --help"
  exit 2
fi

need git=git ssh-keygen=openssh-client gpg=gpg gpg-agent=gpg-agent gpgv=gpgv python3=python3 apt-ftparchive=apt-utils createrepo_c=createrepo-c
commit=$(git -C "$here" rev-parse HEAD 2>/dev/null) || die "a release is made from a clone: this folder has no git history"
changes=$(git -C "$here" status --porcelain)
if [ -n "$changes" ]; then
  [ -n "$dirty" ] || die "not committed: $(head -n 3 <<<"$changes" | xargs). Commit it, or add --allow-dirty for a trial"
  commit+=-dirty
fi
source_date
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/Cargo.toml" | head -n 1)

work=$(mktemp -d)
export GNUPGHOME=$work/gnupg
mkdir -m 700 "$GNUPGHOME"
ended() {
  gpgconf --kill all >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap ended EXIT

# Everything is made aside and moved when it is whole: nobody finds half a release.
made=$work/dist
mkdir -p "$made" "$out"
out=$(cd "$out" && pwd)

make_test_keys() {
  (umask 077 && mkdir -p "$out.keys")
  key=$out.keys/release gpg_key=$out.keys/repository.asc
  rm -f "$key" "$key.pub" "$gpg_key"
  ssh-keygen -q -t ed25519 -N '' -C 'release@opengateway (test)' -f "$key"
  (
    export GNUPGHOME=$work/test-gnupg
    mkdir -m 700 "$GNUPGHOME"
    gpg --batch --quiet --passphrase '' --quick-generate-key 'OpenGateway test key <test@opengateway.invalid>' ed25519 sign 1w
    gpg --batch --quiet --armor --export-secret-keys >"$gpg_key"
    gpgconf --kill all
  ) 2>"$work/log" || die "gpg could not make a key: $(cat "$work/log")"
  say "throwaway keys: $key, $gpg_key"
}

# load_keys: checks the keys before anything is built.
load_keys() {
  [ "$(ssh-keygen -y -P '' -f "$key" 2>"$work/log" | cut -d' ' -f1)" = ssh-ed25519 ] ||
    die "$key is not a private ed25519 key of ssh without a passphrase: $(cat "$work/log"). Make one: ssh-keygen -t ed25519 -f FILE"
  release_key=$(ssh-keygen -y -P '' -f "$key" | cut -d' ' -f1,2)
  gpg --batch --quiet --import "$gpg_key" 2>"$work/log" || die "gpg cannot read $gpg_key: $(cat "$work/log")"
  fingerprint=$(gpg --batch --with-colons --list-secret-keys | awk -F: '$1 == "fpr" {print $10; exit}')
  [ -n "$fingerprint" ] || die "$gpg_key holds no secret key. Export one: gpg --armor --export-secret-keys KEY"
  echo probe | sign --clearsign >/dev/null 2>"$work/log" || die "gpg cannot sign with $gpg_key: $(cat "$work/log")"
}
sign() { gpg --batch --quiet --local-user "$fingerprint" --digest-algo SHA512 "$@"; }

# collect_packages: sets $targets to what there are packages for: a .deb, an .rpm and a tarball for each; with "+engine" when
# the engine is in them.
collect_packages() {
  local arch file found engine
  if [ -z "$packages" ]; then
    "$here/scripts/package.sh" --out "$made" "${package[@]}"
  else
    cp "$packages/opengateway_$version"-*.deb "$packages/opengateway-$version"-*.rpm "$packages/opengateway-$version"-*.tar.gz "$made/" ||
      die "$packages lacks packages of $version. Make them: scripts/package.sh --out $packages"
  fi
  targets=()
  for arch in x86_64 aarch64; do
    found=0
    for file in "$made"/*_"$(debian_arch "$arch")".deb "$made"/*."$arch".rpm "$made"/*-linux-"$arch".tar.gz; do
      [ ! -e "$file" ] || found=$((found + 1))
    done
    case $found in
      0) ;;
      3)
        engine=''
        ! tar -tzf "$made/opengateway-$version-linux-$arch.tar.gz" | grep /usr/libexec/opengateway-engine >/dev/null || engine=+engine
        targets+=("$arch-unknown-linux-gnu$engine")
        ;;
      *) die "for $arch there must be one .deb, one .rpm and one tarball of $version; there are $found files" ;;
    esac
  done
  [ ${#targets[@]} -gt 0 ] || die "no packages in $packages. Make them: scripts/package.sh --out $packages"
}

# The key that install.sh checks the signature with is part of it.
make_installer() {
  local installer=$here/scripts/install.sh
  [ "$(grep -c "^release_key=''\$" "$installer")" = 1 ] || die "scripts/install.sh has no line release_key='' to put the key into"
  sed "s|^release_key=''\$|release_key='$release_key'|" "$installer" >"$made/install.sh"
  chmod 755 "$made/install.sh"
}

make_apt() {
  local target architecture index architectures=()
  mkdir -p "$made/apt/pool/main"
  cp -p "$made"/*.deb "$made/apt/pool/main/"
  (
    cd "$made/apt"
    for target in "${targets[@]}"; do
      architecture=$(debian_arch "${target%%-*}")
      architectures+=("$architecture")
      index=dists/stable/main/binary-$architecture
      mkdir -p "$index"
      apt-ftparchive -o APT::FTPArchive::MD5=false -o APT::FTPArchive::SHA1=false --arch "$architecture" packages pool >"$index/Packages"
      gzip -9nk "$index/Packages"
    done
    apt-ftparchive -o APT::FTPArchive::MD5=false -o APT::FTPArchive::SHA1=false -o APT::FTPArchive::Release::Origin=OpenGateway -o APT::FTPArchive::Release::Label=OpenGateway \
      -o APT::FTPArchive::Release::Suite=stable -o APT::FTPArchive::Release::Codename=stable \
      -o APT::FTPArchive::Release::Components=main -o APT::FTPArchive::Release::Architectures="${architectures[*]}" \
      -o APT::FTPArchive::Release::Description='OpenGateway packages' release dists/stable >"$work/Release"
    mv "$work/Release" dists/stable/Release
    sign --clearsign --output dists/stable/InRelease dists/stable/Release
    sign --armor --detach-sign --output dists/stable/Release.gpg dists/stable/Release
    gpg --batch --armor --export "$fingerprint" >opengateway.asc
  )
}

make_dnf() {
  mkdir "$made/dnf"
  cp -p "$made"/*.rpm "$made/dnf/"
  createrepo_c --quiet --set-timestamp-to-revision --revision "$SOURCE_DATE_EPOCH" "$made/dnf" >"$work/log" 2>&1 ||
    die "createrepo_c failed: $(cat "$work/log")"
  sign --armor --detach-sign --output "$made/dnf/repodata/repomd.xml.asc" "$made/dnf/repodata/repomd.xml"
  gpg --batch --armor --export "$fingerprint" >"$made/dnf/opengateway.asc"
}

make_sums() {
  (cd "$made" && find . -maxdepth 1 -type f ! -name 'SHA256SUMS*' -printf '%f\0' | LC_ALL=C sort -z | xargs -0 sha256sum) >"$work/SHA256SUMS"
  mv "$work/SHA256SUMS" "$made/"
  ssh-keygen -q -Y sign -n opengateway-release -f "$key" "$made/SHA256SUMS" 2>"$work/log" || die "ssh-keygen could not sign: $(cat "$work/log")"
}

# Everything is checked as a user will check it.
verify() {
  printf 'release@opengateway %s\n' "$release_key" >"$work/allowed_signers"
  (
    cd "$made"
    sha256sum --quiet --strict -c SHA256SUMS
    ssh-keygen -q -Y verify -f "$work/allowed_signers" -I release@opengateway -n opengateway-release -s SHA256SUMS.sig <SHA256SUMS
    gpg --batch --quiet --dearmor <apt/opengateway.asc >"$work/repository.gpg"
    gpgv --quiet --keyring "$work/repository.gpg" apt/dists/stable/InRelease
    gpgv --quiet --keyring "$work/repository.gpg" apt/dists/stable/Release.gpg apt/dists/stable/Release
    gpgv --quiet --keyring "$work/repository.gpg" dnf/repodata/repomd.xml.asc dnf/repodata/repomd.xml
  ) >"$work/log" 2>&1 || die "the release does not verify: $(cat "$work/log")"
}

[ -z "$test_keys" ] || make_test_keys
load_keys
collect_packages
python3 -B "$here/packaging/sbom.py" "${targets[@]}" >"$made/opengateway-$version.cdx.json"
make_installer
printf 'version=%s\ncommit=%s\n' "$version" "$commit" >"$made/RELEASE"
make_sums
make_apt
make_dnf
verify
find "$out" -mindepth 1 -maxdepth 1 \( -name 'opengateway[-_]*' -o -name 'SHA256SUMS*' -o -name RELEASE -o -name install.sh \
  -o -name apt -o -name dnf \) -exec rm -rf {} +
cp -a "$made/." "$out/"
say "the release of $version is in $out"
