"""linear_cross_entropy: the softmax over the vocabulary and its loss, without ever holding all the logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ulmfit_fast.ops._common import (
    Grads,
    Precision,
    allows_high,
    as_int,
    autocast_dtype,
    autocast_weight,
    check_input,
    check_shape,
    check_tensor,
    is_number,
    needs_grad,
    raise_second_derivative,
    readable,
    refuse_transforms,
    register_gradient,
)

_REDUCTIONS = ("none", "mean", "sum")
_NONE, _SUM = 0, 2  # the op's codes; a mean is a sum divided here, see linear_cross_entropy


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
    precision: Precision | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of the logits h @ weight.T + bias against target.

    Equivalent to `F.cross_entropy` of `F.linear(h, weight, bias)` and target, their positions flattened to
    (N, V) and (N,), except that no more than a chunk of logits exists at a time, and that a mean over no
    position is 0, not NaN.  With "mean" and "sum" the gradient is computed in the forward pass, where a
    gradient is wanted; with "none" and for a float16 weight the backward pass computes the logits again.
    A frozen weight's gradient is not computed.

    Args:
        h: (..., E); float64, float32, bfloat16 or float16.
        weight: (V, E), in h's dtype, or float32 where h is 16-bit (master weights).  Its gradient has its
            dtype.
        bias: (V,) in weight's dtype, or None.
        target: (...), h's leading sizes, int64, each in 0..V-1 or ignore_index.
        ignore_index: positions with this target have loss 0, no gradient, and do not count in the mean.
        label_smoothing: s in [0, 1]: the target distribution is 1-s on the target plus s/V everywhere.
        reduction: "mean" over the positions that count, "sum", or "none".
        precision: of float32 products, as in `lstm`.
        chunk_rows: on CUDA, positions whose logits exist at once (V of them a position, in h's dtype); None
            takes as many as 1 GiB holds.  The CPU needs a few hundred, whatever is said here.

    Returns:
        float32 (float64 for float64) loss: 0-dim, or the shape of target with "none".

    Raises:
        TypeError, ValueError: an argument is not what is said above.
        IndexError: a target is outside the vocabulary (RuntimeError under torch.compile and for tensor
            subclasses; on CUDA an assertion of the kernel).
    """
    op = "linear_cross_entropy"
    check_input(op, "h", h)
    if h.dim() < 1:
        raise ValueError(f"{op}: h must have shape (..., E), got ()")
    h = h.to(autocast_dtype(h))
    weight, bias = autocast_weight(weight, h.dtype), autocast_weight(bias, h.dtype)
    weight_dtypes = (h.dtype, torch.float32) if h.dtype.itemsize == 2 else (h.dtype,)
    check_tensor(op, "weight", weight, weight_dtypes, h.device)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{op}: weight must have shape (V, E) with V, E > 0, got {tuple(weight.shape)}")
    check_shape(op, "weight", weight, "(V, E)", (weight.shape[0], h.shape[-1]))
    words, features = weight.shape
    if bias is not None:
        check_tensor(op, "bias", bias, (weight.dtype,), h.device)
        check_shape(op, "bias", bias, "(V,)", (words,))
    check_tensor(op, "target", target, (torch.int64,), h.device)
    check_shape(op, "target", target, "h.shape[:-1]", tuple(h.shape[:-1]))
    ignored, rows = as_int(ignore_index), 0 if chunk_rows is None else as_int(chunk_rows)
    if ignored is None:
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if not is_number(label_smoothing):
        raise TypeError(f"{op}: label_smoothing must be a float, got {type(label_smoothing).__name__}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if rows is None:
        raise TypeError(f"{op}: chunk_rows must be None or an int, got {type(chunk_rows).__name__}")
    if chunk_rows is not None and rows < 1:
        raise ValueError(f"{op}: chunk_rows must be None or at least 1, got {chunk_rows}")
    if readable(target):
        wrong = target[(target != ignored) & ((target < 0) | (target >= words))]
        if wrong.numel():
            allowed = f"in 0..{words - 1}, the vocabulary, or ignore_index = {ignore_index}"
            raise IndexError(f"{op}: target must be {allowed}, got {int(wrong[0])}")

    refuse_transforms(op, h, weight, bias)
    # A mean is the sum divided here: the gradients that the op saves are then the sum's, which float16 can
    # hold where those of a mean over thousands of positions underflow, before a gradient scaler can act.
    # But a float16 weight's is a sum over all positions, which float16 may not hold: there the gradient
    # is computed on the way back, from the scale that arrives, and costs the logits a second time.
    grad = needs_grad(h, weight, bias)
    code = _NONE if reduction == "none" or (grad and weight.dtype == torch.float16) else _SUM
    computed = grad and code == _SUM  # in the forward pass
    loss = torch.ops.ulmfit_fast.linear_cross_entropy(
        h.reshape(-1, features),
        weight,
        bias,
        target.reshape(-1),
        ignored,
        float(label_smoothing),
        code,
        allows_high(op, precision, h),
        computed,
        computed and needs_grad(weight, bias),
        rows,
    )[0]
    if reduction == "none":
        return loss.reshape(target.shape)
    if code == _NONE:
        loss = loss.sum(dtype=torch.float64).float()
    return loss if reduction == "sum" else loss / (target != ignored).sum().clamp(min=1)


@torch.library.register_fake("ulmfit_fast::linear_cross_entropy")
def _(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float,
    reduction: int, high: bool, grad: bool, need_dw: bool, chunk_rows: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    loss = h.new_empty(target.shape if reduction == _NONE else (), dtype=dtype)
    dh = h.new_empty(h.shape if grad else (0,))
    return loss, dh, *_weight_gradients(weight, bias, grad and need_dw)


@torch.library.register_fake("ulmfit_fast::linear_cross_entropy_backward")
def _(
    dloss: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int,
    label_smoothing: float, high: bool, need_dw: bool, chunk_rows: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    return h.new_empty(h.shape), *_weight_gradients(weight, bias, need_dw)


def _weight_gradients(weight: Tensor, bias: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor]:
    """Shapes of both; wanted (the ops' need_dw, "gradient of the weight") holds for the bias too."""
    dbias = weight.new_empty(bias.shape if wanted and bias is not None else (0,))
    return weight.new_empty(weight.shape if wanted else (0,)), dbias


class _ScaleGradients(torch.autograd.Function):
    """dloss times the gradients that the forward pass computed.

    An autograd function, although it is only a product: it takes the op's inputs too, so that a second
    derivative fails with a sentence and is not silently zero.
    """

    @staticmethod
    def forward(
        ctx: Any, dloss: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, *grads: Tensor
    ) -> tuple[Tensor, ...]:
        # Out of place: the saved gradients must survive a second backward pass over a retained graph.  In
        # dloss's dtype: float32 / positions rounded to 16 bits would scale all gradients by the same error.
        # torch's product with a scalar does so by itself on a CPU, without a copy of the gradients; its
        # results lie where the forward had its packed weights.
        if readable(dloss):
            return tuple(torch.mul(g, dloss, out=torch.ops.ulmfit_fast.lent_like(g)) for g in grads)
        return tuple((g.to(dloss.dtype) * dloss).to(g.dtype) for g in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise_second_derivative("linear_cross_entropy")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, weight, bias, target, ctx.ignore_index, ctx.label_smoothing, ctx.reduction, ctx.high, ctx.grad, \
        ctx.need_dw, ctx.chunk_rows = inputs  # fmt: skip
    _, dh, dweight, dbias = output
    ctx.mark_non_differentiable(dh, dweight, dbias)
    ctx.save_for_backward(h, weight, bias, *((target,) if ctx.reduction == _NONE else (dh, dweight, dbias)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, *_: None) -> Grads:
    if dloss is None:
        return (None,) * 11
    need_dw = any(ctx.needs_input_grad[1:3])
    if ctx.reduction == _NONE:
        grads = torch.ops.ulmfit_fast.linear_cross_entropy_backward(
            dloss,
            *ctx.saved_tensors,
            ctx.ignore_index,
            ctx.label_smoothing,
            ctx.high,
            need_dw,
            ctx.chunk_rows,
        )
    elif ctx.grad and ctx.need_dw >= need_dw:
        grads = _ScaleGradients.apply(dloss, *ctx.saved_tensors)
    else:
        without = "need_dw=False, so weight and bias have" if ctx.grad else "grad=False, so it has"
        raise RuntimeError(f"ulmfit_fast::linear_cross_entropy was called with {without} no gradient")
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *(None,) * 8


register_gradient("linear_cross_entropy", _backward, _setup_context)
