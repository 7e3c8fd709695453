#!/bin/bash
# rpm-provides.sh - runs inside a host: tells its rpm what a Fedora system would have, so that rpm checks the dependencies of a
# package there. An undeclared or unusual one refuses the installation, as it should.
set -euo pipefail

rpm() { command rpm --force-debian "$@"; }
! rpm -q lab-provides >/dev/null 2>&1 || exit 0

names=(/bin/sh /usr/bin/sh /bin/bash 'systemd = 252' shadow-utils dbus polkit 'rtld(GNU_HASH)' glibc libgcc 'user(root)' 'group(root)')
# The host's own libraries say which versions of symbols a binary may ask for, and rpm reads them as for a package.
for library in libc.so.6 libm.so.6 libgcc_s.so.1 libstdc++.so.6 libgomp.so.1 ld-linux-x86-64.so.2 ld-linux-aarch64.so.1; do
  file=$(find /lib/*-linux-gnu /usr/lib/*-linux-gnu /lib64 -name "$library" 2>/dev/null | head -n 1)
  [ -n "$file" ] || continue
  while read -r provided; do names+=("$provided"); done < <(/usr/lib/rpm/elfdeps --provides "$file" | sort -u)
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  printf 'Name: lab-provides\nVersion: 1\nRelease: 1\nSummary: what a Fedora system would provide\nLicense: MIT\nBuildArch: noarch\n'
  printf 'Provides: %s\n' "${names[@]}"
  printf '%%description\nOf the lab only.\n%%files\n'
} >"$work/lab-provides.spec"
rpmbuild -bb --quiet --define "_topdir $work" --define "_rpmdir $work" --define '_build_name_fmt provides.rpm' "$work/lab-provides.spec"
rpm -U "$work/provides.rpm"
