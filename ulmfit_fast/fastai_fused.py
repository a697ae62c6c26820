"""The decoder and the loss of a fastai language model as one op; see `ulmfit_fast.fastai_swap.accelerate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from fastai.callback.core import Callback
from fastai.learner import AvgLoss, AvgSmoothLoss, Learner, ValueMetric
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import LossMetric, Perplexity
from fastai.text.models import core
from fastai.torch_core import TensorBase
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_map_only

from . import ops
from .encoder import is_exporting
from .ops._logits import has_forward_of, is_plain, linear

_Kind = TypeVar("_Kind", bound=Tensor)
_READ_THE_LOSS = (AvgLoss, AvgSmoothLoss, LossMetric, Perplexity, ValueMetric)
_METADATA = {
    torch.is_floating_point,
    Tensor.is_floating_point,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad_fn")),
}
_SAMPLED = 2**14  # elements of a tensor, at most, in which a change is looked for


def why_not_fused(decoder: core.LinearDecoder, loss: Callable[..., Any]) -> str:
    """Why this decoder cannot be fused with this loss, or ""."""
    if "forward" in vars(decoder):
        return "the decoder has a forward of its own"
    if not has_forward_of(decoder.decoder, nn.Linear):
        return f"the decoder's map is a {type(decoder.decoder).__name__}, or has a forward of its own"
    if type(loss) is not CrossEntropyLossFlat:
        return f"the loss is {loss!r}, not fastai's CrossEntropyLossFlat"
    return _why_other_numbers(loss)


def _why_other_numbers(loss: CrossEntropyLossFlat) -> str:
    """What this loss computes that the op does not, or ""."""
    if type(loss.func) is not nn.CrossEntropyLoss:
        return f"the loss computes {loss.func!r}, not nn.CrossEntropyLoss"
    if loss.func.weight is not None:
        return "the loss has class weights"
    if loss.axis != -1 or loss.floatify or not loss.flatten or not loss.is_2d:
        return "the loss has axis, flatten, floatify or is_2d other than by default"
    return ""


def when_made(learn: Learner) -> str:
    names = [metric.name for metric in _readers(learn)]
    if not names:
        return "not made"
    return f"made in {'training and ' * _in_training(learn)}validation, for {', '.join(names)}"


def _readers(learn: Learner) -> list[Any]:
    """The metrics that read logits."""
    return [metric for metric in learn.metrics if not isinstance(metric, _READ_THE_LOSS)]


def _in_training(learn: Learner) -> bool:
    return getattr(getattr(learn, "recorder", None), "train_metrics", False)


class ReadInTime(Callback):
    """Has logits made before the step where a metric of training will read them after it."""

    order = 100  # after the callbacks that take the logits out of the model's tuple

    def after_pred(self) -> None:
        read = self.training and _in_training(self.learn) and _readers(self.learn)
        if read and isinstance(self.pred, Logits):
            self.pred.make()


class Logits(Tensor):
    """Logits (B, T, V) that do not exist until they are read: a decoder's weights and its input (B, T, E).

    Shape, dtype and device are known; every other operation has the real ones made first, and kept.  As
    fastai's mixed precision expects, they are float32 where the input has 16 bits.  Whoever reads them, and
    in whatever mode, gradients arrive as those of the decoder's call: `waiting` makes them its output in
    autograd's graph.  RuntimeError where the weights or the input were changed before the first reading, so
    that they cannot be made any more.
    """

    @staticmethod
    def __new__(cls, h: Tensor, weight: Tensor, bias: Tensor | None) -> Logits:
        shape = (*h.shape[:-1], len(weight))
        dtype = torch.promote_types(h.dtype, torch.float32)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=h.device)

    def __init__(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.h, self.weight, self.bias = h, weight, bias
        self.made: Tensor | None = None
        self.wanted = (False, False, False)  # the gradients of these three
        self._seen = [_looks(t) for t in (h, weight, bias)]
        self._dtype = _dtype_of_product(h, weight)
        self._read: Tensor | None = None

    def as_subclass(self, cls: type[_Kind]) -> _Kind:  # which torch does not send to __torch_function__
        return self.make().as_subclass(cls)

    def make(self) -> Tensor:
        """The real logits, in the graph where these are."""
        if self.made is None:
            with torch.inference_mode(False), torch.enable_grad():
                self.made = _Read.apply(self)
        return self.made

    def values(self) -> Tensor:
        """The real logits without a graph."""
        if self._read is None:
            h, weight, bias = self.parts()
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                bias = None if bias is None else bias.to(self._dtype)
                self._read = linear(h.to(self._dtype), weight.to(self._dtype), bias).to(self.dtype)
        return self._read

    def parts(self, elements: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """The decoder's input, weight and bias at its call; RuntimeError if they have been changed since.

        Those of which no gradient was wanted then are detached.

        elements: compare some of these too, which on CUDA waits for the device.
        """
        parts = self.h, self.weight, self.bias
        for tensor, seen in zip(parts, self._seen, strict=True):
            now = _looks(tensor)
            same = now[0] == seen[0]
            if not same or (elements and not torch.allclose(now[1], seen[1], 0, 0, equal_nan=True)):
                raise RuntimeError(
                    "these logits are computed when they are first read, and the decoder's weights, or its "
                    "input, have been changed before that: read them before the optimizer's step (in "
                    "after_pred or after_loss), or restore(learn) for a decoder that makes them in each call"
                )
        (h, weight, bias), (for_h, for_weight, for_bias) = parts, self.wanted
        h, weight = h if for_h else h.detach(), weight if for_weight else weight.detach()
        if bias is not None and not for_bias:
            bias = bias.detach()
        return h.as_subclass(Tensor), weight, bias

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.float and args[0].dtype == torch.float32:
            return args[0]
        args, kwargs = tree_map_only(Logits, Logits.make, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types its own as a method of an instance
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What comes past __torch_function__: autograd's functions, those of hooks and checkpoints too."""
        args, kwargs = tree_map_only(Logits, Logits.values, (args, kwargs or {}))
        return func(*args, **kwargs)


