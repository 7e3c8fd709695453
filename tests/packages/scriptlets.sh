# shellcheck shell=bash
# scriptlets.sh - what the packages' scripts do and in which order. They run in a sandbox where every command that would change
# a system is a stub that logs its arguments; then once for real, into a folder. Sourced by check.sh.
# shellcheck disable=SC2154

readonly reload="busctl call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus ReloadConfig"

make_stubs() {
  local command
  mkdir -p "$scratch/stubs" "$scratch/control" "$scratch/scriptlets"
  for command in systemd-sysusers systemd-tmpfiles busctl systemctl deb-systemd-helper deb-systemd-invoke rm rmdir; do
    cat >"$scratch/stubs/$command" <<S
#!/bin/sh
echo "$command \$*" >>"\$LOG"
case "$command \$*" in
  *" --quiet was-enabled "*) exit "\${WAS_ENABLED:-1}" ;;
  *" debian-installed "*) exit "\${DEBIAN_INSTALLED:-1}" ;;
esac
exit "\${STUB_FAILS:-0}"
S
    chmod 755 "$scratch/stubs/$command"
  done
  dpkg-deb -e "$deb" "$scratch/control"
  for command in POSTIN PREUN POSTUN; do rpm -qp --qf "%{$command}\n" "$rpm" >"$scratch/scriptlets/$command"; done
}

# runs SYSTEMD SCRIPT ARGUMENT...: its log. SYSTEMD is yes or no: whether /run/systemd/system is there.
runs() {
  local systemd=$1 code=0
  shift
  : >"$scratch/calls"
  # shellcheck disable=SC2016  # the shell inside expands them
  LOG=$scratch/calls PATH=$scratch/stubs:$PATH unshare --mount sh -c '
    mount -t tmpfs none /run && if [ "$1" = yes ]; then mkdir -p /run/systemd/system; fi
    shift
    exec sh "$@"' sh "$systemd" "$@" >/dev/null || code=$?
  cat "$scratch/calls"
  return $code
}
can_unshare() { unshare --mount true 2>/dev/null || cannot "no mount namespaces; run it as root"; }

deb_installs() {
  can_unshare
  same "first installation" "systemd-sysusers opengateway.conf
systemd-tmpfiles --create opengateway.conf
$reload
deb-systemd-helper debian-installed opengatewayd.service
deb-systemd-helper update-state opengatewayd.service
deb-systemd-helper debian-installed opengatewayd-http.socket
deb-systemd-helper update-state opengatewayd-http.socket
systemctl --system daemon-reload" "$(runs yes "$scratch/control/postinst" configure "")"
}
deb_upgrades() {
  can_unshare
  same "upgrade of an enabled service" "systemd-sysusers opengateway.conf
systemd-tmpfiles --create opengateway.conf
$reload
deb-systemd-helper debian-installed opengatewayd.service
deb-systemd-helper unmask opengatewayd.service
deb-systemd-helper --quiet was-enabled opengatewayd.service
deb-systemd-helper enable opengatewayd.service
deb-systemd-helper update-state opengatewayd.service
deb-systemd-helper debian-installed opengatewayd-http.socket
deb-systemd-helper unmask opengatewayd-http.socket
deb-systemd-helper --quiet was-enabled opengatewayd-http.socket
deb-systemd-helper enable opengatewayd-http.socket
deb-systemd-helper update-state opengatewayd-http.socket
systemctl --system daemon-reload
deb-systemd-invoke try-restart opengatewayd.service" "$(DEBIAN_INSTALLED=0 WAS_ENABLED=0 runs yes "$scratch/control/postinst" configure 0.0.9-1)"
  same "the old one stays up during an upgrade" "" "$(runs yes "$scratch/control/prerm" upgrade 0.2.0-1)"
}
deb_without_systemd() {
  can_unshare
  same "installation in a container" "systemd-sysusers opengateway.conf
systemd-tmpfiles --create opengateway.conf
deb-systemd-helper debian-installed opengatewayd.service
deb-systemd-helper update-state opengatewayd.service
deb-systemd-helper debian-installed opengatewayd-http.socket
deb-systemd-helper update-state opengatewayd-http.socket" "$(runs no "$scratch/control/postinst" configure 0.0.9-1)"
  same "removal in a container" "" "$(runs no "$scratch/control/prerm" remove)$(runs no "$scratch/control/postrm" remove)"
}
deb_into_a_folder() {
  can_unshare
  same "installation below DPKG_ROOT" "systemd-sysusers --root=/target opengateway.conf
systemd-tmpfiles --root=/target --create opengateway.conf
deb-systemd-helper debian-installed opengatewayd.service
deb-systemd-helper update-state opengatewayd.service
deb-systemd-helper debian-installed opengatewayd-http.socket
deb-systemd-helper update-state opengatewayd-http.socket" "$(DPKG_ROOT=/target runs yes "$scratch/control/postinst" configure 0.0.9-1)"
  same "purge below DPKG_ROOT" "deb-systemd-helper purge opengatewayd.service opengatewayd-http.socket
rm -rf /target/var/lib/opengateway /target/var/cache/opengateway /target/etc/opengateway/credentials
rmdir --ignore-fail-on-non-empty /target/etc/opengateway" "$(DPKG_ROOT=/target runs yes "$scratch/control/postrm" purge)"
}
deb_removes() {
  can_unshare
  same "removal" "deb-systemd-invoke stop opengatewayd-http.socket opengatewayd.service opengateway.slice
systemctl --system daemon-reload" "$(runs yes "$scratch/control/prerm" remove; runs yes "$scratch/control/postrm" remove)"
  same "purge" "deb-systemd-helper purge opengatewayd.service opengatewayd-http.socket
rm -rf /var/lib/opengateway /var/cache/opengateway /etc/opengateway/credentials
rmdir --ignore-fail-on-non-empty /etc/opengateway" "$(runs yes "$scratch/control/postrm" purge)"
  same "upgrade" "" "$(runs yes "$scratch/control/postrm" upgrade 0.2.0-1)"
}
# A machine where systemd or the bus is in trouble can still install and remove; a user that cannot be made is an error.
deb_failures() {
  can_unshare
  STUB_FAILS=1 runs yes "$scratch/control/prerm" remove >/dev/null
  STUB_FAILS=1 runs yes "$scratch/control/postrm" remove >/dev/null
  STUB_FAILS=1 runs yes "$scratch/control/postrm" purge >/dev/null
  if STUB_FAILS=1 runs yes "$scratch/control/postinst" configure "" >/dev/null; then
    echo "postinst took no notice of a user that could not be made"
    exit 1
  fi
  same "what was tried before" "systemd-sysusers opengateway.conf" "$(cat "$scratch/calls")"
}

