#!/usr/bin/env bash
# Installs Prometheus and Grafana (kube-prometheus-stack) in the namespace `monitoring`, with castier's monitoring.
#
#   scripts/monitoring.sh                    installs or upgrades; a second run changes nothing
#   scripts/monitoring.sh --write-rule       only writes k8s/components/monitoring/prometheusrule.yaml from grafana/prometheus/*.rules.yaml, and
#                                            copies grafana/dashboards/*.json beside it, where kustomize can read them
#
#   --chart-version VERSION   of kube-prometheus-stack (77.5.0)
#   --dry-run                 prints the commands and runs none
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$here/scripts/lib.sh"

version=77.5.0 only_rule=''
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --write-rule) only_rule=yes ;;
    --chart-version) version=$(value "$@"); shift ;;
    *) wrong "there is no option $1" ;;
  esac
  shift
done

# A PrometheusRule has the same groups as the rule files, below `spec`.
rule() {
  cat <<'YAML'
# Made by scripts/monitoring.sh --write-rule. Change grafana/prometheus/*.rules.yaml instead.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: castier
  labels:
    release: kube-prometheus-stack
spec:
  groups:
YAML
  # Every file starts with its only key, `groups:`. Comments before it are dropped.
  for file in "$here"/grafana/prometheus/*.rules.yaml; do
    awk 'seen { print (length($0) ? "  " : "") $0 } /^groups:$/ { seen = 1 }' "$file"
  done
}

if [[ -n $only_rule ]]; then
  if [[ -n $dry_run ]]; then rule; exit 0; fi
  rule >"$here/k8s/components/monitoring/prometheusrule.yaml"
  mkdir -p "$here/k8s/components/monitoring/dashboards"
  rm -f "$here"/k8s/components/monitoring/dashboards/*.json
  cp "$here"/grafana/dashboards/*.json "$here/k8s/components/monitoring/dashboards/"
  exit 0
fi

need helm "https://helm.sh/docs/intro/install"
need kubectl "https://kubernetes.io/docs/tasks/tools"
run helm repo add prometheus-community https://prometheus-community.github.io/helm-charts --force-update
run helm repo update prometheus-community
run helm upgrade --install kube-prometheus-stack prometheus-community/kube-prometheus-stack \
  --version "$version" --namespace monitoring --create-namespace --wait --timeout 10m
# The kinds of the ServiceMonitors and alerts exist only now, so an installation without the component gets them here. The dashboards are ConfigMaps,
# which Grafana's sidecar finds by their label.
run kubectl apply --server-side -n "$namespace" -k "$here/k8s/components/monitoring"
say "Prometheus and Grafana are installed; scripts/port_forward.sh grafana opens them"
