"""Logits: what a language model's decoder gives where no gradient is wanted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ulmfit_fast.ops._common import FLOATS, allows_high, autocast_dtype, needs_grad, readable

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, h (..., E) -> (..., V); on a CPU, in eager mode and without derivatives by this library.

    torch's own float32 product is slow on some CPUs; `python -m benchmarks.way_back` measures both.
    """
    eager = all(readable(t) for t in (h, weight, bias) if t is not None) and not torch.jit.is_tracing()
    derived = needs_grad(h, weight, bias) or forward_ad._current_level >= 0
    if not eager or derived or h.dtype not in FLOATS or h.shape[-1:] != weight.shape[1:] or h.shape[-1] == 0:
        return F.linear(h, weight, bias)
    x = h.to(autocast_dtype(h))
    master = torch.is_autocast_enabled("cpu") and weight.dtype == torch.float32 and x.dtype.itemsize == 2
    if (weight.dtype != x.dtype and not master) or (
        bias is not None and (bias.dtype != weight.dtype or bias.shape != weight.shape[:1])
    ):
        return F.linear(h, weight, bias)
    high = allows_high("logits", None, x)
    out = torch.ops.ulmfit_fast.logits(x.reshape(-1, x.shape[-1]), weight, bias, high)
    return out.reshape(*h.shape[:-1], weight.shape[0])


def logits(decoder: nn.Module, h: Tensor) -> Tensor:
    """decoder(h), by `linear` where the decoder is a plain nn.Linear that nobody watches."""
    plain = type(decoder) is nn.Linear and "forward" not in vars(decoder) and isinstance(h, Tensor)
    watched = any(getattr(decoder, hooks) for hooks in _HOOKS) or _has_any_global_hook()
    return linear(h, decoder.weight, decoder.bias) if plain and not watched else decoder(h)


@torch.library.register_fake("ulmfit_fast::logits")
def _(h, weight, bias, high):  # type: ignore
    return h.new_empty(h.shape[0], weight.shape[0])
