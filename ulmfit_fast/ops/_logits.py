"""Logits: what a language model's decoder gives where a gradient is not wanted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ulmfit_fast.ops._common import FLOATS, allows_high, autocast_dtype, needs_grad, readable

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def logits(decoder: nn.Module, h: Tensor) -> Tensor:
    """decoder(h), h (..., E) -> (..., V), by this library's products where `decoder` is a plain nn.Linear.

    On a CPU, without derivatives and in eager mode: torch's own product is slow there on machines without
    AMX, and for few rows in 16 bits everywhere.  Everything else, hooks included, is the decoder's own call.
    """
    plain = type(decoder) is nn.Linear and not any(getattr(decoder, hooks) for hooks in _HOOKS)
    if not plain or torch.jit.is_tracing() or h.dtype not in FLOATS:
        return decoder(h)
    weight, bias = decoder.weight, decoder.bias
    eager = all(readable(t) for t in (h, weight, bias) if t is not None)
    derived = needs_grad(h, weight, bias) or forward_ad._current_level >= 0
    if not eager or derived or h.shape[-1:] != weight.shape[1:]:
        return decoder(h)
    x = h.to(autocast_dtype(h))
    master = torch.is_autocast_enabled("cpu") and weight.dtype == torch.float32 and x.dtype.itemsize == 2
    if weight.dtype != x.dtype and not master:
        return decoder(h)
    high = allows_high("logits", None, x)
    out = torch.ops.ulmfit_fast.logits(x.reshape(-1, x.shape[-1]), weight, bias, high)
    return out.reshape(*h.shape[:-1], weight.shape[0])


@torch.library.register_fake("ulmfit_fast::logits")
def _(h, weight, bias, high):  # type: ignore
    return h.new_empty(h.shape[0], weight.shape[0])
