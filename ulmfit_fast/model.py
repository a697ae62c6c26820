"""The models: encoder, language model and classifier, under fastai 2's names; their layers by depth."""

from collections.abc import Callable
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, fx, nn

from . import to_torch
from .classifier import TextClassifier
from .encoder import AWDLSTM
from .nn import VariationalDropout
from .ops._logits import cross_entropy, logits
from .stack import Stack, unique_groups

__all__ = ["AWDLSTM", "LanguageModel", "LinearDecoder", "TextClassifier", "layer_groups"]


class LinearDecoder(nn.Module):
    """Output dropout, then the linear map to the vocabulary, whose weight may be the encoder's.

    x (B, T, E) -> logits (B, T, V); with targets (B, T) -> their mean cross-entropy in nats, without those
    that are ignore_index and with no logits kept, and the dropped x.  device and dtype are by default those
    of tie_encoder.
    """

    def __init__(
        self,
        n_out: int,
        n_hid: int,
        output_p: float = 0.1,
        tie_encoder: nn.Embedding | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if tie_encoder is not None:
            device, dtype = device or tie_encoder.weight.device, dtype or tie_encoder.weight.dtype
        self.decoder = nn.Linear(n_hid, n_out, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()
        if tie_encoder is not None:
            self.decoder.weight = tie_encoder.weight
        self.output_dp = VariationalDropout(output_p)

    def reset_parameters(self) -> None:
        """Fresh weights, the encoder's too where the weight is its own."""
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        if self.decoder.bias is not None:
            nn.init.zeros_(self.decoder.bias)

    @overload
    def forward(self, x: Tensor, targets: None = ..., ignore_index: int = ...) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, targets: Tensor, ignore_index: int = ...) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, targets: Tensor | None = None, ignore_index: int = -100
    ) -> Tensor | tuple[Tensor, Tensor]:
        dropped = self.output_dp(x)
        if targets is None:
            return logits(self.decoder, dropped)
        return cross_entropy(self.decoder, dropped, targets, ignore_index), dropped

    if TYPE_CHECKING:
        __call__ = forward


class LanguageModel(Stack[AWDLSTM, LinearDecoder]):
    """An AWD-LSTM and its decoder; model[0] is the encoder, model[1] the decoder, as in fastai.

    With tie_weights the decoder's weight is the encoder's, and stays so through copying, moving, casting
    and loading.  The decoder is made on the device and in the dtype of the encoder.
    """

    def __init__(
        self, encoder: AWDLSTM, output_p: float = 0.1, tie_weights: bool = True, bias: bool = True
    ) -> None:
        embedding, weight = encoder.encoder, encoder.encoder.weight
        tied, (words, width) = embedding if tie_weights else None, weight.shape
        decoder = LinearDecoder(words, width, output_p, tied, bias, weight.device, weight.dtype)
        super().__init__(encoder, decoder)
        self.tie_weights = tie_weights
        self.register_load_state_dict_post_hook(_tie)

    @overload
    def forward(
        self, ids: Tensor, targets: None = ..., alpha: float = ..., beta: float = ..., ignore_index: int = ...
    ) -> Tensor: ...
    @overload
    def forward(
        self, ids: Tensor, targets: Tensor, alpha: float = ..., beta: float = ..., ignore_index: int = ...
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        alpha: float = 2.0,
        beta: float = 1.0,
        ignore_index: int = -100,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """ids (B, T) -> logits (B, T, V); with targets (B, T) -> (loss, cross-entropy), no logits kept.

        The cross-entropy, in nats, is the mean over the targets other than ignore_index.  In training the
        loss adds Merity et al.'s (2017) activation regularisation, alpha * mean(h**2) of the dropped output
        of the last layer, and the temporal one, beta * mean((h[t] - h[t-1])**2) of its output before
        dropout, as fastai computes them; in eval the two results are the same.
        """
        output = self[0](ids)
        if targets is None:
            return self[1](output)
        if targets.shape != ids.shape:
            raise ValueError(f"targets must be like ids, {tuple(ids.shape)}, got {tuple(targets.shape)}")
        entropy, dropped = self[1](output, targets, ignore_index)
        loss = entropy
        regularised = self.training and dropped.numel() > 0  # a mean over nothing is NaN
        if regularised and alpha:
            loss = loss + alpha * dropped.float().pow(2).mean()
        if regularised and beta and output.size(1) > 1:
            loss = loss + beta * (output[:, 1:] - output[:, :-1]).float().pow(2).mean()
        return loss, entropy

    if TYPE_CHECKING:
        __call__ = forward

    def reset(self) -> None:
        """Forget the encoder's state."""
        self[0].reset()

    def to_torch(self) -> fx.GraphModule:
        """`AWDLSTM.to_torch` with the decoder: stock(ids, state) -> logits (B, T, V), new state.

        The weights are tied if they are here.
        """
        return to_torch.to_torch(self, to_torch.LanguageModel(self))

    def layer_groups(self) -> list[list[nn.Parameter]]:
        encoder, decoder = self[0], self[1]
        return unique_groups([*([rnn] for rnn in encoder.rnns), [encoder.encoder, decoder]])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LanguageModel":
        super()._apply(fn, recurse)
        _tie(self)
        return self


def _tie(model: LanguageModel, incompatible_keys: object = None) -> None:
    """Share the weight again after what replaces parameters: load_state_dict(assign=True), to_empty()."""
    if model.tie_weights:
        tie(model[1].decoder, model[0].encoder, incompatible_keys)


def tie(decoder: nn.Linear, encoder: nn.Embedding, incompatible_keys: object = None) -> None:
    """Give both the decoder's weight, as loading without assign does, which copies it last; the encoder's
    where no decoder was loaded.

    Not where either has no such parameter any more: torch's parametrizations and its dynamic quantisation put
    others in its place.
    """
    if "weight" in decoder._parameters and "weight" in encoder._parameters:
        if any(key.endswith("decoder.weight") for key in getattr(incompatible_keys, "missing_keys", ())):
            decoder.weight = encoder.weight
        else:
            encoder.weight = decoder.weight


def layer_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters by depth, for discriminative rates and gradual unfreezing; a tied weight appears once.

    LanguageModel: [rnn 0, rnn 1, ..., embedding + decoder]; TextClassifier: [embedding, rnn 0, ..., head].
    """
    groups = getattr(model, "layer_groups", None)
    if groups is None:
        raise TypeError(f"model must be a LanguageModel or a TextClassifier, got {type(model).__name__}")
    return groups()
