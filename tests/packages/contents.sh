# shellcheck shell=bash
# contents.sh - what the packages hold: against packaging/files, against what they say, against the tools that judge packages.
# Sourced by check.sh, whose $deb, $rpm, $tarball, $binaries, $engine and $scratch it uses.
# shellcheck disable=SC2154

# expected PACKAGES: "MODE OWNER NAME" of every file, as packaging/files has it.
expected() { listed "$1" | awk '{print "-" ($3 == 755 ? "rwxr-xr-x" : "rw-r--r--"), "root/root", $4}' | LC_ALL=C sort; }
tar_list() { tar --numeric-owner -tvf - | awk '{sub("0/0", "root/root", $2); print $1, $2, $6}'; }

files_of_deb() {
  dpkg-deb --fsys-tarfile "$deb" | tar_list >"$scratch/deb.list"
  same "files of the .deb" "$(expected deb)" "$(sed -n 's|^\(-.*\) \./|\1 /|p' "$scratch/deb.list" | LC_ALL=C sort)"
  same "folders of the .deb that are not 0755 root" "" "$(grep '^d' "$scratch/deb.list" | grep -v '^drwxr-xr-x root/root ' || true)"
  same "links and devices in the .deb" "" "$(grep -v '^[-d]' "$scratch/deb.list" || true)"
}
files_of_rpm() {
  rpm -qplv "$rpm" | awk '{print $1, $3 "/" $4, $NF}' >"$scratch/rpm.list"
  same "files of the .rpm" "$(expected rpm)" "$(grep '^-' "$scratch/rpm.list" | LC_ALL=C sort)"
  same "folders of the .rpm" "$(printf '%s\n' 'drwx------ root/root /etc/opengateway/credentials' 'drwxr-xr-x root/root /etc/opengateway' \
    'drwxr-xr-x root/root /usr/lib/opengateway' 'drwxr-xr-x root/root /usr/share/doc/opengateway' \
    'drwxr-xr-x root/root /usr/share/licenses/opengateway' 'drwxr-xr-x root/root /usr/share/opengateway' \
    'drwxr-xr-x root/root /usr/share/opengateway/models')" \
    "$(grep '^d' "$scratch/rpm.list" | LC_ALL=C sort)"
}
files_of_tarball() {
  local top
  top=$(basename "$tarball" .tar.gz)
  gzip -dc "$tarball" | tar_list >"$scratch/tar.list"
  same "files of the tarball" "$(expected tar)" "$(sed -n "s|^\(-.*\) $top/|\1 /|p" "$scratch/tar.list" | LC_ALL=C sort)"
  same "outside of the top folder" "" "$(awk '{print $3}' "$scratch/tar.list" | grep -v "^$top/" || true)"
}
# What lies in the repository to be installed is listed: a new interface or man page cannot be forgotten.
nothing_is_forgotten() {
  local file forgotten=''
  for file in "$here"/systemd/* "$here"/systemd/*/* "$here"/dbus/* "$here"/packaging/man/*.* "$here"/packaging/completions/* "$here"/models/*.gguf; do
    [ -f "$file" ] || continue
    grep -qF "$file " "$scratch/listed" || forgotten+=" $file"
  done
  same "installed files that packaging/files does not list" "" "$forgotten"
}
bytes_are_the_sources() {
  mkdir -p "$scratch/deb.tree" "$scratch/rpm.tree"
  dpkg-deb -x "$deb" "$scratch/deb.tree"
  (cd "$scratch/rpm.tree" && rpm2cpio "$rpm" | cpio -id --quiet)
  local kind source how name
  for kind in deb rpm; do
    listed $kind | while read -r source how _ name; do
      case $source in @*) continue ;; esac
      if [ "$how" = gzip ]; then zcat "$scratch/$kind.tree$name" | cmp - "$source"; else cmp "$scratch/$kind.tree$name" "$source"; fi
    done
  done
}

config_is_kept() {
  local names=$'/etc/default/opengatewayd\n/etc/opengateway/opengatewayd.toml'
  same "conffiles of the .deb" "$names"$'\n/etc/ufw/applications.d/opengateway' "$(dpkg-deb --ctrl-tarfile "$deb" | tar -xO ./conffiles | LC_ALL=C sort)"
  same "configuration of the .rpm" "$names" "$(rpm -qp --configfiles "$rpm" | LC_ALL=C sort)"
  same "configuration of the .rpm that an update replaces" "" \
    "$(rpm -qp --qf '[%{FILENAMES} %{FILEFLAGS:fflags}\n]' "$rpm" | awk '$2 ~ /c/ && $2 !~ /n/')"
}
documentation_is_whole() {
  zcat "$scratch/deb.tree/usr/share/doc/opengateway/changelog.Debian.gz" >"$scratch/changelog"
  same "version of the changelog" "opengateway ($(dpkg-deb -f "$deb" Version))" "$(head -n 1 "$scratch/changelog" | cut -d' ' -f1,2)"
  same "what dpkg-parsechangelog says of the changelog" "" "$(dpkg-parsechangelog -l "$scratch/changelog" 2>&1 >/dev/null)"
  grep -q '^  libp2p ' "$scratch/deb.tree/usr/share/doc/opengateway/copyright"
  grep -q "^ The engine's libraries are llama.cpp [0-9.]* and ggml [0-9.]*, under the MIT licence" "$scratch/deb.tree/usr/share/doc/opengateway/copyright"
  zcat "$scratch/deb.tree/usr/share/doc/opengateway/third-party-licenses.gz" >"$scratch/licenses"
  grep -q '^ring .* (LICENSE' "$scratch/licenses"
  grep -q '^llama.cpp .* (LICENSE)' "$scratch/licenses" && grep -q '^Copyright 2024 Mozilla Foundation' "$scratch/licenses"
}
dependencies_are_explicit() {
  local own files
  mapfile -t files < <(programs)
  own=$(library_packages_by_symbols "${files[@]}")
  [[ $own == *', libgomp1 (>= '*', libstdc++6 (>= '* ]] || { echo "by symbols the engine needs no libgomp1, libstdc++6: $own"; exit 1; }
  dpkg-deb -f "$deb" Depends | grep -F "$own, " >/dev/null || { echo "the .deb depends on: $(dpkg-deb -f "$deb" Depends); by symbols: $own"; exit 1; }
  same "what the .deb cannot be with" "systemd (<< 250)" "$(dpkg-deb -f "$deb" Breaks)"
  same "what the .rpm wants besides libraries" $'(dbus or dbus-1)\n/bin/sh\nsystemd\nsystemd >= 250' \
    "$(rpm -qp --requires "$rpm" | grep -vE '^(lib.*\(64bit\)|ld-linux.*\(64bit\)|rtld\(GNU_HASH\)|rpmlib\(.*)' | sort -u)"
}
size_is_bounded() {
  local kib
  kib=$(dpkg-deb -f "$deb" Installed-Size)
  echo "installed: $kib KiB"
  [ "$kib" -gt 0 ] && [ "$kib" -le $((50 * 1000 * 1000 / 1024)) ]
}
lintian_is_silent() {
  command -v lintian >/dev/null || cannot "lintian is not here: apt-get install lintian"
  same lintian "" "$(lintian --allow-root --display-info --fail-on error,warning,info --tag-display-limit 0 "$deb" 2>&1)"
}
rpmlint_is_silent() {
  command -v rpmlint >/dev/null || cannot "rpmlint is not here: apt-get install rpmlint"
  rpmlint -c "$here/packaging/rpm/rpmlint.toml" "$rpm" >"$scratch/rpmlint" || { cat "$scratch/rpmlint"; exit 1; }
  same rpmlint "" "$(grep -E ': [EW]: ' "$scratch/rpmlint" || true)"
}

# The second time in another time zone and with another umask, by another user's locale.
packs_the_same_twice() {
  (umask 077 && TZ=Pacific/Auckland LC_ALL=C "$here/scripts/package.sh" --binaries "$binaries" --out "$scratch/again")
  diff <(cd "$scratch/packages" && sha256sum -- *) <(cd "$scratch/again" && sha256sum -- *)
}
another_revision_is_newer() {
  "$here/scripts/package.sh" tarball deb --revision 10 --binaries "$scratch/foreign" --arch "$foreign" --out "$scratch/revision"
  dpkg --compare-versions "$(dpkg-deb -f "$scratch"/revision/*.deb Version)" gt "$(dpkg-deb -f "$deb" Version)"
}
old_systems_run_it() {
  local file
  while read -r file; do same "symbols of $file newer than glibc $oldest_glibc" "" "$(too_new "$file" "$oldest_glibc")"; done < <(programs)
  # The check itself sees something.
  too_new "$binaries/opengatewayd" 2.2 | grep '@GLIBC_2\.[0-9]' >/dev/null || { echo "no symbol is newer than 2.2: the check is blind"; exit 1; }
}

# A processor of any age finds kernels that it can run: the plainest ones are there, and the program itself asks for no more.
kernels_for_every_processor() {
  local kernel
  for kernel in x64 sse42 sandybridge haswell skylakex icelake alderlake zen4; do
    [ -e "$scratch/deb.tree/usr/lib/opengateway/libggml-cpu-$kernel.so" ] || { echo "no kernels for $kernel"; exit 1; }
  done
  # They end with SIGILL (engine/build.rs).
  [ ! -e "$scratch/deb.tree/usr/lib/opengateway/libggml-cpu-sapphirerapids.so" ] || { echo "the kernels for AMX are in"; exit 1; }
}
# As they are installed, from the .deb and from the .rpm, on no path of the machine that built them.
the_engine_finds_its_libraries() {
  local tree file missing
  for tree in "$scratch/deb.tree" "$scratch/rpm.tree"; do
    for file in "$tree/usr/libexec/opengateway-engine" "$tree"/usr/lib/opengateway/*.so*; do
      missing=$(LD_LIBRARY_PATH=$tree/usr/lib/opengateway ldd "$file" | grep 'not found' || true)
      same "libraries that $file misses" "" "$missing"
    done
    missing=$(ldd "$tree/usr/libexec/opengateway-engine" | grep -E 'lib(llama|ggml)' | sed 's|/usr/libexec/\.\./lib/|/usr/lib/|' |
      grep -vF "$tree/usr/lib/opengateway/" || true)
    same "libraries of the engine from elsewhere" "" "$missing"
  done
}
nothing_tells_where_it_was_built() {
  local file found
  while read -r file; do
    found=$(strings -n 6 "$file" | grep -F -e "$here/" -e "${CARGO_HOME:-$HOME/.cargo}/" -e "$(rustc --print sysroot)/" | head -n 3 || true)
    same "paths of the build in $file" "" "$found"
  done < <(programs)
}
packs_without_an_engine() {
  "$here/scripts/package.sh" deb rpm tarball --no-engine --binaries "$binaries" --out "$scratch/plain"
  same "files of the engine" "" "$(dpkg-deb -c "$scratch"/plain/*.deb | grep -E 'libexec|lib/opengateway' || true)"
  same "files of the engine in the .rpm" "" "$(rpm -qpl "$scratch"/plain/*.rpm | grep -E 'libexec|lib/opengateway' || true)"
  ! dpkg-deb -f "$scratch"/plain/*.deb Depends | grep -E 'libgomp|libstdc' || exit 1
  dpkg-deb -f "$scratch"/plain/*.deb Description | grep -q 'is not in this build'
}
an_engine_that_is_not_there_is_refused() {
  if "$here/scripts/package.sh" deb --binaries "$scratch/foreign" --out "$scratch/wrong" 2>"$scratch/refusal"; then exit 1; fi
  grep -q 'no engine in .*or add --no-engine' "$scratch/refusal" && [ ! -e "$scratch/wrong" ]
}

# A program of the other architecture: ours with the processor's number changed. Nobody runs it.
other_processor_is_packed() {
  local debian
  debian=$(debian_arch "$foreign")
  "$here/scripts/package.sh" deb rpm --binaries "$scratch/foreign" --arch "$foreign" --out "$scratch/foreign-packages"
  same "architecture of the .deb" "$debian" "$(dpkg-deb -f "$scratch"/foreign-packages/*_"$debian".deb Architecture)"
  same "architecture of the .rpm" "$foreign" "$(rpm -qp --qf '%{ARCH}' "$scratch"/foreign-packages/*."$foreign".rpm)"
  dpkg-deb -f "$scratch"/foreign-packages/*.deb Depends | grep -E '^libc6 \(>= 2\.[0-9]+\), libgcc-s1 \(>= [0-9.]+\), systemd ' >/dev/null
}
wrong_processor_is_refused() {
  if "$here/scripts/package.sh" deb --no-engine --binaries "$scratch/foreign" --out "$scratch/wrong" 2>"$scratch/refusal"; then exit 1; fi
  grep -q "not for $arch. Choose with --arch" "$scratch/refusal" && [ ! -e "$scratch/wrong" ]
}
make_foreign() {
  local number program
  case $arch in x86_64) foreign=aarch64 number='\xb7' ;; *) foreign=x86_64 number='\x3e' ;; esac
  mkdir "$scratch/foreign"
  for program in opengatewayd ogctl; do
    cp "$binaries/ogctl" "$scratch/foreign/$program"
    # shellcheck disable=SC2059  # it is an escape
    printf "$number" | dd of="$scratch/foreign/$program" bs=1 seek=18 conv=notrunc status=none
  done
}

for form in deb rpm tar; do listed $form; done >"$scratch/listed"
make_foreign
check "files of the .deb" files_of_deb
check "files of the .rpm" files_of_rpm
check "files of the tarball" files_of_tarball
check "nothing is forgotten" nothing_is_forgotten
check "installed bytes are the sources'" bytes_are_the_sources
check "configuration is kept" config_is_kept
check "changelog, copyright, licences" documentation_is_whole
check "dependencies" dependencies_are_explicit
check "installed size is at most 50 MB" size_is_bounded
check "lintian finds nothing that is not argued" lintian_is_silent
check "rpmlint finds nothing that is not argued" rpmlint_is_silent
check "packed twice, the same bytes" packs_the_same_twice
check "glibc $oldest_glibc suffices" old_systems_run_it
case $arch in x86_64) check "kernels for every processor" kernels_for_every_processor ;; esac
check "the engine finds its libraries" the_engine_finds_its_libraries
check "nothing tells where it was built" nothing_tells_where_it_was_built
check "packages without the engine" packs_without_an_engine
check "an engine that is not there is refused" an_engine_that_is_not_there_is_refused
check "packages for $foreign" other_processor_is_packed
check "a program for another processor is refused" wrong_processor_is_refused
check "a higher revision is newer" another_revision_is_newer
