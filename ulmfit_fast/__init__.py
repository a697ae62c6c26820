"""Fused kernels for the AWD-LSTM, the modules on them, and a thin training API for ULMFiT's three stages.

Ops are pure functions of their inputs, a probability and a seed: lstm, embedding_dropout,
variational_dropout, linear_cross_entropy, concat_pool, dropout_mask.  Modules: WeightDropLSTM,
EmbeddingDropout, VariationalDropout, AWDLSTM, LanguageModel, TextClassifier.  The three stages:
pretrain_lm, finetune_lm, train_classifier, and load for what they left in a run directory; ClassifierEnsemble
averages classifiers; load_checkpoint and save_checkpoint for the weights of other programs.  `info()` says
what this copy was built for and what it runs with.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._info import __version__, info
from ._workspace import release_workspace
from .model import AWDLSTM, LanguageModel, TextClassifier
from .nn import EmbeddingDropout, VariationalDropout, WeightDropLSTM

# from their own files, as `ops` has a module and a function of each name, and mypy would take the module
from .ops.concat_pool import concat_pool
from .ops.dropout_mask import dropout_mask
from .ops.embedding_dropout import embedding_dropout
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.lstm import lstm
from .ops.variational_dropout import variational_dropout

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers
    from .ensemble import ClassifierEnsemble
    from .pretrained import load_checkpoint, save_checkpoint
    from .train import finetune_lm, load, pretrain_lm, train_classifier

_LATER = {  # imported on first use
    **dict.fromkeys(("pretrain_lm", "finetune_lm", "train_classifier", "load"), ".train"),
    "ClassifierEnsemble": ".ensemble",
    **dict.fromkeys(("load_checkpoint", "save_checkpoint"), ".pretrained"),
}

__all__ = [
    "AWDLSTM",
    "ClassifierEnsemble",
    "EmbeddingDropout",
    "LanguageModel",
    "TextClassifier",
    "VariationalDropout",
    "WeightDropLSTM",
    "__version__",
    "concat_pool",
    "dropout_mask",
    "embedding_dropout",
    "finetune_lm",
    "info",
    "linear_cross_entropy",
    "load",
    "load_checkpoint",
    "lstm",
    "pretrain_lm",
    "release_workspace",
    "save_checkpoint",
    "train_classifier",
    "variational_dropout",
]


if not TYPE_CHECKING:  # which would find any name then

    def __getattr__(name: str) -> object:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
