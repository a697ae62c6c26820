"""fastai 2 with this library's AWD-LSTM.

    from fastai.text.all import *
    from ulmfit_fast.fastai import AWD_LSTM  # after the star, which brings fastai's own

and `language_model_learner`, `text_classifier_learner`, `get_language_model`, `get_text_classifier` take it
where they take fastai's own; weights go both ways. A learner that is there already:

    accelerate(learn)  # swaps its modules and, where it can, decoder and loss; restore(learn) undoes it
"""

from .fastai_modules import (
    AWD_LSTM,
    EmbeddingDropout,
    PoolingLinearClassifier,
    RNNDropout,
    SentenceEncoder,
    WeightDropout,
    dropout_mask,
)
from .fastai_swap import Accelerated, accelerate, restore

__all__ = [
    "AWD_LSTM",
    "Accelerated",
    "EmbeddingDropout",
    "PoolingLinearClassifier",
    "RNNDropout",
    "SentenceEncoder",
    "WeightDropout",
    "accelerate",
    "dropout_mask",
    "restore",
]
