"""A training step of both models: README.md's table, of one machine, and the factors on all others.

The one is the machine measured last, of those where stock torch has every precision. The others are in
benchmarks/README.md.
"""

from .harness import ratio
from .machine import title
from .report import NOTHING, places
from .selection import is_wrong, machines, main_records, pairs, timed_single_calls, wrong_gradients

STEPS = {"train_step-lm": "language model", "train_step-classifier": "classifier"}
PRECISIONS = ("fp32", "bf16")
PEERS = ("torch", "fastai")
HEAD = ("training step", "precision", "this library", "stock torch", "fastai", "peak memory of the three")
OTHERS = "Stock torch's time over ours in the training steps of the main README, on the other machines:"
OLD = "These records are older than the present way of timing."


def headline(records):
    """Markdown: the table of one machine and where it was measured; without records a sentence."""
    found = _machines(records)
    if not found:
        return NOTHING
    steps, wrong = found[0]
    table = _table(HEAD, [row for record in steps for row in _rows(record, wrong)])
    return "\n\n".join([table, _places(steps), *([OLD] if any(map(timed_single_calls, steps)) else [])])


def elsewhere(records):
    """Markdown: a sentence and a table, a row a machine, of `headline`'s steps on the others; "" without any.

    Steps of other sizes, and those that were timed as single calls, do not compare and are left out.
    """
    found = _machines(records)
    sizes = {_sizes(record) for record in found[0][0]} if found else set()
    columns = [(step, precision) for step in STEPS for precision in PRECISIONS]
    rows = {}
    for steps, wrong in found[1:]:
        for record in steps:
            if _sizes(record) in sizes and not timed_single_calls(record):
                cells = rows.setdefault(title(record) + _threads(record), dict.fromkeys(columns, "-"))
                cells.update(_factors(record, wrong))
    head = ["machine", *(f"{STEPS[step]}, {precision}" for step, precision in columns)]
    table = _table(head, [[name, *cells.values()] for name, cells in rows.items()])
    return f"{OTHERS}\n\n{table}" if rows else ""


def _machines(records):
    """[(steps, wrong gradients)] of each machine that has steps, `headline`'s first."""
    found = [(_steps(some), wrong_gradients(some)) for some in machines(records).values()]
    # in their order, but for machines that lack a precision or its peer
    return sorted((each for each in found if each[0]), key=lambda each: not _has_peers(each[0]))


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


def _factors(record, wrong):
    """{(step, precision): the factor against stock torch}"""
    for precision in PRECISIONS:
        ours, torch, _ = _sides(record, precision)
        if ours and torch:
            bad = is_wrong(record, torch, f"torch {precision}", wrong)
            cell = "wrong gradients" if bad else f"**{ratio(ours, torch)[1]:.2f}×**"
            yield (record["benchmark"], precision), cell
