"""accelerate(learn): this library's modules in an existing fastai learner; restore(learn): fastai's again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fastai.learner import Learner
from fastai.text.models import awdlstm, core
from torch import nn

from .fastai_fused import FusedDecoder, FusedLoss, ReadInTime, when_made, why_not_fused
from .fastai_modules import (
    AWD_LSTM,
    EmbeddingDropout,
    InnerLSTM,
    PoolingLinearClassifier,
    RNNDropout,
    SentenceEncoder,
    WeightDropout,
)

_MODULE_STATE = set(vars(nn.Module())) - {"_modules"}  # parameters, buffers, hooks, training
_THEIRS = {  # what each module of our encoder stands for
    AWD_LSTM: awdlstm.AWD_LSTM,
    EmbeddingDropout: awdlstm.EmbeddingDropout,
    RNNDropout: awdlstm.RNNDropout,
    WeightDropout: awdlstm.WeightDropout,
    InnerLSTM: nn.LSTM,
    nn.Embedding: nn.Embedding,
    nn.ModuleList: nn.ModuleList,
}
_ALIKE = {
    nn.Embedding: ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"),
    nn.LSTM: ("num_layers", "bias", "batch_first", "bidirectional", "proj_size"),
}


@dataclass
class Accelerated:
    """What `accelerate` did, in `learn.accelerated`; its text says what was swapped and when logits are made.

    swapped: (parent, name in it, the old module, the new one).
    """

    swapped: list[tuple[Any, str, nn.Module, nn.Module]] = field(default_factory=list)
    loss_func: Callable[..., Any] | None = None  # the learner's own, while ours replaces it
    loss: str = ""

    def __repr__(self) -> str:
        names = ", ".join(type(old).__name__ for _, _, old, _ in self.swapped) or "no module"
        return f"swapped: {names}; {self.loss}"


def accelerate(learn: Learner) -> Learner:
    """Put this library's modules into a learner, in place, where it has fastai's `AWD_LSTM`.

    The new modules hold the very Parameter objects and hooks of the old ones, so the optimizer with its
    state and groups stays as it is.  A classifier's `SentenceEncoder` and `PoolingLinearClassifier` are
    swapped too: fastai's drop a document's last tokens where padding covers the batch's last chunk
    (docs/fastai.md).  For a language model whose loss is fastai's cross-entropy, the decoder and the loss
    become one op that never holds all the logits; they are made when something other than that loss reads
    them: a metric like `accuracy`, `predict`, a callback.
    `learn.accelerated` says what was done.  A learner made with our `AWD_LSTM` gains the last part.

    Returns:
        learn; one that is accelerated already is left as it is.

    Raises:
        TypeError: learn is not a Learner, holds no `AWD_LSTM`, or one that was changed: with a module of
            another class, a forward of its own, an option that the kernels do not have, or compiled already.
    """
    if _record(learn):
        return learn
    record = Accelerated()
    new: dict[nn.Module, nn.Module] = {}
    paths = {module: f"model.{path}".rstrip(".") for path, module in learn.model.named_modules()}
    swappable = (awdlstm.AWD_LSTM, core.SentenceEncoder, core.PoolingLinearClassifier, core.LinearDecoder)
    for _, name, module in _children(learn):
        wrapped, in_place = name == "_orig_mod", module._compiled_call_impl is not None
        if (wrapped or in_place) and type(module) in swappable:
            raise TypeError(
                f"learn.{paths[module].removesuffix('._orig_mod')} is compiled, so that a module put into it "
                "would not run: accelerate(learn) first, then torch.compile"
            )
    for module, path in paths.items():
        if type(module) is awdlstm.AWD_LSTM:
            new[module] = _encoder_like(module, path)
        elif type(module) is core.SentenceEncoder and isinstance(module.module, awdlstm.AWD_LSTM):
            new[module] = _with_class(module, SentenceEncoder)
        elif type(module) is core.PoolingLinearClassifier:
            new[module] = _with_class(module, PoolingLinearClassifier)
    if not any(isinstance(module, AWD_LSTM) for module in [*new.values(), *learn.model.modules()]):
        raise TypeError(
            "learn must hold fastai's AWD_LSTM itself, as language_model_learner(dls, AWD_LSTM) makes it (no "
            f"subclass of it); its model is a {type(learn.model).__name__} without one"
        )
    # fused ones: the model is another accelerated learner's too
    decoders = [m for m in learn.model.modules() if type(m) in (core.LinearDecoder, FusedDecoder)]
    if not decoders:
        record.loss = "no language model's decoder, whose loss could be fused"
    elif why := next(filter(None, (why_not_fused(decoder, learn.loss_func) for decoder in decoders)), ""):
        record.loss = f"logits are kept: {why}"
    else:
        plain = [decoder for decoder in decoders if type(decoder) is core.LinearDecoder]
        new |= {decoder: _with_class(decoder, FusedDecoder) for decoder in plain}
        record.loss_func, learn.loss_func = learn.loss_func, FusedLoss(learn.loss_func)
        learn.add_cb(ReadInTime())
        record.loss = f"decoder and loss are one op: logits are {when_made(learn)}"
    for parent, name, module in list(_children(learn)):
        if module in new:
            record.swapped.append((parent, name, module, new[module]))
            setattr(parent, name, new[module])
    learn.accelerated = record
    return learn


def restore(learn: Learner) -> Learner:
    """Undo `accelerate`: fastai's own modules and loss again, with the current weights and state.

    Raises:
        ValueError: learn was not accelerated.
        TypeError: a module of its encoder was replaced or pruned meanwhile.
    """
    record = _record(learn)
    if not record:
        raise ValueError("learn was not accelerated, so there is nothing to restore")
    paths = {module: f"learn.model.{path}".rstrip(".") for path, module in learn.model.named_modules()}
    for _, name, old, new in record.swapped:
        if type(old) is awdlstm.AWD_LSTM:
            _check_restorable(old, new, paths.get(new, name))
    for parent, name, old, new in reversed(record.swapped):
        if type(old) is awdlstm.AWD_LSTM:
            _copy_state(old, new)
        else:
            vars(old).update(vars(new))  # `training`; all else is shared
        setattr(parent, name, old)
    if isinstance(learn.loss_func, FusedLoss):
        vars(record.loss_func).update(vars(learn.loss_func))  # what was changed in it meanwhile
        learn.loss_func = record.loss_func
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ReadInTime)])
    del learn.accelerated
    return learn


def _record(learn: Learner) -> Accelerated | None:
    if not isinstance(learn, Learner):
        raise TypeError(f"learn must be a fastai Learner, got {type(learn).__name__}")
    return vars(learn).get("accelerated")


def _children(learn: Learner) -> Iterator[tuple[Any, str, nn.Module]]:
    """(parent, name, module) of every module of learn.model, itself first."""
    yield learn, "model", learn.model
    for parent in learn.model.modules():
        for name, module in parent.named_children():
            yield parent, name, module


def _with_class(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A second module over the same parameters, children and hooks."""
    twin = copy.copy(module)
    twin.__class__ = kind
    return twin


