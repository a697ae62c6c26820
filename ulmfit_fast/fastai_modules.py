"""fastai's text modules under their names, on the library's own encoder; see `ulmfit_fast.fastai`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

try:
    from fastai.text.models import awdlstm, core
    from fastai.torch_core import TensorBase
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "fastai":
        raise
    raise ImportError("ulmfit_fast.fastai needs fastai 2: pip install fastai") from None

from . import nn as own
from . import ops
from .encoder import AWDLSTM
from .layer import WeightDropLayer
from .nn import State, WeightDropLSTM
from .ops._common import Seed, draw_seed

__all__ = [
    "AWD_LSTM",
    "EmbeddingDropout",
    "PoolingLinearClassifier",
    "RNNDropout",
    "SentenceEncoder",
    "WeightDropout",
    "dropout_mask",
]


class _Plain(nn.Module):
    """Mixed in before a fastai base class: isinstance holds, but fastai's constructor is not called."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class RNNDropout(own.VariationalDropout, _Plain, awdlstm.RNNDropout):
    """fastai's `RNNDropout`: one mask for all time steps."""


class EmbeddingDropout(own.EmbeddingDropout, _Plain, awdlstm.EmbeddingDropout):
    """fastai's `EmbeddingDropout`, whose scale leaves the weights as they are."""


def dropout_mask(x: Tensor, sz: list[int], p: float) -> Tensor:
    """A mask of shape sz in x's dtype and device: 0 with probability p, else 1 / (1 - p)."""
    return ops.dropout_mask(draw_seed(x.device), tuple(sz), p, dtype=x.dtype, device=x.device)


class InnerLSTM(WeightDropLSTM):
    """Replaces the `nn.LSTM` that a `WeightDropout` wraps.

    `weight_hh_l0` can be read, as in fastai: it is made at that moment, from the last call's mask.  A call
    of this module by itself reads it too, and so drops nothing more.
    """

    recall: Callable[[], Tensor]

    def __getattr__(self, name: str) -> Any:  # only for names that are not found otherwise
        if name == "weight_hh_l0" and "recall" in vars(self):
            return self.recall()
        return super().__getattr__(name)


