"""Bad input to the ops: a fitting exception that names the argument, what it was and what is allowed.

Tensors are made on the CPU, so that this file needs no device to be imported, and moved where they are used.
"""

import math

import pytest
import torch
from checks import DEVICE, here

import ulmfit_fast as uf


def called(op, good, changes):
    return op(**{name: here(value) for name, value in good.items() if name not in changes}, **changes)


def lstm(**changes):
    good = {
        "x": torch.ones(5, 3, 4),
        "h0": torch.ones(3, 2),
        "c0": torch.ones(3, 2),
        "w_ih": torch.ones(8, 4),
        "w_hh": torch.ones(8, 2),
        "b_ih": torch.ones(8),
        "b_hh": torch.ones(8),
    }
    return called(uf.lstm, good, changes)


def embedding_dropout(**changes):
    good = {"weight": torch.ones(5, 2), "ids": torch.tensor([0, 4]), "p": 0.5}
    return called(uf.embedding_dropout, good, changes)


def variational_dropout(**changes):
    return called(uf.variational_dropout, {"x": torch.ones(2, 3, 4), "p": 0.5}, changes)


def linear_cross_entropy(**changes):
    good = {
        "h": torch.ones(3, 4),
        "weight": torch.ones(5, 4),
        "bias": torch.ones(5),
        "target": torch.tensor([0, 4, -100]),
    }
    return called(uf.linear_cross_entropy, good, changes)


def concat_pool(**changes):
    return called(uf.concat_pool, {"out": torch.ones(2, 3, 4), "lengths": torch.tensor([3, 0])}, changes)


def dropout_mask(**changes):
    return called(uf.dropout_mask, {"seed": 1, "shape": (2, 3), "p": 0.5, "device": DEVICE}, changes)


