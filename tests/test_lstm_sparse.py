"""The LSTM's recurrent products that leave out what DropConnect drops, which AVX-512 has for float32."""

import pytest
import torch
from checks import (
    DTYPES,
    ISA_CASES,
    assert_same_for_all_thread_counts,
    check_case,
    lstm_case,
    with_gradients,
)
from test_lstm import factor

import ulmfit_fast as uf

pytestmark = pytest.mark.cpu_only("the CPU's products")
LONG = (1.0, 1.0)  # of the longest, evenly from the first to the second
SPREAD, FEW_LONG = (0.2, 1.0), (0.1, 0.3)


def lengths_of(batch, time, shares):
    """The first sequence is the longest."""
    low, high = shares
    return (time, *(round(time * (low + (high - low) * i / batch)) for i in range(1, batch)))


def leaves_out(batch, hidden=256, weight_p=0.99, time=10, lengths=None):
    """Whether a NaN in h0 reaches only those units that have a weight to it, not all.

    A product with every weight makes NaNs of all, as 0 * NaN is one.
    """
    x, h0, *others = lstm_case(torch.float32, time, batch, 3, hidden)[0]
    h0 = h0.clone()
    h0[0, 0] = float("nan")
    lengths = None if lengths is None else torch.tensor(lengths)
    first = uf.lstm(x, h0, *others, weight_p=weight_p, seed=1, lengths=lengths)[0][0, 0]
    return not first.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa(isa_results, dtype):
    case = ISA_CASES["lstm_sparse"](dtype)
    check_case(case, dtype, factor(dtype), isa_results[f"lstm_sparse-{dtype}"])


@pytest.mark.parametrize("weight_p", [0.4, 0.97, 1 - 1e-9])  # the last leaves nothing
@pytest.mark.parametrize(
    ("time", "batch", "shares"), [(2, 32, None), (2, 150, None), (5, 80, SPREAD), (1, 64, None)]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_against_reference_and_on_every_thread_count(weight_p, time, batch, shares, reverse):
    lengths = shares and lengths_of(batch, time, shares)
    case = lstm_case(torch.float32, time, batch, 9, 258, weight_p=weight_p, reverse=reverse, lengths=lengths)
    check_case(case, torch.float32, factor(torch.float32), floor=0.5)
    assert_same_for_all_thread_counts(lambda: with_gradients(case[1], case[0]), (1, 2, 3, 13))


@pytest.mark.parametrize("batch", [32, 48, 64, 65, 72, 192])
@pytest.mark.parametrize("hidden", [256, 1153])
def test_a_dropped_nan_is_no_zero(batch, hidden):
    x, h0, c0, w_ih, w_hh, *biases = lstm_case(torch.float32, 2, batch, 5, hidden)[0]
    dropped = uf.dropout_mask(1, w_hh.shape, 0.5)[0] == 0
    w_hh = w_hh.clone()
    w_hh[0, dropped] = float("nan")
    y, _, _ = uf.lstm(x, h0, c0, w_ih, w_hh, *biases, weight_p=0.5, seed=1)
    assert y[0, :, 0].isnan().all() and not y[0, :, 1:].isnan().any()


@pytest.mark.skipif(not uf.info().isa.startswith(("avx512", "amx")), reason="AVX-512's registers")
def test_where_it_is_used():
    """Where it was faster when it was measured."""
    assert all(leaves_out(batch) for batch in (32, 48, 64, 72, 128))
    assert not any(leaves_out(batch) for batch in (1, 16, 31, 33, 65))  # vectors of 16 rows, not full
    assert leaves_out(64, hidden=300) and not leaves_out(64, hidden=255)
    assert not leaves_out(64, weight_p=0.2, hidden=256)
    assert leaves_out(64, lengths=lengths_of(64, 10, LONG))
    assert leaves_out(64, lengths=lengths_of(64, 10, SPREAD))
    assert not leaves_out(64, lengths=lengths_of(64, 10, FEW_LONG))  # most steps have one row
