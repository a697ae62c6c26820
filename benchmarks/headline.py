"""README.md's tables: a training step of both models, on one machine, and the factors on the others.

The one is the machine measured last, of those where stock torch has every precision.
"""

from .harness import ratio
from .machine import title
from .report import NOTHING, places
from .selection import is_wrong, machines, main_records, pairs, timed_single_calls, wrong_gradients

STEPS = {"train_step-lm": "language model", "train_step-classifier": "classifier"}
PRECISIONS = ("fp32", "bf16")
PEERS = ("torch", "fastai")
HEAD = ("training step", "precision", "this library", "stock torch", "fastai", "peak memory of the three")
OTHERS = "Stock torch's time over ours in the same steps on other machines:"
OLD = "These records are older than the present way of timing."


def headline(records, folder=""):
    """Markdown: the tables, where it was measured, and the plot from `folder`; without records a sentence."""
    found = {name: (_steps(some), wrong_gradients(some)) for name, some in machines(records).items()}
    found = {name: (steps, wrong) for name, (steps, wrong) in found.items() if steps}
    if not found:
        return NOTHING
    # in their order, but for machines that lack a precision or its peer
    machine, *others = sorted(found, key=lambda name: not _has_peers(found[name][0]))
    steps, wrong = found[machine]
    table = _table(HEAD, [row for record in steps for row in _rows(record, wrong)])
    where = [_places(steps), *([OLD] if any(map(timed_single_calls, steps)) else [])]
    elsewhere = _elsewhere([found[other] for other in others], {_sizes(record) for record in steps})
    picture = f"![The peer's time over ours in each benchmark]({folder}speed-{machine}.png)"
    return "\n\n".join([table, *where, *elsewhere, picture])


def _has_peers(steps):
    sides = [_sides(record, precision) for record in steps for precision in PRECISIONS]
    return all(ours and torch for ours, torch, _ in sides)


def _steps(records):
    """The main records of both steps, of those that were measured with care and have a peer."""
    steps = [r for r in main_records(records) if r["benchmark"] in STEPS and not r["quick"]]
    return [r for r in steps if any(pairs(r))]


def _table(head, rows):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _rows(record, wrong):
    for precision in PRECISIONS:
        ours, *peers = _sides(record, precision)
        if ours:
            cells = [_peer(record, ours, side, wrong) if side else "not measured" for side in peers]
            memory = [
                f"{side['peak_mb']:,.0f}" if side and side.get("peak_mb") else "-" for side in (ours, *peers)
            ]
            yield [STEPS[record["benchmark"]], precision, _ms(ours), *cells, f"{', '.join(memory)} MB"]


def _sides(record, precision):
    (case,) = record["cases"].values()
    return [case["sides"].get(f"{name} {precision}") for name in ("ours", *PEERS)]


def _peer(record, ours, side, wrong):
    if is_wrong(record, side, f"{side['library']} {side['precision']}", wrong):
        return f"{_ms(side)}, wrong gradients"
    low, middle, high = ratio(ours, side)
    return f"{_ms(side)}, **{middle:.2f}×** ({low:.2f}-{high:.2f})"


def _ms(side):
    return f"{side['total_ms']['median']:,.0f} ms"


def _places(steps):
    """A line where both steps were measured alike, otherwise two."""
    where = {}
    for record in steps:
        where.setdefault(_measured(record), []).append(STEPS[record["benchmark"]])
    lines = [f"{' and '.join(names)}: {text}" for text, names in where.items()]
    return "\n\n".join(line[0].upper() + line[1:] for line in lines)


def _measured(record):
    """The sizes, and where it was measured without the load of that moment."""
    _, preset, batch, bptt, vocab = _sizes(record)
    sizes = f"preset `{preset}`, batch {batch}, {bptt} tokens a window, vocabulary {vocab:,}"
    where, _, _ = places([record])[0].partition("; load average")
    return f"{sizes}{_threads(record)}. Measured on {where}."


def _sizes(record):
    return tuple(record[key] for key in ("benchmark", "preset", "batch", "bptt", "vocab"))


def _threads(record):
    if "gpu" in record:
        return ""
    return f", {record['threads']} thread{'s' if record['threads'] > 1 else ''}"


def _elsewhere(machines, sizes):
    """A sentence and a table, a row a machine, of the steps of these sizes that were timed as they are now.

    machines: (steps, wrong gradients) of each.
    """
    columns = [(step, precision) for step in STEPS for precision in PRECISIONS]
    rows = {}
    for steps, wrong in machines:
        for record in steps:
            if _sizes(record) in sizes and not timed_single_calls(record):
                cells = rows.setdefault(title(record) + _threads(record), dict.fromkeys(columns, "-"))
                cells.update(_factors(record, wrong))
    head = ["machine", *(f"{STEPS[step]}, {precision}" for step, precision in columns)]
    return [OTHERS, _table(head, [[name, *cells.values()] for name, cells in rows.items()])] if rows else []


def _factors(record, wrong):
    """{(step, precision): the factor against stock torch}"""
    for precision in PRECISIONS:
        ours, torch, _ = _sides(record, precision)
        if ours and torch:
            bad = is_wrong(record, torch, f"torch {precision}", wrong)
            cell = "wrong gradients" if bad else f"**{ratio(ours, torch)[1]:.2f}×**"
            yield (record["benchmark"], precision), cell