PROBABILITIES = [
    (op, {name: value}, error, f"{name} must be .*\\[0, 1\\), got {got}")
    for op, name in (
        (lstm, "weight_p"),
        (embedding_dropout, "p"),
        (variational_dropout, "p"),
        (dropout_mask, "p"),
    )
    for value, error, got in (
        (1.0, ValueError, "1.0"),
        (-0.1, ValueError, "-0.1"),
        (math.nan, ValueError, "nan"),
        ("0.5", TypeError, "str"),
        (None, TypeError, "NoneType"),
        (True, TypeError, "bool"),
    )
]
SEEDS = [
    (op, {"seed": value}, error, f"seed must {got}")
    for op in (embedding_dropout, variational_dropout, dropout_mask)
    for value, error, got in (
        (1.5, TypeError, "be None, an int or a 0-dim int64 tensor, got float"),
        (2**63, ValueError, "fit in 64 signed bits, got 9223372036854775808"),
        (torch.tensor(1.0), TypeError, r"be .*, got torch.float32 of shape \(\)"),
        (torch.tensor([1]), TypeError, r"be .*, got torch.int64 of shape \(1,\)"),
    )
]
# What only the values show: on CUDA nobody waits to read them, and the kernel's assertion ends the process
# (test_cuda_runtime.py).
VALUES = [
    (
        embedding_dropout,
        {"ids": torch.tensor([0, 5])},
        IndexError,
        "ids must be in 0..4, the vocabulary, got 5",
    ),
    (
        embedding_dropout,
        {"ids": torch.tensor([-1, 5])},
        IndexError,
        "ids must be in 0..4, the vocabulary, got -1",
    ),
    (concat_pool, {"lengths": torch.tensor([4, 0])}, ValueError, "lengths must be in 0..3, .*, got 4"),
    (concat_pool, {"lengths": torch.tensor([-1, 0])}, ValueError, "lengths must be in 0..3, .*, got -1"),
    (lstm, {"lengths": torch.tensor([5, 6, 0])}, ValueError, "lengths must be in 0..5, .*, got 6"),
    (
        linear_cross_entropy,
        {"target": torch.tensor([0, 5, 1])},
        IndexError,
        "target must be in 0..4, .* -100, got 5",
    ),
    (
        linear_cross_entropy,
        {"target": torch.tensor([0, -1, 1])},
        IndexError,
        "target must be in 0..4, .* -100, got -1",
    ),
]
OTHERS = [
    (dropout_mask, {"shape": (2, -1)}, ValueError, r"shape must have sizes >= 0, got \(2, -1\)"),
    (dropout_mask, {"shape": (2.0,)}, TypeError, r"shape must be integers, got \(2.0,\)"),
    (dropout_mask, {"dtype": torch.int32}, TypeError, "dtype must be float64, .* got torch.int32"),
    (variational_dropout, {"x": torch.ones(3)}, ValueError, r"x must have shape \(B, T, ...\), got \(3,\)"),
    (variational_dropout, {"x": torch.ones(2, 3).int()}, TypeError, "x must be float64 or .*, got int32"),
    (variational_dropout, {"x": [[1.0]]}, TypeError, "x must be a tensor, got list"),
    (variational_dropout, {"batch_first": 1}, TypeError, "batch_first must be True or False, got 1"),
    (
        embedding_dropout,
        {"weight": torch.ones(5)},
        ValueError,
        r"weight must have shape \(V, E\), got \(5,\)",
    ),
    (
        embedding_dropout,
        {"weight": torch.ones(5, 2).long()},
        TypeError,
        "weight must be float64 or .*, got int64",
    ),
    (embedding_dropout, {"ids": torch.ones(2)}, TypeError, "ids must be int64 or int32, got float32"),
    (embedding_dropout, {"ids": [0]}, TypeError, "ids must be a tensor, got list"),
    (embedding_dropout, {"padding_idx": 5}, ValueError, "padding_idx must be in -5..4, got 5"),
    (embedding_dropout, {"padding_idx": 0.5}, TypeError, "padding_idx must be None or an int, got float"),
    (
        embedding_dropout,
        {"ids": torch.zeros(2, device="meta").long()},
        ValueError,
        f"ids is on meta, .* on {DEVICE}",
    ),
    (concat_pool, {"out": torch.ones(2, 3)}, ValueError, r"out must have shape \(B, T, H\), got \(2, 3\)"),
    (
        concat_pool,
        {"lengths": torch.tensor([1])},
        ValueError,
        r"lengths must have shape \(B,\) = \(2,\), got \(1,\)",
    ),
    (concat_pool, {"lengths": torch.ones(2)}, TypeError, "lengths must be int64 or int32, got float32"),
    (concat_pool, {"lengths": [3, 0]}, TypeError, "lengths must be a tensor, got list"),
    (lstm, {"x": torch.ones(5, 3)}, ValueError, r"x must have shape \(T, B, I\) with I > 0, got \(5, 3\)"),
    (lstm, {"x": torch.ones(5, 3, 4).int()}, TypeError, "x must be float64 or .*, got int32"),
    (
        lstm,
        {"x": torch.ones(5, 3, 6)},
        ValueError,
        r"w_ih must have shape \(4H, I\) = \(8, 6\), got \(8, 4\)",
    ),
    (lstm, {"batch_first": True}, ValueError, r"h0 must have shape \(B, H\) = \(5, 2\), got \(3, 2\)"),
    (
        lstm,
        {"h0": torch.ones(1, 3, 2)},
        ValueError,
        r"h0 must have shape \(B, H\) = \(3, 2\), got \(1, 3, 2\)",
    ),
    (lstm, {"c0": torch.ones(3, 2).double()}, TypeError, "c0 must be float32, got float64"),
    (
        lstm,
        {"w_hh": torch.ones(8, 3)},
        ValueError,
        r"w_hh must have shape \(4H, H\) with H > 0, got \(8, 3\)",
    ),
    (lstm, {"w_hh": torch.ones(8, 2).bfloat16()}, TypeError, "w_hh must be float32, got bfloat16"),
    (lstm, {"w_ih": torch.ones(8, 4).double()}, TypeError, "w_ih must be float32, got float64"),
    (lstm, {"w_ih": torch.ones(8, 4, device="meta")}, ValueError, f"w_ih is on meta, .* on {DEVICE}"),
    (lstm, {"b_ih": None}, ValueError, "b_ih and b_hh must both be given or both be None"),
    (lstm, {"b_hh": torch.ones(4)}, ValueError, r"b_hh must have shape \(4H,\) = \(8,\), got \(4,\)"),
    (
        lstm,
        {"lengths": torch.tensor([5, 5])},
        ValueError,
        r"lengths must have shape \(B,\) = \(3,\), got \(2,\)",
    ),
    (
        lstm,
        {"precision": "low"},
        ValueError,
        "precision must be None, 'highest', 'high' or 'medium', got 'low'",
    ),
    (lstm, {"reverse": "yes"}, TypeError, "reverse must be True or False, got 'yes'"),
    (lstm, {"seed": 0.5, "weight_p": 0.5}, TypeError, "seed must be None, an int or .*, got float"),
    (lstm, {"dropout_p": 1.0}, ValueError, r"dropout_p must be a number in \[0, 1\), got 1.0"),
    (lstm, {"dropout_seed": 3}, ValueError, "dropout_seed needs dropout_p, got 3 alone"),
    (lstm, {"dropout_p": "0.5"}, TypeError, r"dropout_p must be a number in \[0, 1\), got str"),
    (
        lstm,
        {"dropout_seed": 0.5, "dropout_p": 0.5},
        TypeError,
        "dropout_seed must be None, an int or .*, got float",
    ),
    (linear_cross_entropy, {"h": torch.tensor(1.0)}, ValueError, r"h must have shape \(..., E\), got \(\)"),
    (
        linear_cross_entropy,
        {"h": torch.ones(3, 5)},
        ValueError,
        r"weight must have shape \(V, E\) = \(5, 5\), got \(5, 4\)",
    ),
    (
        linear_cross_entropy,
        {"weight": torch.ones(5, 4).half()},
        TypeError,
        "weight must be float32, got float16",
    ),
    (
        linear_cross_entropy,
        {"bias": torch.ones(4)},
        ValueError,
        r"bias must have shape \(V,\) = \(5,\), got \(4,\)",
    ),
    (linear_cross_entropy, {"target": torch.ones(3)}, TypeError, "target must be int64, got float32"),
    (
        linear_cross_entropy,
        {"target": torch.tensor([0])},
        ValueError,
        r"target must have shape .* = \(3,\), got \(1,\)",
    ),
    (
        linear_cross_entropy,
        {"label_smoothing": 1.5},
        ValueError,
        r"label_smoothing must be in \[0, 1\], got 1.5",
    ),
    (
        linear_cross_entropy,
        {"label_smoothing": None},
        TypeError,
        "label_smoothing must be a float, got NoneType",
    ),
    (
        linear_cross_entropy,
        {"reduction": "avg"},
        ValueError,
        "reduction must be one of none, mean, sum, got 'avg'",
    ),
    (linear_cross_entropy, {"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got float"),
    (linear_cross_entropy, {"chunk_rows": 0}, ValueError, "chunk_rows must be None or at least 1, got 0"),
    (linear_cross_entropy, {"chunk_rows": 1.5}, TypeError, "chunk_rows must be None or an int, got float"),
]


def label(value):
    return value.__name__ if callable(value) else str(value)[:40] if isinstance(value, dict) else ""


@pytest.mark.parametrize("op, changes, error, message", PROBABILITIES + SEEDS + OTHERS, ids=label)
def test_python_checks(op, changes, error, message):
    op()
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        op(**{name: here(value) for name, value in changes.items()})


@pytest.mark.cpu_only("on CUDA values are the kernel's to check: test_cuda_runtime.py")
@pytest.mark.parametrize("op, changes, error, message", VALUES, ids=label)
def test_values(op, changes, error, message):
    test_python_checks(op, changes, error, message)


def message_alone(value):
    return value if isinstance(value, str) else ""


def raw(name, *arguments):
    return lambda: getattr(torch.ops.ulmfit_fast, name)(*map(here, arguments))


SEED = torch.tensor(1)
KERNEL_VALUES = [
    (
        raw("embedding_dropout", torch.ones(3, 2), torch.tensor([3]), SEED, 0.5, -1),
        "ids must be in 0..2, got 3",
    ),
    (
        raw("embedding_dropout", torch.ones(0, 2), torch.tensor([0]), SEED, 0.5, -1),
        "ids must be in 0..-1, got 0",
    ),
    (
        raw("concat_pool", torch.ones(2, 3, 4), torch.tensor([4, 0])),
        "concat_pool: lengths must be in 0..3, got 4",
    ),
]
KERNEL_CHECKS = [
    (raw("dropout_mask", SEED, [2], 1.0), r"dropout_mask: p must be in \[0, 1\), got 1"),
    (
        raw("dropout_mask", torch.tensor([1]), [2], 0.5),
        r"dropout_mask: seed must have 0 dimensions, got shape \(1\)",
    ),
    (raw("dropout_mask", SEED, [2], 0.5, torch.int32), "dropout_mask: dtype must be float64, .*"),
    (
        raw("variational_dropout", torch.ones(3), SEED, 0.5, True),
        "variational_dropout: x must have at least 2 dim",
    ),
    (
        raw("embedding_dropout", torch.ones(3, 2), torch.tensor([1]), SEED, 0.5, 3),
        "padding_idx must be -1 .*, got 3",
    ),
    (
        raw("embedding_dropout", torch.ones(3, 2), torch.tensor([1], dtype=torch.int32), SEED, 0.5, -1),
        "ids must be int64, got int32",
    ),
    (
        raw(
            "lstm",
            *map(torch.zeros, ((2, 1, 0), (1, 4), (1, 4), (16, 0), (16, 4))),
            *[None] * 3,
            SEED,
            SEED,
            0.0,
            0.0,
            *[False] * 4,
        ),
        r"lstm: x must have at least one feature, got shape \(2, 1, 0\)",
    ),
    (
        raw("embedding_dropout_backward", torch.ones(2, 2), torch.tensor([1]), SEED, 0.5, -1, 3),
        r"dy must begin with the shape of ids, \(1\), got \(2, 2\)",
    ),
    (
        raw("concat_pool_backward", torch.ones(2, 5), torch.tensor([1, 1]), torch.zeros(2, 2).long(), 3),
        r"dpooled must have shape \(2, 6\), got \(2, 5\)",
    ),
]


@pytest.mark.parametrize("call, message", KERNEL_CHECKS, ids=message_alone)
def test_kernels_check_again(call, message):
    """torch.ops is a public way in, and the only one that torch.compile leaves."""
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.cpu_only("on CUDA values are the kernel's to check: test_cuda_runtime.py")
@pytest.mark.parametrize("call, message", KERNEL_VALUES, ids=message_alone)
def test_kernels_check_values(call, message):
    test_kernels_check_again(call, message)
