# shellcheck shell=bash
# release.sh - the release folder: that it verifies, and that what was tampered with does not. Sourced by check.sh.
# shellcheck disable=SC2154

make_release() {
  "$here/scripts/release.sh" --test-keys --allow-dirty --packages "$scratch/packages" --out "$scratch/dist"
  printf 'release@opengateway %s\n' "$(cut -d' ' -f1,2 "$scratch/dist.keys/release.pub")" >"$scratch/allowed_signers"
}
verifies() { (cd "$1" && ssh-keygen -q -Y verify -f "$scratch/allowed_signers" -I release@opengateway -n opengateway-release -s SHA256SUMS.sig <SHA256SUMS && sha256sum --quiet --strict -c SHA256SUMS); }

release_is_whole() {
  local version
  version=$(sed -n 's/^version=//p' "$scratch/dist/RELEASE")
  same "files of the release" "$(cd "$scratch/packages" && printf '%s\n' -- * RELEASE SHA256SUMS SHA256SUMS.sig apt dnf "opengateway-$version.cdx.json" \
    install.sh | sed '/^--$/d; /^$/d' | LC_ALL=C sort)" "$(find "$scratch/dist" -mindepth 1 -maxdepth 1 -printf '%f\n' | LC_ALL=C sort)"
  same "files that are summed" "$(find "$scratch/dist" -maxdepth 1 -type f ! -name 'SHA256SUMS*' -printf '%f\n' | LC_ALL=C sort)" \
    "$(awk '{print $2}' "$scratch/dist/SHA256SUMS")"
  verifies "$scratch/dist"
  grep -qE '^commit=[0-9a-f]{40}(-dirty)?$' "$scratch/dist/RELEASE"
  # Nothing of a private key is in the release.
  ! grep -rqE 'PRIVATE KEY' "$scratch/dist" || exit 1
}
tampering_shows() {
  local name
  for name in opengateway_*.deb SHA256SUMS SHA256SUMS.sig RELEASE; do
    rm -rf "$scratch/tampered"
    cp -a "$scratch/dist" "$scratch/tampered"
    (cd "$scratch/tampered" && for file in $name; do printf 'x' | dd of="$file" bs=1 seek=40 conv=notrunc status=none; done)
    if verifies "$scratch/tampered" >/dev/null 2>&1; then echo "a changed $name was not noticed"; exit 1; fi
  done
}
installer_knows_the_key() {
  same "the key in install.sh" "release_key='$(cut -d' ' -f1,2 "$scratch/dist.keys/release.pub")'" "$(grep '^release_key=' "$scratch/dist/install.sh")"
  same "changes of install.sh" "1" "$(diff "$here/scripts/install.sh" "$scratch/dist/install.sh" | grep -c '^>')"
}
release_from_a_dirty_tree() {
  local clone=$scratch/clone
  git clone -q --depth 1 "file://$here" "$clone"
  echo >>"$clone/README.md"
  if "$clone/scripts/release.sh" --test-keys --packages "$scratch/packages" --out "$scratch/dirty" 2>"$scratch/refusal"; then exit 1; fi
  grep -q 'not committed: M README.md. Commit it' "$scratch/refusal"
  [ ! -e "$scratch/dirty/SHA256SUMS" ]
}
keys_are_needed() {
  local code=0
  "$here/scripts/release.sh" --allow-dirty --out "$scratch/no-key" 2>/dev/null || code=$?
  same "exit code without keys" 2 $code
  echo nonsense >"$scratch/nonsense"
  if "$here/scripts/release.sh" --allow-dirty --key "$scratch/nonsense" --gpg-key "$scratch/nonsense" --out "$scratch/no-key" 2>"$scratch/refusal"; then exit 1; fi
  grep -q 'is not a private ed25519 key of ssh' "$scratch/refusal"
}

