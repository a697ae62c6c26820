"""Drop-in for salesforce/awd-lstm-lm: what its main.py takes from its own modules, on these kernels.

    import ulmfit_fast.salesforce as model                        # in place of: import model
    from ulmfit_fast.salesforce import SplitCrossEntropyLoss      # in place of: from splitcross import ...

Constructors, calls, attributes and state-dict keys are theirs; sequences come first, (T, B).  What differs:
training goes on after an evaluation (theirs raises TypeError with current torch); an evaluation leaves
nothing in the state dict; rnn_type is "LSTM" alone; nothing is printed.

main.py keeps pickled objects, [model, criterion, optimizer], and reads them with torch.load, which since
torch 2.6 refuses classes that it does not know.  So importing this module tells it those that such a file of
these classes names (torch.serialization.add_safe_globals), that their criterion may be read as ours, and a
defaultdict as a dict.  None of this is needed for `RNNModel.from_checkpoint`, which reads such files as
data, theirs too.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .checkpoints import load_state
from .model import tie
from .nn import State, WeightDropLSTM, refuse_options
from .pretrained import Checkpoint, load_checkpoint

__all__ = ["LockedDropout", "RNNModel", "SplitCrossEntropyLoss", "WeightDrop", "embedded_dropout"]

_NO_END = 100 * 1000000  # in place of the end of the vocabulary

Hidden = Sequence[State]  # per layer (h, c), each (1, B, features)


def embedded_dropout(
    embed: nn.Embedding, words: Tensor, dropout: float = 0.1, scale: Tensor | None = None
) -> Tensor:
    """Rows of `embed` for `words`, each word dropped everywhere or nowhere, whatever the module's mode.

    scale multiplies the weights; it must expand to their shape (V, E).
    """
    refuse_options(embed, "embedded_dropout")
    weight = embed.weight if scale is None else scale.expand_as(embed.weight) * embed.weight
    return ops.embedding_dropout(weight, words, dropout or 0.0, padding_idx=embed.padding_idx)


class LockedDropout(nn.Module):
    """Dropout of x (T, B, F) with one mask for all time steps; the probability comes with each call."""

    def forward(self, x: Tensor, dropout: float = 0.5) -> Tensor:
        if not self.training or not dropout:
            return x
        return ops.variational_dropout(x, dropout, batch_first=False)

    if TYPE_CHECKING:
        __call__ = forward  # here and below: nn.Module's own says Any


class WeightDrop(nn.Module):
    """Drops the named weights of `module` anew in each forward of training; the raw ones are NAME_raw in it.

    An nn.LSTM becomes a WeightDropLSTM with the same parameters. `dropout` may be changed at any time.
    variational drops whole rows, in training alone (theirs does it in evaluation too).
    """

    def __init__(
        self, module: nn.Module, weights: Sequence[str], dropout: float = 0, variational: bool = False
    ) -> None:
        super().__init__()
        if isinstance(module, nn.LSTM):
            module = _fused(module)
        elif isinstance(module, nn.RNNBase):
            raise TypeError(f"WeightDrop takes no {type(module).__name__}: of torch's RNNs the LSTM alone")
        if isinstance(module, WeightDropLSTM):
            module.weight_p = 0.0  # `dropout` says how much is dropped, once
        self.module, self.weights = module, list(weights)
        self.dropout, self.variational = dropout, variational
        for name in self.weights:
            module.register_parameter(name + "_raw", module._parameters.pop(name))

    @property
    def zoneout(self) -> float:
        """`dropout` by another name: main.py --resume takes what is not its own WeightDrop for a QRNN."""
        return self.dropout

    @zoneout.setter
    def zoneout(self, p: float) -> None:
        self.dropout = p

    def forward(self, *args: Any) -> Any:
        """What `module` returns for these arguments."""
        lstm = self.module
        if isinstance(lstm, WeightDropLSTM):
            recurrent = {names[1] for names in lstm.weight_names}
            if not self.variational and self.dropout < 1 and recurrent == set(self.weights):
                raw = {name: getattr(lstm, name + "_raw") for name in self.weights}
                x, hx = args if len(args) == 2 else (*args, None)
                return lstm(x, hx, weights=raw, weight_p=float(self.dropout))
        dropped = {name: self._drop(getattr(lstm, name + "_raw")) for name in self.weights}
        return torch.func.functional_call(lstm, dropped, args)

    def _drop(self, raw: Tensor) -> Tensor:
        if self.variational:
            return raw * F.dropout(raw.new_ones(len(raw), 1), self.dropout, self.training)
        return F.dropout(raw, self.dropout, self.training)


def _fused(stock: nn.LSTM) -> WeightDropLSTM:
    """The WeightDropLSTM that has the parameters of `stock` themselves."""
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    options = {name: getattr(stock, name) for name in (*names, "proj_size")}
    lstm = WeightDropLSTM(**options, device="meta")
    for name, parameter in stock.named_parameters():
        lstm.register_parameter(name, parameter)
    return lstm.train(stock.training)


class RNNModel(nn.Module):
    """Embedding, nlayers LSTMs of nhid features, decoder, with five dropouts (Merity et al. 2017).

    dropout is that of the output, dropouth between the layers, dropouti of the embedded input, dropoute of
    whole words, wdrop of the recurrent weights; the first four are attributes that may be changed. With
    tie_weights the last layer has ninp features and the decoder the encoder's weight.
    """

    def __init__(
        self,
        rnn_type: str,
        ntoken: int,
        ninp: int,
        nhid: int,
        nlayers: int,
        dropout: float = 0.5,
        dropouth: float = 0.5,
        dropouti: float = 0.5,
        dropoute: float = 0.1,
        wdrop: float = 0,
        tie_weights: bool = False,
    ) -> None:
        super().__init__()
        if rnn_type != "LSTM":
            raise ValueError(
                f"rnn_type must be 'LSTM' (no kernels for 'GRU' and 'QRNN' here), got {rnn_type!r}"
            )
        self.rnn_type, self.ninp, self.nhid, self.nlayers = rnn_type, ninp, nhid, nlayers
        self.dropout, self.dropouth, self.dropouti, self.dropoute = dropout, dropouth, dropouti, dropoute
        self.tie_weights = tie_weights
        self.lockdrop = LockedDropout()
        self.encoder = nn.Embedding(ntoken, ninp)
        sizes = [ninp] + [nhid] * (nlayers - 1) + [ninp if tie_weights else nhid]
        rnns: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            rnn = WeightDropLSTM(n_in, n_out)
            rnns.append(WeightDrop(rnn, ["weight_hh_l0"], dropout=wdrop) if wdrop else rnn)
        self.rnns = nn.ModuleList(rnns)
        self.decoder = nn.Linear(sizes[-1], ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight
        self.register_load_state_dict_post_hook(_tie)
        self.init_weights()

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint | str | Path, **options: float) -> "RNNModel":
        """A model with the weights of what `load_checkpoint` opens. options: the class's five dropouts."""
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = load_checkpoint(checkpoint)
        parts, source = checkpoint.parts.with_bias(), checkpoint.source
        if parts.embedding is None or parts.decoder is None:
            raise ValueError(f"{source} is no language model: an RNNModel has an embedding and a decoder")
        (ntoken, ninp), nhid = parts.embedding.shape, parts.layers[0]["weight_hh"].shape[1]
        dropouts: dict[str, Any] = options
        model = cls("LSTM", ntoken, ninp, nhid, len(parts.layers), tie_weights=parts.tied, **dropouts)
        load_state(model, parts.named("salesforce" if options.get("wdrop") else "torch"), source)
        return model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RNNModel":
        super()._apply(fn, recurse)
        _tie(self)  # to_empty() parts them
        return self

    def init_weights(self) -> None:
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    @overload
    def forward(
        self, input: Tensor, hidden: Hidden, return_h: Literal[False] = ...
    ) -> tuple[Tensor, list[State]]: ...
    @overload
    def forward(
        self, input: Tensor, hidden: Hidden, return_h: Literal[True]
    ) -> tuple[Tensor, list[State], list[Tensor], list[Tensor]]: ...
    def forward(self, input: Tensor, hidden: Hidden, return_h: bool = False) -> tuple[Any, ...]:
        """input (T, B) word numbers, hidden as of `init_hidden` -> (output (T * B, features), new hidden).

        With return_h also two lists: every layer's output (T, B, features) before and after its dropout.
        """
        output = embedded_dropout(self.encoder, input, self.dropoute if self.training else 0)
        output = self.lockdrop(output, self.dropouti)
        new_hidden, raw_outputs, outputs = [], [], []
        for layer, rnn in enumerate(self.rnns):
            output, state = rnn(output, hidden[layer])
            new_hidden.append(state)
            raw_outputs.append(output)
            output = self.lockdrop(output, self.dropouth if layer < self.nlayers - 1 else self.dropout)
            outputs.append(output)
        result = output.reshape(-1, output.size(2))
        return (result, new_hidden, raw_outputs, outputs) if return_h else (result, new_hidden)

    if TYPE_CHECKING:
        __call__ = forward

    def init_hidden(self, bsz: int) -> Hidden:
        """Zeros, on the model's device and in its dtype."""
        widths = [self.nhid] * (self.nlayers - 1) + [self.decoder.in_features]
        weight = self.encoder.weight.detach()
        return [(weight.new_zeros(1, bsz, n), weight.new_zeros(1, bsz, n)) for n in widths]

    def reset(self) -> None:
        """Nothing to forget: the state is the caller's."""


