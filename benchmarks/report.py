"""Tables and a plot of the speed records: python -m benchmarks.report

Writes RESULTS/speed.md, all records with their tables, and for each machine RESULTS/speed-MACHINE.png: the
peer's time over ours in the main record of every benchmark. `make readme` copies the main tables into
benchmarks/README.md and a short one (`headline.py`) into README.md.
"""

import argparse
import io
from functools import partial
from pathlib import Path

from .floors import base
from .harness import UNITS, describe, ratio
from .machine import title
from .record import RESULTS, load_all, write
from .selection import (
    TITLES,
    is_wrong,
    machines,
    main_pairs,
    main_records,
    pairs,
    timed_single_calls,
    wrong_gradients,
)

TABLES = "speed.md"
NOTHING = "Not measured yet."
WRONG_NOTE = "peer's gradients are wrong"
OLD_TITLE = ", older records"
OLD_NOTE = (
    "These records are of commits before 3612f70: the kernels were older, and single calls were timed, which "
    "charged the allocation of memory to the peer. They do not compare with newer records."
)
PARTS = ("->", "_dropout", "dropout_mask", ", eval")  # cases that a summary leaves to plot and other tables
COLOURS = {"fp32": "#2f6db3", "high": "#d9722c", "bf16": "#3f8f5b", "fp16": "#8a5fb0", "fp64": "#7d7d7d"}
HEADINGS = {
    "tokens_per_s": "tokens/s",
    "gflops": "GFLOP/s",
    "gb_s": "GB/s",
    "roof_share": "of the roof",
    "us_per_step": "µs a time step",
    "forward_us_per_step": "µs a time step, forward",
    "floor_ms": "floor, ms",
    "floor_share": "floor / time",
    "host_ms": "host, ms",
    "back_to_back_ms": "back to back, ms",
    "peak_mb": "peak MB",
    "loss_error": "error of the loss",
    "gradient_error": "error of the gradient",
    "file_mb": "MB in a file",
    "output_error": "output, from ours in fp32",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
}


def _plot_name(machine):
    return f"speed-{machine}.png"


def ratio_table(records, choose=pairs, without=(), wrong=()):
    """Markdown, a row a comparison that `choose` gives, of the cases whose name holds none of `without`.

    wrong: the peers with wrong gradients, see `is_wrong`.
    """
    rows = []
    for record in records:
        for case, ours, peer, names in choose(record):
            if any(part in case for part in without):
                continue
            low, middle, high = ratio(ours, peer)
            forward = f"{ratio(ours, peer, 'forward_ms')[1]:.2f}" if "forward_ms" in ours else ""
            both = ours.get("peak_mb") and peer.get("peak_mb")
            memory = f"{ours['peak_mb']:,.0f}, {peer['peak_mb']:,.0f} MB" if both else ""
            errors = [f"{e:.0e}" for s in (ours, peer) if (e := s.get("gradient_error")) is not None]
            digits = _digits(record)
            medians = [f"{s['total_ms']['median']:,.{digits}f}" for s in (ours, peer)]
            times = f"{', '.join(medians)} ms"
            speed = f"**{middle:.2f}** ({low:.2f}-{high:.2f})"
            if is_wrong(record, peer, names[1], wrong):
                speed = f"{speed.replace('*', '')}, {WRONG_NOTE}"
            what = f"{case} ({_sizes(record)})"
            rows.append(
                [what, *names, times, speed, _at_roof(record, ours, peer), forward, memory, ", ".join(errors)]
            )
    head = ["what", "ours", "peer", "median: ours, peer", "times as fast (p20-p80)", "ratio at the roof"]
    head += ["forward only"]
    return _markdown([*head, "peak memory: ours, peer", "gradient error: ours, peer"], rows)


def _at_roof(record, ours, peer):
    """How many times as fast as the peer ours could be: with all products at the roof, and nothing else."""
    if not peer.get("gflops") or "gpu" in record:  # a GPU's records have a floor of their own
        return ""
    sides = [side for case in record["cases"].values() for side in case["sides"].values()]
    if any(side.get("roof_share", 0) > 1 for side in sides):  # no bound: dropped weights were left out
        return ""
    return f"{record['roof'][base(ours['precision']) + '_gflops'] / peer['gflops']:.2f}"


