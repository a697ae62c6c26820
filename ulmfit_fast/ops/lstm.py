"""lstm: one LSTM layer in one direction with DropConnect on the recurrent weight (arXiv 1708.02182)."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from ulmfit_fast.ops._common import (
    Grads,
    Precision,
    Seed,
    allows_high,
    autocast_dtype,
    autocast_weight,
    check_flag,
    check_input,
    check_lengths,
    check_probability,
    check_shape,
    check_tensor,
    needs_grad,
    refuse_transforms,
    register_gradient,
    seed_tensor,
)


@overload
def lstm(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = ..., b_hh: Tensor | None = ..., *, weight_p: float = ..., seed: Seed = ...,
    batch_first: bool = ..., lengths: Tensor | None = ..., reverse: bool = ...,
    precision: Precision | None = ..., dropout_p: None = ..., dropout_seed: None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def lstm(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = ..., b_hh: Tensor | None = ..., *, weight_p: float = ..., seed: Seed = ...,
    batch_first: bool = ..., lengths: Tensor | None = ..., reverse: bool = ...,
    precision: Precision | None = ..., dropout_p: float, dropout_seed: Seed = ...,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip
def lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    weight_p: float = 0.0,
    seed: Seed = None,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reverse: bool = False,
    precision: Precision | None = None,
    dropout_p: float | None = None,
    dropout_seed: Seed = None,
) -> tuple[Tensor, ...]:
    """One LSTM layer in one direction, with DropConnect on the recurrent weight.

    Equivalent to one direction of `torch.nn.LSTM` with w_hh * dropout_mask(seed, (4H, H), weight_p) as its
    recurrent weight: one mask for all time steps.  For the 16-bit types sums are float32, and so is the cell
    state between the steps of a call.

    Args:
        x: (T, B, I), or (B, T, I) with batch_first; float64, float32, bfloat16 or float16; any strides.
        h0, c0: (B, H) in x's dtype, or None for zeros.
        w_ih, w_hh: (4H, I) and (4H, H), rows in torch's order of the gates i, f, g, o; in x's dtype, or
            float32 where x is 16-bit (master weights).  Their gradients have their dtype.
        b_ih, b_hh: (4H) in the weights' dtype; both or neither.
        weight_p: probability that an element of w_hh is dropped, in [0, 1).
        seed: None, an int or a 0-dim int64 tensor; None draws one from the device's default generator.
        batch_first: the layout of x and y; no transposed copy is made.
        lengths: int64 or int32 (B,), each in 0..T, in any order.  A step at or after its sequence's length
            carries the state and outputs zeros.
        reverse: read each sequence from its last valid step back to its first.
        precision: of float32 products, "highest", "high" or "medium" as in
            `torch.set_float32_matmul_precision`; None takes what is set there.  The lower two allow three
            bfloat16 products instead (relative error about 5e-6), done where they are faster; on CUDA the
            products are TF32's where that setting of torch allows it, and a stricter one here is refused.
        dropout_p: where given, y is also returned after a variational dropout with this probability, in
            [0, 1), made as y is stored: one mask for all time steps (Gal and Ghahramani 2016).
        dropout_seed: of that mask, as `seed`.

    Returns:
        y, like x with H features; h_n and c_n (B, H), the state after the last step read; where dropout_p is
        given also y * dropout_mask(dropout_seed, (B, H), dropout_p) for every step, as `variational_dropout`
        gives it.  With dropout_p=0 this fourth result is y itself, so an in-place change of one changes both.
        All in x's dtype, which under autocast is autocast's.

    Raises:
        TypeError, ValueError: an argument is not what is said above (RuntimeError for a length under
            torch.compile and for tensor subclasses; on CUDA an assertion of the kernel).
    """
    op = "lstm"
    check_input(op, "x", x)
    check_flag(op, batch_first=batch_first, reverse=reverse)
    weight_p = check_probability(op, "weight_p", weight_p)
    if x.dim() != 3 or x.shape[2] == 0:
        layout = "(B, T, I)" if batch_first else "(T, B, I)"
        raise ValueError(f"{op}: x must have shape {layout} with I > 0, got {tuple(x.shape)}")
    batch, time = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])

    dtype = autocast_dtype(x)
    x = x.to(dtype)
    w_ih, w_hh = autocast_weight(w_ih, dtype), autocast_weight(w_hh, dtype)
    b_ih, b_hh = autocast_weight(b_ih, dtype), autocast_weight(b_hh, dtype)
    weight_dtypes = (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)
    check_tensor(op, "w_hh", w_hh, weight_dtypes, x.device)
    if w_hh.dim() != 2 or w_hh.shape[1] == 0 or w_hh.shape[0] != 4 * w_hh.shape[1]:
        raise ValueError(f"{op}: w_hh must have shape (4H, H) with H > 0, got {tuple(w_hh.shape)}")
    hidden = w_hh.shape[1]
    check_tensor(op, "w_ih", w_ih, (w_hh.dtype,), x.device)
    check_shape(op, "w_ih", w_ih, "(4H, I)", (4 * hidden, x.shape[2]))
    if (b_ih is None) != (b_hh is None):
        raise ValueError(f"{op}: b_ih and b_hh must both be given or both be None")
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            check_tensor(op, name, bias, (w_hh.dtype,), x.device)
            check_shape(op, name, bias, "(4H,)", (4 * hidden,))
    states = []
    for name, state in (("h0", h0), ("c0", c0)):
        if state is None:
            state = x.new_zeros((batch, hidden))
        elif isinstance(state, Tensor) and state.is_floating_point() and autocast_dtype(state) == dtype:
            state = state.to(dtype)
        check_tensor(op, name, state, (dtype,), x.device)
        check_shape(op, name, state, "(B, H)", (batch, hidden))
        states.append(state)
    if lengths is not None:
        lengths = check_lengths(op, lengths, batch, time, x.device)

    h0, c0 = states
    refuse_transforms(op, x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    seed = seed_tensor(op, seed, weight_p, x.device)
    high = allows_high(op, precision, x)
    drop = 0.0
    if dropout_p is not None:
        drop = check_probability(op, "dropout_p", dropout_p)
        dropout_seed = seed_tensor(op, dropout_seed, drop, x.device, "dropout_seed")
    elif dropout_seed is not None:
        raise ValueError(f"{op}: dropout_seed needs dropout_p, got {dropout_seed!r} alone")
    else:
        dropout_seed = seed  # not read
    save = needs_grad(x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    y, h_n, c_n, dropped, _, _ = torch.ops.ulmfit_fast.lstm(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths, seed, dropout_seed,
        weight_p, drop, batch_first, reverse, high, save
    )  # fmt: skip
    if dropout_p is None:
        return y, h_n, c_n
    return y, h_n, c_n, dropped if drop > 0 else y


@torch.library.register_fake("ulmfit_fast::lstm")
def _(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    lengths: Tensor | None, seed: Tensor, dropout_seed: Tensor, weight_p: float, dropout_p: float,
    batch_first: bool, reverse: bool, high: bool, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    hidden = w_hh.shape[1]
    time, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    y = x.new_empty((x.shape[0], x.shape[1], hidden))
    dropped = x.new_empty(y.shape if dropout_p > 0 else (0,))
    h_n, c_n = x.new_empty((batch, hidden)), x.new_empty((batch, hidden))
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    units = (hidden + 15) // 16 * 16  # gates and cells: in an order of the kernels' own, whole vectors
    gates = x.new_empty((time, batch, 4 * units) if save else (0,))
    cells = x.new_empty((time, batch, units) if save else (0,), dtype=state_dtype)
    return y, h_n, c_n, dropped, gates, cells


@torch.library.register_fake("ulmfit_fast::lstm_backward")
def _(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, ddropped: Tensor | None, x: Tensor,
    h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, lengths: Tensor | None, seed: Tensor,
    dropout_seed: Tensor, y: Tensor, gates: Tensor, cells: Tensor, weight_p: float, dropout_p: float,
    batch_first: bool, reverse: bool, high: bool, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dx = x.new_empty(x.shape if need_dx else (0,))
    dw_ih = w_ih.new_empty(w_ih.shape if need_dw else (0,))
    dw_hh = w_hh.new_empty(w_hh.shape if need_dw else (0,))
    db = w_hh.new_empty((w_hh.shape[0],) if need_dw else (0,))
    return dx, h0.new_empty(h0.shape), c0.new_empty(c0.shape), dw_ih, dw_hh, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h0, c0, w_ih, w_hh, _, _, lengths, seed, dropout_seed, *options, ctx.saved = inputs
    ctx.options = options  # weight_p, dropout_p, batch_first, reverse, high
    _, dropout_p, *_ = options
    y, _, _, dropped, gates, cells = output
    ctx.mark_non_differentiable(gates, cells, *([] if dropout_p > 0 else [dropped]))
    ctx.save_for_backward(x, h0, c0, w_ih, w_hh, lengths, seed, dropout_seed, y, gates, cells)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    ddropped: Tensor | None,
    *_: None,
) -> Grads:
    if dy is None and dh_n is None and dc_n is None and ddropped is None:
        return (None,) * 16
    if not ctx.saved:
        raise RuntimeError("ulmfit_fast::lstm was called with save=False, so it has no gradient")
    need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh, *_ = ctx.needs_input_grad
    need_dw = need_w_ih or need_w_hh or need_b_ih or need_b_hh  # one flag: the op computes all four or none
    dx, dh0, dc0, dw_ih, dw_hh, db = torch.ops.ulmfit_fast.lstm_backward(
        dy, dh_n, dc_n, ddropped, *ctx.saved_tensors, *ctx.options, need_x, need_dw
    )
    db_hh = db.clone() if need_b_ih and need_b_hh else db  # for in-place changes of one alone
    grads = (dx, dh0, dc0, dw_ih, dw_hh, db, db_hh)
    return (
        tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)) + (None,) * 9
    )


register_gradient("lstm", _backward, _setup_context)
