"""The progress bar of a run: loss, perplexity or accuracy, tokens a second, time left."""

import sys
from typing import Any, Literal

from .extras import need
from .history import Line

Show = bool | Literal["lines"] | None  # what a run draws, see Progress


def check_show(show: object) -> None:
    """ValueError unless `show` is one of those that Progress takes."""
    # 1 and NumPy's True equal True, but would draw nothing
    if not (show is None or isinstance(show, bool) or (isinstance(show, str) and show == "lines")):
        raise ValueError(f"progress must be None, True, False or 'lines', got {show!r}")


def _at_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # a daemon may have none


def announce(text: str, show: Show) -> None:
    """Prints a line on standard error if a run with this `show` writes there."""
    if show in (True, "lines") or (show is None and _at_terminal()):
        print(text, file=sys.stderr, flush=True)


class Progress:
    """A tqdm bar on standard error, one line per epoch, or nothing.

    show: None draws a bar when standard error is a terminal; True always does; "lines" prints one line at the
    end of each epoch; False is silent.
    """

    def __init__(self, total: int, done: int, title: str, show: Show = None) -> None:
        bar = _at_terminal() if show is None else show is True
        self._bar: Any = None
        if bar:
            self._bar = need("tqdm").tqdm(
                total=total, initial=done, desc=title, unit="step", dynamic_ncols=True, mininterval=0.2
            )
        self._lines, self._title = show == "lines", title

    def step(self, epoch: int, shown: Line | None = None) -> None:
        """One step done. shown: the newest metrics line, when there is one."""
        if self._bar is None:
            return
        if shown:
            self._bar.set_postfix_str(f"epoch {epoch}, {describe(shown)}", refresh=False)
        self._bar.update()

    def epoch(self, epoch: int, epochs: int, train: Line, valid: Line | None) -> None:
        """The end of an epoch. train, valid: metrics lines."""
        if self._bar is None and not self._lines:
            return
        text = f"{self._title} epoch {epoch}/{epochs}: {describe(train)}"
        if valid:
            text += f"; validation {describe(valid)}"
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def describe(line: Line) -> str:
    """ "loss 4.321, perplexity 75.3, 5,120 tokens/s" of a metrics line."""
    parts = [f"loss {line['loss']:.3f}"] if "loss" in line else []
    if "perplexity" in line:
        parts.append(f"perplexity {line['perplexity']:.1f}")
    if "accuracy" in line:
        parts.append(f"accuracy {line['accuracy']:.1%}")
    if "tokens_per_s" in line:
        parts.append(f"{line['tokens_per_s']:,.0f} tokens/s")
    return ", ".join(parts)
