-- GETs of the paths in the file named by BENCH_PATHS, one after the other; with BENCH_REVALIDATE as a client that has them already.
local requests, next = {}, 0

function init(args)
  for path in io.lines(os.getenv("BENCH_PATHS")) do
    local headers = {}
    if os.getenv("BENCH_REVALIDATE") then headers["If-None-Match"] = '"' .. path:match("[^/]+$") .. '"' end
    if os.getenv("BENCH_CLOSE") then headers["Connection"] = "close" end
    requests[#requests + 1] = wrk.format("GET", path, headers)
  end
end

function request()
  next = next % #requests + 1
  return requests[next]
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format('\nRESULT {"requests":%d,"microseconds":%d,"bytes":%d,"errors":%d,"p50":%d,"p99":%d}\n', summary.requests,
    summary.duration, summary.bytes, e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50), latency:percentile(99)))
end
