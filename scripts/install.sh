#!/bin/bash
# install.sh - puts OpenGateway on this Linux machine, joins a cluster, and tells each step with its result.
# `install.sh --help` (piped: `bash -s -- --help`) says all of it. Progress goes to stderr; stdout has the answer to
# POC_PROMPT and nothing else.
#
# Everything stands between two braces: bash reads to the second one before it runs anything, so that a download that was cut
# off does nothing.
# shellcheck disable=SC2317 # what undoes is called by its name
{
set -euo pipefail
script=${BASH_SOURCE[0]:-} # empty when piped

# Public key of releases, as in id_ed25519.pub. A release carries this script with its key filled in.
release_key=''
signer=release@opengateway
releases=https://github.com/opengateway/opengateway/releases/latest/download

usage() {
  cat <<'USAGE'
Puts OpenGateway on this machine: dependencies, opengatewayd and ogctl, what the machine has, what it can serve, joined.

  curl -fsSL https://github.com/opengateway/opengateway/releases/latest/download/install.sh | bash
  curl ... | NODE_NAME=NodeA POC_SERVE=1 bash      a node that answers prompts too
  curl ... | POC_PROMPT="What is 2+2?" bash        asks once, prints the answer, leaves nothing behind
  curl ... | bash -s -- OPTION...
  ./scripts/install.sh [OPTION...]                 in a clone: builds it and installs that

As root: a system service, from the package of this distribution (.deb, .rpm) or the tarball. As any other user: a service of
that user in ~/.opengateway-poc. Running it again changes nothing; a newer release is an upgrade that keeps everything.

Options
  --no-start         prepares only: nothing runs and nothing is joined
  --uninstall        stops and removes everything, with configuration, identity and models
    --keep-state     ... but these
  --dry-run          says what would be done; changes nothing
  --allow-downgrade  takes a release that is older than what is installed
  --user, --system   the per-user or the system installation (default: by who you are; OPENGATEWAY_POC_ROOT means --user)
  -h, --help         this

Environment
  NODE_NAME               name that other members see (default: the host's)
  POC_CLUSTER_ID          cluster to join (default gatewayai-poc)
  POC_SERVE               1: answer prompts of other members; 0 (default): only ask
  POC_PROMPT              send this when joined, print the answer. If OpenGateway was not installed, nothing of it stays
  OPENGATEWAY_BOOTSTRAP   addresses to find the cluster by, from `ogctl status` there; needed across networks
  OPENGATEWAY_POC_ROOT    directory of the per-user installation (default ~/.opengateway-poc)
  OPENGATEWAY_RELEASE     URL (https, http, file) or folder of a release (default: the latest one)
  OPENGATEWAY_RELEASE_KEY public key to verify it with, in place of the one in this script
  OPENGATEWAY_SOURCE      a clone to build, in place of a release

NODE_NAME, POC_SERVE and OPENGATEWAY_BOOTSTRAP, when given, are kept for the service: in /etc/default/opengatewayd, or
config/environment per user. Which clusters it is in, the node itself remembers, until `ogctl disconnect`.
USAGE
}

say() { printf '%s\n' "$*" >&2; }
step() { say; say "$1/5 $2"; }
note() { printf '%s\n' "$*" | sed 's/^/    /' >&2; }
# die WHAT [NEXT]: what went wrong and why; then what to do.
die() {
  say "install.sh: error: $1"
  [ $# -lt 2 ] || say "            next:  $2"
  exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }
is_root() { [ "$(id -u)" = 0 ]; }
has_systemd() { [ -d /run/systemd/system ] && have systemctl; }
hash_of() { sha256sum <"$1" | cut -d' ' -f1; }
# until_ SECONDS COMMAND...
until_() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$deadline" ] || return 1
    sleep 0.1
  done
}

# --- what is asked for -----------------------------------------------------------------------------------------------------

read_arguments() {
  action=install mode='' start=yes keep_state='' dry='' downgrade=''
  local argument
  for argument in "$@"; do
    case $argument in
      --no-start) start='' ;;
      --uninstall) action=uninstall ;;
      --keep-state) keep_state=yes ;;
      --dry-run) dry=yes ;;
      --allow-downgrade) downgrade=yes ;;
      --user) mode=user ;;
      --system) mode=system ;;
      -h | --help) usage; exit 0 ;;
      *) say "install.sh: unknown option $argument; see --help"; exit 2 ;;
    esac
  done
}

bad() { say "install.sh: error: $1"; exit 2; }
is_cluster() { [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$ ]]; }

# Nothing is written or passed on before it was looked at here.
read_environment() {
  cluster=${POC_CLUSTER_ID:-gatewayai-poc} prompt=${POC_PROMPT:-} role=''
  local name=${NODE_NAME:-} bootstrap=${OPENGATEWAY_BOOTSTRAP:-} LC_ALL=C address
  is_cluster "$cluster" ||
    bad "POC_CLUSTER_ID is $(printf %q "$cluster"): a cluster is 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or digit"
  [[ $name != *[[:cntrl:]]* && ${#name} -le 64 ]] ||
    bad "NODE_NAME is $(printf %q "$name"): a name is 1 to 64 bytes without control characters"
  case ${POC_SERVE:-} in
    '') ;;
    1 | true | yes) role=serve ;;
    0 | false | no) role=consume ;;
    *) bad "POC_SERVE is $(printf %q "$POC_SERVE"): it is 1 or 0" ;;
  esac
  read -r -d '' -a bootstraps <<<"${bootstrap//,/ }" || true
  for address in ${bootstraps[@]+"${bootstraps[@]}"}; do
    [[ $address =~ ^/[A-Za-z0-9./:_-]+$ ]] ||
      bad "OPENGATEWAY_BOOTSTRAP has $(printf %q "$address"): an address is like /ip4/192.0.2.1/udp/4001/quic-v1/p2p/..."
  done
  given=()
  [ -z "$name" ] || given+=("NODE_NAME=$name")
  [ -z "${POC_SERVE:-}" ] || given+=("POC_SERVE=$POC_SERVE")
  [ -z "${bootstraps[*]-}" ] || given+=("OPENGATEWAY_BOOTSTRAP=${bootstraps[*]}")
}

