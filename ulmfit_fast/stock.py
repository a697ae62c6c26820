"""The same language model on stock torch modules, as fastai builds it: what the demo and benchmarks compare
with.

nn.LSTM per layer, whose recurrent weight is dropped by `F.dropout` at each forward; masks from `bernoulli_`;
the whole matrix of logits into `F.cross_entropy`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import LanguageModel
from .nn import State


def dropout_mask(x: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """fastai's: 0 with probability p, else 1 / (1 - p)."""
    return x.new_empty(shape).bernoulli_(1 - p).div_(1 - p)


class StockLSTM(nn.Module):
    """One nn.LSTM layer with DropConnect: raw weight kept aside, a dropped copy set before each forward."""

    weight_hh_l0_raw: nn.Parameter

    def __init__(self, n_in: int, n_out: int, weight_p: float) -> None:
        super().__init__()
        self.module, self.weight_p = nn.LSTM(n_in, n_out, batch_first=True), weight_p
        self.weight_hh_l0_raw = nn.Parameter(self.module.get_parameter("weight_hh_l0").detach().clone())
        del self.module._parameters["weight_hh_l0"]

    def forward(self, x: Tensor, hidden: State | None) -> tuple[Tensor, State]:
        raw = self.weight_hh_l0_raw
        weight = F.dropout(raw, self.weight_p, self.training)
        # where nothing is dropped it is the parameter itself, which nn.LSTM would keep as one of its own
        self.module.weight_hh_l0 = raw.view_as(raw) if weight is raw else weight
        return self.module(x, hidden)


class StockLanguageModel(nn.Module):
    """forward(ids, targets) -> (loss with AR and TAR, cross-entropy), state carried and detached; tied
    softmax.
    """

    def __init__(
        self,
        vocab_size: int,
        emb_sz: int,
        n_hid: int,
        n_layers: int,
        *,
        output_p: float,
        hidden_p: float,
        input_p: float,
        embed_p: float,
        weight_p: float,
    ) -> None:
        super().__init__()
        sizes = [emb_sz] + [n_hid] * (n_layers - 1) + [emb_sz]
        self.embedding = nn.Embedding(vocab_size, emb_sz, padding_idx=1)
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.rnns = nn.ModuleList([StockLSTM(n_in, n_out, weight_p) for n_in, n_out in pairs])
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.output_p, self.hidden_p, self.input_p, self.embed_p = output_p, hidden_p, input_p, embed_p
        self.hidden: list[State | None] = [None] * n_layers

    @classmethod
    def like(cls, model: LanguageModel, **dropouts: float) -> "StockLanguageModel":
        """The stock twin of a LanguageModel, with its weights."""
        encoder, state = model[0], model.state_dict()
        words, width = encoder.encoder.weight.shape
        twin = cls(words, width, encoder.n_hid, encoder.n_layers, **dropouts)
        own = {"embedding.weight": state["0.encoder.weight"], "bias": state["1.decoder.bias"]}
        own |= {k[2:]: v for k, v in state.items() if k.startswith("0.rnns.")}
        twin.load_state_dict(own)
        return twin.to(encoder.encoder.weight.device)

    def reset(self) -> None:
        self.hidden = [None] * len(self.rnns)

    def forward(
        self, ids: Tensor, targets: Tensor, alpha: float = 2.0, beta: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        weight = self.embedding.weight
        dropped = weight
        if self.training and self.embed_p:
            dropped = weight * dropout_mask(weight, (len(weight), 1), self.embed_p)
        x = self._drop(F.embedding(ids, dropped, self.embedding.padding_idx), self.input_p)
        for layer, rnn in enumerate(self.rnns):
            x, (h, c) = rnn(x, self.hidden[layer])
            self.hidden[layer] = h.detach(), c.detach()
            if layer < len(self.rnns) - 1:
                x = self._drop(x, self.hidden_p)
        out = self._drop(x, self.output_p)
        entropy = F.cross_entropy(F.linear(out, weight, self.bias).flatten(0, 1), targets.flatten())
        loss = entropy
        if self.training:
            loss = (
                loss + alpha * out.float().pow(2).mean() + beta * (x[:, 1:] - x[:, :-1]).float().pow(2).mean()
            )
        return loss, entropy

    def _drop(self, x: Tensor, p: float) -> Tensor:
        return x * dropout_mask(x, (x.shape[0], 1, x.shape[2]), p) if self.training and p else x
