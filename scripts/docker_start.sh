#!/usr/bin/env bash
# Builds the image and starts everything in compose.yaml: an origin, three nodes behind nginx, Prometheus, Loki, Alloy and Grafana.
#
#   scripts/docker_start.sh              builds, starts, waits until all are healthy, and prints the addresses
#   scripts/docker_start.sh --stop       stops everything; the data stays
#   scripts/docker_start.sh --minikube   only builds the image, inside minikube, as castier:dev
#
#   --no-build   uses the existing image castier:dev
#   --dry-run    prints the commands and runs none
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$here/scripts/lib.sh"

action=start build=yes
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --stop) action=stop ;;
    --minikube) action=minikube ;;
    --no-build) build='' ;;
    *) wrong "there is no option $1" ;;
  esac
  shift
done

# The commit, for the image's label. An export without git has none.
revision=$(git -C "$here" rev-parse --short HEAD 2>/dev/null || echo unknown)

if [[ $action == minikube ]]; then
  need minikube "https://minikube.sigs.k8s.io/docs/start"
  # Builds in minikube's own Docker, so that no push is needed.
  run minikube image build --tag castier:dev --build-opt "build-arg=REVISION=$revision" "$here"
  say "the image castier:dev is in minikube; go on with scripts/enable_ingress.sh"
  exit 0
fi

need docker "https://docs.docker.com/engine/install"
compose=(docker compose --file "$here/compose.yaml")
if [[ $action == stop ]]; then
  run "${compose[@]}" down
  exit 0
fi
if [[ -z $dry_run ]]; then
  docker info >/dev/null 2>&1 || fail "docker is installed, but its daemon does not answer; start it, or join the group docker"
fi
# The cluster's secret. Created once, and never in git.
secret=$here/castier-data/compose-peer-secret
if [[ ! -s $secret ]]; then
  if [[ -n $dry_run ]]; then
    echo "openssl rand -hex 32 > $secret"
  else
    need openssl "your system's package manager"
    mkdir -p "$(dirname "$secret")"
    # The container's user 65532 does not own the file, and must be able to read it.
    (umask 022 && openssl rand -hex 32 >"$secret.new" && mv "$secret.new" "$secret")
  fi
fi
[[ -z $build ]] || run docker build --build-arg "REVISION=$revision" --tag castier:dev "$here"
run "${compose[@]}" up --detach --wait
say "castier http://127.0.0.1:8080   Grafana http://127.0.0.1:3000   Prometheus http://127.0.0.1:9090; scripts/docker_start.sh --stop ends it"
