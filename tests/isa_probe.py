"""Runs the cases of checks.py under the instruction set of ULMFIT_FAST_ISA and saves the results."""

import sys

import checks
import torch

from ulmfit_fast import ops

results = {"mask": [ops.dropout_mask(seed, (5, 1001), 0.37) for seed in (0, -1, 2**40 + 3)]}
for name, make in checks.ISA_CASES.items():
    for dtype in checks.DTYPES:
        inputs, op, _ = make(dtype)
        results[f"{name}-{dtype}"] = checks.with_gradients(op, inputs)
torch.save(results, sys.argv[1])
