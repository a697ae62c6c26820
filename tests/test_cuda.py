"""The CUDA ops beside the CPU's: the same masks to the bit, the same numbers to rounding, for every op.

These tests run wherever there is a GPU, whatever --device says.  What the ops do with streams, graphs and
memory is in test_cuda_runtime.py.
"""

import checks
import numpy as np
import pytest
import torch
from checks import (
    DTYPES,
    ISA_CASES,
    assert_near,
    check_case,
    concat_pool_case,
    embedding_dropout_case,
    linear_cross_entropy_case,
    lstm_case,
    randn,
    variational_dropout_case,
    with_gradients,
)

import ulmfit_fast as uf
from ulmfit_fast import reference

pytestmark = pytest.mark.usefixtures("cuda")

SEEDS = (0, 5, 2**32 + 7, 2**62 + 5, -1, -(2**63))
LOW = (torch.bfloat16, torch.float16)
RAGGED = (5, 0, 3)
# As in the ops' own files; in fp64 the CPU op, which stands for the truth, has an error of that size too.
FACTORS = {"variational_dropout": 1, "embedding_dropout": 3, "concat_pool": 2}


def factor(name, dtype):
    few = 2 if dtype in LOW else 32
    return FACTORS.get(name, few) * (2 if dtype == torch.float64 else 1)


def cpu_in_fp64(make, like):
    """Outputs and gradients of the CPU op in fp64, of the numbers that `make` gives the CUDA op."""
    with checks.on("cpu"):
        inputs, op, _ = make()
        return with_gradients(op, [t.double() for t in inputs], like=like)


def check_beside_the_cpu(name, dtype, make, floor=0.0):
    inputs, op, _ = make()
    results = with_gradients(op, inputs)
    for i, (a, e) in enumerate(zip(results, cpu_in_fp64(make, results), strict=True)):
        assert a.device == checks.DEVICE
        assert_near(a, e, dtype, factor(name, dtype), f"result {i}", floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (63,), (65,), (16, 4), (3, 0, 2), (7, 11, 13), (70_001,)])
def test_masks_are_the_cpus(cuda, dtype, shape):
    for seed in SEEDS:
        for p in (0.0, 0.1, 0.5, 0.999):
            mask = uf.dropout_mask(seed, shape, p, dtype=dtype, device=cuda)
            assert mask.device == cuda
            assert torch.equal(mask.cpu(), uf.dropout_mask(seed, shape, p, dtype=dtype, device="cpu"))
            there = torch.tensor(seed, device=cuda)
            assert torch.equal(uf.dropout_mask(there, shape, p, dtype=dtype), mask)


