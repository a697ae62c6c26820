"""The persistent recurrence of `lstm` beside the general one and the fp64 reference.

Where there is a GPU these tests run on it; in the build of `make cuda-on-cpu` the same kernels run on the
CPU, their thread blocks in turn, on a card that ULMFIT_ON_CPU_CARD makes up.  Elsewhere they are skipped.
test_lstm_persistent_gpu.py has what a CPU cannot run, or not in any time.
"""

import os
import subprocess
import sys

import checks
import pytest
import torch
from checks import assert_near, check_case, lstm_case, with_gradients
from checks_persistent import DTYPES, FACTOR, ROUNDED, VARIABLE, factor, general, lengths_of, on_cpu

import ulmfit_fast as uf

pytestmark = pytest.mark.usefixtures("persistent")

CARDS = {"L2": "132,227", "clusters": "132,227,32"}  # by where the sums of the way back are exchanged


@pytest.fixture(params=CARDS)
def exchange(request, monkeypatch):
    if on_cpu():
        monkeypatch.setenv("ULMFIT_ON_CPU_CARD", CARDS[request.param])
    elif request.param == "clusters":
        pytest.skip("a GPU has one of the two, and runs as L2")


def check(case, dtype, **options):
    check_case(case, ROUNDED.get(dtype, dtype), factor(dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, (5, 0, 3)])
