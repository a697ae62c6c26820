"""The lines of metrics.jsonl, which are valid JSON whatever a loss is; perplexity."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Line = dict[str, Any]  # of metrics.jsonl
Totals = Mapping[str, float | Tensor]  # sums by name; a tensor's is still on its device


def perplexity(loss: float) -> float:
    """exp of a mean cross-entropy in nats; inf where that is larger than a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def as_json(line: Line) -> str:
    """A metrics line as JSON, which has neither infinity nor NaN: they become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(plain, allow_nan=False)


def _from_json(line: bytes) -> Line:
    """null is NaN again, and an infinite perplexity where the loss was a number."""
    entry: Line = json.loads(line)
    entry["kind"]  # noqa: B018  (raises if this is no metrics line)
    for name in [name for name, value in entry.items() if value is None]:
        overflowed = name == "perplexity" and entry.get("loss") is not None
        entry[name] = math.inf if overflowed and not math.isnan(entry["loss"]) else math.nan
    return entry


def read_history(file: pathlib.Path) -> list[Line]:
    """All lines of a metrics.jsonl as dicts, none when there is no such file.

    A last line that is cut short, by a power cut or a full disk, is left out; a malformed earlier line raises
    ValueError.
    """
    if not file.exists():
        return []
    lines, history = file.read_bytes().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            history.append(_from_json(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number < len(lines):
                raise ValueError(f"{str(file)!r}, line {number} is no metrics line: {error}") from None
    return history


class Sums:
    """Figures summed over targets, with their number, and the tokens and seconds of their steps."""

    def __init__(
        self, totals: Totals | None = None, targets: int = 0, tokens: int = 0, seconds: float = 0.0
    ) -> None:
        self.totals: dict[str, Any] = dict(totals or {})
        self.targets, self.tokens, self.seconds = targets, tokens, seconds

    def add(self, totals: Totals, targets: int, tokens: int, seconds: float = 0.0) -> None:
        for name, total in totals.items():
            self.totals[name] = self.totals.get(name, 0) + total
        self.targets, self.tokens = self.targets + targets, self.tokens + tokens
        self.seconds += seconds

    def numbers(self) -> tuple[dict[str, float], int, int, float]:
        """The arguments that build an equal object, with totals as floats on the host."""
        return {name: float(x) for name, x in self.totals.items()}, self.targets, self.tokens, self.seconds
