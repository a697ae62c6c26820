"""Modules over the ops: the weight-dropped LSTM, embedding dropout and variational dropout."""

import math
import warnings
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .ops._common import Seed, check_probability, check_seed, check_size, derive_seed, draw_seed
from .ops._logits import is_plain

State = tuple[Tensor, Tensor]  # (h, c) of an LSTM


def refuse_options(emb: nn.Embedding, owner: str) -> None:
    """ValueError for an embedding with options that the op lacks; `owner` is whose argument it is."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(emb, option):
            raise ValueError(f"{owner} has no nn.Embedding({option}={getattr(emb, option)})")


class VariationalDropout(nn.Module):
    """Dropout with one mask per (sample, feature) for all time steps (Gal and Ghahramani 2016).

    Input (B, T, *), or (T, B, *) with batch_first=False; the same shape comes out.  Identity in eval.
    """

    def __init__(self, p: float = 0.5, batch_first: bool = True) -> None:
        super().__init__()
        self.p = check_probability("VariationalDropout", "p", p)
        self.batch_first = batch_first

    def forward(self, x: Tensor, seed: Seed = None) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return ops.variational_dropout(x, self.p, seed=seed, batch_first=self.batch_first)

    if TYPE_CHECKING:
        __call__ = forward  # here and below: nn.Module's own says Any

    def extra_repr(self) -> str:
        return f"p={self.p}" + ("" if self.batch_first else ", batch_first=False")


class EmbeddingDropout(nn.Module):
    """Look-up in the embedding `emb` that drops whole vocabulary rows with probability embed_p in training.

    `emb` is shared, not copied; its padding_idx row gets no gradient from the look-up.  `scale` multiplies
    the result (fastai's argument, without its side effect of scaling the weights themselves in eval).
    """

    def __init__(self, emb: nn.Embedding, embed_p: float) -> None:
        super().__init__()
        refuse_options(emb, "EmbeddingDropout")
        self.emb = emb
        self.embed_p = check_probability("EmbeddingDropout", "embed_p", embed_p)

    def forward(self, ids: Tensor, scale: float | None = None, seed: Seed = None) -> Tensor:
        p = self.embed_p if self.training else 0.0
        if is_plain(self.emb, nn.Embedding):
            out = ops.embedding_dropout(self.emb.weight, ids, p, seed=seed, padding_idx=self.emb.padding_idx)
        else:  # hooks, or a forward of its own: the same rows and masks, by a call of the module
            out = self.emb(ids)
            if p > 0:
                words = self.emb.weight.shape[0]
                mask = ops.dropout_mask(seed, words, p, dtype=out.dtype, device=out.device)
                out = out * mask[ids].unsqueeze(-1)
        return out if scale is None else out * scale

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"embed_p={self.embed_p}"


class WeightDropLSTM(nn.Module):
    """`torch.nn.LSTM` with DropConnect on the recurrent weights (Merity et al. 2017) and `lengths`.

    Constructor, call, parameter names and initialisation are `nn.LSTM`'s, so state dicts go both ways.  In
    eval, or with weight_p=0 and dropout=0, the outputs are equal up to rounding.  What differs:

    - weight_p: in training each forward draws one mask per recurrent matrix, kept for all time steps and
      scaled by 1/(1-weight_p).  Every layer and direction has its own mask (fastai leaves the reverse
      direction's undropped).
    - dropout between layers is variational: one mask per (sample, feature) for all time steps.
    - lengths (B,), 0..T in any order, in place of a PackedSequence: steps past a sequence's length give
      zeros, h_n and c_n are those of its last valid step, the reverse direction starts there.
    - seed: layer l in direction d uses `derive_seed(seed, l * directions + d)`, the dropout after layer l
      `derive_seed(seed, num_layers * directions + l)`.  None draws one where a mask is wanted.
    - proj_size is refused.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_p: float = 0.0,
    ) -> None:
        super().__init__()
        input_size = check_size("input_size", input_size)
        hidden_size = check_size("hidden_size", hidden_size)
        num_layers = check_size("num_layers", num_layers)
        flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
        if proj_size != 0:
            raise ValueError(
                f"proj_size must be 0, got {proj_size}: WeightDropLSTM has no projection; "
                "use torch.nn.LSTM, or a linear layer after this module"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = check_probability("WeightDropLSTM", "dropout", dropout)
        self.bidirectional = bidirectional
        self.proj_size = 0
        if dropout > 0 and num_layers == 1:
            warnings.warn(  # as nn.LSTM does
                "dropout is that between layers, so it has no effect where there is one: "
                f"got dropout={dropout} and num_layers=1",
                stacklevel=2,
            )
        self.weight_p = check_probability("WeightDropLSTM", "weight_p", weight_p)
        for layer in range(num_layers):
            n_in = input_size if layer == 0 else hidden_size * self.num_directions
            rows = 4 * hidden_size
            shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, n_in), "weight_hh": (rows, hidden_size)}
            if bias:
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
            for suffix in self._suffixes():
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(f"{name}_l{layer}{suffix}", parameter)
        self.reset_parameters()

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """[w_ih, w_hh, b_ih, b_hh] (the first two without bias) of each layer and direction in turn."""
        return self._matrices({})

    def _matrices(self, replaced: dict[str, Tensor]) -> list[list[Tensor]]:
        known = [name for names in self.weight_names for name in names]
        if not isinstance(replaced, dict):
            raise TypeError(f"weights must be a dict of tensors by name, got {type(replaced).__name__}")
        if unknown := [name for name in replaced if name not in known]:
            raise ValueError(f"weights must be named as one of {', '.join(known)}, got {unknown[0]!r}")

        def weight(name: str) -> Tensor:
            return replaced[name] if name in replaced else getattr(self, name)

        return [[weight(name) for name in names] for names in self.weight_names]

    @property
    def weight_names(self) -> list[list[str]]:
        """The names of `all_weights`."""
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        return [
            [f"{kind}_l{layer}{suffix}" for kind in kinds]
            for layer in range(self.num_layers)
            for suffix in self._suffixes()
        ]

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(hidden_size), in `nn.LSTM`'s order: one `manual_seed`, the same weights."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Does nothing, as no kernel here wants one flat buffer; there for code written for `nn.LSTM`."""

    @overload
    def forward(
        self, input: Tensor, hx: State | None = ..., *,
        lengths: Tensor | None = ..., seed: Seed = ..., weights: dict[str, Tensor] | None = ...,
        weight_p: float | None = ..., dropout_p: None = ..., dropout_seed: None = ...,
    ) -> tuple[Tensor, State]: ...  # fmt: skip
    @overload
    def forward(
        self, input: Tensor, hx: State | None = ..., *,
        lengths: Tensor | None = ..., seed: Seed = ..., weights: dict[str, Tensor] | None = ...,
        weight_p: float | None = ..., dropout_p: float, dropout_seed: Seed = ...,
    ) -> tuple[Tensor, State, Tensor]: ...  # fmt: skip
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        seed: Seed = None,
        weights: dict[str, Tensor] | None = None,
        weight_p: float | None = None,
        dropout_p: float | None = None,
        dropout_seed: Seed = None,
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
        """All layers over input.

        Args:
            input: (T, B, I), or (B, T, I) with batch_first, or (T, I) for one sequence.
            hx: (h_0, c_0), each (layers * directions, B, H), without B where input has none; None for zeros.
            lengths: int64 or int32 (B,), each in 0..T, in any order, see the class.
            seed: of all masks, see the class; None draws one where a mask is wanted.
            weights: used in place of the module's own, by their names.
            weight_p: in place of the module's own.
            dropout_p: where given, output is also returned after a variational dropout with this probability,
                in eval too.
            dropout_seed: of that dropout's mask.

        Returns:
            output, like input with directions * H features; (h_n, c_n), each like h_0; where dropout_p is
            given also the dropped output (with dropout_p=0 output itself).

        Raises:
            TypeError, ValueError, RuntimeError: an argument is not what is said above; where `nn.LSTM` raises
                too, with its type and message.
        """
        x = input  # nn.LSTM's name
        matrices = self._matrices({} if weights is None else weights)
        self._check_input(x, matrices[0][0], lengths)
        seed = check_seed("WeightDropLSTM", seed)
        if dropout_p is None and dropout_seed is not None:
            raise ValueError(f"dropout_seed needs dropout_p, got {dropout_seed!r} alone")
        if hx is not None:
            self._check_hidden(x, hx)
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(0 if self.batch_first else 1)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        weight_p = self.weight_p if weight_p is None else weight_p
        weight_p = check_probability("WeightDropLSTM", "weight_p", weight_p)
        if not self.training:
            weight_p = 0.0
        dropout = self.dropout if self.training and self.num_layers > 1 else 0.0
        if seed is None and (weight_p > 0 or dropout > 0):
            seed = draw_seed(x.device)
        drops: list[tuple[float | None, Seed]] = [(None, None)] * (self.num_layers - 1)  # after each layer
        if dropout > 0:
            drops = [(dropout, derive_seed(seed, len(matrices) + layer)) for layer, _ in enumerate(drops)]
        drops.append((dropout_p, dropout_seed))
        h_n, c_n = [], []
        for layer, (p, mask_seed) in enumerate(drops):
            fused: dict[str, Any] = {}
            if not self.bidirectional:
                fused = {"dropout_p": p, "dropout_seed": mask_seed}
            outputs = []
            for direction in range(self.num_directions):
                i = layer * self.num_directions + direction
                h0, c0 = (None, None) if hx is None else (hx[0][i], hx[1][i])
                y, h, c, *dropped = ops.lstm(
                    x,
                    h0,
                    c0,
                    *matrices[i],
                    weight_p=weight_p,
                    seed=derive_seed(seed, i),
                    batch_first=self.batch_first,
                    lengths=lengths,
                    reverse=direction == 1,
                    **fused,
                )
                outputs.append(y)
                h_n.append(h)
                c_n.append(c)
            output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            if dropped:
                x = dropped[0]
            elif p is None:
                x = output
            else:  # one mask for the features of both directions
                x = ops.variational_dropout(output, p, seed=mask_seed, batch_first=self.batch_first)
        state = torch.stack(h_n), torch.stack(c_n)
        if not batched:
            output, x = (t.squeeze(0 if self.batch_first else 1) for t in (output, x))
            state = state[0].squeeze(1), state[1].squeeze(1)
        return (output, state) if dropout_p is None else (output, state, x)

    if TYPE_CHECKING:
        __call__ = forward

    def _check_input(self, x: Tensor, weight: Tensor, lengths: Tensor | None) -> None:
        if isinstance(x, PackedSequence):
            raise TypeError(
                "WeightDropLSTM takes a padded tensor and its lengths=, not a PackedSequence: "
                "x, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed); lstm(x, lengths=lengths)"
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"input must be a tensor, got {type(x).__name__}")
        if x.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {x.dim()}D instead")
        if x.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.size(-1)}"
            )
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        if lengths is not None and x.dim() == 2:
            raise ValueError("lengths needs a batch dimension; cut the 2-D input instead: input[:length]")

    def _check_hidden(self, x: Tensor, hx: State) -> None:
        if not isinstance(hx, tuple | list) or len(hx) != 2:
            raise TypeError(f"hx must be the tuple (h_0, c_0), got {type(hx).__name__}")
        if x.dim() == 2 and not hx[0].dim() == hx[1].dim() == 2:
            raise RuntimeError(
                "For unbatched 2-D input, hx and cx should also be 2-D but got "
                f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        batch = () if x.dim() == 2 else (x.size(0 if self.batch_first else 1),)
        expected = (self.num_layers * self.num_directions, *batch, self.hidden_size)
        for i, state in enumerate(hx):
            if tuple(state.shape) != expected:
                raise RuntimeError(f"Expected hidden[{i}] size {expected}, got {list(state.shape)}")

    def extra_repr(self) -> str:
        defaults = dict(
            num_layers=1, bias=True, batch_first=False, dropout=0, bidirectional=False, weight_p=0
        )
        changed = [f"{k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *changed])