choose_mode() {
  if [ -z "$mode" ]; then
    mode=user
    if is_root && [ -z "${OPENGATEWAY_POC_ROOT:-}" ]; then mode=system; fi
  fi
  if [ $mode = system ]; then
    is_root || die "--system needs root" "sudo, or leave it out for an installation of your own"
    environment_file=/etc/default/opengatewayd manifest=/usr/share/opengateway/install-manifest
    kind=$(installed_kind) || kind=$(distribution_kind)
    control=(systemctl)
    return
  fi
  kind=user
  [ -n "${HOME:-}" ] || die "HOME is not set, so there is no place for a per-user installation" "export HOME"
  root=${OPENGATEWAY_POC_ROOT:-$HOME/.opengateway-poc}
  # The unit, the manifest and the configuration name it; in none of them these characters need quotes.
  [[ $root =~ ^/[A-Za-z0-9/._+@=,-]+$ && $root != *[./]. && $root != */ && $root != */./* && $root != */../* ]] ||
    bad "OPENGATEWAY_POC_ROOT is $(printf %q "$root"): it is an absolute path of A-Z a-z 0-9 / . _ + @ = , - only"
  environment_file=$root/config/environment manifest=$root/manifest
  units=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user
  export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/run/user/$(id -u)}
  control=(systemctl --user)
}

# Whether the service manager that will run the node is there.
can_start() {
  has_systemd || return 1
  [ $mode = system ] || { [ -S "$XDG_RUNTIME_DIR/bus" ] && systemctl --user show-environment >/dev/null 2>&1; }
}

# The way in which the distribution of this machine takes software: deb, dnf, zypper, or tar for any other.
distribution_kind() {
  local word words
  # shellcheck source=/dev/null
  words=$(. /etc/os-release 2>/dev/null && printf '%s %s' "${ID:-}" "${ID_LIKE:-}") || words=''
  for word in $words; do
    case $word in
      debian | ubuntu) if have apt-get; then echo deb; return; fi ;;
      fedora | rhel | centos) if have dnf; then echo dnf; return; fi ;;
      suse | opensuse* | sles*) if have zypper; then echo zypper; return; fi ;;
    esac
  done
  echo tar
}

# How OpenGateway was installed on this system; fails when it is not. Only systems that live by it are asked with rpm: on
# others it would make a database of its own.
installed_kind() {
  local family
  family=$(distribution_kind)
  case $family in
    deb) if [ "$(dpkg-query -W -f '${db:Status-Status}' opengateway 2>/dev/null)" = installed ]; then echo deb; return; fi ;;
    dnf | zypper) if rpm -q opengateway >/dev/null 2>&1; then echo "$family"; return; fi ;;
  esac
  [ -e /usr/share/opengateway/install-manifest ] && echo tar
}

is_installed() { if [ $mode = system ]; then installed_kind >/dev/null; else [ -e "$manifest" ]; fi; }

installed_version() {
  case $kind in
    deb) dpkg-query -W -f '${Version}' opengateway ;;
    dnf | zypper) rpm -q --qf '%{VERSION}-%{RELEASE}' opengateway ;;
    *) sed -n 's/^# version //p' "$manifest" ;;
  esac
}

# Where the software comes from: "clone" or "release", and its place.
choose_source() {
  local beside=''
  [ ! -f "$script" ] || beside=$(cd "$(dirname "$(readlink -f "$script")")" && pwd)
  release_key=${OPENGATEWAY_RELEASE_KEY:-$release_key}
  source_kind=release place=${OPENGATEWAY_RELEASE:-$releases}
  if [ -n "${OPENGATEWAY_SOURCE:-}" ]; then
    is_clone "$OPENGATEWAY_SOURCE" || die "OPENGATEWAY_SOURCE is $OPENGATEWAY_SOURCE, and that is no clone of OpenGateway"
    source_kind=clone place=$(cd "$OPENGATEWAY_SOURCE" && pwd)
  elif [ -n "${OPENGATEWAY_RELEASE:-}" ]; then :
  elif [ -n "$beside" ] && is_clone "$beside/.."; then source_kind=clone place=$(cd "$beside/.." && pwd)
  elif [ -n "$beside" ] && [ -f "$beside/SHA256SUMS" ]; then place=$beside
  # A script of a release never builds what happens to lie around; the one of a clone does, in the clone.
  elif [ -z "$release_key" ] && is_clone "$PWD"; then
    refuse_clone_of_others
    source_kind=clone place=$PWD
  fi
  [ "$source_kind" = clone ] || [ -n "$release_key" ] || die \
    "this copy of install.sh has no release key, so that nothing it downloads could be verified" \
    "take install.sh from a release; or in a clone ./scripts/install.sh; or OPENGATEWAY_SOURCE=CLONE; or OPENGATEWAY_RELEASE_KEY"
}
# Whoever owns what lies in the current directory has their scripts run by building it, as root perhaps.
refuse_clone_of_others() {
  local path owner
  for path in . Cargo.toml scripts scripts/package.sh; do
    owner=$(stat -c %u "./$path")
    if [ "$owner" = "$(id -u)" ] || { is_root && [ "$owner" = "${SUDO_UID:-}" ]; }; then continue; fi
    die "the current directory looks like a clone of OpenGateway, and ${PWD%/}/$path belongs to another user ($owner)" \
      "cd elsewhere; or, to build it all the same, OPENGATEWAY_SOURCE=$(printf %q "$PWD")"
  done
}
is_clone() { [ -x "$1/scripts/package.sh" ] && grep -qs '^name = "opengateway"' "$1/Cargo.toml"; }

check_platform() {
  local loader
  [ "$(uname -s)" = Linux ] || die "OpenGateway runs on Linux, and this is $(uname -s)"
  case $(uname -m) in
    x86_64) architecture=x86_64 deb_architecture=amd64 loader=/lib64/ld-linux-x86-64.so.2 ;;
    aarch64) architecture=aarch64 deb_architecture=arm64 loader=/lib/ld-linux-aarch64.so.1 ;;
    *) die "OpenGateway runs on x86_64 and aarch64, and this is $(uname -m)" ;;
  esac
  [ -e $loader ] || die "this system has no GNU C library ($loader is missing), which OpenGateway needs: musl (Alpine) is not supported" \
    "a distribution with glibc, for example Debian, Ubuntu, Fedora, openSUSE, Arch"
}

# --- undoing ---------------------------------------------------------------------------------------------------------------

# Functions that take back what this run did, the last one first; emptied when everything is done.
undo=()
on_exit() {
  local code=$? at
  trap - EXIT ERR
  trap '' INT TERM HUP
  set +e
  stop_private_node
  if [ ${#undo[@]} -gt 0 ]; then
    say "install.sh: taking back what was done"
    for ((at = ${#undo[@]} - 1; at >= 0; at--)); do ${undo[at]}; done
  fi
  [ -z "${lock:-}" ] || rm -f "$lock"
  [ -z "${work:-}" ] || rm -rf "$work"
  exit "$code"
}

prepare_work() {
  work=$(mktemp -d "${TMPDIR:-/tmp}/opengateway-install.XXXXXXXX")
  # apt and the private node read below it as other users; nobody can list it.
  chmod 711 "$work"
  mkdir -m 755 "$work/release" "$work/tree" "$work/stage"
  trap on_exit EXIT
  # What fails without a word of its own.
  set -E
  trap 'say "install.sh: error: line $LINENO failed: $BASH_COMMAND"' ERR
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
}

# One at a time. Nobody else can open the lock, and so hold it.
take_lock() {
  have flock || return 0
  local file=${HOME:-}/.opengateway-install.lock
  if is_root; then file=/run/opengateway-install.lock
  elif [ -O "${XDG_RUNTIME_DIR:-}" ] && [ -w "$XDG_RUNTIME_DIR" ]; then file=$XDG_RUNTIME_DIR/opengateway-install.lock; fi
  (umask 077 && : >>"$file") || die "the lock $file cannot be made"
  exec 9<"$file"
  # The other one may just have ended, and removed what is locked here.
  if ! flock -n 9 || [ ! "$file" -ef /proc/self/fd/9 ]; then die "another install.sh is running" "wait until it has ended"; fi
  lock=$file
}

# --- packages of the distribution ------------------------------------------------------------------------------------------

apt() {
  DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends -o DPkg::Lock::Timeout=300 \
    -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "$@"
}
apt_install() { ours apt install "$@" || { apt update && ours apt install "$@"; }; } # the lists of a fresh system are empty

quietly() {
  local log=$work/log
  "$@" >"$log" 2>&1 9>&- || { tail -n 40 "$log" >&2; return 1; }
}

all_packages() {
  if [ "$(distribution_kind)" = deb ]; then
    dpkg-query -W -f '${db:Status-Status} ${binary:Package}\n' | sed -n 's/^installed //p'
  else
    rpm -qa --qf '%{NAME}\n'
  fi | sort
}

# need_command COMMAND DEB RPM: installs, as root, the package that has it.
need_command() {
  have "$1" && return
  local family
  family=$(distribution_kind)
  if ! is_root || [ "$family" = tar ]; then
    die "$1 is missing" "install it with this system's package manager (Debian, Ubuntu: $2; Fedora, openSUSE: $3), then run this again"
  fi
  note "installing $1, which is missing"
  record_packages
  case $family in
    deb) quietly apt_install "$2" ;;
    dnf) quietly ours dnf -y -q install "$3" ;;
    zypper) quietly ours zypper --non-interactive install "$3" ;;
  esac || die "$1 could not be installed; see above"
}

# From here on it is recorded what `ours` installs, so that it can be removed again.
record_packages() {
  recording=yes
  [ ! -e "$work/installed" ] || return 0
  : >"$work/installed"
  undo+=(remove_dependencies)
}
# ours COMMAND...: a transaction of the package manager, which keeps others out while it goes on. What somebody else installs
# before or after it is theirs.
ours() {
  [ -n "$recording" ] || { "$@"; return; }
  local code=0
  all_packages >"$work/packages"
  "$@" || code=$?
  all_packages | comm -13 "$work/packages" - >>"$work/installed"
  return "$code"
}
still_installed() { all_packages | comm -12 - <(sort -u "$work/installed"); }
remove_dependencies() {
  local new
  new=$(still_installed)
  [ -n "$new" ] || return 0
  # shellcheck disable=SC2086 # names of packages
  if [ "$(distribution_kind)" = deb ]; then dpkg --purge $new; else rpm -e $new; fi >/dev/null 2>&1 && return
  # shellcheck disable=SC2046
  say "these packages stay:" $(still_installed)
}

# --- 1: dependencies -------------------------------------------------------------------------------------------------------

install_dependencies() {
  step 1 "Dependencies"
  if [ "$source_kind" = release ]; then
    [ -d "$place" ] || need_command curl curl curl
    need_command ssh-keygen openssh-client openssh
    need_command tar tar tar
    need_command gzip gzip gzip
    # Without systemd the node for one prompt needs a bus of its own; it goes again with the rest.
    ! once || { need_command dbus-daemon dbus-daemon dbus-daemon; need_command setpriv util-linux util-linux; }
    note "curl, ssh-keygen, tar: here. Python, EXO, Node.js and Hyperswarm are not needed"
  else
    note "a clone, $place: scripts/package.sh installs what building needs"
  fi
  look_for_engines
  if once || can_start; then return; fi
  if [ $mode = system ] || ! has_systemd; then note "systemd is not running here: the node will have to be started by hand"; else
    note "the service manager and session bus of $(id -un) are not there: the node will have to be started by hand. They are there
after a login (su and sudo are none), or after loginctl enable-linger; Debian and Ubuntu need the package dbus-user-session"
  fi
}

look_for_engines() {
  if [ -e /proc/driver/nvidia/version ] || have nvidia-smi; then
    note "NVIDIA driver: $(head -n 1 /proc/driver/nvidia/version 2>/dev/null || echo 'nvidia-smi is there, and its kernel module is not loaded')"
  else
    note "NVIDIA driver: none seen (a GPU is optional)"
  fi
  if ! have curl; then note "model servers: not looked for without curl"; return; fi
  look_for_server EXO 52415
  look_for_server Ollama 11434
  look_for_server llama-server 8080
  look_for_server vLLM 8000
  look_for_server "LM Studio" 1234
}

# A server on its usual port is found by the node too.
look_for_server() {
  local url=http://127.0.0.1:$2/v1
  if [[ "$(curl -gfsS -m 2 --noproxy '*' --max-filesize 1048576 "$url/models" 2>/dev/null)" == *'"data"'* ]]; then
    note "$1: answers at $url. A node that serves offers its models too ([upstreams] discover = false: it does not)"
  else
    note "$1: not seen at $url (optional; it is never installed by this script)"
  fi
}

# --- 2: the software -------------------------------------------------------------------------------------------------------

# fetch NAME [BYTES]: a file of the release, which is at most so large.
fetch() {
  local to=$work/release/$1 most=${2:-500000000}
  if [ -d "$place" ]; then
    head -c $((most + 1)) -- "$place/$1" >"$to"
  else
    # Not every curl keeps to --max-filesize when the server tells no size.
    (ulimit -f $((most / 1024 + 1)) 2>/dev/null || true; exec curl -gfsSL --proto '=https,http,file' --retry 3 --connect-timeout 15 --max-time 1800 \
      --speed-limit 1000 --speed-time 60 --max-filesize "$most" -o "$to" "${place%/}/$1")
  fi || die "$1 could not be fetched from $place" "is it a release? Another one: OPENGATEWAY_RELEASE=URL-or-folder"
  [ "$(wc -c <"$to")" -le "$most" ] || die "$1 is larger than $most bytes, and no release has that" "nothing was installed. Take the release from elsewhere"
}

# verify_sums: the list of hashes is what the release key signed.
verify_sums() {
  fetch SHA256SUMS 1048576
  fetch SHA256SUMS.sig 1048576
  printf '%s namespaces="opengateway-release" %s\n' "$signer" "$release_key" >"$work/signers"
  # ssh-keygen overlooks a version 0, and what comes after the last line: no release has that.
  [[ "$(cat "$work/release/SHA256SUMS.sig"; echo .)" == $'-----BEGIN SSH SIGNATURE-----\nU1NIU0lHAAAAAQ'*$'\n-----END SSH SIGNATURE-----\n.' ]] ||
    die "SHA256SUMS.sig is no signature of ssh" "nothing was installed. Take the release from elsewhere"
  ssh-keygen -Y verify -f "$work/signers" -I "$signer" -n opengateway-release -s "$work/release/SHA256SUMS.sig" \
    <"$work/release/SHA256SUMS" >"$work/log" 2>&1 ||
    die "the signature of SHA256SUMS is wrong: $(tail -n 1 "$work/log")" "nothing was installed. Tell who gave you this release; take it from elsewhere"
}

# get_artefact SUFFIX: the one file of the release that ends so, whole and as signed; sets $artefact.
get_artefact() {
  if [ "$source_kind" = clone ]; then build "$1"; return; fi
  verify_sums
  local found wanted
  found=$(awk -v end="$1" '{ name = substr($0, 67) }
    name ~ /^opengateway[A-Za-z0-9._+~-]*$/ && substr(name, length(name) - length(end) + 1) == end { print name }' \
    "$work/release/SHA256SUMS")
  [[ -n $found && $found != *$'\n'* ]] || die "this release has no one file that ends in $1, which this machine needs"
  wanted=$(awk -v name="$found" 'substr($0, 67) == name { print $1 }' "$work/release/SHA256SUMS")
  fetch "$found"
  artefact=$work/release/$found
  [ "$(hash_of "$artefact")" = "$wanted" ] ||
    die "the SHA-256 of $found is not the one that was signed" "nothing was installed. Run this again; if it stays so, tell who gave you this release"
  note "$found: signature and SHA-256 are right"
}

build() {
  local format=tarball
  case $1 in *.deb) format=deb ;; *.rpm) format=rpm ;; esac
  note "building $format in $place; the first time takes minutes"
  "$place/scripts/package.sh" $format --out "$work/release" >&2 9>&- || die "the build failed; see above"
  artefact=$(find "$work/release" -maxdepth 1 -name "opengateway*$1")
  [ -f "$artefact" ] || die "scripts/package.sh $format made no file that ends in $1"
  chmod 644 "$artefact"
}

suffix() {
  case $1 in
    deb) echo "_$deb_architecture.deb" ;;
    dnf | zypper) echo ".$architecture.rpm" ;;
    *) echo "-linux-$architecture.tar.gz" ;;
  esac
}

# compare VERSION: sets $changes to install, same, upgrade or downgrade. An older release could be one whose faults are known:
# nobody gets it without asking for it.
compare() {
  local now
  changes=install
  is_installed || return 0
  now=$(installed_version)
  if [ "$now" = "$1" ]; then changes=same
  elif [ "$(printf '%s\n%s\n' "$now" "$1" | sort -V | tail -n 1)" = "$1" ]; then changes=upgrade
  elif [ -n "$downgrade" ]; then changes=downgrade
  else die "version $now is installed, and this release is the older $1" "--allow-downgrade takes it all the same"; fi
}

install_software() {
  step 2 "CLI"
  get_artefact "$(suffix "$kind")"
  fresh='' was_active=''
  is_installed || fresh=yes
  if can_start && is_active; then was_active=yes; undo+=(resume_service); fi
  local pid
  pid=$(main_pid)
  case $kind in
    deb) install_deb ;;
    dnf | zypper) install_rpm ;;
    *) install_tarball ;;
  esac
  if [ $mode = system ]; then bin=/usr/bin og=(/usr/bin/ogctl --bus system); else
    bin=$root/bin og=("$root/bin/ogctl" --bus "unix:path=$XDG_RUNTIME_DIR/bus")
  fi
  changed=''
  # A package has restarted what ran.
  [ "$changes" = same ] || [ "$(main_pid)" != "$pid" ] || changed=yes
  note "$("$bin/ogctl" --version): $bin/ogctl, $bin/opengatewayd"
}

install_deb() {
  local options=()
  compare "$(dpkg-deb -f "$artefact" Version)"
  if [ $changes = same ]; then
    if dpkg-deb --ctrl-tarfile "$artefact" | tar -xO ./md5sums | cmp -s - /var/lib/dpkg/info/opengateway.md5sums; then
      note "is installed already: nothing to do"
      return
    fi
    changes=upgrade options=(--reinstall) # the same version, other files: built again
  fi
  prepare_undo
  [ $changes != downgrade ] || options=(--allow-downgrades)
  quietly apt_install ${options[@]+"${options[@]}"} "$artefact" || die "apt could not install $(basename "$artefact"); see above"
  [ -n "$fresh" ] || undo+=(say_version_stays)
  note "installed with apt"
}

install_rpm() {
  local verb=install options=()
  compare "$(rpm -qp --nosignature --qf '%{VERSION}-%{RELEASE}' "$artefact")"
  if [ $changes = same ]; then
    if [ "$(rpm -qp --nosignature --qf '%{SHA256HEADER}' "$artefact")" = "$(rpm -q --qf '%{SHA256HEADER}' opengateway)" ]; then
      note "is installed already: nothing to do"
      return
    fi
    changes=upgrade verb=reinstall options=(--force)
  fi
  prepare_undo
  [ $changes != downgrade ] || { verb=downgrade options=(--oldpackage); }
  # Its bytes were verified above, by a signature that covers more than the package.
  if [ "$kind" = zypper ]; then
    quietly ours zypper --non-interactive install --allow-unsigned-rpm ${options[@]+"${options[@]}"} "$artefact"
  else
    quietly ours dnf -y -q --setopt=localpkg_gpgcheck=0 "$verb" "$artefact"
  fi || die "$kind could not install $(basename "$artefact"); see above"
  [ -n "$fresh" ] || undo+=(say_version_stays)
  note "installed with $kind"
}

# A package that is new is taken back with what came with it. One that replaces another stays, and so does what it needs.
prepare_undo() {
  recording=''
  [ -n "$fresh" ] || return 0
  remember_before
  record_packages
  undo+=(undo_package)
}
say_version_stays() {
  say "OpenGateway $(installed_version) stays installed: a package that replaced another one is not taken back."
  say "To go back: this script with OPENGATEWAY_RELEASE=OLDER-RELEASE and --allow-downgrade"
}

remove_package() {
  case $kind in
    deb) if [ -n "$keep_state" ]; then quietly apt remove opengateway; else quietly apt purge opengateway; fi ;;
    *) if [ -n "$keep_state" ]; then remove_rpm_only; else quietly rpm -e opengateway; fi ;;
  esac
}

# rpm removes configuration too, and renames what was edited.
remove_rpm_only() {
  local path code=0 files=(/etc/opengateway/opengatewayd.toml /etc/default/opengatewayd)
  for path in "${files[@]}"; do
    [ ! -e "$path" ] || { mkdir -p "$work/kept${path%/*}" && cp -a "$path" "$work/kept$path"; } || return
  done
  quietly rpm -e opengateway || code=$?
  for path in "${files[@]}"; do
    if [ ! -e "$work/kept$path" ] || [ -e "$path" ]; then continue; fi
    mkdir -p "${path%/*}"
    cp -a "$work/kept$path" "$path" || code=1
    ! cmp -s "$path" "$path.rpmsave" || rm -f "$path.rpmsave"
  done
  return "$code"
}

# What an installation that is taken back, or that was for one prompt, must leave as it was.
remember_before() {
  local path
  : >"$work/begun"
  had_user=$(getent passwd opengateway || true) had_group=$(getent group opengateway-users || true) had=()
  for path in $(leftovers); do [ ! -e "$path" ] || had+=("$path"); done
}
forget_new() {
  local path
  for path in $(leftovers); do [[ " ${had[*]-} " == *" $path "* ]] || rm -rf "$path"; done
  [ "$mode" = system ] || return 0
  find /etc/opengateway /etc/default -maxdepth 1 -name 'opengatewayd*.dpkg-dist' -cnewer "$work/begun" -delete 2>/dev/null
  [ -n "$had_user" ] || userdel opengateway 2>/dev/null
  [ -n "$had_group" ] || groupdel opengateway-users 2>/dev/null
}
undo_package() {
  keep_state=${had[*]-}
  remove_package
  forget_new
}

# --- 2: the software, from the tarball -------------------------------------------------------------------------------------

# The manifest has a line for each file, "SHA256 PATH" as it was shipped, and one for each directory that was made, "- PATH".
recorded() { [ ! -e "$manifest" ] || awk -v path="$1" '$2 == path { print $1 }' "$manifest"; }

make_directory() {
  [ ! -d "$1" ] || return 0
  make_directory "$(dirname "$1")" 755
  mkdir -m "$2" "$1"
  printf -- '- %s\n' "$1" >>"$work/made"
}

# changes_file PATH: it is about to be made, changed or removed; undo_files puts it back as it is now.
changes_file() {
  printf '%s\n' "$1" >>"$work/put"
  [ -e "$1" ] || return 0
  mkdir -p "$work/old$(dirname "$1")"
  cp -p "$1" "$work/old$1"
}

# put SOURCE DESTINATION MODE [config]: what the user edited stays, and the new one is put beside it.
put() {
  local new was target=$2
  new=$(hash_of "$1") was=$(recorded "$2")
  printf '%s %s\n' "$new" "$2" >>"$work/manifest"
  if [ -e "$2" ]; then
    local now
    now=$(hash_of "$2")
    [ "$now" != "$new" ] || return 0
    if [ "${4:-}" = config ] && [ "$now" != "$was" ]; then
      [ "$new" != "$was" ] || return 0
      target=$2.new
      note "$2 was edited and stays; the new one is $target"
    fi
  fi
  make_directory "$(dirname "$target")" 755
  changes_file "$target"
  install -m "$3" "$1" "$target.opengateway-new"
  mv -f "$target.opengateway-new" "$target"
}

undo_files() {
  local path
  while read -r path; do
    rm -f "$path.opengateway-new"
    if [ -e "$work/old$path" ]; then cp -p "$work/old$path" "$path"; else rm -f "$path"; fi
  done <"$work/put"
  [ -z "$fresh" ] || forget_new
  sed -n 's/^- //p' "$work/made" | tac | while read -r path; do rmdir "$path" 2>/dev/null; done
  reload_managers
  [ ! -s "$work/put" ] || changed=yes
}

install_tarball() {
  local name
  name=$(basename "$artefact")
  name=${name#opengateway-}
  compare "${name%-linux-*}"
  tar -xzf "$artefact" -C "$work/tree" --strip-components=1 --no-same-owner ||
    die "$(basename "$artefact") cannot be unpacked"
  "$work/tree/usr/bin/ogctl" --version >/dev/null ||
    die "ogctl does not run on this system; see above" "a newer distribution, or a clone and ./scripts/install.sh"
  see_engine "$work/tree/usr"
  if [ $mode = system ]; then stage_system; else stage_user; fi
  refuse_foreign
  touch "$work/put" "$work/made" "$work/made.kept"
  remember_before
  undo+=(undo_files)
  local file path
  while read -r -d '' file; do
    path=${file#"$work/stage"}
    put "$file" "$path" "$(if [ -x "$file" ]; then echo 755; else echo 644; fi)" "$(if is_config "$path"; then echo config; fi)"
  done < <(find "$work/stage" -type f -print0 | sort -z)
  drop_old_files
  [ $mode = system ] || for path in libexec models; do make_directory "$root/$path" 755; done
  [ $mode = system ] || make_directory "$root/state" 700
  write_manifest "${name%-linux-*}"
  if [ -s "$work/put" ]; then
    [ "$changes" != same ] || changes=upgrade
    settle_system
    note "$(wc -l <"$work/put") files installed below $([ $mode = system ] && echo / || echo "$root")"
  else
    changes=same
    note "is installed already: nothing to do"
  fi
}

# see_engine DIRECTORY: says whether the engine below it can run. A package names the libraries that it needs; a tarball cannot.
see_engine() {
  local engine=$1/libexec/opengateway-engine missing
  if [ ! -e "$engine" ]; then
    note "this build has no engine: the node serves what model servers beside it have"
    return
  fi
  missing=$(missing_libraries "$engine")
  if [ "$missing" = libgomp.so.1 ] && is_root && [ "$(distribution_kind)" = deb ]; then
    note "installing libgomp1, which the engine needs"
    record_packages
    quietly apt_install libgomp1 || die "libgomp1 could not be installed; see above"
    missing=$(missing_libraries "$engine")
  fi
  [ -z "$missing" ] || note "the engine cannot run yet, and the node answers without a model of its own until it can: ${missing//$'\n'/, } missing.
Install with this system's package manager: libgomp1 and libstdc++6 (Fedora: libgomp and libstdc++)"
}
missing_libraries() { { ldd "$1" 2>/dev/null || true; } | sed -n 's/^[[:space:]]*\([^ ]*\) => not found.*/\1/p' | sort -u; }

is_config() { [[ $1 == /etc/* || (-n ${root:-} && $1 == "${root:-}"/config/*) ]]; }

stage_system() {
  [ -w /usr/bin ] || die "/usr cannot be written" "install as a plain user, or with --user"
  cp -R "$work/tree/." "$work/stage/"
  rm -f "$work/stage/usr/share/opengateway/opengatewayd-user.service"
}

# The per-user layout; system files (unit, bus and polkit policy, sysusers, tmpfiles) have no place in it.
stage_user() {
  local to=$work/stage$root share
  mkdir -p "$to/bin" "$to/config" "$to/share/dbus-1" "$work/stage$units"
  cp "$work/tree/usr/bin/"* "$to/bin/"
  # The engine finds its libraries from where it is.
  for share in libexec lib/opengateway share/opengateway/models; do
    [ -d "$work/tree/usr/$share" ] || continue
    mkdir -p "$(dirname "$to/$share")"
    cp -R "$work/tree/usr/$share" "$to/$share"
  done
  for share in man bash-completion zsh fish doc dbus-1/interfaces; do
    [ ! -d "$work/tree/usr/share/$share" ] || cp -R "$work/tree/usr/share/$share" "$to/share/$share"
  done
  cp "$work/tree/etc/opengateway/opengatewayd.toml" "$to/config/"
  sed "/^#/!s|@ROOT@|$root|g" "$work/tree/usr/share/opengateway/opengatewayd-user.service" >"$work/stage$units/opengatewayd.service"
}

# Never over files that somebody else put there.
refuse_foreign() {
  [ -n "$fresh" ] || return 0
  local file path
  if [ $mode = user ] && [ -d "$root" ]; then
    for path in "$root"/* "$root"/.[!.]*; do
      [ -e "$path" ] || continue
      case ${path##*/} in
        config | state | models | bus) ;; # of a node that was run by hand there, with the lines that this script says
        *) die "$root has $path, which is not of OpenGateway" "another OPENGATEWAY_POC_ROOT, best one that does not exist" ;;
      esac
    done
  fi
  while read -r -d '' file; do
    path=${file#"$work/stage"}
    [ ! -e "$path" ] || is_config "$path" || cmp -s "$file" "$path" ||
      die "$path is there, and was not put there by this script or a package" "remove it, then run this again"
  done < <(find "$work/stage" -type f -print0)
}

# What an older release had and this one has not.
drop_old_files() {
  [ -e "$manifest" ] || return 0
  local hash path
  while read -r hash path; do
    case $hash in
      '#') continue ;;
      -) grep -qxF -- "- $path" "$work/made" || printf -- '- %s\n' "$path" >>"$work/made.kept" ;;
      *)
        if ! is_config "$path" && ! awk -v path="$path" '$2 == path { found = 1 } END { exit !found }' "$work/manifest"; then
          changes_file "$path"
          rm -f "$path"
        fi
        ;;
    esac
  done <"$manifest"
}

