"""One layer of the AWD-LSTM, under fastai 2's names."""

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .nn import State, WeightDropLSTM
from .ops._common import Seed, check_probability


class WeightDropLayer(nn.Module):
    """One batch-first LSTM layer under fastai's names: `weight_hh_l0_raw` here, the rest in `module`.

    x (B, T, n_in), hx two of (directions, B, n_out) -> output (B, T, directions * n_out), (h_n, c_n); where
    dropout_p is given also output after a variational dropout.
    """

    weight_hh_l0_raw: nn.Parameter

    def __init__(self, n_in: int, n_out: int, bidir: bool, weight_p: float, **factory: Any) -> None:
        super().__init__()
        self.weight_p = weight_p
        self.module = WeightDropLSTM(n_in, n_out, batch_first=True, bidirectional=bidir, **factory)
        self.weight_hh_l0_raw = self.module.get_parameter("weight_hh_l0")
        del self.module.weight_hh_l0

    def reset_parameters(self) -> None:
        """Fresh weights, as `WeightDropLSTM.reset_parameters`, whose module has one of them no more."""
        self.module.reset_parameters()
        bound = 1.0 / math.sqrt(self.module.hidden_size)
        nn.init.uniform_(self.weight_hh_l0_raw, -bound, bound)

    @property
    def weight_p(self) -> float:
        """The probability of dropping a recurrent weight."""
        return self._weight_p

    @weight_p.setter
    def weight_p(self, p: float) -> None:
        self._weight_p = check_probability("AWDLSTM", "weight_p", p)

    def forward(
        self,
        x: Tensor,
        hx: State | None = None,
        lengths: Tensor | None = None,
        seed: Seed = None,
        **drop: Any,
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
        # the weights by name: what a hook of `module` puts there, as pruning does, is read after it has run
        weights: dict[str, Tensor] = {"weight_hh_l0": self.weight_hh_l0_raw}
        return self.module(x, hx, lengths=lengths, seed=seed, weights=weights, weight_p=self.weight_p, **drop)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"weight_p={self.weight_p}"
