"""The scratch memory that the CPU kernels keep between calls."""

import torch

from . import ops  # noqa: F401  (registers the op)


def release_workspace() -> int:
    """Give the scratch memory that the CPU kernels keep for their next call back to the system.

    No more than 1 GB is kept in a process. What an LSTM saves for its backward, the gradients of
    `linear_cross_entropy` and that of `embedding_dropout` lie in such memory as well, but not in what is
    given back: it comes back when the graph and the gradients are freed.

    Returns:
        bytes given back.
    """
    return torch.ops.ulmfit_fast.release_workspace()
