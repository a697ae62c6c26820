"""linear_cross_entropy against its fp64 reference: every dtype, reduction, ISA, thread count; memory."""

import os
import subprocess
import sys

import checks
import pytest
import torch
from checks import (
    DEVICE,
    DTYPES,
    ISA_CASES,
    assert_near,
    assert_same,
    assert_same_for_all_thread_counts,
    check_case,
    linear_cross_entropy_case,
    randn,
    with_gradients,
)
from torch.nn import functional as F

import ulmfit_fast as uf
from ulmfit_fast import reference

# 16-bit: weights, probabilities and gradients are rounded once or twice each. fp32, fp64: long sums.
FACTOR = 2

# the last: words enough for a thread of the CUDA kernel to have several loads on their way, and remainders
SIZES = [((1,), 1, 1), ((130,), 40, 1000), ((2, 3, 5), 17, 129), ((700,), 8, 70), ((3,), 5, 20_509)]
# words whose logits become `value`: among the first panel of words, after it, targets, all
INFINITE_LOGITS = [
    (slice(2, 3), torch.inf),
    (slice(250, 251), torch.inf),
    (slice(200, 201), torch.inf),
    (slice(3, 4), -torch.inf),
    (slice(0, 150), -torch.inf),
    (slice(0, 300), -torch.inf),
    (slice(2, 3), torch.nan),
    (slice(250, 251), torch.nan),
]


def factor(dtype):
    return {torch.float64: 32, torch.float32: 32}.get(dtype, FACTOR)


