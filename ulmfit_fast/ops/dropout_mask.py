"""dropout_mask: the mask that any op of this package used, given its seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ulmfit_fast.ops._common import FLOATS, Seed, as_int, check_probability, seed_tensor


def dropout_mask(
    seed: Seed,
    shape: int | Sequence[int],
    p: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Dropout mask of `shape`: 0 with probability p, else 1/(1-p).

    Element e of the row-major index space is dropped iff word e of Philox4x32-10 keyed by the seed is below
    floor(p * 2**32) (`reference.philox_mask` has the counters), so the same seed gives the same mask on
    every device, instruction set and thread count.

    Args:
        seed: an int or a 0-dim int64 tensor; None draws one from the device's default generator.
        shape: sizes, each >= 0.
        p: probability of zero, in [0, 1).
        dtype: float64, float32, bfloat16 or float16.
        device: where the mask lies; None is the seed's device if that is a tensor, else torch's default.

    Returns:
        A tensor of `shape` and `dtype` on `device`.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
    """
    p = check_probability("dropout_mask", "p", p)
    given = [as_int(n) for n in (shape if hasattr(shape, "__iter__") else [shape])]
    sizes = [n for n in given if n is not None]
    if len(sizes) < len(given):
        raise TypeError(f"dropout_mask: shape must be integers, got {shape!r}")
    if any(n < 0 for n in sizes):
        raise ValueError(f"dropout_mask: shape must have sizes >= 0, got {tuple(sizes)}")
    if dtype not in FLOATS:
        raise TypeError(f"dropout_mask: dtype must be float64, float32, bfloat16 or float16, got {dtype!r}")
    device = None if device is None else torch.device(device)
    seed = seed_tensor("dropout_mask", seed, p, device)
    return torch.ops.ulmfit_fast.dropout_mask(seed, sizes, p, dtype)


@torch.library.register_fake("ulmfit_fast::dropout_mask")
def _(seed: Tensor, shape: Sequence[int], p: float, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or torch.float32, device=seed.device)
