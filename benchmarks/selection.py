"""Which speed records stand for a machine, in which order, and which of their comparisons hold."""

from .harness import Side, comparisons, crosses
from .machine import short_name
from .record import recency

WRONG = 0.1  # a relative error of a gradient that no rounding explains
TWO_CALLS_SINCE = 1795364262  # commit 3612f70: a turn is two calls, of which the second counts
TITLES = {
    "train_step-lm": "Training step of the language model",
    "graph_step": "Training step of the language model in a CUDA graph",
    "train_step-classifier": "Training step of the classifier",
    "lstm": "LSTM layers",
    "linear_cross_entropy": "Softmax and loss",
    "dropout_mask": "Dropout",
    "way_back": "Forward pass in eval, and the ways out",
}


def main_records(records):
    """The record that stands for each benchmark: ULMFiT's sizes, batch 64, 30000 words, most threads."""

    presets = ["tiny", "small", "ulmfit"]

    def rank(r):
        size = presets.index(r["preset"]) if r["preset"] in presets else -1  # single layers of any size
        near = -abs(r["batch"] - 64), -abs(r.get("vocab", 30000) - 30000)
        return not r["quick"], size, *near, r["threads"]

    ranked = sorted(records, key=rank)
    return [found[-1] for name in TITLES if (found := [r for r in ranked if r["benchmark"] == name])]


def machines(records):
    """{name as in files: its records}, the machine that was measured last first."""
    found = {}
    for record in sorted(records, key=lambda r: "gpu" in r):
        found.setdefault(short_name(record), []).append(record)
    return dict(sorted(found.items(), key=lambda item: max(map(recency, item[1])), reverse=True))


def timed_single_calls(record):
    """Whether a CPU's record is older than the turns of two calls."""
    return "gpu" not in record and 0 < recency(record)[1] < TWO_CALLS_SINCE


def pairs(record):
    """(case, side of ours, side of the peer, their names) of all that compare in a record."""
    for case, content in record["cases"].items():
        sides = content["sides"]
        for ours, peer in comparisons(sides, cross=crosses(record["benchmark"])):
            yield case, sides[ours], sides[peer], (ours, peer)


def main_pairs(record, wrong=()):
    """`pairs` without torch's slow path, where the gradients of its default path are right.

    It is some hundred times as slow, and nobody would choose it there.
    """
    found, slow = list(pairs(record)), Side.SLOW
    right = {(case, names) for case, _, peer, names in found if not is_wrong(record, peer, names[1], wrong)}
    for case, ours, peer, names in found:
        default = names[0], names[1].removesuffix(slow)
        if default == names or (case, default) not in right:
            yield case, ours, peer, names


def wrong_gradients(records):
    """{(preset, side)} of the language model's steps in which a peer's gradients were wrong."""
    steps = [r for r in records if r["benchmark"] == "train_step-lm"]
    found = [(r["preset"], names[1], peer) for r in steps for _, _, peer, names in pairs(r)]
    return {(preset, name) for preset, name, peer in found if (peer.get("gradient_error") or 0) > WRONG}


def is_wrong(record, peer, name, wrong):
    """Whether a peer's gradients are wrong, by its own error.

    The classifier's step has no measured error: it has the LSTM of the language model's step, so `wrong`, see
    `wrong_gradients`, counts.
    """
    if peer.get("gradient_error") is not None:
        return peer["gradient_error"] > WRONG
    return record["benchmark"] == "train_step-classifier" and (record["preset"], name) in wrong