def _tie(model: RNNModel, incompatible_keys: object = None) -> None:
    """Share the weight again after what replaces parameters: load_state_dict(assign=True), to_empty()."""
    if model.tie_weights:
        tie(model.decoder, model.encoder, incompatible_keys)


class SplitCrossEntropyLoss(nn.Module):
    """Cross-entropy of a softmax in two stages, for large vocabularies (Grave et al. 2016).

    splits: where the vocabulary, most frequent words first, is cut; [] is the plain softmax. The words before
    the first cut stand in the head together with one entry for each further part (tail_vectors, tail_bias), a
    word in a part has the probability of its part times its own within it. No matrix of logits is kept.
    """

    def __init__(self, hidden_size: int, splits: Sequence[int], verbose: bool = False) -> None:
        super().__init__()
        splits = list(splits)
        if splits != sorted(set(splits)) or any(split <= 0 for split in splits):
            raise ValueError(f"splits must be increasing numbers greater than zero, got {splits}")
        self.hidden_size = hidden_size
        self.splits = [0, *splits, _NO_END]  # as theirs, which may be read as ours
        if splits:
            self.tail_vectors = nn.Parameter(torch.zeros(len(splits), hidden_size))
            self.tail_bias = nn.Parameter(torch.zeros(len(splits)))

    @property
    def nsplits(self) -> int:
        """The number of parts, the head among them."""
        return len(self.splits) - 1

    def logprob(
        self,
        weight: Tensor,
        bias: Tensor,
        hiddens: Tensor,
        splits: Sequence[int] | None = None,
        softmaxed_head_res: Tensor | None = None,
        verbose: bool = False,
    ) -> Tensor:
        """log p of each word (N, V), or of the words of some parts: weight (V, E), bias (V,), hiddens (N, E).

        splits: numbers of parts, 0 is the head. softmaxed_head_res: the log-softmax of the head, if known.
        """
        if softmaxed_head_res is None:
            softmaxed_head_res = F.linear(hiddens, *self._head(weight, bias)).log_softmax(-1)
        results = []
        for part in range(self.nsplits) if splits is None else splits:
            words = slice(self.splits[part], self.splits[part + 1])
            if part == 0:
                results.append(softmaxed_head_res[:, words])
            else:
                inner = F.linear(hiddens, weight[words], bias[words]).log_softmax(-1)
                results.append(softmaxed_head_res[:, -part, None] + inner)
        return torch.cat(results, 1)

    def _head(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the first stage: the first words, then, last part first, one entry for each."""
        if self.nsplits == 1:
            return weight, bias
        words = slice(self.splits[1])
        return torch.cat([weight[words], self.tail_vectors]), torch.cat([bias[words], self.tail_bias])

    def forward(
        self, weight: Tensor, bias: Tensor, hiddens: Tensor, targets: Tensor, verbose: bool = False
    ) -> Tensor:
        """Mean of -log p(target): weight (V, E), bias (V,), hiddens (..., E), targets (...)."""
        hiddens, targets = hiddens.reshape(-1, hiddens.size(-1)), targets.reshape(-1)
        cuts = self.splits[1:-1]
        if not cuts:
            return ops.linear_cross_entropy(hiddens, weight, bias, targets)
        head = cuts[0]
        part = torch.bucketize(targets, targets.new_tensor(cuts), right=True)
        # theirs: the entry of part i is the i-th from the end
        entry = torch.where(part == 0, targets, head + len(cuts) - part)
        total = ops.linear_cross_entropy(hiddens, *self._head(weight, bias), entry, reduction="sum")
        for i, (start, end) in enumerate(itertools.pairwise([*cuts, len(weight)]), 1):
            rows = (part == i).nonzero().squeeze(1)
            if len(rows):
                inner = hiddens[rows], weight[start:end], bias[start:end], targets[rows] - start
                total = total + ops.linear_cross_entropy(*inner, reduction="sum")
        return (total / len(targets)).type_as(weight)

    if TYPE_CHECKING:
        __call__ = forward


def _dict(*args: object) -> dict[Any, Any]:
    """Read in place of a pickled defaultdict, which is still empty then: torch.load fills only dicts."""
    return {}


_known: list[Any] = (
    [RNNModel, WeightDrop, LockedDropout, SplitCrossEntropyLoss, WeightDropLSTM, _tie]
    + [nn.ModuleList, nn.Embedding, nn.Linear, nn.CrossEntropyLoss]
    + [torch.optim.SGD, torch.optim.ASGD, torch.optim.Adam]
    + [(SplitCrossEntropyLoss, "splitcross.SplitCrossEntropyLoss")]
    + [dict, list, (_dict, "collections.defaultdict")]
)
torch.serialization.add_safe_globals(_known)