class WeightDropout(WeightDropLayer, _Plain, awdlstm.WeightDropout):
    """fastai's `WeightDropout(module, weight_p, layer_names)` around one layer of `nn.LSTM`, whose parameters
    it takes over.

    Unlike fastai's it drops the reverse direction's recurrent weights too, and copies no weight in eval.
    Other modules are refused: fastai's own class wraps those.
    """

    _last_mask: tuple[float, Seed]

    def __init__(
        self, module: nn.LSTM, weight_p: float, layer_names: str | list[str] = "weight_hh_l0"
    ) -> None:
        if not isinstance(module, nn.LSTM):
            raise TypeError(f"module must be an nn.LSTM, got {type(module).__name__}")
        if module.num_layers != 1 or not module.bias or module.proj_size:
            raise ValueError(f"module must have one layer, biases and no projection, got {module}")
        names = [layer_names] if isinstance(layer_names, str) else list(layer_names)
        if names != ["weight_hh_l0"]:
            raise ValueError(f"layer_names must be 'weight_hh_l0' (its reverse is dropped too), got {names}")
        nn.Module.__init__(self)
        self.layer_names = names
        self.module = inner = InnerLSTM(
            module.input_size,
            module.hidden_size,
            batch_first=module.batch_first,
            bidirectional=module.bidirectional,
            device="meta",
        )
        self.weight_p = float(weight_p)
        parameters = dict(module.named_parameters())
        self.weight_hh_l0_raw = parameters.pop("weight_hh_l0")
        del self.module.weight_hh_l0
        for name, parameter in parameters.items():
            setattr(self.module, name, parameter)
        inner.recall = self._dropped_weight
        self.reset()

    def forward(
        self,
        x: Tensor,
        hx: State | None = None,
        lengths: Tensor | None = None,
        seed: Seed = None,
        **drop: Any,
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
        p = self.weight_p if self.training else 0.0
        if p and seed is None:
            seed = draw_seed(x.device)
        self._last_mask = (p, seed)
        return super().forward(x, hx, lengths, seed, **drop)

    def reset(self) -> None:
        """`module.weight_hh_l0` is the raw weight again."""
        self._last_mask = (0.0, None)

    def _dropped_weight(self) -> Tensor:
        raw, (p, seed) = self.weight_hh_l0_raw, self._last_mask
        if not p or seed is None:
            return raw.clone()
        return raw * ops.dropout_mask(int(seed), tuple(raw.shape), p, dtype=raw.dtype, device=raw.device)


class AWD_LSTM(AWDLSTM, _Plain, awdlstm.AWD_LSTM):
    """fastai's `AWD_LSTM`: its constructor, attributes, outputs and state-dict keys, on our kernels.

    Differences from fastai: with bidir the reverse direction's recurrent weights are dropped too; no weight
    is copied in eval; it can be deep-copied, pickled and compiled whole.
    """

    initrange = 0.1

    def __init__(
        self,
        vocab_sz: int,
        emb_sz: int,
        n_hid: int,
        n_layers: int,
        pad_token: int = 1,
        hidden_p: float = 0.2,
        input_p: float = 0.6,
        embed_p: float = 0.1,
        weight_p: float = 0.5,
        bidir: bool = False,
    ) -> None:
        dropouts: dict[str, Any] = dict(
            hidden_p=hidden_p, input_p=input_p, embed_p=embed_p, weight_p=weight_p
        )
        for name, p in dropouts.items():
            try:
                dropouts[name] = p = float(p)  # NumPy numbers and tensors too
            except (TypeError, ValueError):
                raise TypeError(f"{name} must be a number, got {p!r}") from None
            if not 0 <= p < 1:
                raise ValueError(
                    f"{name} must be in [0, 1) (the probability of dropping), got {p:g}: fastai multiplies "
                    f"each of config's probabilities by drop_mult; take a smaller one, or a smaller {name}"
                )
        super().__init__(vocab_sz, emb_sz, n_hid, n_layers, pad_token, bidir=bidir, **dropouts)
        self.encoder_dp = EmbeddingDropout(self.encoder, dropouts["embed_p"])
        self.input_dp = RNNDropout(dropouts["input_p"])
        self.hidden_dps = nn.ModuleList(RNNDropout(dropouts["hidden_p"]) for _ in range(n_layers))

    # the next two are fastai's, for subclasses to override: their names and positions, and no keyword
    def _one_rnn(self, n_in: int, n_out: int, bidir: bool, weight_p: float, layer: int) -> nn.Module:
        return WeightDropout(nn.LSTM(n_in, n_out, batch_first=True, bidirectional=bidir), weight_p)

    def _one_hidden(self, layer: int) -> State:
        return self.zero_hidden(self.bs)[layer]

    def _layer(self, layer: int, bidir: bool, weight_p: float, **factory: Any) -> nn.Module:
        n_in = self.n_hid if layer else self.emb_sz
        return self._one_rnn(n_in, self._features(layer), bidir, weight_p, layer)

    def forward(  # type: ignore[override]  # fastai's two arguments may come without their names
        self, inp: Tensor, from_embeds: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """inp (B, T) token numbers, or (B, T, emb_sz) embeddings with from_embeds -> (B, T, emb_sz).

        options are those of `AWDLSTM`.  The output is of inp's type, which in fastai is not plain Tensor.
        """
        kind = type(inp)
        if not isinstance(inp, TensorBase):
            return super().forward(inp, from_embeds, **options)
        # plain inside: every operation of fastai's types takes a detour through Python
        out = super().forward(inp.as_subclass(Tensor), from_embeds, **options)
        return out if isinstance(out, tuple) else out.as_subclass(kind)

    def reset(self) -> None:
        """Forget the state: the next call starts from zeros."""
        rnn: Any  # what `_one_rnn` makes
        for rnn in self.rnns:
            if hasattr(rnn, "reset"):
                rnn.reset()
        super().reset()
        self.hidden = [self._one_hidden(layer) for layer in range(self.n_layers)]


class SentenceEncoder(core.SentenceEncoder):
    """fastai's `SentenceEncoder`, for documents in any order, padded before or after their words.

    fastai's counts the rows with a word in a chunk's first column and reads as many from the top.  Those are
    the wrong ones where the batch is not sorted, and also where padding at a document's end reaches that
    column; then it is silently wrong.  Here each chunk is read by the rows that have begun.  What it has in
    common with fastai's: documents begin where a chunk does, the state is detached between chunks, and of a
    document longer than max_len only whole chunks at its end are pooled.
    """

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """input (B, T) token numbers -> outputs (B, L, emb_sz), mask (B, L): True where there is padding.

        Whole chunks of padding after a document come before it in what is returned, as the head's pooling
        looks for the last word in the last bptt columns.  ValueError where a document begins inside a chunk:
        fastai's leaves the chunk's tokens out.
        """
        rows, columns = input.shape
        padding = input.as_subclass(Tensor) == self.pad_idx
        begins = padding.long().cumprod(1).sum(1)  # padding before each document
        after = padding.flip(1).long().cumprod(1).sum(1).where(begins < columns, 0)
        for row, begin in enumerate(begins.tolist()):
            if begin % self.bptt and begin < columns:
                raise ValueError(
                    f"input must be padded in whole chunks of bptt = {self.bptt} before each document, but "
                    f"row {row} begins at {begin}: give the DataLoaders and the learner the same seq_len"
                )
        shift = after // self.bptt * self.bptt
        begins, order = (begins + shift).sort(stable=True)
        places = torch.arange(columns, device=input.device) - shift[order, None]
        input = input[order].gather(1, places % columns)
        padding, begins = input == self.pad_idx, begins.tolist()
        self.reset()
        outs, masks = [], []
        for start in range(0, columns, self.bptt):
            chunk = slice(start, start + self.bptt)
            out = self.module(input[: bisect_right(begins, start), chunk])
            if self.max_len is None or columns - start <= self.max_len:
                outs.append(core._pad_tensor(out, rows))
                masks.append(padding[:, chunk])
        out, mask = torch.cat(outs, 1), torch.cat(masks, 1)
        if order.tolist() == list(range(rows)):  # as fastai's sorted batches mostly are: no copy
            return out, mask
        back = order.argsort()
        return out.index_select(0, back), mask.index_select(0, back)


class PoolingLinearClassifier(core.PoolingLinearClassifier):
    """fastai's classifier head, which takes the output after each document's last word, however short it is.

    fastai's counts the padding in the last bptt columns, also that before a document that begins there, and
    so goes back too far in one shorter than bptt.
    """

    def forward(self, input: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """outputs (B, L, emb_sz), mask (B, L) as of `SentenceEncoder` -> (B, classes), outputs twice."""
        out, mask = input
        pooled = core.masked_concat_pool(out, mask, self.bptt)
        after = mask.flip(1).long().cumprod(1).sum(1)
        last = out[torch.arange(len(out)), -after.clamp(max=mask.size(1) - 1) - 1]
        x = self.layers(torch.cat([last, pooled[:, last.size(1) :]], 1))
        return x, out, out


core._model_meta[AWD_LSTM] = core._model_meta[awdlstm.AWD_LSTM].copy()
