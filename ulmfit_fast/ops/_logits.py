"""A decoder's logits and its loss: by this library where it is a plain nn.Linear, else by calling it."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ulmfit_fast.ops._common import FLOATS, allows_high, autocast_dtype, needs_grad, readable
from ulmfit_fast.ops.linear_cross_entropy import linear_cross_entropy

_Module = TypeVar("_Module", bound=nn.Module)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_forward_of(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether its output is that of `kind` for its weights (parametrized ones too)."""
    return type(module).forward is kind.forward and "forward" not in vars(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether something hangs on its call: a hook watches it, or makes its weights (pruning, weight_norm)."""
    return any(getattr(module, hooks) for hooks in _HOOKS) or _has_any_global_hook()


def is_plain(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether its weights may be read in place of a call: `has_forward_of`, and no hooks."""
    return has_forward_of(module, kind) and not is_hooked(module)


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
    """decoder(h), by `linear` where the decoder is a plain nn.Linear."""
    if is_plain(decoder, nn.Linear) and isinstance(h, Tensor):  # torch.fx traces with a Proxy
        return linear(h, decoder.weight, decoder.bias)
    return decoder(h)


def cross_entropy(decoder: nn.Module, h: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The mean cross-entropy of decoder(h), which is not made where the decoder is a plain nn.Linear."""
    if target.shape != h.shape[:-1]:
        raise ValueError(f"targets must be {tuple(h.shape[:-1])}, as the rows, got {tuple(target.shape)}")
    if is_plain(decoder, nn.Linear):
        return linear_cross_entropy(h, decoder.weight, decoder.bias, target, ignore_index=ignore_index)
    out = decoder(h).flatten(0, -2)
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    total = F.cross_entropy(out, target.flatten(), ignore_index=ignore_index, reduction="sum")
    return total / (target != ignore_index).sum().clamp(min=1)  # as the op: 0 where no position counts


@torch.library.register_fake("ulmfit_fast::logits")
def _(h: Tensor, weight: Tensor, bias: Tensor | None, high: bool) -> Tensor:
    return h.new_empty(h.shape[0], weight.shape[0])
