"""embedding_dropout against its fp64 reference: every dtype, ISA, thread count; repeated ids, padding."""

import math

import checks
import pytest
import torch
from checks import (
    DEVICE,
    DTYPES,
    ISA_CASES,
    assert_same_for_all_thread_counts,
    check_case,
    embedding_dropout_case,
    randn,
    with_gradients,
)
from torch.nn import functional as F

import ulmfit_fast as uf
from ulmfit_fast import reference

# a product and a rounding; the gradient sums some 5 to 16 positions of a word, in fp32 for the 16-bit types
FACTOR = 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "words, width, ids_shape", [(50, 37, (4, 60)), (7, 1100, (33,)), (300, 16, (2, 3, 5)), (3, 1, ())]
)
def test_against_reference(dtype, words, width, ids_shape):
    check_case(embedding_dropout_case(dtype, words, width, ids_shape), dtype, FACTOR)


@pytest.mark.cpu_only("instruction sets")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa(isa_results, dtype):
    check_case(
        ISA_CASES["embedding_dropout"](dtype), dtype, FACTOR, isa_results[f"embedding_dropout-{dtype}"]
    )


def test_gradcheck():
    inputs, op, _ = embedding_dropout_case(torch.float64, 9, 4, (12,))
    assert torch.autograd.gradcheck(op, [inputs[0].requires_grad_()])


@pytest.mark.cpu_only("thread counts")
def test_every_thread_count():
    inputs, op, _ = embedding_dropout_case(torch.float32, 1000, 50, (5000,))
    assert_same_for_all_thread_counts(lambda: with_gradients(op, inputs))


def test_any_ids():
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies

    @hypothesis.given(
        some.integers(1, 20),
        some.integers(0, 40),
        some.lists(some.integers(0, 5), max_size=3),
        some.integers(0, 2**63 - 1),
    )
    def check(words, width, ids_shape, seed):
        case = embedding_dropout_case(
            torch.float64, words, width, tuple(ids_shape), seed=seed, padding_idx=None
        )
        # up to 125 positions of one word, summed in any order
        check_case(case, torch.float64, FACTOR, floor=math.prod(ids_shape) ** 0.5)

    check()


def test_strided_weight_and_ids():
    weight, ids = randn(10, 20), torch.arange(10, device=DEVICE).reshape(5, 2)
    strided = weight.repeat_interleave(2, 1)[:, ::2], ids.t().contiguous().t()
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(
        uf.embedding_dropout(*strided, 0.5, seed=1), uf.embedding_dropout(weight, ids, 0.5, seed=1)
    )
    assert torch.equal(uf.embedding_dropout(weight, ids.int(), 0), F.embedding(ids, weight))


def test_padding_row_is_read_and_has_no_gradient():
    weight, ids = randn(6, 4).requires_grad_(), torch.tensor([5, 2, 5], device=DEVICE)
    for padding_idx in (5, -1):
        y = uf.embedding_dropout(weight, ids, 0.0, padding_idx=padding_idx)
        assert torch.equal(y, weight[ids])
        (gradient,) = torch.autograd.grad(y.sum(), weight)
        assert gradient[5].eq(0).all() and gradient[2].eq(1).all()


def test_a_dropped_nan_is_no_zero():
    """weight * mask is NaN there, so a model that has gone wrong shows it."""
    weight = torch.full((20, 16), math.nan, device=DEVICE)
    assert uf.embedding_dropout(weight, torch.arange(20, device=DEVICE), 0.5, seed=1).isnan().all()


def test_autocast_leaves_the_dtype_alone():
    weight, ids = torch.ones(3, 4, device=DEVICE), torch.tensor([1], device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert uf.embedding_dropout(weight, ids, 0.5).dtype == torch.float32


def test_a_word_is_dropped_wherever_it_occurs():
    ids = torch.arange(100, device=DEVICE).repeat(2)
    y = uf.embedding_dropout(torch.ones(100, 3, device=DEVICE), ids, 0.5, seed=4)
    assert torch.equal(y[:100], y[100:])
    assert torch.equal(y[:100, 0], reference.dropout_mask(4, (100,), 0.5, device=DEVICE))


def test_opcheck():
    weight, seed = randn(8, 5, dtype=torch.float32).requires_grad_(), torch.tensor(3, device=DEVICE)
    for ids in (torch.tensor([[1, 2], [1, 7]]), torch.zeros(0, dtype=torch.int64)):
        arguments = (weight, ids.to(DEVICE), seed, 0.3, 1)
        torch.library.opcheck(torch.ops.ulmfit_fast.embedding_dropout.default, arguments)


def test_compile():
    compiled = torch.compile(uf.embedding_dropout, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, p, seed in ((5, 0.1, 1), (6, 0.5, 2)):
        weight, ids = randn(9, 4).requires_grad_(), torch.randint(9, (2, n), device=DEVICE)
        y, expected = compiled(weight, ids, p, seed=seed), uf.embedding_dropout(weight, ids, p, seed=seed)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(out.square().sum(), weight)[0] for out in (y, expected)))
    if not checks.CUDA_KERNELS:  # there it is an assertion of the kernel: test_cuda_runtime.py
        with pytest.raises(RuntimeError, match="embedding_dropout: ids must be in 0..8, got 9 at position 1"):
            compiled(weight, torch.tensor([[0, 9]]), 0.5, seed=2)


def test_second_derivative_is_refused():
    weight = randn(3, 2).requires_grad_()
    y = uf.embedding_dropout(weight, torch.tensor([0, 2], device=DEVICE), 0.0)
    (gradient,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="embedding_dropout: second derivatives are not implemented"):
        gradient.sum().backward()
