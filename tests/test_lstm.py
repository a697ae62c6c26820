"""lstm against its fp64 reference: every dtype, layout, ISA, thread count; lengths; ULMFiT's sizes.

torch's own bf16 LSTM is never the oracle: its backward is wrong on AMX machines at H = 1024 to 1152, which is
why those sizes are here.
"""

import threading

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
    lstm_case,
    randn,
    with_gradients,
)
from torch import nn

import ulmfit_fast as uf

# Gates, outputs and their gradients are stored in the dtype (half an epsilon each, of values up to 1), and
# weights are rounded to it; the errors of a step enter the next one; sums are fp32, or fp64 for fp64.
FACTOR = 2
RAGGED = (5, 0, 3)


def factor(dtype):
    # no storage rounding to speak of: the error is that of exp and tanh (some ulp) and of the sums
    return {torch.float64: 32, torch.float32: 32}.get(dtype, FACTOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, RAGGED])
@pytest.mark.parametrize("dropout_p", [None, 0.4])
def test_against_reference(dtype, batch_first, reverse, lengths, dropout_p):
    options = {"batch_first": batch_first, "reverse": reverse, "lengths": lengths, "dropout_p": dropout_p}
    check_case(lstm_case(dtype, **options), dtype, factor(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "time, batch, inputs, hidden", [(1, 1, 1, 1), (7, 17, 40, 64), (3, 50, 5, 130), (20, 2, 100, 20)]
)
def test_sizes(dtype, time, batch, inputs, hidden):
    check_case(
        lstm_case(dtype, time, batch, inputs, hidden, bias=hidden % 3 != 1), dtype, factor(dtype), floor=0.5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "time, batch, inputs, hidden", [(1, 1, 3, 5), (1, 64, 40, 33), (13, 5, 33, 64), (1, 2, 400, 130)]
)
def test_few_rows_of_undropped_weights(dtype, time, batch, inputs, hidden):
    """Which the CPU does not pack."""
    case = lstm_case(dtype, time, batch, inputs, hidden, weight_p=0.0)
    check_case(case, dtype, factor(dtype), floor=0.5)


@pytest.mark.parametrize("hidden", [33, 100, 400, 1024, 1150, 1152])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ulmfit_sizes(dtype, hidden):
    if dtype != torch.bfloat16 and hidden not in (400, 1152):
        pytest.skip("the wrong gradients were bf16's")
    lengths = tuple(3 - (i % 4 == 1) for i in range(16))
    check_case(lstm_case(dtype, 3, 16, 32, hidden, lengths=lengths), dtype, factor(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights(dtype):
    """fp32 weights with 16-bit activations: rounded when packed, gradients in fp32."""
    check_case(lstm_case(dtype, 4, 6, 20, 48, weight_dtype=torch.float32), dtype, factor(dtype))
    undropped = lstm_case(dtype, 1, 5, 20, 48, weight_dtype=torch.float32, weight_p=0.0)
    check_case(undropped, dtype, factor(dtype))


@pytest.mark.cpu_only("instruction sets")
@pytest.mark.parametrize("name", ["lstm", "lstm_wide", "lstm_unpacked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa(isa_results, name, dtype):
    check_case(ISA_CASES[name](dtype), dtype, factor(dtype), isa_results[f"{name}-{dtype}"])


@pytest.mark.parametrize(
    "options",
    [{}, {"lengths": (3, 0, 2), "reverse": True, "batch_first": True, "bias": False, "dropout_p": 0.4}],
)
def test_gradcheck(options):
    inputs, op, _ = lstm_case(torch.float64, 3, 3, 2, 3, **options)
    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in inputs])


@pytest.mark.cpu_only("thread counts")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_thread_count_with_few_rows(dtype):
    inputs, op, _ = lstm_case(dtype, 2, 30, 30, 150, weight_p=0.0)
    assert_same_for_all_thread_counts(lambda: with_gradients(op, inputs), (1, 2, 3, 13))


@pytest.mark.cpu_only("thread counts")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_every_thread_count(dtype, ragged, reverse):
    """With 13 there are more threads than panels of W_hh, and the rows of a step are shared out too."""
    lengths = tuple(i % 7 for i in range(70)) if ragged else None
    inputs, op, _ = lstm_case(dtype, 6, 70, 30, 150, lengths=lengths, dropout_p=0.4, reverse=reverse)
    assert_same_for_all_thread_counts(lambda: with_gradients(op, inputs), (1, 2, 3, 13))


def test_any_shape_layout_and_lengths():
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies
    sizes = some.tuples(some.integers(0, 5), some.integers(0, 4), some.integers(1, 20), some.integers(1, 20))

    @hypothesis.given(
        some.data(), sizes, some.booleans(), some.booleans(), some.booleans(), some.sampled_from(DTYPES)
    )
    def check(data, sizes, batch_first, reverse, bias, dtype):
        time, batch = sizes[:2]
        lengths = data.draw(some.none() | some.tuples(*[some.integers(0, time)] * batch))
        dropout_p = data.draw(some.sampled_from([None, 0.0, 0.4]))
        options = {"batch_first": batch_first, "reverse": reverse, "bias": bias, "lengths": lengths}
        case = lstm_case(dtype, *sizes, **options, dropout_p=dropout_p)
        check_case(case, dtype, factor(dtype), floor=0.5)

    check()


@pytest.mark.parametrize("batch_first", [False, True])
def test_strides(batch_first):
    inputs, op, _ = lstm_case(torch.float32, 4, 3, 10, 20, batch_first=batch_first)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in inputs]
    spread[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    spread[4] = inputs[4].t().contiguous().t()
    spread[2] = inputs[2][:1].expand(3, 20)
    inputs[2] = spread[2].contiguous()
    assert_same(with_gradients(op, spread), with_gradients(op, inputs))


def test_equals_torch_lstm_where_nothing_is_dropped():
    module = nn.LSTM(10, 20, bidirectional=True, device=DEVICE)
    x = randn(6, 3, 10, dtype=torch.float32)
    y, (h_n, c_n) = module(x)
    for d, suffix in enumerate(("l0", "l0_reverse")):
        weights = [getattr(module, f"{n}_{suffix}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        ours = uf.lstm(x, None, None, *weights, reverse=d == 1)
        for a, b in zip(ours, (y[..., d * 20 : d * 20 + 20], h_n[d], c_n[d]), strict=True):
            assert_near(a, b, torch.float32, 16)


def test_padding_is_never_read_and_gives_zeros():
    inputs, op, _ = lstm_case(torch.float32, lengths=RAGGED)
    padded = [inputs[0].clone(), *inputs[1:]]
    for b, n in enumerate(RAGGED):
        padded[0][n:, b] = torch.nan
    results = with_gradients(op, inputs), with_gradients(op, padded)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for b, n in enumerate(RAGGED):
        assert results[0][0][n:, b].eq(0).all(), "outputs"
        assert results[0][3][n:, b].eq(0).all(), "gradients of x"
    assert torch.equal(results[0][1][1], inputs[1][1]), "a sequence of length 0 hands its state on"


def test_dropconnect_mask_is_that_of_dropout_mask():
    # so many rows that weights are packed with a mask and without one
    inputs, _, _ = lstm_case(torch.float32, 9, 8)
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = inputs
    mask = uf.dropout_mask(5, w_hh.shape, 0.3, device=DEVICE)
    dropped = uf.lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, weight_p=0.3, seed=5)
    assert_same(dropped, uf.lstm(x, h0, c0, w_ih, w_hh * mask, b_ih, b_hh))
    w_hh.requires_grad_()
    y, _, _ = uf.lstm(x, h0, c0, w_ih, w_hh, weight_p=0.3, seed=5)
    y.sum().backward()
    assert w_hh.grad[mask == 0].eq(0).all() and w_hh.grad[mask != 0].ne(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_output_is_that_of_variational_dropout(dtype):
    inputs, op, _ = lstm_case(dtype, lengths=RAGGED, dropout_p=0.4)
    y, _, _, dropped = op(*inputs)
    assert torch.equal(dropped, uf.variational_dropout(y, 0.4, seed=12, batch_first=False))
    y, _, _, kept = lstm_case(dtype, dropout_p=0.0)[1](*inputs)
    assert kept is y


@pytest.mark.parametrize("dropout_p", [None, 0.4])
def test_gradients_of_some_outputs_or_inputs_only(dropout_p):
    inputs, op, _ = lstm_case(torch.float32, dropout_p=dropout_p)
    leaves = [t.requires_grad_() for t in inputs]
    everything = torch.autograd.grad([y.sum() for y in op(*leaves)], leaves)
    parts = [torch.autograd.grad(op(*leaves)[i].sum(), leaves) for i in range(len(op(*leaves)))]
    for whole, *part in zip(everything, *parts, strict=True):
        assert_near(sum(part), whole, torch.float32, 16)
    for i, leaf in enumerate(leaves):
        alone = [t.detach().requires_grad_(t is leaf) for t in leaves]
        (grad,) = torch.autograd.grad([y.sum() for y in op(*alone)], alone[i])
        assert torch.equal(grad, everything[i])


def test_each_bias_has_a_gradient_of_its_own():
    """Though both are the same numbers: gradients are clipped and averaged in place."""
    inputs, op, _ = lstm_case(torch.float32)
    for y in op(*[t.requires_grad_() for t in inputs]):
        of_ih, of_hh = torch.autograd.grad(y.sum(), inputs[-2:], retain_graph=True)
        assert torch.equal(of_ih, of_hh)
        of_ih.zero_()
        assert of_hh.any()


def test_nothing_is_saved_without_grad():
    inputs, op, _ = lstm_case(torch.float32)
    with torch.no_grad():
        for a, b in zip(op(*inputs), op(*[t.requires_grad_() for t in inputs]), strict=True):
            assert torch.equal(a, b) and not a.requires_grad


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_autocast(weight_dtype):
    inputs, op, ref = lstm_case(torch.float32, 4, 6, 20, 48, weight_dtype=weight_dtype)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        results = with_gradients(op, inputs)
    assert [t.dtype for t in results[:3]] == [torch.bfloat16] * 3
    check_case((inputs, op, ref), torch.bfloat16, FACTOR, results)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert op(*[t.double() for t in inputs])[0].dtype == torch.float64
        with pytest.raises(TypeError, match="lstm: w_hh must be float64, got float16"):
            op(*[t.double() for t in inputs[:3]], *[t.half() for t in inputs[3:]])


def test_several_python_threads_and_more_threads_than_cores():
    torch.set_num_threads(7)
    inputs, op, _ = lstm_case(torch.float32, 6, 20, 30, 150)
    expected, results = with_gradients(op, inputs), [None] * 3

    def work(i):
        results[i] = with_gradients(op, inputs)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"lengths": RAGGED, "reverse": True}])
def test_opcheck(options):
    inputs, _, _ = lstm_case(torch.float32, time=5)
    lengths = torch.tensor(options["lengths"], device=DEVICE) if options else None
    seed = torch.tensor(3, device=DEVICE)
    op = torch.ops.ulmfit_fast.lstm.default
    leaves = [t.requires_grad_() for t in inputs]
    for dropout_p in (0.0, 0.4):
        drawn = seed, seed + 1, 0.5, dropout_p
        torch.library.opcheck(op, (*leaves, lengths, *drawn, False, bool(options), False, True))
    constants = [t.detach() for t in inputs]
    torch.library.opcheck(op, (*constants, lengths, seed, seed, 0.0, 0.0, False, False, True, False))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    if backend == "inductor" and DEVICE.type == "cuda":
        pytest.importorskip("triton", reason="inductor makes its CUDA kernels with it")

    def function(*inputs):
        dropout = {"dropout_p": 0.3, "dropout_seed": 9}
        y, h, c, dropped = uf.lstm(*inputs, weight_p=0.5, seed=7, batch_first=True, **dropout)
        return uf.variational_dropout(y, 0.3, seed=8), h, c, dropped

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for batch in (3, 5):
        inputs, _, _ = lstm_case(torch.float32, batch=batch, batch_first=True)
        for a, b in zip(with_gradients(compiled, inputs), with_gradients(function, inputs), strict=True):
            assert_near(a, b, torch.float32, 4)


def test_compile_draws_seeds_and_checks_lengths():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, w_ih, w_hh, lengths):
        return uf.lstm(x, None, None, w_ih, w_hh, weight_p=0.5, lengths=lengths)[0]

    inputs, _, _ = lstm_case(torch.float32)
    arguments = inputs[0], inputs[3], inputs[4]
    lengths = torch.tensor([5, 4, 5], device=DEVICE)
    assert not torch.equal(compiled(*arguments, lengths), compiled(*arguments, lengths))
    if not checks.CUDA_KERNELS:  # there it is an assertion of the kernel: test_cuda_runtime.py
        with pytest.raises(RuntimeError, match="lstm: lengths must be in 0..5, got 6 at position 1"):
            compiled(*arguments, torch.tensor([5, 6, 5]))


def test_second_derivative_is_refused():
    inputs, op, _ = lstm_case(torch.float64)
    x = inputs[0].requires_grad_()
    (dx,) = torch.autograd.grad(op(*inputs)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lstm: second derivatives are not implemented"):
        dx.sum().backward()


def test_dropconnect_of_a_slice_of_a_wider_weight():
    """The mask is that of (4H, H), whatever the distance of the rows in memory."""
    inputs, op, _ = lstm_case(torch.float32)
    sliced = list(inputs)
    sliced[4] = torch.cat([inputs[4], inputs[4]], 1)[:, :33]
    assert sliced[4].stride() == (66, 1)
    assert_same(op(*sliced), op(*inputs))


@pytest.mark.parametrize("bits", [0x7FC00001, -1])
def test_a_nan_of_any_bits_stays_one(bits):
    x = torch.full((1, 2, 3), bits, dtype=torch.int32, device=DEVICE).view(torch.float32)
    _, *others = lstm_case(torch.float32, 1, 2, 3, 20)[0]
    for result in uf.lstm(x, *others):
        assert result.isnan().all()


@pytest.mark.parametrize("hidden", [33, 64])  # 64: whole groups of the mask
def test_a_dropped_nan_is_no_zero(hidden):
    """w_hh * mask is NaN there, so a model that has gone wrong shows it."""
    (x, h0, c0, w_ih, w_hh, *biases), _, _ = lstm_case(torch.float32, 2, 3, 5, hidden)
    dropped = uf.dropout_mask(1, w_hh.shape, 0.5)[0] == 0
    w_hh = w_hh.clone()
    w_hh[0, dropped] = float("nan")
    y, _, _ = uf.lstm(x, h0, c0, w_ih, w_hh, *biases, weight_p=0.5, seed=1)
    assert y[0, :, 0].isnan().all()
