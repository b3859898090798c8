#!/usr/bin/env bash
# Forwards ports of this machine into the cluster until Ctrl-C: to castier, its admin listener, the origin, Grafana or Prometheus.
#
#   scripts/port_forward.sh                       castier on 127.0.0.1:8080 and castier-0's admin listener on 127.0.0.1:8082
#   scripts/port_forward.sh castier grafana       only these. Known: castier, admin, origin, grafana, prometheus
#
#   --pod NAME   the pod of the admin listener (castier-0)
#   --dry-run    prints the commands and runs none
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$here/scripts/lib.sh"

pod=castier-0 wanted=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --pod) pod=$(value "$@"); shift ;;
    castier | admin | origin | grafana | prometheus) wanted+=("$1") ;;
    *) wrong "there is no $1 to open" ;;
  esac
  shift
done
((${#wanted[@]})) || wanted=(castier admin)

need kubectl "https://kubernetes.io/docs/tasks/tools"
pids=()
# Kills each process by its id, and no other forwards of this machine.
stop() {
  trap - EXIT INT TERM
  ((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null || true
  wait
}
trap stop EXIT
trap 'exit 0' INT TERM

# forward NAMESPACE TARGET LOCAL:REMOTE WHAT
forward() {
  local command=(kubectl port-forward --address 127.0.0.1 --namespace "$1" "$2" "$3")
  if [[ -n $dry_run ]]; then run "${command[@]}"; return; fi
  "${command[@]}" >/dev/null &
  pids+=($!)
  say "$4 on http://127.0.0.1:${3%%:*}"
}
for what in "${wanted[@]}"; do
  case $what in
    castier) forward "$namespace" service/castier 8080:80 castier ;;
    admin) forward "$namespace" "pod/$pod" 8082:8082 "the admin listener of $pod" ;;
    origin) forward "$namespace" service/castier-origin 9000:9000 castier-origin ;;
    grafana) forward monitoring service/kube-prometheus-stack-grafana 3000:80 Grafana ;;
    prometheus) forward monitoring service/kube-prometheus-stack-prometheus 9090:9090 Prometheus ;;
  esac
done
[[ -z $dry_run ]] || exit 0
# If one ends by itself, stop all. kubectl has printed the reason.
wait -n || fail "a connection into the cluster ended"