def side_table(record):
    """Markdown, a row a side of each case; columns that nothing fills are left out."""
    sides = [(c, n, s) for c, content in record["cases"].items() for n, s in content["sides"].items()]
    digits = _digits(record)
    keys = [key for key in HEADINGS if any(s.get(key) is not None for _, _, s in sides)]
    rows = []
    for case, name, side in sides:
        total = side["total_ms"]
        median, low, high = (f"{total[key]:,.{digits}f}" for key in ("median", "p20", "p80"))
        times = f"{median} ({low}-{high})"
        forward = f"{side['forward_ms']['median']:,.{digits}f}" if "forward_ms" in side else ""
        cells = ["" if side.get(key) is None else f"{side[key]:{UNITS[key][1]}}" for key in keys]
        rows.append([case, name, times, forward, *cells])
    return _markdown(["case", "side", "ms (p20-p80)", "forward ms", *(HEADINGS[key] for key in keys)], rows)


def _markdown(head, rows):
    """A table without its empty columns; the first column does not repeat what the row above says."""
    if not rows:
        return ""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    shown = [
        ["" if i == 0 and k and rows[k - 1][0] == row[0] else row[i] for i in used]
        for k, row in enumerate(rows)
    ]
    lines = [[head[i] for i in used], ["---"] * len(used), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _digits(record):
    """Digits after the point of its milliseconds."""
    return 3 if "gpu" in record else 1


def failures(record):
    """Markdown of the sides that failed."""
    return "\n".join(
        f"- {case}, {side}: `{error.splitlines()[0]}`"
        for case, content in record["cases"].items()
        for side, error in content.get("failed", {}).items()
    )


def _sizes(record):
    sizes = {key: record[key] for key in ("preset", "batch", "bptt", "vocab") if key in record}
    if "gpu" in record:
        return f"{describe(sizes)}, {record['device']}"
    return f"{describe(sizes)}, {record['threads']} thread{'s' if record['threads'] > 1 else ''}"


def places(records):
    """Where records were measured, a line each place."""
    loads = {}
    for r in records:
        versions = ", ".join(f"{k} {r['versions'][k]}" for k in ("torch", "fastai") if r["versions"].get(k))
        commit, _, changes = str(r["commit"]).partition(" ")
        commit = " ".join([commit[:12], changes]).strip()
        where = [title(r), *([_through(r["gpu"])] if "gpu" in r else [])]
        line = f"{', '.join(where)}, {versions}, commit {commit}, {r['date']}"
        line += ", --quick: two rounds" if r["quick"] else ""
        loads.setdefault(line, []).append(r["load_average_1min"])
    return [
        f"{line}; load average {min(seen):g}" + (f" to {max(seen):g}" if len(seen) > 1 else "")
        for line, seen in loads.items()
    ]


def _through(gpu):
    return f"driver {gpu['driver']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}"


def summary(records, folder=""):
    """Markdown of the main records, newest machine first, plots from `folder`; without records a sentence."""
    if not records:
        return NOTHING
    parts = [_section(name, some, folder) for name, some in machines(records).items()]
    return "\n\n".join([*parts, f"All records, with rates and errors: [{TABLES}]({folder}{TABLES})."])


def _section(machine, records, folder):
    main = main_records(records)
    picture = f"![Times as fast as the peers]({folder}{_plot_name(machine)})"
    plot = [picture] if any(any(pairs(r)) for r in main) else []
    wrong = wrong_gradients(records)
    table = ratio_table(main, partial(main_pairs, wrong=wrong), PARTS, wrong)
    old = [OLD_NOTE] if all(map(timed_single_calls, records)) else []
    name = title(records[0]) + (OLD_TITLE if old else "")
    parts = [f"### {name}", *old, *plot, *([table] if table else []), "Measured on:"]
    return "\n\n".join([*parts, "\n".join(f"- {place}" for place in places(main))])


def full(records):
    """Markdown of every record, machine by machine."""
    parts = ["# Speed", summary(records)]
    for some in machines(records).values():
        parts.append(f"# {title(some[0])}")
        for record in sorted(some, key=lambda r: list(TITLES).index(r["benchmark"])):
            parts += _one(record, wrong_gradients(some))
    return "\n\n".join(parts) + "\n"


def _one(record, wrong):
    roof, failed = record["roof"], failures(record)
    rates = ", ".join(f"{p} {roof[key]:,.0f} GFLOP/s" for p in COLOURS if (key := f"{p}_gflops") in roof)
    return [
        f"## {TITLES[record['benchmark']]}: {_sizes(record)}",
        side_table(record),
        ratio_table([record], wrong=wrong),
        *([f"Failed:\n\n{failed}"] if failed else []),
        f"The roof: {rates}, copy {roof['copy_gb_s']:,.1f} GB/s.",
        f"Measured on {places([record])[0]}: `{record['command']}`",
    ]


def plot(records):
    """PNG bytes: for each record a panel of bars, peer's time over ours, with the 20th to 80th percentile.

    None where nothing compares.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state

    main = [r for r in main_records(records) if any(pairs(r))]
    if not main:  # all of ours, or all peers, failed
        return None
    models = [r for r in main if r["benchmark"].startswith(("train_step", "way_back"))]
    columns = [column for column in (models, [r for r in main if r not in models]) if column]
    wrong = wrong_gradients(records)
    room = 3  # in bars: a panel's title and scale
    bars = [[len(list(main_pairs(r, wrong))) + room for r in column] for column in columns]
    tallest = max(map(sum, bars))
    figure = Figure(figsize=(8.5 * len(columns), 0.27 * tallest + 0.6), layout="constrained")
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column, heights in zip(parts, columns, bars, strict=True):
        empty = tallest - sum(heights) or 0.01  # below the last panel, so that all bars are of one height
        axes = part.subplots(len(column) + 1, 1, height_ratios=[*heights, empty])
        for axis, record in zip(axes, column, strict=False):
            _panel(axis, record, wrong)
        axes[-1].axis("off")
    what = "The peer's time over ours: times as fast (bar: median, line: p20 to p80)"
    figure.suptitle(f"{what}\n{title(records[0])}", fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _panel(axis, record, wrong):
    labels, colours, ratios = [], [], []
    for case, ours, peer, names in main_pairs(record, wrong):
        prefix = f"{case}: " if len(record["cases"]) > 1 else ""
        note = ", wrong gradients" if is_wrong(record, peer, names[1], wrong) else ""
        labels.append(f"{prefix}{names[0]} against {names[1]}{note}")
        colours.append(COLOURS[base(ours["precision"])])
        ratios.append(ratio(ours, peer))
    middles = [middle for _, middle, _ in ratios]
    reach = [[m - low for low, m, _ in ratios], [high - m for _, m, high in ratios]]
    axis.barh(labels, middles, xerr=reach, color=colours, height=0.7, error_kw={"lw": 1, "capsize": 2})
    for row, (_, middle, high) in enumerate(ratios):
        axis.annotate(
            f"{middle:.2f}", (high, row), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.axvline(1, color="#444444", linewidth=1, linestyle="--")
    axis.set_xlim(0, 1.12 * max(1.0, *(high for _, _, high in ratios)))
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{TITLES[record['benchmark']]} ({_sizes(record)})", fontsize=9, loc="left")


def write_report(results):
    """Writes the tables, and the plots that there are records for; -> the records."""
    records = load_all(results, "speed")
    write(Path(results) / TABLES, full(records).encode())
    for name, some in machines(records).items():
        picture = plot(some)
        if picture:
            write(Path(results) / _plot_name(name), picture)
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    args = parser.parse_args()
    records = write_report(args.results)
    plots = [name for name in map(_plot_name, machines(records)) if (args.results / name).exists()]
    print(f"{len(records)} speed records: wrote {', '.join([TABLES, *plots])}")


if __name__ == "__main__":
    main()
