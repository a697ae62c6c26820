"""dropout_mask: the bits of the definition, its statistics, and what its seed governs."""

import pytest
import torch
from checks import DEVICE, DTYPES, assert_same_for_all_thread_counts, random_state

import ulmfit_fast as uf
from ulmfit_fast import reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(), (1,), (15,), (16, 4), (65,), (3, 0, 2), (7, 11, 13), (2048,), (2049,), (70000,)]
)
def test_bits(dtype, shape):
    for seed, p in ((0, 0.5), (-1, 0.1), (2**62 + 5, 0.999), (3, 0.0)):
        expected = reference.dropout_mask(seed, shape, p, dtype=dtype, device=DEVICE)
        assert torch.equal(uf.dropout_mask(seed, shape, p, dtype=dtype, device=DEVICE), expected)


def test_bits_for_any_shape_seed_and_p():
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies

    @hypothesis.given(
        some.lists(some.integers(0, 40), max_size=3),
        some.integers(-(2**63), 2**63 - 1),
        some.floats(0, 1, exclude_max=True),
    )
    def check(shape, seed, p):
        expected = reference.dropout_mask(seed, tuple(shape), p, device=DEVICE)
        assert torch.equal(uf.dropout_mask(seed, shape, p, device=DEVICE), expected)

    check()


@pytest.mark.cpu_only("instruction sets")
def test_bits_for_every_isa(isa_results):
    for seed, mask in zip((0, -1, 2**40 + 3), isa_results["mask"], strict=True):
        assert torch.equal(mask, reference.dropout_mask(seed, (5, 1001), 0.37))


@pytest.mark.cpu_only("thread counts")
def test_bits_for_every_thread_count():
    assert_same_for_all_thread_counts(lambda: [uf.dropout_mask(4, (100_003,), 0.3)])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_statistics(p):
    n = 1_000_000
    dropped = uf.dropout_mask(12345, (n,), p, device=DEVICE) == 0
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(dropped.double().mean().item() - p) < 5 * sigma
    centred = dropped.double() - p
    for lag in (1, 2, 15, 16, 17, 32, 48, 63, 64, 65, 1024, 1152):  # lanes, words, groups, a row of H = 1152
        correlation = (centred[lag:] * centred[:-lag]).mean().item()
        assert abs(correlation) < 5 * p * (1 - p) / n**0.5, f"elements {lag} apart are correlated"
    # the numbers dropped among the 64 elements of a group have a binomial's variance
    counts = dropped.reshape(-1, 64).double().sum(1)
    assert counts.var().item() == pytest.approx(64 * p * (1 - p), rel=0.05)


def test_neighbouring_seeds_are_independent():
    masks = [uf.dropout_mask(s, (200_000,), 0.5, device=DEVICE) == 0 for s in (7, 8, 7 + 2**32)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = (masks[a] == masks[b]).double().mean().item()
        assert abs(same - 0.5) < 5 * 0.5 / 200_000**0.5


def test_a_kept_element_is_scaled_by_one_over_one_minus_p():
    mask = uf.dropout_mask(0, (1000,), 0.3, dtype=torch.float64, device=DEVICE)
    assert set(mask.tolist()) == {0.0, 1 / 0.7}
    assert uf.dropout_mask(0, (1000,), 0.0, device=DEVICE).eq(1).all()


def test_manual_seed_governs():
    def draw():
        return uf.dropout_mask(None, (100,), 0.5, device=DEVICE)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(first, draw()) and torch.equal(second, draw()) and not torch.equal(first, second)


def test_p_zero_draws_nothing():
    ones, ids = torch.ones(2, 2, device=DEVICE), torch.tensor([1], device=DEVICE)
    state = random_state()
    uf.dropout_mask(None, (100,), 0.0, device=DEVICE)
    uf.variational_dropout(ones, 0.0)
    uf.embedding_dropout(ones, ids, 0)
    assert torch.equal(state, random_state())


def test_seed_as_a_tensor_and_device():
    mask = uf.dropout_mask(torch.tensor(5, device=DEVICE), (9,), 0.5)
    assert mask.device == DEVICE and torch.equal(mask, uf.dropout_mask(5, 9, 0.5, device=DEVICE))
    assert uf.dropout_mask(5, (9,), 0.5, device="meta").device.type == "meta"


def test_opcheck():
    op = torch.ops.ulmfit_fast.dropout_mask.default
    seed = torch.tensor(3, device=DEVICE)
    torch.library.opcheck(op, (seed, [4, 5], 0.5, torch.bfloat16))
    torch.library.opcheck(op, (seed, [0], 0.0))


def test_compile():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(seed, n, p):
        return uf.dropout_mask(seed, (n, 3), p, device=DEVICE)

    for seed, n, p in ((1, 4, 0.5), (2**53 + 1, 5, 0.25), (-9, 6, 0.75)):
        expected = uf.dropout_mask(seed, (n, 3), p, device=DEVICE)
        assert torch.equal(compiled(seed, n, p), expected)
