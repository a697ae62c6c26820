"""`import ulmfit_fast.flops` lets torch.utils.flop_counter.FlopCounterMode count the ops' products.

Not imported by the package itself: where torch has CUDA, flop_counter imports triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = torch.Size
_OPS = torch.ops.ulmfit_fast


@register_flop_formula(_OPS.lstm)
def _(x: Shape, h0: Shape, c0: Shape, w_ih: Shape, w_hh: Shape, *rest: object, **_: object) -> int:
    return 2 * x[0] * x[1] * w_ih[0] * (w_ih[1] + w_hh[1])


@register_flop_formula(_OPS.lstm_backward)
def _(
    dy: Any, dh_n: Any, dc_n: Any, ddropped: Any, x: Shape, h0: Shape, c0: Shape, w_ih: Shape, w_hh: Shape,
    *rest: Any, **_: object,
) -> int:  # fmt: skip
    need_dx, need_dw = rest[-2:]
    inputs, hidden = w_ih[1], w_hh[1]
    return 2 * x[0] * x[1] * w_ih[0] * (need_dx * inputs + hidden + need_dw * (inputs + hidden))


@register_flop_formula(_OPS.linear_cross_entropy)
def _(h: Shape, weight: Shape, *rest: object, **_: object) -> int:
    grad, need_dw = rest[-3:-1]
    return 2 * h[0] * h[1] * weight[0] * (1 + bool(grad) + bool(grad and need_dw))


@register_flop_formula(_OPS.linear_cross_entropy_backward)
def _(dloss: Shape, h: Shape, weight: Shape, *rest: object, **_: object) -> int:
    need_dw = rest[-2]
    return 2 * h[0] * h[1] * weight[0] * (2 + bool(need_dw))  # the logits again, then the gradients