@pytest.mark.parametrize("dropout_p", [None, 0.4])
def test_against_reference(dtype, batch_first, reverse, lengths, dropout_p, exchange, tf32):
    options = {"batch_first": batch_first, "reverse": reverse, "lengths": lengths, "dropout_p": dropout_p}
    check(lstm_case(dtype, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [2, 3, 15, 16, 17, 31, 33, 64, 95, 130, 200])
def test_ragged_sizes(dtype, hidden, tf32):
    for batch in (1, 15, 17, 33):
        options = {"bias": hidden % 2 == 1, "dropout_p": 0.4 if hidden % 3 else None}
        case = lstm_case(dtype, 3, batch, 5, hidden, lengths=lengths_of(batch, 3), **options)
        check(case, dtype, floor=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("card", ["4,227", "4,227,1", "5,99", "8,227", "9,227,2", "40,30", "40,40,8"])
def test_small_cards_take_row_blocks_in_turn(card, dtype, monkeypatch, tf32):
    """Few multiprocessors: several row blocks to a part, several parts, every tile; with clusters as well."""
    if not on_cpu():
        pytest.skip("a made-up card is the CPU's")
    monkeypatch.setenv("ULMFIT_ON_CPU_CARD", card)
    for hidden, batch in ((33, 70), (17, 100), (40, 50)):
        options = {"reverse": batch == 70, "dropout_p": 0.4}
        case = lstm_case(dtype, 4, batch, 5, hidden, lengths=lengths_of(batch, 4), **options)
        check(case, dtype, floor=0.5)


def test_any_shape_and_card(monkeypatch, tf32):
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies
    sizes = some.tuples(some.integers(1, 4), some.integers(1, 40), some.integers(1, 9), some.integers(1, 60))

    @hypothesis.settings(max_examples=15)
    @hypothesis.given(
        some.data(),
        some.sampled_from(DTYPES),
        sizes,
        some.booleans(),
        some.booleans(),
        some.sampled_from((6, 12, 132)),
    )
    def check_any(data, dtype, sizes, batch_first, reverse, multiprocessors):
        clusters = data.draw(some.sampled_from((0, 1, multiprocessors // 4)))
        monkeypatch.setenv("ULMFIT_ON_CPU_CARD", f"{multiprocessors},227,{clusters}")
        time, batch = sizes[:2]
        lengths = data.draw(some.none() | some.tuples(*[some.integers(0, time)] * batch))
        dropout_p = data.draw(some.sampled_from((None, 0.0, 0.4)))
        options = {"batch_first": batch_first, "reverse": reverse, "lengths": lengths}
        check(lstm_case(dtype, *sizes, **options, dropout_p=dropout_p), dtype, floor=0.5)

    check_any()


def test_master_weights_and_no_gradient():
    case = lstm_case(torch.bfloat16, 4, 6, 20, 48, weight_dtype=torch.float32)
    check(case, torch.bfloat16)
    inputs, op, _ = case
    with torch.no_grad():  # nothing is saved
        assert all(torch.equal(a, b) for a, b in zip(op(*inputs), with_gradients(op, inputs), strict=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_output_is_that_of_variational_dropout(dtype, tf32):
    inputs, op, _ = lstm_case(dtype, 5, 20, 10, 70, lengths=lengths_of(20, 5), dropout_p=0.4)
    y, _, _, dropped = op(*inputs)
    assert torch.equal(dropped, uf.variational_dropout(y, 0.4, seed=12, batch_first=False))


def test_equal_to_the_bit_over_repeated_runs():
    inputs, op, _ = lstm_case(torch.bfloat16, 5, 20, 10, 70, lengths=lengths_of(20, 5), dropout_p=0.4)
    first = with_gradients(op, inputs)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(op, inputs), first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_exchanges_give_the_same_bits(dtype, monkeypatch, tf32):
    if not on_cpu():
        pytest.skip("a made-up card is the CPU's")
    inputs, op, _ = lstm_case(dtype, 5, 40, 10, 70, lengths=lengths_of(40, 5), dropout_p=0.4)
    results = []
    for card in CARDS.values():
        monkeypatch.setenv("ULMFIT_ON_CPU_CARD", card)
        results.append(with_gradients(op, inputs))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_clusters_that_are_promised_and_not_granted(monkeypatch):
    """The sums go through L2 instead: the general path gives other bits."""
    if not on_cpu():
        pytest.skip("a made-up card is the CPU's")
    inputs, op, _ = lstm_case(torch.bfloat16, 5, 40, 10, 70, lengths=lengths_of(40, 5))
    monkeypatch.setenv("ULMFIT_ON_CPU_CARD", CARDS["L2"])
    expected = with_gradients(op, inputs)
    monkeypatch.setenv("ULMFIT_ON_CPU_CARD", CARDS["clusters"] + ",90,132,1")
    for way in ("persistent", "auto"):
        monkeypatch.setenv(VARIABLE, way)
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(op, inputs), expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(general(inputs, op), expected, strict=True))


def test_a_plan_in_words(monkeypatch):
    def plan(hidden, backward):
        x = torch.empty(72, 64, 400, dtype=torch.bfloat16, device=checks.DEVICE)
        return torch.ops.ulmfit_fast.lstm_plan(x, hidden, False, backward)

    if not on_cpu():
        assert "multiprocessors with" in plan(1152, True)
        return
    card = "132 multiprocessors with 227 KB, compute capability 9.0, kernels for 9.0; "
    split = "2 x 64 thread blocks of 220 KB, each with 72 columns and 1 x 32 rows, sums in "
    assert plan(1152, False).startswith(card + "2 x 64 thread blocks of ")
    monkeypatch.setenv("ULMFIT_ON_CPU_CARD", "132,227,32")
    assert plan(1152, True) == card + split + "clusters; 32 clusters of such blocks run at once"
    monkeypatch.setenv("ULMFIT_ON_CPU_CARD", "132,227,31")
    assert plan(1152, True).endswith("sums in L2; 31 clusters of such blocks run at once")
    assert plan(9999, True).startswith(card + "no split of W_hh for H = 9999 and batch 64 fits")
    with pytest.raises(RuntimeError, match="lstm_plan: hidden must be 1 or more, got 0"):
        plan(0, True)


def test_one_upstream_gradient_of_another_layout():
    """A gradient of y alone, expanded over time and batch."""
    x, h0, c0, *weights = [t.requires_grad_() for t in lstm_case(torch.bfloat16)[0]]
    results = {}
    for way in ("persistent", "general"):
        os.environ[VARIABLE] = way
        y, _, _ = uf.lstm(x, h0, c0, *weights, weight_p=0.5, seed=3)
        results[way] = torch.autograd.grad(y.sum(), [x, h0, c0, *weights])
    for a, b in zip(results["persistent"], results["general"], strict=True):
        assert_near(a, b, torch.bfloat16, FACTOR)


def test_no_steps_and_no_sequences():
    for time, batch in ((0, 3), (4, 0)):
        inputs, op, _ = lstm_case(torch.bfloat16, time, batch)
        results = with_gradients(op, inputs)
        assert all(torch.equal(a, b) for a, b in zip(results, general(inputs, op), strict=True))


def test_says_why_it_cannot(monkeypatch):
    def refused(dtype, hidden, words):
        inputs, op, _ = lstm_case(dtype, 1, 1, 1, hidden)
        with pytest.raises(RuntimeError, match=rf"{VARIABLE}=persistent, but .*{words}"):
            op(*inputs)
        monkeypatch.setenv(VARIABLE, "auto")
        results = with_gradients(op, inputs)
        monkeypatch.setenv(VARIABLE, "persistent")
        assert all(torch.equal(a, b) for a, b in zip(results, general(inputs, op), strict=True))

    refused(torch.float64, 20, "for bfloat16, float16 and float32")
    refused(torch.float32, 20, r"float32 needs TF32, .* torch.set_float32_matmul_precision\('high'\)")
    if on_cpu():
        monkeypatch.setenv("ULMFIT_ON_CPU_CARD", "2,99")
        refused(torch.bfloat16, 300, "H = 300 and batch 1 fits 2 multiprocessors with 99 KB")
        monkeypatch.setenv("ULMFIT_ON_CPU_CARD", "132,227,0,75")
        refused(torch.bfloat16, 20, "compiled for compute capability 7.5: .* TORCH_CUDA_ARCH_LIST")
        monkeypatch.setenv("ULMFIT_ON_CPU_CARD", "132,227,32,90,1")
        refused(torch.bfloat16, 20, "this context may use fewer multiprocessors than the device says")
    else:
        refused(torch.bfloat16, 4096, "H = 4096 and batch 1 fits")


def test_the_default_is_the_general_path(monkeypatch):
    """For which any dtype will do; and another word is refused."""
    inputs, op, _ = lstm_case(torch.float32)
    for word in ("general", ""):
        monkeypatch.setenv(VARIABLE, word)
        op(*inputs)
    monkeypatch.delenv(VARIABLE)
    op(*inputs)
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(RuntimeError, match=f"{VARIABLE} must be general, auto or persistent, got fast"):
        op(*inputs)


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_length_is_refused(backward):
    """As by the general path: on a GPU a device-side assertion, which ends the process."""
    code = (
        "import sys, torch, ulmfit_fast as uf; d = sys.argv[1]; o = dict(dtype=torch.bfloat16, device=d);"
        "z = lambda *s: torch.zeros(*s, **o); n = torch.tensor([9], device=d);"
        "y = torch.ops.ulmfit_fast.lstm(z(2, 1, 4), z(1, 8), z(1, 8), z(32, 4), z(32, 8), None, None, n,"
        " *[torch.tensor(0, device=d)] * 2, 0.0, 0.0, False, False, False, True); print(y[0].sum().item())"
    )
    if backward:  # of what forward made of a right one
        code = code.replace("[9]", "[2]") + (
            "; n.fill_(9); g = torch.ops.ulmfit_fast.lstm_backward(y[0], None, None, None, z(2, 1, 4),"
            " z(1, 8), z(1, 8), z(32, 4), z(32, 8), n, *[torch.tensor(0, device=d)] * 2, y[0], y[4], y[5],"
            " 0.0, 0.0, False, True, False, True, True); print(g[0].sum().item())"
        )
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code, str(checks.DEVICE)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "lengths must be in 0..T" in done.stderr + done.stdout


def test_the_way_back_is_what_it_was_on_the_way_forward(tf32):
    """Torch's setting changes in between."""
    leaves = [t.requires_grad_() for t in lstm_case(torch.float32)[0]]
    results = []
    for setting in ("high", "highest"):
        torch.set_float32_matmul_precision("high")
        y = uf.lstm(*leaves, weight_p=0.5, seed=3)[0]
        torch.set_float32_matmul_precision(setting)
        results.append(torch.autograd.grad(y.sum(), leaves[1:3]))  # dh0, dc0: of the recurrence alone
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_float32_in_tf32_beside_float32(tf32):
    """What is given back has float32's bits, and is as near to the general path's as TF32 makes it."""
    inputs, op, _ = lstm_case(torch.float32, 6, 20, 10, 70)
    for a, b in zip(op(*inputs), general(inputs, op), strict=False):
        bits = a.view(torch.int32) & 0x1FFF
        assert (bits != 0).float().mean() > 0.9
        assert_near(a, b, ROUNDED[torch.float32], factor(torch.float32))
