# shellcheck shell=bash
# Common functions of the scripts for containers and Kubernetes. To be sourced.

name=$(basename "$0" .sh)
# castier's namespace in the cluster.
# shellcheck disable=SC2034 # for those who source this
namespace=cas
dry_run=''

# The comment at the top of the script.
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }
say() { echo "$name: $1"; }
fail() { echo "$name: $1" >&2; exit 1; }
wrong() { echo "$name: $1; see scripts/$(basename "$0") --help" >&2; exit 2; }
# value --OPTION VALUE...: the option's value.
value() { [[ -n ${2:-} && ${2:0:2} != -- ]] || wrong "$1 needs a value"; echo "$2"; }
# need TOOL WHERE: exits with one clear line if the tool is missing. A dry run needs no tools.
need() {
  [[ -n $dry_run ]] || command -v "$1" >/dev/null 2>&1 || fail "$1 is not installed; see $2"
}
# run COMMAND...: runs the command; a dry run prints it, ready to paste.
run() {
  if [[ -n $dry_run ]]; then printf '%q ' "$@" | sed 's/ $//'; echo; else "$@"; fi
}
