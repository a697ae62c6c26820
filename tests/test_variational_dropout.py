"""variational_dropout against its fp64 reference: every dtype, layout, ISA and thread count."""

import pytest
import torch
from checks import (
    DEVICE,
    DTYPES,
    ISA_CASES,
    assert_same_for_all_thread_counts,
    check_case,
    randn,
    variational_dropout_case,
    with_gradients,
)

import ulmfit_fast as uf
from ulmfit_fast import reference

# one product and one rounding, half an epsilon each
FACTOR = 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 77), (1, 600, 16), (2, 3, 2500), (4, 3), (2, 3, 4, 5)])
def test_against_reference(dtype, batch_first, shape):
    check_case(variational_dropout_case(dtype, shape, batch_first=batch_first), dtype, FACTOR)


@pytest.mark.cpu_only("instruction sets")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa(isa_results, dtype):
    case = ISA_CASES["variational_dropout"](dtype)
    check_case(case, dtype, FACTOR, isa_results[f"variational_dropout-{dtype}"])


def test_gradcheck():
    inputs, op, _ = variational_dropout_case(torch.float64, (2, 3, 5))
    assert torch.autograd.gradcheck(op, [inputs[0].requires_grad_()])


@pytest.mark.cpu_only("thread counts")
def test_every_thread_count():
    inputs, op, _ = variational_dropout_case(torch.float32, (3, 300, 1100))
    assert_same_for_all_thread_counts(lambda: with_gradients(op, inputs))


def test_any_shape_layout_and_strides():
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies
    size = some.integers(0, 5)

    @hypothesis.given(
        some.lists(size, min_size=2, max_size=4),
        some.permutations(range(4)),
        some.integers(1, 2),
        some.booleans(),
    )
    def check(shape, order, step, batch_first):
        order = [i for i in order if i < len(shape)]
        storage = randn(*[shape[i] for i in order[:-1]], shape[order[-1]] * step)[..., ::step]
        x = storage.permute([order.index(i) for i in range(len(shape))])
        assert list(x.shape) == shape
        features = x[0, 0].numel() if shape[0] and shape[1] else int(torch.tensor(shape[2:]).prod())
        sizes = (shape[0 if batch_first else 1], features)
        mask = reference.dropout_mask(1, sizes, 0.5, dtype=x.dtype, device=DEVICE)
        expected = reference.variational_dropout(x, mask, batch_first=batch_first)
        assert torch.equal(uf.variational_dropout(x, 0.5, seed=1, batch_first=batch_first), expected)

    check()


def test_the_mask_is_that_of_dropout_mask_in_both_layouts():
    ones = torch.ones(3, 4, 10, device=DEVICE)
    mask = uf.dropout_mask(8, (3, 10), 0.5, device=DEVICE)
    assert torch.equal(uf.variational_dropout(ones, 0.5, seed=8), mask.unsqueeze(1).expand(3, 4, 10))
    other = uf.variational_dropout(ones.transpose(0, 1).contiguous(), 0.5, seed=8, batch_first=False)
    assert torch.equal(other, mask.expand(4, 3, 10))


def test_p_zero_is_the_identity():
    x = randn(2, 3, 4)
    assert torch.equal(uf.variational_dropout(x, 0), x)


def test_a_dropped_infinity_is_no_zero():
    """x * mask is NaN there, so a model that has gone wrong shows it."""
    dropped = uf.variational_dropout(randn(2, 3, 33) / 0, 0.5, seed=1)
    assert (dropped.isnan() | dropped.isinf()).all()
    assert dropped.isnan().any()


def test_autocast_leaves_the_dtype_alone():
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert uf.variational_dropout(torch.ones(1, 2, 3, device=DEVICE), 0.5).dtype == torch.float32


def test_opcheck():
    for x in (
        randn(2, 3, 5, dtype=torch.float32).requires_grad_(),
        torch.ones(2, 0, 3, device=DEVICE),
        torch.ones(3, 2, 5, device=DEVICE).transpose(0, 1),
    ):
        torch.library.opcheck(
            torch.ops.ulmfit_fast.variational_dropout.default, (x, torch.tensor(3, device=DEVICE), 0.3, True)
        )


def test_compile():
    compiled = torch.compile(uf.variational_dropout, fullgraph=True, backend="aot_eager", dynamic=True)
    for p, seed, shape in ((0.1, 1, (2, 3, 4)), (0.2, 2, (3, 4, 5)), (0.5, 2**62 + 1, (5, 2, 7))):
        x = randn(*shape).requires_grad_()
        y = compiled(x, p, seed=seed)
        expected = uf.variational_dropout(x, p, seed=seed)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)))


def test_second_derivative_is_refused():
    x = randn(1, 2, 3).requires_grad_()
    (dx,) = torch.autograd.grad(uf.variational_dropout(x, 0.5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="variational_dropout: second derivatives are not implemented"):
        dx.sum().backward()