def test_a_mask_of_more_elements_than_32_bits_count(cuda):
    first, n = 2**31, 1000  # a whole number of groups, and what lies beyond
    if torch.cuda.mem_get_info(cuda)[0] < 6e9:
        pytest.skip("needs 6 GB on the GPU")
    mask = uf.dropout_mask(3, (first + n,), 0.5, dtype=torch.bfloat16, device=cuda)[first:].cpu()
    groups = -(-n // reference.GROUP)
    lanes = first // 4 + np.arange(groups * reference.LANES, dtype=np.uint64)
    counter = np.stack([lanes, np.zeros_like(lanes), np.zeros_like(lanes), np.zeros_like(lanes)])
    words = reference.philox4x32(counter, (3, 0)).reshape(4, groups, reference.LANES).transpose(1, 0, 2)
    assert torch.equal(mask != 0, torch.from_numpy(words.reshape(-1)[:n] >= 2**31))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_dropouts_of_ones_are_the_cpus(cuda, dtype, seed):
    def dropped():
        ones, ids = torch.ones(3, 4, 130, dtype=dtype, device=checks.DEVICE), torch.arange(3).repeat(5)
        return (
            uf.variational_dropout(ones, 0.4, seed=seed),
            uf.variational_dropout(ones, 0.4, seed=seed, batch_first=False),
            uf.embedding_dropout(ones[:, 0], ids.to(checks.DEVICE), 0.4, seed=seed),
        )

    here = dropped()
    with checks.on("cpu"):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(here, dropped(), strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_dropconnect_drops_what_the_cpu_drops(seed):
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = lstm_case(torch.float32)[0]
    w_hh.requires_grad_()
    y, _, _ = uf.lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, weight_p=0.3, seed=seed)
    y.sum().backward()
    assert torch.equal(w_hh.grad.cpu() != 0, uf.dropout_mask(seed, w_hh.shape, 0.3, device="cpu") != 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ISA_CASES)
def test_results_are_the_cpus(name, dtype):
    check_beside_the_cpu(name, dtype, lambda: ISA_CASES[name](dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, RAGGED])
def test_lstm_layouts_directions_and_lengths(dtype, batch_first, reverse, lengths):
    options = {"batch_first": batch_first, "reverse": reverse, "lengths": lengths}
    options["dropout_p"] = 0.4 if reverse else None
    check_beside_the_cpu("lstm", dtype, lambda: lstm_case(dtype, **options))


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("hidden", [33, 100, 400, 1150, 1152])
def test_lstm_of_ulmfits_sizes_in_bfloat16(hidden, batch):
    lengths = tuple(4 - (i % 4 == 1) for i in range(batch))
    case = lstm_case(torch.bfloat16, 4, batch, 48, hidden, lengths=lengths)
    check_case(case, torch.bfloat16, 2, floor=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 1000, None])
def test_any_number_of_rows_at_once_gives_the_same_loss(dtype, reduction, chunk_rows):
    target = torch.arange(130, device=checks.DEVICE) % 333
    target[::5] = -100
    inputs = [randn(130, 40, dtype=dtype), randn(333, 40, dtype=dtype, scale=0.2), randn(333, dtype=dtype)]
    options = {"reduction": reduction, "label_smoothing": 0.1}

    def op(h, w, b):
        return (uf.linear_cross_entropy(h, w, b, target, chunk_rows=chunk_rows, **options),)

    def ref(h, w, b):
        return (reference.linear_cross_entropy(h, w, b, target, **options),)

    check_case((inputs, op, ref), dtype, 2 if dtype in LOW else 32)


# long enough sums, of many threads each, for an order that changes to change the last bit
REPEATED = {
    "variational_dropout": lambda dtype: variational_dropout_case(dtype, (64, 70, 400)),
    "embedding_dropout": lambda dtype: embedding_dropout_case(dtype, 50, 400, (64, 70)),
    "concat_pool": lambda dtype: concat_pool_case(dtype, 32, 300, 400, tuple(i * 9 for i in range(32))),
    "lstm": lambda dtype: lstm_case(dtype, 20, 64, 100, 256, lengths=tuple(i % 21 for i in range(64))),
    "linear_cross_entropy": lambda dtype: linear_cross_entropy_case(dtype, (2000,), 100, 3000),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REPEATED)
def test_equal_to_the_bit_over_repeated_runs(name, dtype):
    inputs, op, _ = REPEATED[name](dtype)
    first = with_gradients(op, inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(op, inputs), first, strict=True))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["lstm", "linear_cross_entropy"])
