"""Writes the results: a CSV of all rounds, Markdown tables of the medians, and plots."""

import csv
import os
import statistics

import matplotlib

matplotlib.use("Agg")
# Text stays text in the SVG files, and equal figures give equal files.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "castier", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
import matplotlib.pyplot as plt  # noqa: E402

ORDER = ("castier", "nginx", "varnish")
# Varnish has no cache of files that outlives it. "origin directly": no cache at all.
DISK_ORDER = ("castier", "nginx", "origin directly")
COLOURS = {"castier": "#c1502e", "nginx": "#5a8f5a", "varnish": "#4a6fa5", "origin directly": "#888888"}
HITS = ("hits 1 KiB", "hits 64 KiB", "hits 1 MiB", "connection: close", "304")
DISK = ("disk hits 64 KiB", "disk hits 1 MiB", "fill")
TITLES = {"connection: close": "1 KiB, a connection each", "304": "304 (If-None-Match)", "herd": "herd", "zipf": "Zipf", "idle": "idle"}
TITLES |= {"fill": "fill, 1 GiB", "full": "full of 1 KiB blobs", "streaming": "slow origin"}
# Metrics for which more is better. For all others less is better.
MORE = ("requests/s", "hit ratio, %", "blobs kept", "MB/s")

# Published figure, its unit and the metric of ours that answers it. The runs: two of the Sangraha object store, of a message service that names
# messages by their SHA-256, of a form processor, of a test harness for content-addressed stores, and of a data service's cache.
PUBLISHED = {
    "sangraha-2k": [("57.16 requests/s", "requests/s")],
    "sangraha-1m": [("7.70 requests/s", "requests/s")],
    "messages": [("1,600 requests/s", "requests/s")],
    "forms": [("mean 1,858 ms in one container; 1,056 ms on 5 replicas", "mean, ms")],
    "cas-harness": [("p50 2.69 ms", "50th, ms"), ("p95 113.6 ms", "95th, ms"), ("p99 505.8 ms", "99th, ms"), ("success 1", "success")],
    "data-services": [("184 backend queries", "origin loads"), ("816.7 ms in all", "total, ms")],
}


# The text before the table of published runs.
PAIR = """The commands want a castier in front of a castier-origin that allows DELETE, both fresh, with their data on a disk, as it was here: an upload is
answered when it is synced.

```sh
CASTIER_ALLOW_DELETE=true castier-origin --listen 127.0.0.1:9000 --root ./origin &
CASTIER_ORIGIN__URL=http://127.0.0.1:9000 castier &
```
"""


class Results:
    """The rows by experiment, metric and server."""

    def __init__(self, rows):
        self.rows = rows
        self.values = {}
        for experiment, server, _, metric, value in rows:
            self.values.setdefault((experiment, metric), {}).setdefault(server, []).append(value)

    def metrics(self, experiment):
        return [metric for (name, metric) in self.values if name == experiment]

    def of(self, experiment, metric):
        """Server → (median, least, most)."""
        found = self.values.get((experiment, metric), {})
        return {name: (statistics.median(found[name]), min(found[name]), max(found[name])) for name in dict.fromkeys(ORDER + DISK_ORDER) if name in found}


def number(value):
    """About three digits."""
    if abs(value) >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cell(spread, best):
    median, least, most = spread
    text = f"**{number(median)}**" if best else number(median)
    # With less than half a percent between them, the rounds agreed.
    return text if most - least <= 0.005 * abs(median) else f"{text} ({number(least)}–{number(most)})"


def write_csv(results, path):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["experiment", "server", "round", "metric", "value"])
        writer.writerows([*row[:4], f"{row[4]:.6g}"] for row in results.rows)