# apt_sees REPOSITORY: apt itself reads it, with nothing of this machine's configuration, and names the version.
apt_sees() {
  local state
  state=$(mktemp -d "$scratch/apt.XXXXXX")
  mkdir -p "$state"/{lists/partial,cache/archives/partial,parts}
  touch "$state/status"
  echo "deb [signed-by=$scratch/dist/apt/opengateway.asc] file:$1 stable main" >"$state/sources.list"
  local options=(-o "Dir::Etc::sourcelist=$state/sources.list" -o "Dir::Etc::sourceparts=$state/parts" -o "Dir::State::lists=$state/lists"
    -o "Dir::Cache=$state/cache" -o "Dir::State::status=$state/status" -o APT::Sandbox::User=root -o "APT::Architecture=$(debian_arch "$arch")"
    -o Acquire::Languages=none)
  apt-get "${options[@]}" -o APT::Update::Error-Mode=any update >&2 &&
    apt-cache "${options[@]}" show opengateway | sed -n 's/^Version: //p' &&
    (cd "$state" && apt-get "${options[@]}" download opengateway >&2 && cmp "$deb" ./*.deb)
}
apt_repository() {
  command -v apt-get >/dev/null || cannot "no apt here"
  chmod 755 "$scratch"
  same "what apt finds" "$(dpkg-deb -f "$deb" Version)" "$(apt_sees "$scratch/dist/apt")"
  rm -rf "$scratch/tampered"
  cp -a "$scratch/dist" "$scratch/tampered"
  sed -i 's/^Label: OpenGateway/Label: OpenGatewaz/' "$scratch/tampered/apt/dists/stable/InRelease"
  if apt_sees "$scratch/tampered/apt"; then echo "apt took a changed InRelease"; exit 1; fi
}
dnf_repository() {
  local repo=$scratch/dist/dnf primary
  gpg --batch --quiet --dearmor <"$repo/opengateway.asc" >"$scratch/dnf.gpg"
  gpgv --quiet --keyring "$scratch/dnf.gpg" "$repo/repodata/repomd.xml.asc" "$repo/repodata/repomd.xml"
  primary=$(sed -n 's|.*href="\(repodata/[0-9a-f]*-primary\.xml\.gz\)".*|\1|p' "$repo/repodata/repomd.xml")
  grep -q "$(sha256sum "$repo/$primary" | cut -d' ' -f1)" "$repo/repodata/repomd.xml"
  zcat "$repo/$primary" | grep "$(sha256sum "$rpm" | cut -d' ' -f1)" >/dev/null
}
bill_of_materials() {
  python3 - "$scratch"/dist/*.cdx.json "$here/Cargo.lock" <<'P'
import json, re, sys, tomllib
bom = json.load(open(sys.argv[1]))
lock = {(p["name"], p["version"]): p.get("checksum") for p in tomllib.load(open(sys.argv[2], "rb"))["package"]}
assert bom["bomFormat"] == "CycloneDX" and bom["specVersion"] == "1.5" and bom["version"] == 1
assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bom["serialNumber"])
assert bom["metadata"]["component"]["name"] == "opengateway"
components = bom["components"]
names = {c["name"] for c in components}
assert {"libp2p", "zbus", "tokio", "ring", "aws-lc-sys"} <= names, "a crate that is surely linked is missing"
engine = {"opengateway-engine", "llama-cpp-sys-2", "llama.cpp", "ggml"}
assert engine <= names, "what the engine is made of is missing"
assert not {"proptest", "tempfile", "cc"} & names, "a crate of tests or builds is listed"
for c in components:
    kind = "github/ggml-org" if c["name"] in ("llama.cpp", "ggml") else "cargo"
    assert c["type"] == "library" and c["purl"] == f"pkg:{kind}/{c['name']}@{c['version']}" == c["bom-ref"]
    if checksum := lock.get((c["name"], c["version"])):
        assert c["hashes"] == [{"alg": "SHA-256", "content": checksum}], c["name"]
    assert re.fullmatch(r"[A-Za-z0-9.() -]+", c["licenses"][0]["expression"]), c["licenses"]
refs = [c["bom-ref"] for c in components] + [bom["metadata"]["component"]["bom-ref"]]
assert len(refs) == len(set(refs))
assert sorted(d["ref"] for d in bom["dependencies"]) == sorted(refs)
assert all(set(d["dependsOn"]) <= set(refs) for d in bom["dependencies"])
P
}

check "release: made and verified" make_release
check "release: files and checksums" release_is_whole
check "release: tampering shows" tampering_shows
check "release: install.sh knows the key" installer_knows_the_key
check "release: not from a dirty tree" release_from_a_dirty_tree
check "release: keys are needed" keys_are_needed
check "release: apt repository" apt_repository
check "release: dnf repository" dnf_repository
check "release: bill of materials" bill_of_materials