write_manifest() {
  make_directory "$(dirname "$manifest")" 755
  { printf '# version %s\n' "$1"; cat "$work/manifest" "$work/made.kept" "$work/made"; } >"$work/manifest.whole"
  if cmp -s "$work/manifest.whole" "$manifest"; then return; fi
  changes_file "$manifest"
  install -m 644 "$work/manifest.whole" "$manifest"
}

# What the scripts of a package do; the user must exist before the bus reads the policy that names it.
settle_system() {
  if [ $mode = system ]; then
    if have systemd-sysusers; then systemd-sysusers opengateway.conf >&2; else note "systemd-sysusers is missing: no user opengateway was made"; fi
    ! have systemd-tmpfiles || systemd-tmpfiles --create opengateway.conf >&2 || true
  fi
  reload_managers
}
reload_managers() {
  ! can_start || "${control[@]}" daemon-reload
  if [ $mode = system ] && has_systemd; then
    busctl call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus ReloadConfig >/dev/null 2>&1 || true
  fi
}

remove_files() {
  local hash path
  cp "$manifest" "$work/manifest.gone"
  while read -r hash path; do
    case $hash in '#' | -) continue ;; esac
    if [ -n "$keep_state" ] && is_config "$path"; then continue; fi
    rm -f "$path" "$path.new"
  done <"$work/manifest.gone"
  rm -f "$manifest"
  [ -n "$keep_state" ] || remove_leftovers
  sed -n 's/^- //p' "$work/manifest.gone" | tac | while read -r path; do rmdir "$path" 2>/dev/null || true; done
  reload_managers
}

