"""The way back: each model as a graph of stock torch modules, which runs where this library is not installed.

The classes here are only traced, into a `torch.fx.GraphModule` whose children are nn.Embedding, nn.LSTM,
nn.Linear and the like, and which pickles its forward as source: a saved graph names nothing of this package.
Their code must not look at a size of its input as a Python number, or the graph would keep that number.
"""

import copy
import re
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, fx, nn

from .checkpoints import listed
from .nn import WeightDropLSTM
from .stack import Stack

if TYPE_CHECKING:
    from .encoder import AWDLSTM

_Module = TypeVar("_Module", bound=nn.Module)
State = tuple[tuple[Tensor, Tensor] | None, ...]  # per layer (h, c), as AWDLSTM.hidden, or None for zeros

_RENAMED = (
    (r"^(0\.module|0|1)\.", ""),
    (r"^(rnns\.\d+)\.(?:module\.)?(\w+?)(?:_raw)?$", r"\1.\2"),
    (r"^layers\.", "head."),
)


def torch_key(key: str) -> str | None:
    """The key that a key of AWDLSTM's, LanguageModel's or TextClassifier's state dict has after to_torch().

    `encoder.weight`, `rnns.{l}.` with nn.LSTM's names, `decoder.weight` and `.bias`, `head.{i}.{0,2}.` with
    those of its batch norms and linears.  None for `encoder_dp.emb.weight`, which is the embedding's again.
    """
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return None if key == "encoder_dp.emb.weight" else key


def to_torch(model: nn.Module, stock: "Encoder") -> fx.GraphModule:
    """The graph of `stock`, one of the classes below made for `model`, in eval, its weights copied."""
    named = ((torch_key(key), tensor) for key, tensor in model.state_dict().items())
    state = {key: tensor.clone() for key, tensor in named if key is not None}
    if others := state.keys() ^ stock.state_dict().keys():
        raise ValueError(
            f"to_torch takes the weights of its own modules alone, but {type(model).__name__} differs in "
            f"{listed(sorted(others))}: remove pruning and parametrizations (torch.nn.utils.prune.remove, "
            "torch.nn.utils.parametrize.remove_parametrizations) first"
        )
    stock.load_state_dict(state, assign=True)
    if isinstance(stock, LanguageModel) and getattr(model, "tie_weights", False):
        stock.decoder.weight = stock.encoder.weight
    rnn: Any  # a ModuleList does not say what it holds
    for rnn in stock.rnns:
        rnn.flatten_parameters()  # one buffer, as cuDNN wants it
    tracer = fx.Tracer()
    tracer.is_leaf_module = lambda m, module_qualified_name: True  # type: ignore[method-assign]  # the head stays whole
    graph = tracer.trace(stock)
    for node in graph.find_nodes(op="placeholder", target="state"):
        node.args = ((None,) * len(stock.rnns),)  # the default: nn.LSTM starts from zeros where it gets None
    return fx.GraphModule(stock, graph, type(model).__name__).eval()


def _expect(name: str, module: object, kind: type[_Module]) -> _Module:
    if not isinstance(module, kind):
        raise ValueError(f"to_torch needs a {kind.__name__} as {name}, got a {type(module).__name__}")
    return module


class Encoder(nn.Module):
    """ids (B, T), state -> output (B, T, E), new state."""

    def __init__(self, awd_lstm: "AWDLSTM") -> None:
        super().__init__()
        lstms = [
            _expect(f"rnns[{layer}].module", rnn.module, WeightDropLSTM)
            if hasattr(rnn, "module")
            else _expect(f"rnns[{layer}]", rnn, WeightDropLSTM)
            for layer, rnn in enumerate(awd_lstm.rnns)
        ]
        words, width = awd_lstm.encoder.weight.shape
        with torch.device("meta"):  # the weights are assigned
            self.encoder = nn.Embedding(words, width, awd_lstm.encoder.padding_idx)
            self.rnns = nn.ModuleList(
                nn.LSTM(x.input_size, x.hidden_size, batch_first=True, bidirectional=x.bidirectional)
                for x in lstms
            )

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        x = self.encoder(ids)
        new = []
        for layer, rnn in enumerate(self.rnns):
            x, carried = rnn(x, state[layer])
            new.append(carried)
        return x, tuple(new)


