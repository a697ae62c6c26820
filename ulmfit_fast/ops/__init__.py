"""The ops: pure functions of their inputs, a dropout probability and a seed.

`_C` is the compiled library; loading it registers schemas and kernels with torch's dispatcher.  Each
`ops/<op>.py` then adds what is written in Python: the public function with its checks, the fake (meta)
kernel and the autograd formula.
"""

import torch  # noqa: F401  (loads libtorch, which _C links against)

try:
    from ulmfit_fast import _C  # type: ignore[attr-defined]  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"ulmfit_fast's compiled library ulmfit_fast._C could not be loaded: {error}. "
        "Build it with `pip install --no-build-isolation .` or, in place, "
        "`python setup.py build_ext --inplace`, in the environment that has torch (2.10 or newer). If it is "
        "installed already, Python may have found a folder of sources before it: start Python elsewhere."
    ) from error

from ulmfit_fast.ops.concat_pool import concat_pool
from ulmfit_fast.ops.dropout_mask import dropout_mask
from ulmfit_fast.ops.embedding_dropout import embedding_dropout
from ulmfit_fast.ops.linear_cross_entropy import linear_cross_entropy
from ulmfit_fast.ops.lstm import lstm
from ulmfit_fast.ops.variational_dropout import variational_dropout

__all__ = [
    "concat_pool",
    "dropout_mask",
    "embedding_dropout",
    "linear_cross_entropy",
    "lstm",
    "variational_dropout",
]
