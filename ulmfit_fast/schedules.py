"""Learning rates over time and over layers, and what trains when. Pure functions of numbers."""

import math
from typing import NamedTuple


def stlr(t: int, T: int, lr_max: float, cut_frac: float = 0.1, ratio: float = 32.0) -> float:
    """Slanted triangular rate at step t of T (Howard and Ruder 2018, equation 3), t from 0 to T - 1.

    Rises linearly to `lr_max` over the first floor(T * cut_frac) steps and falls linearly to lr_max / ratio.
    """
    _check_step(t, T)
    cut = math.floor(T * cut_frac)
    p = t / cut if t < cut else 1 - (t - cut) / max(1, T - cut)
    return lr_max * (1 + p * (ratio - 1)) / ratio


def one_cycle(
    t: int, T: int, lr_max: float, pct_start: float = 0.25, div: float = 25.0, div_final: float = 1e5
) -> float:
    """Cosine from lr_max / div up to `lr_max` and down to lr_max / div_final (Smith 2018, with fastai 2's
    numbers).
    """
    _check_step(t, T)
    rise = pct_start * T
    if t < rise:
        return _cosine(lr_max / div, lr_max, t / rise)
    return _cosine(lr_max, lr_max / div_final, (t - rise) / max(1e-9, T - rise))


def _check_step(t: int, T: int) -> None:
    if not 0 <= t < T:
        raise ValueError(f"t must be a step from 0 to T - 1 = {T - 1}, got {t}")


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def discriminative_lrs(lr: float, n_groups: int, factor: float = 2.6) -> list[float]:
    """Rates of the layer groups, first to last: the last has `lr`, each one below it 1/factor of the next."""
    if n_groups < 1 or factor < 1:
        raise ValueError(f"n_groups must be at least 1 and factor at least 1, got {n_groups} and {factor}")
    return [lr / factor ** (n_groups - 1 - g) for g in range(n_groups)]


class Phase(NamedTuple):
    """Some epochs in which the last `n_trainable` layer groups train."""

    epochs: int
    n_trainable: int


def head_first_plan(head_epochs: int, epochs: int, n_groups: int) -> list[Phase]:
    """Stage 2: the last group (embedding and decoder) alone, then all."""
    plan = [Phase(head_epochs, 1), Phase(epochs, n_groups)]
    return [phase for phase in plan if phase.epochs]


def gradual_unfreezing_plan(epochs: int, n_groups: int, gradual: bool = True) -> list[Phase]:
    """Stage 3: one more group each epoch, from the last; the rest of the epochs train all.

    With fewer epochs than groups the last epoch still trains all of them.
    """
    if not gradual:
        return [Phase(epochs, n_groups)]
    frozen = min(epochs, n_groups) - 1
    return [Phase(1, k + 1) for k in range(frozen)] + [Phase(epochs - frozen, n_groups)]
