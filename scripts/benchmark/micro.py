"""Makes a table of the last micro-benchmarks from criterion's files. Started by `scripts/bench micro`."""

import json
import os
import sys

UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1, "ns"))


def main():
    directory, since = os.path.join(os.environ.get("CARGO_TARGET_DIR", "target"), "criterion"), float(sys.argv[1])
    found = []
    for folder, _, files in os.walk(directory):
        if os.path.basename(folder) == "new" and "estimates.json" in files:
            written = os.path.getmtime(os.path.join(folder, "estimates.json"))
            if written >= since:
                found.append((written, read(folder, "benchmark.json"), read(folder, "estimates.json")["median"]))
    if not found:
        raise SystemExit("bench: no benchmark has that in its name")
    print("| | median | 95 % confidence | rate |\n| --- | ---: | ---: | ---: |")
    # In the order in which they ran.
    for _, benchmark, median in sorted(found, key=lambda row: row[0]):
        interval, nanoseconds = median["confidence_interval"], median["point_estimate"]
        bounds = f"{time(interval['lower_bound'])} – {time(interval['upper_bound'])}"
        print(f"| {benchmark['title']} | {time(nanoseconds)} | {bounds} | {rate(benchmark.get('throughput'), nanoseconds)} |")


def read(folder, name):
    with open(os.path.join(folder, name)) as file:
        return json.load(file)


def time(nanoseconds):
    """With three digits."""
    divisor, unit = next(((divisor, unit) for divisor, unit in UNITS if nanoseconds >= 0.9995 * divisor), UNITS[-1])
    value = nanoseconds / divisor
    return f"{value:.0f} {unit}" if value >= 99.5 else f"{value:.1f} {unit}" if value >= 9.95 else f"{value:.2f} {unit}"


def rate(throughput, nanoseconds):
    """The unit of `throughput`, per second."""
    (kind, count), = (throughput or {"": 0}).items()
    per_second = count / nanoseconds * 1e9
    return {"Bytes": f"{per_second / 2**20:,.0f} MiB/s", "Elements": f"{per_second:,.0f} readers/s"}.get(kind, "")


if __name__ == "__main__":
    main()