# State, configuration and cache: made at run time, so neither package nor manifest has all of them.
leftovers() {
  if [ $mode = system ]; then
    echo /var/lib/opengateway /var/cache/opengateway /etc/opengateway /etc/default/opengatewayd{,.new,.rpmsave,.rpmnew}
  else
    echo "$root/state" "$root/models" "$root/config" "$root/bus"
  fi
}
remove_leftovers() {
  # shellcheck disable=SC2046 # their names have no blanks
  rm -rf $(leftovers)
}

# --- the service and what it was told --------------------------------------------------------------------------------------

begin_mark='# --- by install.sh: what was given to it'
end_mark='# --- end of install.sh'

# Values in double quotes, which systemd and a shell read alike.
quoted() { printf '%s="%s"\n' "${1%%=*}" "$(printf '%s' "${1#*=}" | sed 's/[\\"$`]/\\&/g')"; }

# keep_settings: the keys that were given, between two marks in the service's environment; what was there stays.
keep_settings() {
  local pair old='' block
  [ ! -e "$environment_file" ] || old=$(cat "$environment_file")
  block=$(sed -n "/^$begin_mark\$/,/^$end_mark\$/{/^# ---/d;p}" <<<"$old")
  [ ${#given[@]} -gt 0 ] || [[ $block == *POC_CLUSTER_ID=* ]] || return 0
  take_over_cluster "$block"
  block=$(sed '/^POC_CLUSTER_ID=/d' <<<"$block")
  for pair in ${given[@]+"${given[@]}"}; do
    block=$(sed "/^${pair%%=*}=/d" <<<"$block"; quoted "$pair")
  done
  {
    sed "/^$begin_mark\$/,/^$end_mark\$/d" <<<"$old"
    [ -z "$block" ] || printf '%s\n%s\n%s\n' "$begin_mark" "$(sed '/^$/d' <<<"$block")" "$end_mark"
  } | sed '1{/^$/d}' >"$work/environment"
  if cmp -s "$work/environment" "$environment_file"; then return; fi
  mkdir -p "$(dirname "$environment_file")"
  [ ! -e "$environment_file" ] || cp -p "$environment_file" "$work/environment.old"
  undo+=(undo_settings)
  cat "$work/environment" >"$environment_file" # in place: owner, mode and label stay
  changed=yes
  [ ${#given[@]} = 0 ] || note "kept in $environment_file: ${given[*]%%=*}"
}
# An earlier script kept the cluster here, and as configuration it came back after `ogctl disconnect`. Now it is joined.
take_over_cluster() {
  local kept
  kept=$(sed -n 's/^POC_CLUSTER_ID="\(.*\)"$/\1/p' <<<"$1")
  if [ -n "${POC_CLUSTER_ID:-}" ] || ! is_cluster "$kept"; then return 0; fi
  cluster=$kept POC_CLUSTER_ID=$kept
  [ -n "$role" ] || ! grep -qE '^POC_SERVE="(1|true|yes)"$' <<<"$1" || role=serve
}
undo_settings() { if [ -e "$work/environment.old" ]; then cat "$work/environment.old" >"$environment_file"; else rm -f "$environment_file"; fi; }

is_active() { "${control[@]}" is-active -q opengatewayd; }
main_pid() { ! can_start || "${control[@]}" show -P MainPID opengatewayd 2>/dev/null || true; }

start_service() {
  if [ "$("${control[@]}" is-enabled opengatewayd 2>/dev/null)" != enabled ]; then
    quietly "${control[@]}" enable opengatewayd || die "opengatewayd could not be enabled; see above"
    undo+=(disable_service)
    note "enabled: it starts again after a reboot ($([ $mode = system ] && echo "systemctl disable opengatewayd" || echo "systemctl --user disable opengatewayd") undoes that)"
  fi
  if is_active; then
    [ -n "$changed" ] || return 0
    quietly "${control[@]}" restart opengatewayd
  else
    [ -n "$was_active" ] || undo+=(halt_service)
    quietly "${control[@]}" start opengatewayd # returns when it is ready
  fi || { service_log >&2; die "opengatewayd does not start; its last words are above"; }
}
disable_service() { "${control[@]}" disable opengatewayd >/dev/null 2>&1; }
halt_service() { "${control[@]}" stop opengatewayd >/dev/null 2>&1; }
stop_service() { "${control[@]}" disable --now opengatewayd >/dev/null 2>&1; }
# The last that is undone: a node that ran before runs on, with the program and the settings that are there now.
resume_service() {
  [ -n "$changed" ] || is_active || changed=yes
  [ -n "$changed" ] || return 0
  "${control[@]}" reset-failed opengatewayd >/dev/null 2>&1
  "${control[@]}" restart opengatewayd >/dev/null 2>&1 || say "opengatewayd ran before, and does not start again: see its log"
}
service_log() { journalctl --no-pager -n 15 "--$([ $mode = system ] || echo user-)unit=opengatewayd" 2>/dev/null; }

# --- a node for the time of this script ------------------------------------------------------------------------------------

# private_node DIRECTORY OPTION...: its opengatewayd on a bus of its own, below $work; as nobody when we are root.
private_node() {
  local bin=$1 as=() node=$work/node
  shift
  mkdir -m 700 "$node" "$node/config"
  # The disk that counts is the one that an installation would use.
  printf '[models]\ndirectory = "%s"\n' "$([ $mode = system ] && echo /var/lib/opengateway || echo "$root")/models" >"$node/config/opengatewayd.toml"
  cat >"$node/bus.conf" <<CONF
<busconfig><type>session</type><listen>unix:path=$node/bus</listen><policy context="default"><allow user="*"/>
<allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy></busconfig>
CONF
  if is_root; then
    as=(setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs)
    chown -R 65534:65534 "$node"
  fi
  ${as[@]+"${as[@]}"} dbus-daemon --nofork --nopidfile --config-file="$node/bus.conf" >"$work/bus.log" 2>&1 9>&- &
  private=($!)
  until_ 10 test -S "$node/bus" || die "dbus-daemon does not start: $(cat "$work/bus.log")"
  env -u POC_CLUSTER_ID -u POC_SERVE -u POC_PROMPT OPENGATEWAY_POC_ROOT="$node" \
    ${as[@]+"${as[@]}"} "$bin/opengatewayd" --bus "unix:path=$node/bus" "$@" >"$work/node.log" 2>&1 9>&- &
  private=($! "${private[@]}")
  og=("$bin/ogctl" --bus "unix:path=$node/bus")
  until_ 20 "${og[@]}" status || die "the node does not start: $(tail -n 5 "$work/node.log")"
}

stop_private_node() {
  local pid
  for pid in ${private[@]+"${private[@]}"}; do
    kill "$pid" 2>/dev/null || continue
    until_ 10 test ! -e "/proc/$pid" || kill -KILL "$pid" 2>/dev/null
    wait "$pid" 2>/dev/null || true
  done
  private=()
}

can_run_privately() { have dbus-daemon && { ! is_root || have setpriv; }; }

# --- 3, 4, 5: gauge, eligible, join ----------------------------------------------------------------------------------------

gauge() {
  step 3 "Gauge: what this machine has"
  local found
  found=$("${og[@]}" resources 2>&1) || die "$found"
  note "$found"
}

eligible() {
  step 4 "Eligible: the model tiers that this machine could serve"
  local found
  found=$("${og[@]}" eligible 2>&1) || die "$found"
  note "$found"
}

sees_somebody() { [[ $("${og[@]}" peers "$cluster" --json 2>/dev/null) == *'"peer_id":'* ]]; }
# Clusters that this node is in, each with its role.
joined() { "${og[@]}" clusters --json 2>/dev/null | sed 's/{"id":/\n&/g' | sed -n 's/^{"id":"\([^"]*\)".*"joined":true.*"role":"\([a-z]*\)".*/\1 \2/p'; }
role_now() { joined | awk -v id="$cluster" 'tolower($1) == tolower(id) { print $2 }'; }
# An installation that is in other clusters than the default one, and was told of none, stays in those.
keep_clusters() {
  if [ -n "${POC_CLUSTER_ID:-}" ] || [ -n "$fresh" ] || [ -n "$(role_now)" ]; then return; fi
  local first
  read -r first _ < <(joined) || return 0
  cluster=$first
}

# join SECONDS: joins, unless that is done, and looks round for so long.
join() {
  keep_clusters
  step 5 "Join: cluster $cluster"
  local now wanted options=() address said
  now=$(role_now)
  wanted=${role:-${now:-consume}}
  if [ "$now" = "$wanted" ] && [ ${#bootstraps[@]} = 0 ]; then
    note "joined already ($(role_in_words "$now"))"
  else
    for address in ${bootstraps[@]+"${bootstraps[@]}"}; do options+=(--bootstrap "$address"); done
    said=$("${og[@]}" connect "$cluster" "--$wanted" --wait 0 ${options[@]+"${options[@]}"} 2>&1) ||
      die "$said" "see what this machine can serve with: ogctl eligible; POC_SERVE=0 joins without serving"
    note "joined ($(role_in_words "$wanted"))"
  fi
  if until_ "$1" sees_somebody; then
    note "$("${og[@]}" peers "$cluster" 2>&1)"
  else
    note "nobody else is there yet, which is no failure: it goes on looking. On another network: OPENGATEWAY_BOOTSTRAP"
  fi
}
role_in_words() { if [ "$1" = serve ]; then echo "answers prompts of the others"; else echo "asks, and answers nobody: POC_SERVE=1 changes that"; fi; }

# The text goes by a pipe: arguments are seen by every user of the machine.
ask() { printf '%s' "$prompt" | "${og[@]}" prompt --cluster "$cluster" --no-local - 9>&-; }

# Another member answers. One that only asks may be seen before one that serves, so "nobody can" is asked again for a while.
send_prompt() {
  local deadline=$((SECONDS + 10)) code
  say
  say "Prompt, answered by the cluster:"
  while :; do
    code=0
    ask 2>"$work/asked" || code=$?
    if [ $code != 5 ] || [ $SECONDS -ge $deadline ]; then break; fi
    sleep 0.5
  done
  note "$(cat "$work/asked")"
  [ $code != 5 ] || note "a node that answers: NODE_NAME=NodeA POC_SERVE=1; on another network give OPENGATEWAY_BOOTSTRAP"
  [ $code = 0 ] || exit $code
}

# --- the runs --------------------------------------------------------------------------------------------------------------

# One prompt from a machine that has no OpenGateway: a node in a private directory, and nothing is installed at all.
run_once() {
  install_dependencies
  step 2 "CLI"
  unpack_privately
  note "$("${og[@]}" --version), in a private directory: for one prompt nothing is installed"
  private_node "$work/tree/usr/bin"
  gauge
  eligible
  join 20
  send_prompt
  note "nothing stays"
}

unpack_privately() {
  get_artefact "$(suffix tar)"
  tar -xzf "$artefact" -C "$work/tree" --strip-components=1 --no-same-owner || die "$(basename "$artefact") cannot be unpacked"
  og=("$work/tree/usr/bin/ogctl")
  "${og[@]}" --version >/dev/null || die "ogctl does not run from $work; see above" "TMPDIR=DIRECTORY of a file system that allows programs"
}

run_install() {
  local was_here=yes
  is_installed || was_here=''
  install_dependencies
  install_software
  keep_settings
  if [ -z "$start" ] || ! can_start; then
    gauge_without_service
    say_how_to_start
    [ -z "$prompt" ] || [ -z "$start" ] || die "POC_PROMPT was not sent: OpenGateway is installed, and no systemd runs the node" "run it by hand as said above; ogctl prompt sends it"
  else
    start_service
    gauge
    eligible
    join "$([ -n "$prompt" ] && echo 20 || echo 5)"
    [ -z "$prompt" ] || send_prompt
  fi
  if [ -n "$prompt" ] && [ -z "$was_here" ] && [ -n "$start" ]; then return; fi # what undo holds is taken back on exit
  undo=()
  finish
}

# What the machine has and could serve, shown by a node that nobody can see and that is gone afterwards.
gauge_without_service() {
  if can_run_privately; then
    private_node "$bin" --no-mdns --listen /ip4/127.0.0.1/udp/0/quic-v1
    gauge
    eligible
    stop_private_node
  else
    step 3 "Gauge: when the node runs, with ogctl resources"
    step 4 "Eligible: when the node runs, with ogctl eligible"
  fi
}

say_how_to_start() {
  if can_start; then
    step 5 "Join: not now (--no-start). Later:"
    note "${control[*]} enable --now opengatewayd
ogctl connect $cluster --${role:-consume}"
    return
  fi
  local bus=/run/opengateway-bus where="--state-dir /var/lib/opengateway" before=''
  [ $mode = system ] || bus=$root/bus where='' before="OPENGATEWAY_POC_ROOT=$root "
  step 5 "Join: there is no systemd here that could run the node. By hand:"
  note "dbus-daemon --session --fork --nopidfile --address=unix:path=$bus
$before$bin/opengatewayd --bus unix:path=$bus ${where:+$where }--connect $cluster --${role:-consume}$(daemon_options)
The first line is a D-Bus bus (package dbus-daemon); the second stays in the foreground. Then in another terminal:
$bin/ogctl --bus unix:path=$bus status
$bin/ogctl --bus unix:path=$bus peers
$bin/ogctl --bus unix:path=$bus prompt 'What is 2+2?'"
}
daemon_options() {
  [ -z "${NODE_NAME:-}" ] || printf ' --node-name %q' "$NODE_NAME"
  [ ${#bootstraps[@]} = 0 ] || printf ' --bootstrap %s' "${bootstraps[@]}"
}

finish() {
  say
  say "Done: OpenGateway $(installed_version) ($([ $mode = system ] && echo "system service" || echo "for $(id -un), in $root")). Remove it: this script with --uninstall"
  [ $mode = system ] || path_hints
  can_start || return 0
  local ogctl=ogctl
  # ogctl finds the session bus by this variable, which a login sets.
  [ $mode = system ] || [ -n "${DBUS_SESSION_BUS_ADDRESS:-}" ] || ogctl=${og[*]}
  note "$ogctl status
$ogctl peers
$ogctl prompt 'What is 2+2?'
${control[*]} status opengatewayd; journalctl $([ $mode = system ] || echo '--user ')-u opengatewayd"
}

path_hints() {
  local link=$HOME/.local/bin/ogctl
  case :$PATH: in
    *:"$root/bin":*) ;;
    *:"$HOME/.local/bin":*)
      if [ ! -e "$link" ] && [ ! -L "$link" ]; then
        mkdir -p "$HOME/.local/bin"
        ln -s "$root/bin/ogctl" "$link"
        note "$link leads to it"
      fi ;;
    *) note "put ogctl on your PATH: export PATH=$root/bin:\$PATH" ;;
  esac
  if [ "$(loginctl show-user "$(id -un)" -P Linger 2>/dev/null)" = no ]; then
    note "it ends when you log out; to let it run always: sudo loginctl enable-linger $(id -un)"
  fi
}

run_uninstall() {
  is_installed || { say "OpenGateway is not installed $([ $mode = system ] && echo "on this system" || echo "in $root"): nothing to remove"; exit 0; }
  [ ! -d "$work/tree" ] || touch "$work/put"
  if can_start; then stop_service || true; fi
  case $kind in
    user)
      [ "$(readlink "$HOME/.local/bin/ogctl" 2>/dev/null)" != "$root/bin/ogctl" ] || rm -f "$HOME/.local/bin/ogctl"
      remove_files
      [ -n "$keep_state" ] || rmdir "$root" 2>/dev/null || [ ! -e "$root" ] || say "$root stays: it has files that are not of OpenGateway"
      ;;
    tar) remove_files ;;
    *)
      remove_package || die "the package could not be removed; see above"
      [ -n "$keep_state" ] || remove_leftovers
      ;;
  esac
  say "OpenGateway is removed$([ -n "$keep_state" ] && echo "; configuration, identity, clusters and models stay")."
  [ $mode = user ] || say "The user opengateway and the groups opengateway and opengateway-users stay, so that their numbers go to nobody else."
}

describe() {
  say "Nothing is changed (--dry-run). This would be done:"
  if [ $action = uninstall ]; then
    is_installed || { note "nothing: OpenGateway is not installed"; return; }
    note "stop and disable opengatewayd; remove it ($kind)$([ -n "$keep_state" ] && echo ", but not configuration, identity and models" || echo " with configuration, identity and models")"
    return
  fi
  if [ "$source_kind" = clone ]; then note "1. install what building needs; build in $place"; else
    note "1. see that curl, ssh-keygen, tar and gzip are there$(is_root && echo ', and install what is missing')
2. fetch from $place: SHA256SUMS, its signature, and the file that ends in $(suffix "$(artefact_kind)"); verify both"; fi
  if once; then
    note "3. run a node from a private directory, show what this machine has and could serve
4. join $cluster, send the prompt, print the answer
5. stop the node and remove the directory"
    return
  fi
  note "3. install it: $([ "$kind" = user ] && echo "in $root, unit in $units" || echo "$kind, system-wide")$(is_installed && echo "; version $(installed_version) is there and is kept when it is the same")"
  [ ${#given[@]} = 0 ] || note "   keep ${given[*]%%=*} in $environment_file"
  if [ -z "$start" ]; then note "4. start nothing (--no-start)"; elif can_start; then
    note "4. ${control[*]} enable --now opengatewayd; show what this machine has and could serve
5. join $cluster as one that $(role_in_words "${role:-consume}")$([ -z "$prompt" ] || echo '; send the prompt')"
  else note "4. say how to run it by hand: there is no systemd here that could"; fi
}

# A prompt on a machine without OpenGateway needs no installation, when there is a dbus-daemon for a private bus; without
# systemd there is no other way.
once() { [ -n "$prompt" ] && [ -n "$start" ] && ! is_installed && { can_run_privately || ! can_start; }; }
artefact_kind() { if once; then echo tar; else echo "$kind"; fi; }

main() {
  read_arguments "$@"
  exec </dev/null # nothing that is started here may read the rest of a piped script
  read_environment
  choose_mode
  private=() fresh='' changed='' was_active='' recording='' lock=''
  if [ $action = install ]; then
    check_platform
    choose_source
  fi
  if [ -n "$dry" ]; then describe; exit 0; fi
  prepare_work
  take_lock
  if [ $action = uninstall ]; then run_uninstall; exit 0; fi
  if [ "$source_kind" = clone ]; then say "OpenGateway from the clone $place"; else say "OpenGateway from the release $place"; fi
  if once; then run_once; else run_install; fi
  exit 0
}

main "$@"
}
