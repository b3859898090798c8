#!/usr/bin/env bash
# Installs castier in the cluster: the namespace, the nodes' secret if there is none, and an overlay. Then waits until all pods are ready.
# For an overlay with the component seaweedfs it makes the store's key as well.
#
#   scripts/apply_k8s.sh                 the overlay minikube
#   scripts/apply_k8s.sh production      another folder of k8s/overlays, or the path of your own overlay
#
#   --delete    removes it from the cluster; the claims with the blobs, the secret and the namespace stay
#   --diff      shows what would change in the cluster
#   --dry-run   prints the commands and runs none
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$here/scripts/lib.sh"

overlay='' action=apply
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --delete) action=delete ;;
    --diff) action='diff' ;;
    -*) wrong "there is no option $1" ;;
    *) [[ -z $overlay ]] || wrong "one overlay is enough"; overlay=$1 ;;
  esac
  shift
done
overlay=${overlay:-minikube}
[[ $overlay == */* ]] || overlay=$here/k8s/overlays/$overlay
[[ -f $overlay/kustomization.yaml ]] || wrong "there is no overlay $overlay"

need kubectl "https://kubernetes.io/docs/tasks/tools"
case $action in
  diff)
    # Status 1 means that there are differences.
    run kubectl diff -k "$overlay" || (($? == 1))
    exit 0 ;;
  delete)
    # Everything except the namespace, whose deletion would delete the secret and the claims.
    if [[ -n $dry_run ]]; then
      echo "kubectl kustomize $(printf '%q' "$overlay") | kubectl delete --ignore-not-found -f -  # without the Namespace"
    else
      kubectl kustomize "$overlay" | awk 'BEGIN { RS = ORS = "---\n" } !/(^|\n)kind: Namespace\n/' | kubectl delete --ignore-not-found -f -
    fi
    exit 0 ;;
esac

run kubectl apply --server-side -f "$here/k8s/base/namespace.yaml"
# Created only once: nodes with the old secret would refuse new nodes with another one.
if [[ -n $dry_run ]] || ! kubectl get secret castier-peer --namespace "$namespace" >/dev/null 2>&1; then
  need openssl "your system's package manager"
  if [[ -n $dry_run ]]; then
    echo "openssl rand -hex 32 | kubectl create secret generic castier-peer --namespace $namespace --from-file=peer=/dev/stdin"
  else
    # Through standard input, since other users of this machine can read the arguments of a command.
    openssl rand -hex 32 | kubectl create secret generic castier-peer --namespace "$namespace" --from-file=peer=/dev/stdin
  fi
fi
store=castier-origin
if grep -q components/seaweedfs "$overlay/kustomization.yaml"; then
  store=seaweedfs
  # Created only once: the store and castier must have the same key.
  if [[ -n $dry_run ]]; then
    echo "openssl rand -hex 32  # the key, as below"
    echo "kubectl create secret generic castier-store --namespace $namespace --from-file=secret=KEY --from-file=s3.json=IDENTITIES"
  elif ! kubectl get secret castier-store --namespace "$namespace" >/dev/null 2>&1; then
    key=$(openssl rand -hex 32)
    identities='{"identities":[{"name":"castier","credentials":[{"accessKey":"castier","secretKey":"%s"}],"actions":["Admin","Read","Write","List"]}]}'
    # shellcheck disable=SC2059 # the format has a %s for the key
    kubectl create secret generic castier-store --namespace "$namespace" --from-file=secret=<(printf %s "$key") --from-file=s3.json=<(printf "$identities" "$key")
  fi
fi
run kubectl apply --server-side -k "$overlay"
run kubectl rollout status "statefulset/$store" --namespace "$namespace" --timeout=300s
run kubectl rollout status statefulset/castier --namespace "$namespace" --timeout=600s
say "castier runs; scripts/port_forward.sh opens a way to it"
