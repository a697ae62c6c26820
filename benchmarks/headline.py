"""README.md's table: a training step of both models on the machine that was measured last."""

from .harness import ratio
from .report import NOTHING, places
from .selection import is_wrong, machines, main_records, pairs, timed_single_calls, wrong_gradients

STEPS = {"train_step-lm": "language model", "train_step-classifier": "classifier"}
PRECISIONS = ("fp32", "bf16")
PEERS = ("torch", "fastai")
HEAD = ("training step", "precision", "this library", "stock torch", "fastai", "peak memory of the three")
OLD = "These records are older than the present way of timing."


def headline(records, folder=""):
    """Markdown: the table, where it was measured, and the plot from `folder`; without records a sentence."""
    for machine, some in machines(records).items():
        steps = [r for r in main_records(some) if r["benchmark"] in STEPS and not r["quick"]]
        steps = [r for r in steps if any(pairs(r))]
        if steps:
            return _describe(machine, steps, wrong_gradients(some), folder)
    return NOTHING


def _describe(machine, steps, wrong, folder):
    rows = [row for record in steps for row in _rows(record, wrong)]
    table = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *rows)]
    where = {}  # one line where both steps were measured alike
    for record in steps:
        where.setdefault(_measured(record), []).append(STEPS[record["benchmark"]])
    names = [f"{' and '.join(found)}: {text}" for text, found in where.items()]
    old = [OLD] if any(map(timed_single_calls, steps)) else []
    picture = f"![The peer's time over ours in each benchmark]({folder}speed-{machine}.png)"
    return "\n\n".join(["\n".join(table), *(name[0].upper() + name[1:] for name in names), *old, picture])


def _rows(record, wrong):
    (case,) = record["cases"].values()
    for precision in PRECISIONS:
        ours, *peers = (case["sides"].get(f"{name} {precision}") for name in ("ours", *PEERS))
        if ours:
            cells = [_peer(record, ours, side, wrong) if side else "not measured" for side in peers]
            memory = [
                f"{side['peak_mb']:,.0f}" if side and side.get("peak_mb") else "-" for side in (ours, *peers)
            ]
            yield [STEPS[record["benchmark"]], precision, _ms(ours), *cells, f"{', '.join(memory)} MB"]


def _peer(record, ours, side, wrong):
    if is_wrong(record, side, f"{side['library']} {side['precision']}", wrong):
        return f"{_ms(side)}, wrong gradients"
    low, middle, high = ratio(ours, side)
    return f"{_ms(side)}, **{middle:.2f}×** ({low:.2f}-{high:.2f})"


def _ms(side):
    return f"{side['total_ms']['median']:,.0f} ms"


def _measured(record):
    """The sizes, and where it was measured without the load of that moment."""
    sizes = f"preset `{record['preset']}`, batch {record['batch']}, {record['bptt']} tokens a window"
    sizes += f", vocabulary {record['vocab']:,}"
    if "gpu" not in record:
        sizes += f", {record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    where, _, _ = places([record])[0].partition("; load average")
    return f"{sizes}. Measured on {where}."
