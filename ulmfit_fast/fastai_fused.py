"""The decoder and the loss of a fastai language model as one op; see `ulmfit_fast.fastai_swap.accelerate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastai.learner import AvgLoss, AvgSmoothLoss, Learner, ValueMetric
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import LossMetric, Perplexity
from fastai.text.models import core
from fastai.torch_core import TensorBase
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from . import ops
from .ops._logits import has_forward_of, is_plain, linear

_READ_THE_LOSS = (AvgLoss, AvgSmoothLoss, LossMetric, Perplexity, ValueMetric)
_METADATA = {
    torch.is_floating_point,
    Tensor.is_floating_point,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
}
_SAMPLED = 2**14  # elements of a weight, at most, in which a change is looked for


def why_not_fused(decoder: core.LinearDecoder, loss: Callable) -> str:
    """Why this decoder cannot be fused with this loss, or ""."""
    if "forward" in vars(decoder):
        return "the decoder has a forward of its own"
    if not has_forward_of(decoder.decoder, nn.Linear):
        return f"the decoder's map is a {type(decoder.decoder).__name__}, or has a forward of its own"
    if type(loss) is not CrossEntropyLossFlat:
        return f"the loss is {loss!r}, not fastai's CrossEntropyLossFlat"
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


def _readers(learn: Learner) -> list:
    """The metrics that read logits."""
    return [metric for metric in learn.metrics if not isinstance(metric, _READ_THE_LOSS)]


def _in_training(learn: Learner) -> bool:
    return getattr(getattr(learn, "recorder", None), "train_metrics", False)


class Logits(Tensor):
    """Logits (B, T, V) that do not exist until they are read: a decoder's weights and its input (B, T, E).

    Shape, dtype and device are known; every other operation makes the real ones first, and keeps them.
    As fastai's mixed precision expects, they are float32 where the input has 16 bits.  RuntimeError
    where the weights were changed before the first reading, so that they cannot be made any more.
    """

    @staticmethod
    def __new__(cls, decoder: nn.Linear, h: Tensor) -> Logits:
        shape = (*h.shape[:-1], decoder.out_features)
        dtype = torch.promote_types(h.dtype, torch.float32)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=h.device)

    def __init__(self, decoder: nn.Linear, h: Tensor) -> None:
        self.weight, self.bias, self.h, self.made = decoder.weight, decoder.bias, h, None
        self._seen = [_looks(t) for t in (self.weight, self.bias)]
        self._was_enabled = torch.is_grad_enabled()  # of the decoder's call, whoever reads them

    def make(self) -> Tensor:
        if self.made is None:
            h, weight, bias = self.parts()
            if not torch.is_autocast_enabled(h.device.type):
                h = h.to(weight.dtype)
            # not a plain Tensor: fastai would cast it back to Logits, the type that it passed in
            kind = TensorBase if type(self.h) is Tensor else type(self.h)
            with torch.inference_mode(False), torch.set_grad_enabled(self._was_enabled):
                self.made = linear(h, weight, bias).to(self.dtype).as_subclass(kind)
        return self.made

    def parts(self, elements: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """The decoder's input, weight and bias at its call; RuntimeError if they have been changed since.

        elements: compare some of these too, which on CUDA waits for the device.
        """
        for tensor, seen in zip((self.weight, self.bias), self._seen, strict=True):
            now = _looks(tensor)
            same = now[0] == seen[0]
            if not same or (elements and not torch.allclose(now[1], seen[1], 0, 0, equal_nan=True)):
                raise RuntimeError(
                    "these logits are computed when they are first read, and the decoder's weights have been "
                    "changed before that: read them before the optimizer's step (in after_pred or "
                    "after_loss), or restore(learn) for a decoder that makes them in each call"
                )
        return self.h.as_subclass(Tensor), self.weight, self.bias

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.float and args[0].dtype == torch.float32:
            return args[0]
        args, kwargs = tree_map_only(Logits, Logits.make, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore
        raise RuntimeError(
            f"{func} reads logits that do not exist: restore(learn) gives fastai's decoder back"
        )


def _looks(tensor: Tensor | None) -> tuple[tuple, Tensor]:
    """A fingerprint of a weight: autograd's version counter, and some of its elements.

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
        return Logits(self.decoder, dropped) if self._may_wait() else self.decoder(dropped)

    def _may_wait(self) -> bool:
        if not is_plain(self.decoder, nn.Linear):
            return False
        # both modes search what the model returns for the parameters that will have a gradient
        ddp = DistributedDataParallel._get_active_ddp_module()
        return ddp is None or not (ddp.find_unused_parameters or ddp.static_graph)


class FusedLoss(CrossEntropyLossFlat):
    """fastai's cross-entropy, which computes it without the logits where they are not made."""

    def __init__(self, loss: CrossEntropyLossFlat, learn: Learner) -> None:
        vars(self).update(vars(loss))
        self.learn = learn

    def __call__(self, inp: Tensor, targ: Tensor, **kwargs: Any) -> Tensor:
        if not isinstance(inp, Logits) or inp.made is not None or kwargs or self._read_after_the_step():
            return super().__call__(inp, targ, **kwargs)
        loss = ops.linear_cross_entropy(
            *inp.parts(elements=not inp.is_cuda),
            targ.as_subclass(Tensor).long(),
            ignore_index=self.func.ignore_index,
            label_smoothing=self.func.label_smoothing,
            reduction=self.func.reduction,
        )
        return loss.flatten() if loss.dim() else loss

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the learner, whose data would come along."""
        return vars(self) | {"learn": None}

    def _read_after_the_step(self) -> bool:
        """Whether a metric will read this training batch's logits after the step has changed the weights."""
        learn = self.learn
        return getattr(learn, "training", False) and _in_training(learn) and bool(_readers(learn))
