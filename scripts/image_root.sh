#!/usr/bin/env bash
# Assembles the file system of the container image: the programs, their libraries, and the files that those read. The image has no shell and no
# package manager.
#
#   scripts/image_root.sh BIN DIR      BIN has castier and castier-origin; DIR is created
#
#   --sbom FILE   a list of components (CycloneDX) for the image; can be repeated
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$here/scripts/lib.sh"

arguments=() sboms=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --sbom) sboms+=("$(value "$@")"); shift ;;
    -*) wrong "there is no option $1" ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
((${#arguments[@]} == 2)) || wrong "say where the programs are, and where the files should go"
bin=${arguments[0]} root=${arguments[1]}
[[ ! -e $root ]] || fail "$root exists; name a directory that does not"
need ldd "the package libc-bin"

mkdir -p "$root"/{etc/ssl/certs,usr/bin,usr/share/doc/castier,tmp,var/lib/castier,var/lib/castier-origin}
chmod 1777 "$root/tmp"
for program in castier castier-origin; do
  install -m 755 "$bin/$program" "$root/usr/bin/$program"
  # Lines such as "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)" and "/lib64/ld-linux-x86-64.so.2 (0x...)".
  ldd "$bin/$program" | grep -o '/[^ ]*' | while read -r library; do
    install -D -m 755 "$library" "$root$library"
  done
done
# For an origin with https.
install -m 644 /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt" ||
  fail "there are no certificates on this machine; install the package ca-certificates"
# Host names are looked up in /etc/hosts, then in DNS.
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
echo 'castier:x:65532:65532::/var/lib/castier:/sbin/nologin' >"$root/etc/passwd"
echo 'castier:x:65532:' >"$root/etc/group"
install -m 644 "$here/LICENSE" "$root/usr/share/doc/castier/LICENSE"
for sbom in ${sboms[@]+"${sboms[@]}"}; do install -m 644 "$sbom" "$root/usr/share/doc/castier/"; done