def test_autocast_of_float32_weights(name, dtype):
    inputs, op, ref = {
        "lstm": lambda: lstm_case(torch.float32, 4, 6, 20, 48, lengths=(4, 1, 0, 3, 4, 2)),
        "linear_cross_entropy": lambda: linear_cross_entropy_case(torch.float32, (40,), 30, 90),
    }[name]()
    with torch.autocast(checks.DEVICE.type, dtype):
        results = with_gradients(op, inputs)
    assert results[0].dtype == (dtype if name == "lstm" else torch.float32)
    check_case((inputs, op, ref), dtype, 2, results)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_training_with_autocast_and_a_gradient_scaler(dtype):
    device = checks.DEVICE
    lm = uf.LanguageModel(uf.AWDLSTM(50, 16, 24, 2, hidden_p=0.1, input_p=0.1, weight_p=0.2)).to(device)
    ids = (torch.arange(31, device=device) % 10).expand(8, -1)
    optimizer = torch.optim.Adam(lm.parameters(), 0.02)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)

    def loss(low):
        lm.reset()
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=low):
            return lm(ids[:, :-1], ids[:, 1:])

    def gradients(low):
        torch.manual_seed(5)  # the same masks
        scaler.scale(loss(low)[0]).backward()
        scaler.unscale_(optimizer)
        scaler.update()
        return [p.grad.clone() for p in lm.parameters()]

    # a norm's relative error: a few roundings a layer, and their way through the recurrence
    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()
    before = loss(True)[1].item()
    for _ in range(40):
        total, entropy = loss(True)
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
    assert entropy.item() < 0.7 * before  # log 10, the entropy of ten words, is 0.6 of it
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in lm.parameters())


def test_float32_products_follow_torchs_switch(cuda):
    """precision="high" changes nothing, and "highest" is refused where torch's switch makes it untrue."""
    inputs, _, _ = lstm_case(torch.float32, 4, 64, 128, 256)

    def op(precision=None):
        return lambda *t: uf.lstm(*t, weight_p=0.3, seed=5, precision=precision)

    outputs = {}
    try:
        # relative errors of norms: of float32's roundings, and of TF32's 10 bits
        for setting, bound in (("highest", 5e-6), ("high", 4e-3)):
            torch.set_float32_matmul_precision(setting)
            results = with_gradients(op(), inputs)
            others = with_gradients(op("high"), inputs)
            assert all(torch.equal(a, b) for a, b in zip(others, results, strict=True))
            if setting == "high":
                with pytest.raises(ValueError, match="precision='highest' on CUDA"):
                    op("highest")(*inputs)
            else:
                others = with_gradients(op("highest"), inputs)
                assert all(torch.equal(a, b) for a, b in zip(others, results, strict=True))
            exact = with_gradients(op(), [t.double() for t in inputs], like=results)
            for a, b in zip(results, exact, strict=True):
                assert (a.double() - b).norm() <= bound * b.norm()
            outputs[setting] = results[0]
    finally:
        torch.set_float32_matmul_precision("highest")
    if torch.cuda.get_device_capability(cuda) >= (8, 0):  # older ones have no TF32
        assert not torch.equal(outputs["highest"], outputs["high"])


def test_seeds_are_drawn_on_the_device_and_manual_seed_governs(cuda):
    layer = uf.WeightDropLSTM(5, 7, weight_p=0.5, device=cuda)
    x, ids = torch.ones(4, 3, 5, device=cuda), torch.arange(40, device=cuda)
    draws = {
        "dropout_mask": lambda: uf.dropout_mask(None, (1000,), 0.5, device=cuda),
        "variational_dropout": lambda: uf.variational_dropout(x, 0.5),
        "embedding_dropout": lambda: uf.embedding_dropout(torch.ones(40, 2, device=cuda), ids, 0.5),
        "lstm": lambda: uf.lstm(x, None, None, *layer.all_weights[0], weight_p=0.5)[0],
        "WeightDropLSTM": lambda: layer(x)[0],
    }
    for name, draw in draws.items():
        torch.manual_seed(3)
        host, device = torch.get_rng_state(), torch.cuda.get_rng_state(cuda)
        first, second = draw(), draw()
        assert torch.equal(torch.get_rng_state(), host), f"{name} drew on the CPU"
        assert not torch.equal(torch.cuda.get_rng_state(cuda), device), name
        torch.manual_seed(3)
        assert torch.equal(draw(), first) and torch.equal(draw(), second), name
        assert not torch.equal(first, second), name


def test_info_names_the_gpu(cuda):
    facts = uf.info()
    assert facts.cuda_built and facts.architectures and len(facts.gpus) == torch.cuda.device_count()
    assert torch.cuda.get_device_name(cuda) in facts.gpus[cuda.index]
    assert not [sentence for sentence in facts.missing if "compute capability" in sentence]