def _encoder_like(theirs: awdlstm.AWD_LSTM, name: str) -> AWD_LSTM:
    """Ours with the parameters of theirs, which is `learn.<name>`.

    TypeError if ours would compute something different.
    """
    if type(theirs.encoder) is not nn.Embedding:
        raise _unlike(f"{name}.encoder", theirs.encoder, "nn.Embedding itself")
    with torch.device("meta"):
        ours = AWD_LSTM(
            len(theirs.encoder.weight),
            theirs.emb_sz,
            theirs.n_hid,
            theirs.n_layers,
            theirs.pad_token,
            bidir=theirs.n_dir == 2,
        )
    _check_alike(theirs, ours, name)
    _copy_state(ours, theirs)
    return ours


def _check_alike(theirs: nn.Module, ours: nn.Module, name: str) -> None:
    """TypeError, naming the module, if one of theirs differs from what fastai builds."""
    twins = dict(ours.named_modules())
    for key, module in theirs.named_modules():
        path = ".".join(filter(None, (name, key)))
        if key not in twins:
            raise _unlike(path, module, "nothing")
        twin = twins.pop(key)
        kind = _THEIRS[type(twin)]
        if type(module) is not kind:
            raise _unlike(path, module, f"{kind.__name__} itself")
        for attribute in vars(module):
            if callable(getattr(kind, attribute, None)) and attribute != "flatten_parameters":
                raise _unlike(path, module, f"the class's own {attribute}, not another")
        for attribute in _ALIKE.get(kind, ()):
            found, wanted = getattr(module, attribute), getattr(twin, attribute)
            if found != wanted:
                raise _unlike(path, module, f"{attribute}={wanted!r}, not {found!r}")
        if kind is awdlstm.WeightDropout and list(module.layer_names) != ["weight_hh_l0"]:
            raise _unlike(path, module, f"layer_names ['weight_hh_l0'], not {list(module.layer_names)}")
        if _shapes(module) != _shapes(twin):
            raise _unlike(path, module, f"parameters {_shapes(twin)}, not {_shapes(module)}")
    for key in twins:
        raise _unlike(f"{name}.{key}", None, "a module")


