"""embedding_dropout: whole words are dropped (Gal and Ghahramani 2016; Merity et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ulmfit_fast.ops._common import (
    Grads,
    Seed,
    as_int,
    check_input,
    check_probability,
    check_range,
    check_tensor,
    refuse_transforms,
    register_gradient,
    seed_tensor,
)


def embedding_dropout(
    weight: Tensor, ids: Tensor, p: float, *, seed: Seed = None, padding_idx: int | None = None
) -> Tensor:
    """Looks up rows of an embedding of which each is dropped, wherever it occurs, with probability p.

    Equivalent to `F.embedding(ids, weight * mask[:, None], padding_idx)` with mask = dropout_mask(seed,
    (V,), p), but only the rows that occur are read.

    Args:
        weight: (V, E); float64, float32, bfloat16 or float16.
        ids: int64 or int32, any shape, each in 0..V-1.
        p: probability that a word is dropped, in [0, 1).
        seed: None, an int or a 0-dim int64 tensor; None draws one from the device's default generator.
        padding_idx: this row of weight receives no gradient; negative counts from the end.

    Returns:
        (*ids.shape, E) in weight's dtype.  The gradient is dense, and sums each row in the order of the
        positions, so it does not depend on the number of threads.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
        IndexError: an id is outside the vocabulary (RuntimeError under torch.compile and for tensor
            subclasses; on CUDA an assertion of the kernel).
    """
    op = "embedding_dropout"
    check_input(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must have shape (V, E), got {tuple(weight.shape)}")
    check_tensor(op, "ids", ids, (torch.int64, torch.int32), weight.device)
    p = check_probability(op, "p", p)
    words = weight.shape[0]
    check_range(op, "ids", ids, 0, words, f"in 0..{words - 1}, the vocabulary", IndexError)
    row = -1 if padding_idx is None else as_int(padding_idx)
    if row is None:
        raise TypeError(f"{op}: padding_idx must be None or an int, got {type(padding_idx).__name__}")
    if padding_idx is not None:
        if not -words <= row < words:
            raise ValueError(f"{op}: padding_idx must be in {-words}..{words - 1}, got {padding_idx}")
        row += words if row < 0 else 0
    refuse_transforms(op, weight)
    seed = seed_tensor(op, seed, p, weight.device)
    return torch.ops.ulmfit_fast.embedding_dropout(weight, ids.long(), seed, p, row)


@torch.library.register_fake("ulmfit_fast::embedding_dropout")
def _(weight: Tensor, ids: Tensor, seed: Tensor, p: float, padding_idx: int) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


@torch.library.register_fake("ulmfit_fast::embedding_dropout_backward")
def _(dy: Tensor, ids: Tensor, seed: Tensor, p: float, padding_idx: int, num_embeddings: int) -> Tensor:
    return dy.new_empty((num_embeddings, dy.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, seed, ctx.p, ctx.padding_idx = inputs
    ctx.words = weight.shape[0]
    ctx.save_for_backward(ids, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None) -> Grads:
    dweight = None
    if dy is not None:
        ids, seed = ctx.saved_tensors
        dweight = torch.ops.ulmfit_fast.embedding_dropout_backward(
            dy, ids, seed, ctx.p, ctx.padding_idx, ctx.words
        )
    return dweight, None, None, None, None


register_gradient("embedding_dropout", _backward, _setup_context)
