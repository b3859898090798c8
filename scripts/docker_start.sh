#!/usr/bin/env bash
# Builds the image and starts everything in compose.yaml: an origin, three nodes behind nginx, Prometheus, Loki, Alloy and Grafana.
#
#   scripts/docker_start.sh              builds, starts, waits until all are healthy, and prints the addresses
#   scripts/docker_start.sh --stop       stops everything; the data stays
#   scripts/docker_start.sh --minikube   only builds the image, inside minikube, as castier:dev
#
#   --seaweedfs  with SeaweedFS in place of castier-origin (compose.seaweedfs.yaml)
#   --no-build   uses the existing image castier:dev
#   --dry-run    prints the commands and runs none
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$here/scripts/lib.sh"

action=start build=yes store=''
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --stop) action=stop ;;
    --minikube) action=minikube ;;
    --no-build) build='' ;;
    --seaweedfs) store=seaweedfs ;;
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
[[ -z $store ]] || compose+=(--file "$here/compose.$store.yaml")
if [[ $action == stop ]]; then
  run "${compose[@]}" down
  exit 0
fi
if [[ -z $dry_run ]]; then
  docker info >/dev/null 2>&1 || fail "docker is installed, but its daemon does not answer; start it, or join the group docker"
fi
# secret FILE: creates it once, and never in git.
secret() {
  if [[ -s $1 ]]; then return; fi
  if [[ -n $dry_run ]]; then echo "openssl rand -hex 32 > $1"; return; fi
  need openssl "your system's package manager"
  mkdir -p "$(dirname "$1")"
  # The container's user 65532 does not own the file, and must be able to read it.
  (umask 022 && openssl rand -hex 32 >"$1.new" && mv "$1.new" "$1")
}
# The cluster's, and the store's.
secret "$here/castier-data/compose-peer-secret"
if [[ -n $store ]]; then
  key=$here/castier-data/compose-store-secret
  secret "$key"
  if [[ -z $dry_run ]]; then
    identities='{"identities":[{"name":"castier","credentials":[{"accessKey":"castier","secretKey":"%s"}],"actions":["Admin","Read","Write","List"]}]}'
    # shellcheck disable=SC2059 # the format has a %s for the key
    (umask 022 && printf "$identities" "$(<"$key")" >"$here/castier-data/compose-store-s3.json")
  fi
fi
[[ -z $build ]] || run docker build --build-arg "REVISION=$revision" --tag castier:dev "$here"
run "${compose[@]}" up --detach --wait
say "castier http://127.0.0.1:8080   Grafana http://127.0.0.1:3000   Prometheus http://127.0.0.1:9090; scripts/docker_start.sh --stop ends it"