def _check_restorable(theirs: awdlstm.AWD_LSTM, ours: nn.Module, name: str) -> None:
    """TypeError, naming the module, if one of ours, which is `name`, is none that `accelerate` made."""
    twins = dict(ours.named_modules())
    for key, module in theirs.named_modules():
        twin = twins.get(key)
        if _THEIRS.get(type(twin)) is not type(module):
            raise TypeError(
                f"{name}.{key} is a {type(twin).__name__} now: put its own module back, then restore(learn)"
            )
        if isinstance(twin, WeightDropout) and "weight_hh_l0_raw" not in twin._parameters:
            raise TypeError(
                f"{name}.{key}.weight_hh_l0_raw is no parameter any more, as after pruning, and fastai's "
                "module needs it: torch.nn.utils.prune.remove, then restore(learn)"
            )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if isinstance(module, nn.LSTM):  # fastai's weight_p = 0 leaves a second name of the raw weight there
        shapes.pop("weight_hh_l0", None)
    return shapes


def _unlike(path: str, module: nn.Module | None, wanted: str) -> TypeError:
    return TypeError(
        f"learn.{path} ({type(module).__name__}) must be as fastai's AWD_LSTM has it, or what takes its "
        f"place would compute something else: accelerate needs {wanted}"
    )


def _copy_state(to: Any, source: Any) -> None:
    """From one library's encoder to the other's: parameters, buffers and hooks, in the very same dicts."""
    for rnn in source.rnns:
        rnn.module._parameters.pop("weight_hh_l0", None)  # fastai's weight_p = 0 leaves the raw one there
        if isinstance(rnn.module, nn.LSTM):
            rnn.module.weight_hh_l0 = None  # the last call's, with which nothing can be deep-copied
    for name, module in source.named_modules():
        twin = to.get_submodule(name)
        kept = _MODULE_STATE | ({"num_embeddings"} if isinstance(twin, nn.Embedding) else set())
        vars(twin).update({key: vars(module)[key] for key in kept})
        for key, parameter in twin._parameters.items():
            setattr(twin, key, parameter)  # nn.LSTM keeps a list of them besides
    to.encoder_dp.embed_p, to.input_dp.p = float(source.encoder_dp.embed_p), float(source.input_dp.p)
    for kind, p in (("rnns", "weight_p"), ("hidden_dps", "p")):
        for twin, module in zip(getattr(to, kind), getattr(source, kind), strict=True):
            setattr(twin, p, float(getattr(module, p)))
    to.reset()  # clears what the layers keep from the last call
    to.bs, to.hidden = source.bs, list(source.hidden)
