"""What others call the weights of an AWD-LSTM: fastai 0.7, 1 and 2, salesforce/awd-lstm-lm, stock torch.

`parse` takes any of their state dicts apart by name, never by position, checks that the parts fit together
and gives `Parts`; `Parts.named` names them again.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checkpoints import listed
from .text import transfer_rows

FORMATS = ("fastai", "salesforce", "torch")  # besides "ulmfit_fast", which is fastai 2's names in safetensors

_LSTM = re.compile(r"(?:(.*?)(?:\.module)?\.)??((?:weight|bias)_(?:ih|hh))_l(\d+)(_reverse)?(_raw)?")
_EMBEDDING = re.compile(
    r"(.*\.)?(encoder|encoder_dp\.emb|encoder_with_dropout\.embed|embeddings?|embed|emb)\.weight"
)
_DECODER = re.compile(r"(.*\.)?(decoder|linear|fc)\.(weight|bias)")
_HEAD = re.compile(r"(?:module\.)?(?:1\.layers|head)\.(.+)")
_OUR_HEAD = re.compile(r"\d+\.(2\.weight|0\.(weight|bias|running_mean|running_var|num_batches_tracked))")
_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_OLD_N_HID = 1150
# ends of the keys whose tensors have a row for each word
_PER_WORD = ("encoder.weight", "encoder_dp.emb.weight", "1.decoder.weight", "1.decoder.bias")


@dataclass
class Parts:
    """The weights without names.

    layers: each {"weight_ih", "weight_hh", "bias_ih", "bias_hh": tensor}, with "_reverse" after them for the
    other direction; bias: None where there is no decoder, or it has none; head: keys as of
    `PoolingLinearClassifier.layers`; origin: whose names they had; notes: what a reader should know.
    """

    origin: str
    layers: list[dict[str, Tensor]]
    embedding: Tensor | None = None
    decoder: Tensor | None = None
    bias: Tensor | None = None
    head: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def tied(self) -> bool:
        """Whether the decoder's weight is the embedding."""
        one, other = self.decoder, self.embedding
        return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)

    def config(self, source: str) -> dict[str, Any]:
        """The arguments of `AWDLSTM` that fix its shape; ValueError where no AWDLSTM has these shapes."""
        if self.embedding is None:
            raise ValueError(f"{source} holds an LSTM without an embedding, so no encoder can be built")
        directions = 2 if "weight_hh_reverse" in self.layers[0] else 1
        vocab_sz, emb_sz = self.embedding.shape
        outputs = [layer["weight_hh"].shape[1] * directions for layer in self.layers]
        inputs = [layer["weight_ih"].shape[1] for layer in self.layers]
        n_hid = outputs[0]
        if inputs != [emb_sz, *outputs[:-1]] or outputs[-1] != emb_sz or len({*outputs[:-1]}) > 1:
            raise ValueError(
                f"{source} has an embedding of {emb_sz}, layers with {inputs} inputs and {outputs} outputs; "
                "an AWDLSTM's first input and last output are as wide as its embedding, the others equal"
            )
        return dict(
            vocab_sz=vocab_sz, emb_sz=emb_sz, n_hid=n_hid, n_layers=len(outputs), bidir=directions == 2
        )

    def with_bias(self) -> "Parts":
        """The same with zeros for the bias of a decoder that has none."""
        if self.decoder is None or self.bias is not None:
            return self
        return dataclasses.replace(self, bias=self.decoder.new_zeros(len(self.decoder)))

    def named(self, format: str) -> dict[str, Tensor]:
        """The state dict under the names of one of FORMATS, in the order of its writer's own."""
        if format == "salesforce" and (self.head or "weight_hh_reverse" in self.layers[0]):
            what = "classifier" if self.head else "bidirectional LSTM"
            raise ValueError(f"format 'salesforce' has no {what}; use 'fastai' or 'torch'")
        if format == "salesforce" and self.decoder is not None:  # whose decoder always has a bias
            self = self.with_bias()
        where, decoder, head = {
            "fastai": ("0.module." if self.head else "" if self.decoder is None else "0.", "1.", "1.layers"),
            "salesforce": ("", "", ""),
            "torch": ("", "", "head"),
        }[format]
        state = {} if self.embedding is None else {f"{where}encoder.weight": self.embedding}
        if self.embedding is not None and format == "fastai":
            state[f"{where}encoder_dp.emb.weight"] = self.embedding
        for i, layer in enumerate(self.layers):
            for kind, suffix in _ORDER[format]:
                if kind in layer:
                    state[f"{where}rnns.{i}.{suffix}"] = layer[kind]
        if self.decoder is not None:
            state[f"{decoder}decoder.weight"] = self.decoder
        if self.bias is not None:
            state[f"{decoder}decoder.bias"] = self.bias
        return state | {f"{head}.{key}": tensor for key, tensor in self.head.items()}


