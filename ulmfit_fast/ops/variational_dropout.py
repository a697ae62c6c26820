"""variational_dropout: one dropout mask for all time steps (Gal and Ghahramani 2016, arXiv 1512.05287)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ulmfit_fast.ops._common import (
    Grads,
    Seed,
    check_flag,
    check_input,
    check_probability,
    refuse_transforms,
    register_gradient,
    seed_tensor,
)


def variational_dropout(x: Tensor, p: float, *, seed: Seed = None, batch_first: bool = True) -> Tensor:
    """Zeroes features with probability p, the same ones at every time step, and scales the rest by 1/(1-p).

    Equivalent to `x * mask.reshape(B, 1, *x.shape[2:])` with mask = dropout_mask(seed, (B, F), p), F the
    product of the trailing sizes; the mask is the same in both layouts.

    Args:
        x: (B, T, *) with batch_first, else (T, B, *); float64, float32, bfloat16 or float16; any strides.
        p: probability of zero, in [0, 1); with 0, x itself is returned.
        seed: None, an int or a 0-dim int64 tensor; None draws one from the device's default generator.
        batch_first: which of the first two sizes of x is the batch.

    Returns:
        A tensor of x's shape and dtype.  Autocast leaves the dtype alone, as for torch's dropout.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
    """
    op = "variational_dropout"
    check_input(op, "x", x)
    p = check_probability(op, "p", p)
    check_flag(op, batch_first=batch_first)
    if x.dim() < 2:
        layout = "(B, T, ...)" if batch_first else "(T, B, ...)"
        raise ValueError(f"{op}: x must have shape {layout}, got {tuple(x.shape)}")
    if p == 0:
        return x
    refuse_transforms(op, x)
    return torch.ops.ulmfit_fast.variational_dropout(x, seed_tensor(op, seed, p, x.device), p, batch_first)


@torch.library.register_fake("ulmfit_fast::variational_dropout")
def _(x: Tensor, seed: Tensor, p: float, batch_first: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("ulmfit_fast::variational_dropout_backward")
def _(dy: Tensor, seed: Tensor, p: float, batch_first: bool) -> Tensor:
    return dy.new_empty(dy.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p, ctx.batch_first = inputs
    ctx.save_for_backward(seed)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None) -> Grads:
    if dy is None:
        return None, None, None, None
    (seed,) = ctx.saved_tensors
    dx = torch.ops.ulmfit_fast.variational_dropout_backward(dy, seed, ctx.p, ctx.batch_first)
    return dx, None, None, None


register_gradient("variational_dropout", _backward, _setup_context)
