"""concat_pool: the last step, the maximum and the mean over time (Howard and Ruder 2018, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ulmfit_fast.ops._common import Grads, check_input, check_lengths, refuse_transforms, register_gradient


def concat_pool(out: Tensor, lengths: Tensor) -> Tensor:
    """[last, max, mean] of each sequence over its first lengths[b] steps, in one pass over `out`.

    Equivalent to, for each b with n = lengths[b] > 0:
    `torch.cat([out[b, n - 1], out[b, :n].amax(0), out[b, :n].mean(0)])`; zeros where n = 0.  On a tie the
    first step is the maximum and has its gradient.

    Args:
        out: (B, T, H); float64, float32, bfloat16 or float16; any strides.
        lengths: int64 or int32 (B,), each in 0..T, in any order.

    Returns:
        (B, 3H) in out's dtype; sums are accumulated in float32 for the 16-bit types.

    Raises:
        TypeError, ValueError: an argument is not what is said above (RuntimeError for a length under
            torch.compile and for tensor subclasses; on CUDA an assertion of the kernel).
    """
    op = "concat_pool"
    check_input(op, "out", out)
    if out.dim() != 3:
        raise ValueError(f"{op}: out must have shape (B, T, H), got {tuple(out.shape)}")
    lengths = check_lengths(op, lengths, out.shape[0], out.shape[1], out.device)
    refuse_transforms(op, out)
    return torch.ops.ulmfit_fast.concat_pool(out, lengths)[0]


@torch.library.register_fake("ulmfit_fast::concat_pool")
def _(out: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, hidden = out.shape
    return out.new_empty((batch, 3 * hidden)), lengths.new_empty((batch, hidden))


@torch.library.register_fake("ulmfit_fast::concat_pool_backward")
def _(dpooled: Tensor, lengths: Tensor, argmax: Tensor, time: int) -> Tensor:
    batch, hidden = argmax.shape
    return dpooled.new_empty((batch, time, hidden))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, lengths = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.time = out.shape[1]
    ctx.save_for_backward(lengths, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dpooled: Tensor | None, dargmax: Tensor | None) -> Grads:
    if dpooled is None:
        return None, None
    lengths, argmax = ctx.saved_tensors
    return torch.ops.ulmfit_fast.concat_pool_backward(dpooled, lengths, argmax, ctx.time), None


register_gradient("concat_pool", _backward, _setup_context)
