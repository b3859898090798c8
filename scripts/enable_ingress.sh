#!/usr/bin/env bash
# Installs ingress-nginx in the cluster: on minikube as its addon, otherwise from the controller's Helm chart.
#
#   scripts/enable_ingress.sh            installs it and waits until it is ready; a second run changes nothing
#
#   --chart-version VERSION   of the Helm chart ingress-nginx (4.13.2)
#   --helm                    uses the Helm chart on minikube too
#   --dry-run                 prints the commands and runs none
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$here/scripts/lib.sh"

version=4.13.2 chart=''
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --helm) chart=yes ;;
    --chart-version) version=$(value "$@"); shift ;;
    *) wrong "there is no option $1" ;;
  esac
  shift
done

need kubectl "https://kubernetes.io/docs/tasks/tools"
# A dry run also asks for the name of the context, if possible, since the commands depend on it.
context=$(kubectl config current-context 2>/dev/null || true)
if [[ -z $context && -z $dry_run ]]; then
  fail "kubectl has no cluster; start one, with minikube start, or choose one with kubectl config use-context"
fi
if [[ $context == minikube && -z $chart ]]; then
  need minikube "https://minikube.sigs.k8s.io/docs/start"
  run minikube addons enable ingress
else
  need helm "https://helm.sh/docs/intro/install"
  run helm upgrade --install ingress-nginx ingress-nginx --repo https://kubernetes.github.io/ingress-nginx \
    --version "$version" --namespace ingress-nginx --create-namespace
fi
run kubectl wait --namespace ingress-nginx --for=condition=Available deployment/ingress-nginx-controller --timeout=180s
say "ingress-nginx is ready; go on with scripts/apply_k8s.sh"