# kind of weight and its key below rnns.N, in the order in which each writer's state dict has them
_REVERSE = [f"{kind}_reverse" for kind in _KINDS]
_TORCH_KEY = {kind + reverse: f"{kind}_l0{reverse}" for reverse in ("", "_reverse") for kind in _KINDS}
_ORDER = {
    "fastai": [("weight_hh", "weight_hh_l0_raw")]
    + [(k, f"module.{_TORCH_KEY[k]}") for k in ("weight_ih", "bias_ih", "bias_hh", *_REVERSE)],
    "salesforce": [(k, f"module.{_TORCH_KEY[k]}") for k in ("weight_ih", "bias_ih", "bias_hh")]
    + [("weight_hh", "module.weight_hh_l0_raw")],
    "torch": list(_TORCH_KEY.items()),
}


def parse(state: Mapping[str, Tensor], source: str) -> Parts:
    """Takes a state dict apart; ValueError, naming `source`, where it is no LSTM's or its parts do not fit.

    Known are the keys of fastai 0.7, 1 and 2 (language model, classifier, encoder), of salesforce's RNNModel
    with and without weight drop, and of stock modules: nn.LSTMs in any order of nesting and numbering, an
    embedding (`encoder`, `embedding`, `emb`), a decoder (`decoder`, `linear`, `fc`), a head as
    `save_checkpoint` writes it.  A copy of the recurrent weight beside its raw one is dropped.

    The two biases of a layer cannot be told apart by their values, nor need they be: only their sum enters an
    LSTM.  Keys in another order than fastai's are noted, as its `load_pretrained` goes by position.
    """
    found: dict[tuple[Any, ...], dict[str, Tensor]] = {}
    raw, rest, heads = set(), {}, {}
    for key, tensor in state.items():
        if match := _LSTM.fullmatch(key):
            path, kind, layer, reverse, is_raw = match.groups()
            place = (_natural(path or ""), int(layer))
            kind += reverse or ""
            if is_raw or (place, kind) not in raw:
                found.setdefault(place, {})[kind] = tensor
            if is_raw:
                raw.add((place, kind))
        elif match := _HEAD.fullmatch(key):
            heads[match[1]] = tensor
        else:
            rest[key] = tensor
    if not found:
        raise ValueError(
            f"{source} holds no LSTM weights (weight_ih_l0 and so on); its keys: {listed(state)}"
        )
    parts = Parts(_origin(state), [found[place] for place in sorted(found)])
    parts.embedding = _only(source, {k: t for k, t in rest.items() if _EMBEDDING.fullmatch(k)})
    decoders = {k: t for k, t in rest.items() if _DECODER.fullmatch(k)}
    parts.decoder = _only(source, {k: t for k, t in decoders.items() if k.endswith("weight")})
    parts.bias = _only(source, {k: t for k, t in decoders.items() if k.endswith("bias")})
    if unknown := [k for k in rest if not _EMBEDDING.fullmatch(k) and k not in decoders]:
        raise ValueError(f"{source} has keys that no AWD-LSTM has: {listed(unknown)}")
    for i, layer in enumerate(parts.layers):
        _complete(source, i, layer, parts.notes)
    _check_outside(source, parts)
    _take_head(parts, heads)
    _note(parts, list(state))
    return parts


def _natural(path: str) -> tuple[Any, ...]:
    """rnns.2 before rnns.10."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split("."))


def _origin(state: Iterable[str]) -> str:
    keys = " ".join(state)
    if "encoder_with_dropout." in keys:
        return "fastai 0.7"
    if "encoder_dp." in keys:
        return "fastai 1" if re.search(r"module\.weight_hh_l0( |$)", keys) else "fastai 2"
    if "module.weight_hh_l0_raw" in keys:
        return "salesforce"
    return "fastai 2" if "weight_hh_l0_raw" in keys else "torch"


def _only(source: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The one tensor that is there under one or several names."""
    first = None
    for key, tensor in tensors.items():
        if first is None:
            name, first = key, tensor
        elif tensor is not first and not torch.equal(tensor, first):
            raise ValueError(f"{source}: {name} and {key} should hold one tensor, but differ")
    return first


