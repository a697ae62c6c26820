"""The lines of metrics.jsonl, which are valid JSON whatever a loss is; perplexity."""

import json
import math
import pathlib
from typing import Any


def perplexity(loss: float) -> float:
    """exp of a mean cross-entropy in nats; inf where that is larger than a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def as_json(line: dict[str, Any]) -> str:
    """A metrics line as JSON, which has neither infinity nor NaN: they become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(plain, allow_nan=False)


def _from_json(line: bytes) -> dict[str, Any]:
    """null is NaN again, and an infinite perplexity where the loss was a number."""
    entry = json.loads(line)
    entry["kind"]  # noqa: B018  (raises if this is no metrics line)
    for name in [name for name, value in entry.items() if value is None]:
        overflowed = name == "perplexity" and entry.get("loss") is not None
        entry[name] = math.inf if overflowed and not math.isnan(entry["loss"]) else math.nan
    return entry


def read_history(file: pathlib.Path) -> list[dict[str, Any]]:
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