def check(case, dtype):
    """The loss is fp32 even for 16-bit types; it is held to the dtype's own epsilon, as the logits are."""
    check_case(case, dtype, factor(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_against_reference(dtype, reduction, bias):
    check(linear_cross_entropy_case(dtype, reduction=reduction, bias=bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, features, words", SIZES)
def test_sizes(dtype, shape, features, words):
    case, longer = linear_cross_entropy_case(dtype, shape, features, words), 1 + words // 10_000
    check_case(case, dtype, longer * factor(dtype))


@pytest.mark.parametrize("options", [{"label_smoothing": 0.0}, {"label_smoothing": 1.0}, {"ignore_index": 3}])
def test_options(options):
    for dtype in DTYPES:
        check(linear_cross_entropy_case(dtype, **options), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_master_weights(dtype, reduction):
    check(linear_cross_entropy_case(dtype, weight_dtype=torch.float32, reduction=reduction), dtype)


@pytest.mark.cpu_only("instruction sets")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa(isa_results, dtype):
    case = ISA_CASES["linear_cross_entropy"](dtype)
    check_case(case, dtype, factor(dtype), isa_results[f"linear_cross_entropy-{dtype}"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    inputs, op, _ = linear_cross_entropy_case(torch.float64, (5,), 3, 7, reduction=reduction)
    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in inputs])


@pytest.mark.cpu_only("thread counts")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_thread_count(dtype):
    inputs, op, _ = linear_cross_entropy_case(dtype, (300,), 50, 700)
    assert_same_for_all_thread_counts(lambda: with_gradients(op, inputs))


def test_any_shape():
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies

    @hypothesis.given(
        some.lists(some.integers(0, 5), max_size=3),
        some.integers(1, 20),
        some.integers(1, 70),
        some.sampled_from(["mean", "sum", "none"]),
        some.sampled_from(DTYPES),
    )
    def any_shape(shape, features, words, reduction, dtype):
        check(linear_cross_entropy_case(dtype, tuple(shape), features, words, reduction=reduction), dtype)

    any_shape()


def test_equals_torch_cross_entropy():
    h, weight, bias = (randn(*s, dtype=torch.float32) for s in ((6, 8), (11, 8), (11,)))
    target = torch.tensor([0, 10, -100, 3, 3, -100], device=DEVICE)
    ours = uf.linear_cross_entropy(h, weight, bias, target, label_smoothing=0.1)
    assert_near(
        ours, F.cross_entropy(F.linear(h, weight, bias), target, label_smoothing=0.1), torch.float32, 8
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_stay_finite(dtype):
    h, weight = (torch.full((rows, 8), 60.0, dtype=dtype, device=DEVICE) for rows in (4, 5))
    weight[2:] = -60.0
    target = torch.tensor([0, 1, 2, 4], device=DEVICE)
    results = with_gradients(lambda h, w: (uf.linear_cross_entropy(h, w, None, target),), [h, weight])
    assert all(t.isfinite().all() for t in results)
    assert results[0].item() == pytest.approx(
        (2 * 0.6931471805599453 + 2 * (57600 + 0.6931471805599453)) / 4, rel=1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first, later", [(-300.0, 0.0), (0.0, 200.0), (200.0, 0.0), (-torch.inf, -100.0)])
def test_logits_of_the_first_words_far_from_the_others(dtype, first, later):
    """Exponentials are taken against the largest logit among the first words, which may not be a near one."""
    if checks.CUDA_KERNELS and dtype.itemsize == 2 and max(first, abs(later)) >= 100:
        pytest.skip("the CUDA op keeps 16-bit logits, as torch does: 200 is known to within 0.5 or 0.06")
    h, weight = randn(9, 6, dtype=dtype), randn(300, 6, dtype=dtype)
    bias = torch.full((300,), first, dtype=dtype, device=weight.device)
    bias[130:] = later
    target = torch.arange(140, 149, device=weight.device)
    inputs = [h, weight]
    results = with_gradients(lambda h, w: (uf.linear_cross_entropy(h, w, bias, target),), inputs)
    expected = with_gradients(
        lambda h, w: (F.cross_entropy(F.linear(h, w, bias.double()), target),), [t.double() for t in inputs]
    )
    # a logit of 200 is itself rounded to 100 epsilons, on both sides; 16-bit inputs are multiplied in float32
    rounding = max(first, abs(later)) if dtype.itemsize >= 4 else 0
    for a, b in zip(results, expected, strict=True):
        assert_near(a, b, dtype, factor(dtype) + rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words, value", INFINITE_LOGITS)
@pytest.mark.parametrize("grad", [True, False])
def test_infinite_logits_are_torchs(dtype, words, value, grad):
    """On a CPU in two chunks of rows.  Targets are the words 3 and 200."""
    rows = 4 if checks.CUDA_KERNELS else 700
    inputs = [randn(rows, 6, dtype=dtype), randn(300, 6, dtype=dtype)]
    inputs.append(torch.zeros(300, dtype=dtype, device=DEVICE))
    inputs[2][words] = value
    target = torch.tensor([3, 200], device=DEVICE).repeat(rows // 2)

    def losses(function, inputs):
        run = lambda h, w, b: (function(h, w, b),)  # noqa: E731
        return with_gradients(run, inputs) if grad else run(*inputs)

    wide = [t.double() for t in inputs]
    for reduction in ("none", "sum"):
        results = losses(lambda *t, r=reduction: uf.linear_cross_entropy(*t, target, reduction=r), inputs)
        expected = losses(
            lambda h, w, b, r=reduction: F.cross_entropy(F.linear(h, w, b), target, reduction=r), wide
        )
        for a, b in zip(results, expected, strict=True):
            scale = b.nan_to_num(posinf=0, neginf=0).abs().max().item()
            bound = factor(dtype) * torch.finfo(dtype).eps * scale
            torch.testing.assert_close(a.double(), b, rtol=0, atol=bound, equal_nan=True)


def test_a_sum_beyond_float32_is_inf():
    h, weight = torch.full((2, 3, 4), 1e19, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    weight[1], weight[0] = 3e18, -1e18
    target = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    assert uf.linear_cross_entropy(h, weight, None, target, reduction="none").isfinite().all()
    assert uf.linear_cross_entropy(h, weight, None, target) == torch.inf


@pytest.mark.parametrize("shape, target", [((0, 3), []), ((2, 3), [-100, -100])])
def test_a_mean_over_nothing_is_zero_with_zero_gradients(shape, target):
    target = torch.tensor(target, dtype=torch.int64, device=DEVICE)
    results = with_gradients(
        lambda h, w: (uf.linear_cross_entropy(h, w, None, target),), [randn(*shape), randn(5, 3)]
    )
    assert all(t.eq(0).all() for t in results) and results[0].dtype == torch.float64


def test_float16_gradients_of_a_mean_survive_the_gradient_scaler():
    """1 / 4096 of a small gradient is below float16's range unless the scale comes first."""
    inputs, op, ref = linear_cross_entropy_case(torch.float16, (4096,), 4, 9)
    for t in inputs:
        t.requires_grad_()
    scale = 2.0**14
    grads = torch.autograd.grad(op(*inputs)[0] * scale, inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    for a, b in zip(grads, torch.autograd.grad(ref(*wide)[0] * scale, wide), strict=True):
        assert_near(a, b, torch.float16, FACTOR)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_weights_whose_gradient_of_the_sum_overflows(reduction):
    h, weight = torch.full((64, 4), 3000.0), torch.zeros(30, 4)  # their sum is beyond 65,504
    target = torch.zeros(64, dtype=torch.int64, device=DEVICE)

    def gradients(function, dtype):
        leaves = [t.to(DEVICE, dtype).requires_grad_() for t in (h, weight)]
        loss = function(*leaves) / (1 if reduction == "mean" else 64)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    ours = gradients(
        lambda h, w: uf.linear_cross_entropy(h, w, None, target, reduction=reduction), torch.half
    )
    theirs = gradients(lambda h, w: F.cross_entropy(h @ w.t(), target, reduction=reduction), torch.double)
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, torch.float16, FACTOR)


def test_batches_of_upstream_gradients():
    """vmap over the backward pass, as torch.autograd.functional.jacobian(vectorize=True) has it."""
    h, weight = randn(3, 4), randn(5, 4)
    target = torch.tensor([0, 1, 2], device=DEVICE)
    for reduction in ("mean", "none"):
        ours, theirs = (
            torch.autograd.functional.jacobian(
                lambda h, w, f=f, r=reduction: f(h, w, None, target, reduction=r), (h, weight), vectorize=True
            )
            for f in (uf.linear_cross_entropy, reference.linear_cross_entropy)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert_near(a, b, torch.float64, factor(torch.float64))


def test_a_retained_graph_gives_the_same_gradient_twice():
    inputs, op, _ = linear_cross_entropy_case(torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    (loss,) = op(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cpu_only("the process's memory; test_cuda_runtime.py has the device's")
def test_no_more_than_a_chunk_of_logits_exists():
    """4,096 x 20,000 fp32 logits would be 328 MB; the op's peak is measured in a process of its own."""
    script = """
import resource, sys, torch, ulmfit_fast as uf
h = torch.randn(4096, 16, requires_grad=True)
weight, target = torch.randn(20000, 16, requires_grad=True), torch.randint(20000, (4096,))
uf.linear_cross_entropy(h[:8], weight, None, target[:8]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
uf.linear_cross_entropy(h, weight, None, target).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 100e6


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_autocast(weight_dtype):
    inputs, op, ref = linear_cross_entropy_case(torch.float32, (40,), 30, 90, weight_dtype=weight_dtype)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        results = with_gradients(op, inputs)
    assert results[0].dtype == torch.float32
    check_case((inputs, op, ref), torch.bfloat16, FACTOR, results)


def test_strides():
    inputs, op, _ = linear_cross_entropy_case(torch.float32)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in inputs]
    spread[1] = inputs[1].t().contiguous().t()
    assert_same(with_gradients(op, spread), with_gradients(op, inputs))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_weight(dtype, reduction):
    (h, w, b), op, _ = linear_cross_entropy_case(dtype, (40,), reduction=reduction)
    loss, dh, _, db = with_gradients(op, [h, w, b])
    assert_same(with_gradients(lambda h: op(h, w, b), [h]), [loss, dh])
    assert_same(with_gradients(lambda h, b: op(h, w, b), [h, b]), [loss, dh, db])


def test_gradient_that_was_not_wanted():
    (h, w, _), _, _ = linear_cross_entropy_case(torch.float32, (9,))
    options = (torch.arange(9, device=DEVICE), -100, 0.0, 2, False, True, False, 0)
    loss, dh, dw, db = torch.ops.ulmfit_fast.linear_cross_entropy(h, w.requires_grad_(), None, *options)
    assert (dh.numel(), dw.numel(), db.numel()) == (h.numel(), 0, 0)
    with pytest.raises(RuntimeError, match="called with need_dw=False, so weight and bias have no gradient"):
        loss.backward()


def test_opcheck():
    op = torch.ops.ulmfit_fast.linear_cross_entropy.default
    inputs, _, _ = linear_cross_entropy_case(torch.float32, (9,))
    target = torch.arange(9, device=DEVICE)
    leaves = [t.requires_grad_() for t in inputs]
    for reduction, high, grad in ((2, False, True), (0, True, False)):
        torch.library.opcheck(op, (*leaves, target, -100, 0.1, reduction, high, grad, grad, 0))
    frozen = [t.detach() for t in inputs]
    torch.library.opcheck(op, (leaves[0], *frozen[1:], target, -100, 0.0, 2, False, True, False, 4))
    torch.library.opcheck(op, (*frozen[:2], None, target, -100, 0.0, 2, False, False, False, 4))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    def function(h, w, b, target):
        return uf.linear_cross_entropy(h, w, b, target, label_smoothing=0.1, reduction=reduction)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 7):
        inputs, _, _ = linear_cross_entropy_case(torch.float32, (n,))
        target = torch.arange(n, device=DEVICE)
        ours, theirs = (
            with_gradients(lambda *t, f=f, target=target: (f(*t, target),), inputs)
            for f in (compiled, function)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert_near(a, b, torch.float32, 4)
    if not checks.CUDA_KERNELS:  # there it is an assertion of the kernel: test_cuda_runtime.py
        message = "linear_cross_entropy: target must be in 0..49 or -100, got 50"
        with pytest.raises(RuntimeError, match=message):
            compiled(*inputs, target + 44)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(reduction):
    inputs, op, _ = linear_cross_entropy_case(torch.float64, reduction=reduction)
    h = inputs[0].requires_grad_()
    (dh,) = torch.autograd.grad(op(*inputs)[0].sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: second derivatives are not implemented"):
        dh.square().sum().backward()