def _complete(source: str, i: int, layer: dict[str, Tensor], notes: list[str]) -> None:
    """Checks one layer, and gives it biases of zero where it has none."""
    for reverse in ("", "_reverse") if any(kind.endswith("_reverse") for kind in layer) else ("",):
        kinds = [kind + reverse for kind in _KINDS]
        if not any(kind in layer for kind in kinds[2:]) and kinds[0] in layer:
            layer |= {kind: layer[kinds[0]].new_zeros(len(layer[kinds[0]])) for kind in kinds[2:]}
            notes.append(f"layer {i} has no biases in the file: zeros")
        if missing := [kind for kind in kinds if kind not in layer]:
            raise ValueError(f"{source}: layer {i} lacks {listed(missing)}")
        shapes = [tuple(layer[kind].shape) for kind in kinds]
        n = shapes[1][-1] if len(shapes[1]) == 2 else 0
        if len(shapes[0]) == 2 and n and shapes[0][0] == shapes[1][0] == 3 * n:
            raise ValueError(f"{source}: layer {i} is a GRU's (3 x {n} rows), an LSTM has 4 x {n}")
        if not n or len(shapes[0]) != 2 or shapes != [(4 * n, shapes[0][1]), (4 * n, n), (4 * n,), (4 * n,)]:
            said = ", ".join(f"{kind} {shape}" for kind, shape in zip(kinds, shapes, strict=True))
            raise ValueError(f"{source}: the weights of layer {i} do not fit each other: {said}")


def _check_outside(source: str, parts: Parts) -> None:
    """Embedding and decoder, against each other; fastai 0.7's decoder gets the bias that fastai 2's has."""
    for name, tensor in (("embedding", parts.embedding), ("decoder", parts.decoder)):
        if tensor is not None and tensor.dim() != 2:
            raise ValueError(f"{source}: the {name} has shape {tuple(tensor.shape)}, not (words, features)")
    if parts.decoder is None:
        if parts.bias is not None:
            raise ValueError(f"{source}: a decoder's bias, but no decoder")
        return
    rows = len(parts.decoder)
    if parts.embedding is not None and len(parts.embedding) != rows:
        raise ValueError(f"{source}: {len(parts.embedding)} words in the embedding, {rows} in the decoder")
    if parts.bias is None and parts.origin == "fastai 0.7":
        parts.bias = parts.with_bias().bias
        parts.notes.append("no decoder bias in the file: zeros")
    elif parts.bias is None:
        parts.notes.append("no decoder bias in the file, and none in its language model")
    elif parts.bias.shape != (rows,):
        raise ValueError(f"{source}: the decoder has {rows} rows, its bias {tuple(parts.bias.shape)}")


def _take_head(parts: Parts, heads: dict[str, Tensor]) -> None:
    if all(_OUR_HEAD.fullmatch(key) for key in heads):
        parts.head = heads
    else:
        parts.notes.append(
            "its classifier head is fastai 1's or 0.7's, whose linear layers have biases: left out, "
            "the encoder is here"
        )


def _note(parts: Parts, keys: list[str]) -> None:
    if parts.layers[0]["weight_hh"].shape[1] == _OLD_N_HID:
        parts.notes.append(
            f"{_OLD_N_HID} hidden units, as salesforce and fastai 0.7 have, where fastai 2 has 1152"
        )
    order = [
        kind for key in keys if (match := _LSTM.fullmatch(key)) and (kind := match[2]).startswith("bias")
    ]
    if "bias_ih" in order and order.index("bias_hh") < order.index("bias_ih"):
        parts.notes.append(
            "bias_hh stands before bias_ih in the file: read by name here, swapped by what goes by position"
        )


def transfer(
    state: Mapping[str, Tensor], old: Sequence[str], new: Sequence[str]
) -> tuple[dict[str, Tensor], int]:
    """(state dict for another vocabulary, number of its words that were known): see `Checkpoint.with_tokens`.

    state: keys as of LanguageModel, TextClassifier or AWDLSTM; old, new: words in order.
    """
    rows = torch.from_numpy(transfer_rows(old, new))
    known = rows >= 0
    moved = dict(state)
    made = {}
    for key, tensor in state.items():
        if key.endswith(_PER_WORD):
            if tensor.data_ptr() not in made:  # tied weights stay one tensor
                weight = tensor.cpu()
                fresh = weight.mean(0, keepdim=True).expand(len(new), *weight.shape[1:]).clone()
                fresh[known] = weight[rows[known]]
                made[tensor.data_ptr()] = fresh
            moved[key] = made[tensor.data_ptr()]
    return moved, int(known.sum())
