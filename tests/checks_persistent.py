"""What the tests of the persistent recurrence share."""

import os

import checks
import torch
from checks import with_gradients

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VARIABLE = "ULMFIT_FAST_RECURRENCE"
FACTOR = 2  # as in test_lstm.py: what is stored in 16 bits, and the errors of the steps before
# whose epsilon the tolerances are made of: TF32 has as many bits of a number as float16
ROUNDED = {torch.float32: torch.float16}


def on_cpu():
    return checks.DEVICE.type == "cpu"


def factor(dtype):
    """Of the epsilons of ROUNDED, for a result that products of torch's library are part of.

    16-bit operands are exact.  For float32 the persistent products round each operand to nearest, by half an
    epsilon at most; cuBLAS may cut the low 13 bits off, which is up to one epsilon an operand, always towards
    zero, so that sums do not average it out.  Both operands by both ways: three epsilons.
    """
    return 3 * FACTOR if dtype == torch.float32 and not on_cpu() else FACTOR


def lengths_of(batch, time):
    return tuple((3 * i + 1) % (time + 1) for i in range(batch))


def general(inputs, op):
    """The same by the general path."""
    before = os.environ[VARIABLE]
    os.environ[VARIABLE] = "general"
    try:
        return with_gradients(op, inputs)
    finally:
        os.environ[VARIABLE] = before


def check_beside_general(case, dtype):
    """Every result's distance from the general path's, as a share of its norm."""
    inputs, op, _ = case
    results = with_gradients(op, inputs)
    for i, (a, b) in enumerate(zip(results, general(inputs, op), strict=True)):
        assert a.isfinite().all(), f"result {i}"
        share = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
        assert share <= factor(dtype) * torch.finfo(ROUNDED.get(dtype, dtype)).eps, f"result {i}: {share:.2g}"
