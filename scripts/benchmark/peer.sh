#!/usr/bin/env bash
# CPU time of a GET of 64 KiB: a local hit, and a transfer from the peer (over both nodes). Needs wrk and built programs.
#
# There is no mirror, and hundreds of blobs are requested in turn, so that each request through the peer is a transfer. With one blob, most
# requests would join a running transfer, and look cheap. The figures of /stats in each line show that none did.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${CARGO_TARGET_DIR:-target}/release
base=${1:-7900} # the first of some 30 ports
seconds=${2:-8}
dir=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait; rm -rf "$dir"' EXIT

CASTIER_LISTEN__ADMIN=127.0.0.1:$((base + 1)) "$bin/castier-origin" --listen "127.0.0.1:$base" --root "$dir/origin" >/dev/null 2>&1 &
pids+=($!)
for port in $((base + 10)) $((base + 20)); do
  cat >"$dir/$port.toml" <<TOML
listen = { public = "127.0.0.1:$port", peer = "127.0.0.1:$((port + 1))", admin = "127.0.0.1:$((port + 2))" }
origin.url = "http://127.0.0.1:$base"
log.level = "warn"
cluster = { advertise = "127.0.0.1:$((port + 1))", peers = ["127.0.0.1:$((base + 11))", "127.0.0.1:$((base + 21))"], mirror_share = 0 }
TOML
  "$bin/castier" --config "$dir/$port.toml" >/dev/null 2>&1 &
  pids+=($!)
done
asked=http://127.0.0.1:$((base + 10)) admin=http://127.0.0.1:$((base + 12))
for port in $((base + 12)) $((base + 22)); do
  for ((tries = 0; tries < 300; tries++)); do curl -fs -o /dev/null "http://127.0.0.1:$port/readyz" && break; sleep 0.1; done
done

: >"$dir/own"
: >"$dir/other"
while [[ $(wc -l <"$dir/own") -lt 200 || $(wc -l <"$dir/other") -lt 200 ]]; do
  head -c 65536 /dev/urandom >"$dir/blob"
  digest=$(sha256sum "$dir/blob" | cut -c1-64)
  curl -s -o /dev/null -T "$dir/blob" "$asked/cas/$digest"
  case $(curl -sD - -o /dev/null "$asked/cas/$digest") in
    *detail=memory*) echo "$digest" >>"$dir/own" ;;
    *detail=peer*) echo "$digest" >>"$dir/other" ;;
  esac
done
cat >"$dir/wrk.lua" <<'LUA'
local paths, at = {}, 0
function init(args) for line in io.lines(args[1]) do paths[#paths + 1] = "/cas/" .. line end end
function request() at = at % #paths + 1; return wrk.format("GET", paths[at]) end
LUA

ticks() { awk '{ print $14 + $15 }' "/proc/$1/stat"; }
figure() { curl -s "$admin/stats" | grep -o "\"$1\":[0-9]*" | cut -d: -f2; }
run() { # name, file of digests, connections, a header
  local peers loads one two count hertz
  hertz=$(getconf CLK_TCK)
  peers=$(figure PeerLoads) loads=$(figure Loads) one=$(ticks "${pids[1]}") two=$(ticks "${pids[2]}")
  count=$(wrk -t1 "-c$3" "-d${seconds}s" -s "$dir/wrk.lua" ${4:+-H "$4"} "$asked" -- "$2" | awk '/requests in/ { print $1 }')
  awk -v name="$1" -v c="$3" -v n="$count" -v one=$(($(ticks "${pids[1]}") - one)) -v two=$(($(ticks "${pids[2]}") - two)) -v hertz="$hertz" \
    -v loads=$(($(figure Loads) - loads)) -v peers=$(($(figure PeerLoads) - peers)) 'BEGIN {
      us = 1e6 / hertz / n
      printf "%s, %2d connections: %d requests, %d loads, %d from the peer; CPU each: %.1f + %.1f = %.1f us\n", name, c, n, loads, peers, one * us, two * us, (one + two) * us
    }'
}
for connections in 1 16; do
  for _ in 1 2 3; do
    run "local hit   " "$dir/own" "$connections"
    run "through peer" "$dir/other" "$connections"
    # The cost of a session, which a hit in the fast path does not have.
    run "with session" "$dir/own" "$connections" "Range: bytes=0-"
  done
done