def table(results, experiments, order=ORDER):
    """One line for each metric. The best median is bold."""
    lines = ["| | " + " | ".join(order) + " |", "| --- |" + " ---: |" * len(order)]
    for experiment in experiments:
        for metric in results.metrics(experiment):
            if metric == "busy":
                continue
            spreads = results.of(experiment, metric)
            # A server without a cache is only for comparison, and is never bold.
            best = (max if metric in MORE else min)(spreads[name][0] for name in spreads if name in ORDER)
            cells = [cell(spreads[name], number(spreads[name][0]) == number(best)) if name in spreads else "–" for name in order]
            lines.append(f"| {TITLES.get(experiment, experiment)}: {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def published_table(results):
    lines = ["| run | published | castier, one node | command |", "| --- | --- | --- | --- |"]
    for scenario, figures in PUBLISHED.items():
        for published, metric in figures:
            spread = results.of(scenario, metric).get("castier")
            if spread is None:
                continue
            what = "" if metric == "success" else f" {metric.split(', ')[-1]}" if ", " in metric else f" {metric}"
            more = " --fill http://127.0.0.1:9000 --stats http://127.0.0.1:8082" if scenario == "data-services" else ""
            command = f"`castier-load --target http://127.0.0.1:8080 --scenario {scenario}{more}`"
            lines.append(f"| {scenario} | {published} | {cell(spread, False)}{what} | {command} |")
    return "\n".join(lines)


def markdown(results, about, images, clients):
    """Everything between the markers of docs/benchmarks.md."""
    parts = ["### The machine and the settings\n", *(f"- {line}" for line in about), ""]
    parts += ["Medians of the rounds, with the least and the most in brackets. The best of each row is bold.\n"]
    sections = [
        ("Hits", HITS, "hits"),
        ("The disk: hits, and the fill of a cold blob of 1 GiB", DISK, "disk"),
        (f"A cold herd: {clients} clients, one blob of 64 MiB", ("herd",), "herd"),
        ("Zipf's law over a corpus ten times the cache, and idle connections", ("zipf", "idle"), "zipf"),
        ("Starting, a full cache, and one slow load for many clients", ("start", "full", "streaming"), None),
    ]
    for title, experiments, image in sections:
        if any(results.metrics(experiment) for experiment in experiments):
            parts += [f"### {title}\n", table(results, experiments, DISK_ORDER if experiments is DISK else ORDER), ""]
            parts += [f"![{title}]({images}{image}.svg)\n"] if image else []
    if any(results.metrics(scenario) for scenario in PUBLISHED):
        parts += ["### Published runs of the predecessors\n", PAIR, published_table(results), ""]
    return "\n".join(parts)


def panels(path, title, panels):
    """A row of small bar charts, each with its own unit; whiskers from the least to the most."""
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return
    rows = -(-len(panels) // 5)
    columns = -(-len(panels) // rows)
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 2.6 * rows + 0.5), squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, spreads) in zip(axes.flat, panels):
        for place, (server, (median, least, most)) in enumerate(spreads.items()):
            axis.bar(place, median, width=0.7, color=COLOURS[server], yerr=[[median - least], [most - median]], capsize=3, ecolor="#333333")
            axis.annotate(number(median), (place, most), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
        axis.set_xticks(range(len(spreads)), [name.replace(" ", "\n") for name in spreads])
        axis.set_title(name, fontsize=9)
        axis.set_ylim(0, max(most for _, _, most in spreads.values()) * 1.15 or 1)
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    for suffix, metadata in (("svg", {"Date": None}), ("png", None)):
        figure.savefig(f"{path}.{suffix}", dpi=110, metadata=metadata)
    plt.close(figure)


def way(metric):
    """A metric, and which way is better."""
    return f"{metric} {'↑' if metric in MORE else '↓'}"


def plot(results, directory, clients):
    of = results.of
    name = lambda experiment: TITLES.get(experiment, experiment)  # noqa: E731
    hits = [(f"{name(experiment)}\nµs of CPU per request", of(experiment, "µs CPU/request")) for experiment in HITS]
    hits += [(f"{name(experiment)}\nrequests/s from one core", of(experiment, "requests/s")) for experiment in HITS]
    panels(os.path.join(directory, "hits"), "Hits: the server's CPU (less is better) and throughput (more is better)", hits)
    disk = [(f"{name(experiment)}\n{way(metric)}", of(experiment, metric)) for experiment in DISK for metric in results.metrics(experiment)]
    panels(os.path.join(directory, "disk"), "The disk tier (arrow: which way is better)", [panel for panel in disk if "busy" not in panel[0]])
    herd = [(metric, of("herd", metric)) for metric in results.metrics("herd")]
    panels(os.path.join(directory, "herd"), f"{clients} clients ask for one cold blob of 64 MiB (less is better)", herd)
    rest = [(f"Zipf: {way(metric)}", of("zipf", metric)) for metric in results.metrics("zipf")]
    rest += [(f"idle: {way(metric)}", of("idle", metric)) for metric in results.metrics("idle")]
    panels(os.path.join(directory, "zipf"), "A corpus ten times the cache; idle connections (arrow: which way is better)", rest)