class LanguageModel(Encoder):
    """ids (B, T), state -> logits (B, T, V), new state."""

    def __init__(self, model: "Stack[AWDLSTM, Any]") -> None:
        super().__init__(model[0])
        linear = _expect("decoder.decoder", model[1].decoder, nn.Linear)
        words, width = linear.weight.shape
        self.decoder = nn.Linear(width, words, bias=linear.bias is not None, device="meta")

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        output, new = super().forward(ids, state)
        return self.decoder(output), new


class TextClassifier(Encoder):
    """ids (B, T) with T > 0, lengths (B,) -> logits (B, C).

    A document is read in one piece.  That gives the same numbers as chunks that pass their state on, but for
    the reverse direction of a bidirectional layer: SentenceEncoder's starts, in each chunk, from where it
    was at the beginning of the one before.  It therefore reads the document with every chunk turned round.
    """

    def __init__(self, model: Stack[Any, Any]) -> None:
        super().__init__(model[0].module)
        self.bptt, self.max_len = model[0].bptt, model[0].max_len
        self.head = nn.Sequential(*(nn.Sequential(*map(_stock_layer, block)) for block in model[1].layers))

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]  # a graph of its own
        position = torch.ones_like(ids).cumsum(1) - 1
        lengths = lengths.long().unsqueeze(1)
        beyond = position >= lengths
        x = self.encoder(ids.masked_fill(beyond, 0))
        turned = self._turned(position, lengths) if self.rnns[0].bidirectional else None
        rnn: Any
        for rnn in self.rnns:
            x = rnn(x)[0] if turned is None else _read_both_ways(rnn, x, turned)
        beyond = beyond.unsqueeze(2)
        last = _at(x, (lengths - 1).clamp(min=0), self.encoder.embedding_dim).squeeze(1)
        largest = x.masked_fill(beyond, -torch.inf).amax(1)
        mean = x.masked_fill(beyond, 0).sum(1) / lengths.clamp(min=1)
        return self.head(torch.cat([last, largest, mean], 1).masked_fill(lengths == 0, 0))

    def _turned(self, position: Tensor, lengths: Tensor) -> Tensor:
        """Where each position lies once the chunks of its document are reversed; those beyond it stay.

        The chunks are those of `SentenceEncoder._chunks`: distances near..far-1 from the document's end.
        """
        distance = lengths - 1 - position
        near = distance // self.bptt * self.bptt
        far = near + self.bptt
        if self.max_len is not None:
            early = (distance - self.max_len) // self.bptt * self.bptt + self.max_len
            far = torch.where(distance < self.max_len, far.clamp(max=self.max_len), early + self.bptt)
            near = torch.where(distance < self.max_len, near, early)
        first, last = (lengths - far).clamp(min=0), lengths - 1 - near
        return torch.where(distance < 0, position, first + last - position)


def _at(x: Tensor, position: Tensor, features: int) -> Tensor:
    """x (B, T, F) at the time steps `position` (B, S): (B, S, F)."""
    return x.gather(1, position.unsqueeze(2).expand(-1, -1, features))


def _read_both_ways(rnn: nn.LSTM, x: Tensor, turned: Tensor) -> Tensor:
    """One bidirectional layer whose reverse direction reads the steps x[turned[0]], x[turned[1]], ...

    It begins with its last input, so these are given to it from the end; nn.LSTM's other direction is then
    computed and discarded.
    """
    forth, _ = rnn(x)
    back, _ = rnn(_at(x, turned, rnn.input_size).flip(1))
    n = rnn.hidden_size
    return torch.cat([forth[:, :, :n], _at(back[:, :, n:].flip(1), turned, n)], 2)


def _stock_layer(layer: nn.Module) -> nn.Module:
    """A layer of the head as torch has it: the batch norm alone is ours."""
    if not isinstance(layer, nn.BatchNorm1d):
        return copy.deepcopy(layer)
    options = layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    return nn.BatchNorm1d(layer.num_features, *options, device="meta")
