"""curves.png: loss, perplexity or accuracy, and the learning rate over the steps of a run."""

import io
import math
from collections.abc import Sequence
from typing import Any

from .extras import need
from .history import Line

BLUE, ORANGE, GREY = "#2f6db3", "#d9722c", "#8a8a8a"
TITLES = {
    "pretrain": "Stage 1: language model",
    "finetune": "Stage 2: fine-tuned language model",
    "classify": "Stage 3: classifier",
}


def curves(history: Sequence[Line], stage: str) -> bytes:
    """The picture as PNG bytes. history: the dicts of metrics.jsonl."""
    figure = need("matplotlib.figure").Figure(
        figsize=(11, 3.4), layout="constrained"
    )  # no pyplot: no global state
    measure = "accuracy" if stage == "classify" else "perplexity"
    axes = figure.subplots(1, 3)
    train = [line for line in history if line["kind"] == "train"]
    valid = [line for line in history if line["kind"] == "valid"]
    for axis, key in zip(axes, ("loss", measure, "lr"), strict=True):
        smooth = len(train) > 40 and key != "lr"
        _line(axis, train, key, BLUE, "training", alpha=0.3 if smooth else 1.0)
        if smooth:
            _line(axis, _smoothed(train, key), key, BLUE, "training, averaged")
        if key != "lr" and valid:
            _line(axis, valid, key, ORANGE, "validation", marker="o", markersize=4)
        axis.set_title({"lr": "learning rate (last layer group)"}.get(key, key), fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if measure == "perplexity":
        axes[1].set_yscale("log")
        ticker = need("matplotlib.ticker")
        axes[1].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
        axes[1].yaxis.set_major_formatter("{x:g}")
        axes[1].yaxis.set_minor_locator(ticker.NullLocator())
    axes[2].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    if train:
        axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(TITLES[stage], fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _line(axis: Any, lines: Sequence[Line], key: str, colour: str, label: str, **style: Any) -> None:
    # a log axis that goes up to the largest floats overflows in matplotlib; a gap says as much
    values = [x[key] if x[key] < 1e100 else math.nan for x in lines]
    axis.plot([x["step"] for x in lines], values, color=colour, label=label, **style)


def _smoothed(lines: Sequence[Line], key: str) -> list[Line]:
    """The mean over about a twentieth of the points, half of them before and half after each."""
    half, out = max(1, len(lines) // 40), []
    for i, line in enumerate(lines):
        near = lines[max(0, i - half) : i + half + 1]
        out.append({"step": line["step"], key: sum(x[key] for x in near) / len(near)})
    return out