def waiting(decoder: nn.Linear, h: Tensor) -> Logits:
    """decoder(h), not computed yet."""
    parts = h, decoder.weight, decoder.bias
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in parts]
    if not any(wanted):  # autograd would read the output of a function that has no gradient
        return Logits(*parts)
    logits = _Wait.apply(*parts)
    logits.wanted = tuple(wanted)
    return logits


class _Wait(torch.autograd.Function):
    """F.linear whose output waits.  Its backward serves those who read it; the fused loss has its own."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None) -> Logits:
        ctx.save_for_backward(h, weight, bias)
        ctx.dtype = _dtype_of_product(h, weight)
        return Logits(h, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias = ctx.saved_tensors
        h, weight = h.as_subclass(Tensor), weight.as_subclass(Tensor)
        with torch.autocast(grad.device.type, enabled=False):
            rows = grad.as_subclass(Tensor).to(ctx.dtype).flatten(0, -2)
            for_h, for_weight, for_bias = ctx.needs_input_grad
            grad_h = (rows @ weight.to(ctx.dtype)).view(h.shape).to(h.dtype) if for_h else None
            inputs = h.to(ctx.dtype).flatten(0, -2)
            grad_weight = (rows.t() @ inputs).to(weight.dtype) if for_weight else None
            grad_bias = rows.sum(0).to(bias.dtype) if for_bias else None
        return grad_h, grad_weight, grad_bias


class _Read(torch.autograd.Function):
    """The values of waiting logits, as an operation on them."""

    @staticmethod
    def forward(ctx: Any, logits: Logits) -> Tensor:
        # not a plain Tensor: fastai would cast it back to Logits, the type that it passed in
        kind = TensorBase if type(logits.h) is Tensor else type(logits.h)
        # and no view, as as_subclass makes one, which autograd would not let anyone change in place
        return Tensor._make_subclass(kind, logits.values())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _dtype_of_product(h: Tensor, weight: Tensor) -> torch.dtype:
    device = h.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _looks(tensor: Tensor | None) -> tuple[tuple[Any, ...], Tensor]:
    """A fingerprint of a tensor: autograd's version counter, and some of its elements.

    The elements are needed because fastai's optimizers write to `p.data`, which autograd does not count.
    """
    if tensor is None:
        return (), torch.empty(0)
    flat = tensor.detach().as_subclass(Tensor).reshape(-1)
    version = None if tensor.is_inference() else tensor._version
    return (version, flat.device, flat.dtype), flat[:: len(flat) // _SAMPLED + 1].clone()


class FusedDecoder(core.LinearDecoder):
    """fastai's `LinearDecoder` that leaves the logits to the loss, unless the call is watched."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dropped = self.output_dp(input)
        return self._logits(dropped), input, dropped

    @_disable_dynamo  # one break of a compiled model's graph, not one for each question below
    def _logits(self, dropped: Tensor) -> Tensor:
        may_wait = is_plain(self.decoder, nn.Linear) and not _is_transformed()
        return waiting(self.decoder, dropped) if may_wait else self.decoder(dropped)


def _is_transformed() -> bool:
    """Whether this call is traced, or of torch.func or forward-mode AD, which want real tensors."""
    traced = torch.jit.is_tracing() or is_exporting() or get_proxy_mode() is not None
    return traced or peek_interpreter_stack() is not None or forward_ad._current_level >= 0


class FusedLoss(CrossEntropyLossFlat):
    """fastai's cross-entropy, which computes it without the logits where they are not made."""

    def __init__(self, loss: CrossEntropyLossFlat) -> None:
        self.__dict__.update(vars(loss))

    def __call__(self, inp: Tensor, targ: Tensor, **kwargs: Any) -> Tensor:
        if not isinstance(inp, Logits) or inp.made is not None or kwargs or _why_other_numbers(self):
            return super().__call__(inp, targ, **kwargs)
        target = targ.as_subclass(Tensor)
        if target.is_floating_point() or target.numel() != inp.shape[:-1].numel():  # an error, and theirs
            return super().__call__(inp, targ, **kwargs)
        target, ignored = target.long().reshape(inp.shape[:-1]), self.func.ignore_index
        loss = ops.linear_cross_entropy(
            *inp.parts(elements=not inp.is_cuda),
            target,
            ignore_index=ignored,
            label_smoothing=self.func.label_smoothing,
            reduction=self.func.reduction,
        )
        if self.func.reduction == "mean":  # torch's mean over nothing is NaN, the op's 0
            loss = loss.where((target != ignored).any(), torch.nan)
        # fastai's loss is a TensorBase, whose constructor makes float32 of float64
        return TensorBase(loss.flatten() if loss.dim() else loss)
