"""schedules.py against the formulas they come from."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulmfit_fast import schedules
from ulmfit_fast.schedules import Phase

pytestmark = pytest.mark.cpu_only("pure functions")


def test_stlr_is_the_papers_formula():
    T, top, cut_frac, ratio = 1000, 0.01, 0.1, 32
    cut = math.floor(T * cut_frac)
    for t in range(T):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        assert schedules.stlr(t, T, top, cut_frac, ratio) == pytest.approx(
            top * (1 + p * (ratio - 1)) / ratio
        )
    assert schedules.stlr(0, T, top) == pytest.approx(top / 32)
    assert schedules.stlr(100, T, top) == pytest.approx(top)


@given(st.integers(1, 500), st.floats(0, 1), st.floats(1e-5, 10))
def test_rates_stay_between_the_bounds(T, cut, top):
    for t in {0, T // 3, T - 1}:
        assert top / 32 * 0.999 <= schedules.stlr(t, T, top, cut) <= top * 1.001
        assert 0 < schedules.one_cycle(t, T, top, pct_start=cut) <= top * 1.001


def test_one_cycle():
    rates = [schedules.one_cycle(t, 400, 1.0) for t in range(400)]
    assert rates[0] == pytest.approx(1 / 25) and rates[100] == pytest.approx(1.0)
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize("t", [-1, 10, 11])
def test_a_step_outside_is_refused(t):
    for schedule in (schedules.stlr, schedules.one_cycle):
        with pytest.raises(ValueError, match="t must be a step from 0 to T - 1 = 9"):
            schedule(t, 10, 1.0)


def test_discriminative_rates():
    assert schedules.discriminative_lrs(1.0, 3) == pytest.approx([1 / 2.6**2, 1 / 2.6, 1.0])
    assert schedules.discriminative_lrs(0.5, 2, factor=1) == [0.5, 0.5]
    with pytest.raises(ValueError, match="n_groups must be at least 1"):
        schedules.discriminative_lrs(1.0, 0)


def test_plans():
    assert schedules.head_first_plan(1, 5, 4) == [Phase(1, 1), Phase(5, 4)]
    assert schedules.head_first_plan(0, 5, 4) == [Phase(5, 4)]
    assert schedules.gradual_unfreezing_plan(8, 5) == [
        Phase(1, 1),
        Phase(1, 2),
        Phase(1, 3),
        Phase(1, 4),
        Phase(4, 5),
    ]
    assert schedules.gradual_unfreezing_plan(1, 5) == [Phase(1, 5)]
    assert schedules.gradual_unfreezing_plan(3, 5, gradual=False) == [Phase(3, 5)]


@given(st.integers(1, 12), st.integers(1, 6))
def test_unfreezing_never_refreezes_and_ends_with_all(epochs, n_groups):
    plan = schedules.gradual_unfreezing_plan(epochs, n_groups)
    trainable = [phase.n_trainable for phase in plan]
    assert sum(phase.epochs for phase in plan) == epochs
    assert trainable == sorted(trainable) and trainable[-1] == n_groups
