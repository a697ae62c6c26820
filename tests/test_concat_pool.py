"""concat_pool against its fp64 reference: every dtype, ISA, thread count; lengths, ties, padding."""

import checks
import pytest
import torch
from checks import (
    DEVICE,
    DTYPES,
    ISA_CASES,
    assert_same_for_all_thread_counts,
    check_case,
    concat_pool_case,
    randn,
    with_gradients,
)

import ulmfit_fast as uf

# the mean sums up to 9 (the long case: 200) steps in fp32 or fp64; last and maximum are exact
FACTOR = 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, time, hidden, lengths",
    [(4, 9, 300, (9, 0, 1, 5)), (1, 200, 7, (200,)), (2, 130, 16, (64, 65)), (3, 1, 260, (1, 1, 0))],
)
def test_against_reference(dtype, batch, time, hidden, lengths):
    check_case(concat_pool_case(dtype, batch, time, hidden, lengths), dtype, FACTOR)


@pytest.mark.cpu_only("instruction sets")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa(isa_results, dtype):
    check_case(ISA_CASES["concat_pool"](dtype), dtype, FACTOR, isa_results[f"concat_pool-{dtype}"])


def test_gradcheck():
    inputs, op, _ = concat_pool_case(torch.float64, 3, 4, 5, (4, 0, 2))
    assert torch.autograd.gradcheck(op, [inputs[0].requires_grad_()])


@pytest.mark.cpu_only("thread counts")
def test_every_thread_count():
    inputs, op, _ = concat_pool_case(torch.float32, 5, 100, 520, (100, 3, 64, 0, 99))
    assert_same_for_all_thread_counts(lambda: with_gradients(op, inputs))


def test_any_shape_and_lengths():
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies

    @hypothesis.given(some.data(), some.integers(0, 4), some.integers(0, 6), some.integers(0, 20))
    def check(data, batch, time, hidden):
        lengths = tuple(data.draw(some.integers(0, time)) for _ in range(batch))
        check_case(concat_pool_case(torch.float64, batch, time, hidden, lengths), torch.float64, FACTOR)

    check()


def test_padding_is_never_read():
    out, lengths = randn(2, 5, 8), torch.tensor([2, 4], device=DEVICE)
    padded = out.clone()
    padded[0, 2:] = padded[1, 4:] = torch.nan
    assert torch.equal(uf.concat_pool(out, lengths), uf.concat_pool(padded, lengths))


def test_strides():
    out = randn(5, 3, 12)
    views = out.transpose(0, 1), out.repeat_interleave(2, 2)[..., ::2].transpose(0, 1)
    lengths = torch.tensor([5, 2, 0, 9, 3, 9], device=DEVICE)[::2]
    assert not lengths.is_contiguous()
    for view in views:
        assert torch.equal(uf.concat_pool(view, lengths), uf.concat_pool(view.contiguous(), lengths.clone()))


def test_a_tie_gives_its_gradient_to_the_first_step():
    out = torch.zeros(1, 3, 20, device=DEVICE, requires_grad=True)
    uf.concat_pool(out, torch.tensor([3], device=DEVICE))[:, 20:40].sum().backward()
    assert out.grad[0, 0].eq(1).all() and out.grad[0, 1:].eq(0).all()


def test_infinities_and_nan_pass_through_the_maximum():
    out, lengths = torch.full((1, 3, 2), -torch.inf, device=DEVICE), torch.tensor([3], device=DEVICE)
    assert uf.concat_pool(out, lengths)[0, 2:4].tolist() == [-torch.inf] * 2
    out[0, 1, 0] = torch.nan
    assert uf.concat_pool(out, lengths)[0, 2].isnan()


def test_opcheck():
    op = torch.ops.ulmfit_fast.concat_pool.default
    lengths = torch.tensor([4, 0, 2], device=DEVICE)
    torch.library.opcheck(op, (randn(3, 4, 5, dtype=torch.float32).requires_grad_(), lengths))
    torch.library.opcheck(op, (torch.ones(2, 0, 3, device=DEVICE), torch.zeros_like(lengths[:2])))


def test_compile():
    compiled = torch.compile(uf.concat_pool, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, time, hidden in ((2, 3, 4), (3, 5, 6)):
        out, lengths = randn(batch, time, hidden).requires_grad_(), torch.arange(batch, device=DEVICE)
        y, expected = compiled(out, lengths), uf.concat_pool(out, lengths)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(z.square().sum(), out)[0] for z in (y, expected)))
    if not checks.CUDA_KERNELS:  # there it is an assertion of the kernel: test_cuda_runtime.py
        with pytest.raises(RuntimeError, match="concat_pool: lengths must be in 0..5, got 6 at position 2"):
            compiled(out, torch.tensor([0, 5, 6]))


def test_second_derivative_is_refused():
    out = randn(1, 2, 3).requires_grad_()
    pooled = uf.concat_pool(out, torch.tensor([2], device=DEVICE))
    (gradient,) = torch.autograd.grad(pooled.square().sum(), out, create_graph=True)
    with pytest.raises(RuntimeError, match="concat_pool: second derivatives are not implemented"):
        gradient.sum().backward()