rpm_installs() {
  can_unshare
  local order="systemd-sysusers opengateway.conf
systemd-tmpfiles --create opengateway.conf
systemctl --system daemon-reload
$reload"
  same "first installation" "$order
systemctl --no-reload preset opengatewayd.service opengatewayd-http.socket" "$(runs yes "$scratch/scriptlets/POSTIN" 1)"
  same "upgrade: the new one" "$order" "$(runs yes "$scratch/scriptlets/POSTIN" 2)"
  same "upgrade: the old one" "systemctl --system daemon-reload
systemctl try-restart opengatewayd.service" "$(runs yes "$scratch/scriptlets/PREUN" 1; runs yes "$scratch/scriptlets/POSTUN" 1)"
  same "in a container" "systemd-sysusers opengateway.conf
systemd-tmpfiles --create opengateway.conf
systemctl --no-reload preset opengatewayd.service opengatewayd-http.socket" "$(runs no "$scratch/scriptlets/POSTIN" 1)"
}
rpm_erases() {
  can_unshare
  same "erasure" "systemctl stop opengatewayd-http.socket opengatewayd.service opengateway.slice
systemctl --no-reload disable opengatewayd.service opengatewayd-http.socket
systemctl --system daemon-reload" "$(runs yes "$scratch/scriptlets/PREUN" 0; runs yes "$scratch/scriptlets/POSTUN" 0)"
  STUB_FAILS=1 runs yes "$scratch/scriptlets/PREUN" 0 >/dev/null
  STUB_FAILS=1 runs yes "$scratch/scriptlets/POSTUN" 0 >/dev/null
}

# For real, into a folder: dpkg runs the scripts on this machine with DPKG_ROOT set.
installs_into_a_folder() {
  [ "$(id -u)" = 0 ] || cannot "needs root"
  command -v systemd-sysusers >/dev/null || cannot "systemd-sysusers is not here"
  command -v deb-systemd-helper >/dev/null || cannot "deb-systemd-helper is not here"
  local root=$scratch/root before
  mkdir -p "$root"/etc "$root"/var/lib/dpkg/{info,updates}
  touch "$root/var/lib/dpkg/status"
  before=$(getent passwd; ls -l /etc/opengateway 2>&1; true)
  in_root() { dpkg --root="$root" --log=/dev/null --force-script-chrootless --force-depends "$@"; }
  in_root --install "$deb"
  grep -q '^opengateway:.*:/usr/sbin/nologin$' "$root/etc/passwd"
  grep -q '^opengateway-users:' "$root/etc/group"
  same "folder for secrets" "700 root:root" "$(stat -c '%a %U:%G' "$root/etc/opengateway/credentials")"
  same "nothing is enabled" "" "$(find "$root/etc/systemd" -name '*opengateway*' 2>/dev/null)"
  echo '# edited' >>"$root/etc/opengateway/opengatewayd.toml"
  in_root --install "$deb"
  same "edited configuration after a reinstallation" '# edited' "$(tail -n 1 "$root/etc/opengateway/opengatewayd.toml")"
  mkdir -p "$root/var/lib/opengateway/models" "$root/var/cache/opengateway"
  touch "$root/var/lib/opengateway/identity.key"
  in_root --remove opengateway
  [ -e "$root/var/lib/opengateway/identity.key" ] && [ -e "$root/etc/opengateway/opengatewayd.toml" ]
  in_root --purge opengateway
  same "left by the purge" "" "$(find "$root" -path "$root/var/lib/dpkg" -prune -o -iname '*opengateway*' -print)"
  grep -q '^opengateway:' "$root/etc/passwd"
  same "this machine" "$before" "$(getent passwd; ls -l /etc/opengateway 2>&1; true)"
}

make_stubs
check ".deb: first installation" deb_installs
check ".deb: upgrade" deb_upgrades
check ".deb: without systemd" deb_without_systemd
check ".deb: below DPKG_ROOT" deb_into_a_folder
check ".deb: removal and purge" deb_removes
check ".deb: failures" deb_failures
check ".rpm: installation and upgrade" rpm_installs
check ".rpm: erasure" rpm_erases
check ".deb: installed, edited, removed and purged in a folder" installs_into_a_folder
