"""float32 products: strict unless "high" is asked for, and then never worse than three bfloat16 ones.

On CUDA torch's own switch for TF32 decides alone, and without it products are strict.
"""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from checks import DEVICE, linear_cross_entropy_case, lstm_case, with_gradients

import ulmfit_fast as uf
from ulmfit_fast.ops._common import allows_high

# Each operand is two bfloat16 numbers, 2^-9 * 2^-9 of it lost; the product's error, a few layers of sums on.
HIGH = 2e-5


@pytest.fixture
def high():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def lstm(precision=None):
    return lambda *inputs: uf.lstm(*inputs, weight_p=0.3, seed=5, precision=precision)


def loss(target, precision=None):
    return lambda h, w, b: (uf.linear_cross_entropy(h, w, b, target, precision=precision),)


def assert_within_high(ours, inputs, function):
    exact = with_gradients(function, [t.double() for t in inputs])
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).norm() <= HIGH * b.norm() + 1e-12


# (T, B, I, H): edges of the 16-row, 32-deep, 64-column tiles, and batches above a block of rows
@pytest.mark.parametrize(
    "shape", [(5, 3, 7, 33), (4, 7, 20, 100), (2, 17, 40, 64), (3, 48, 64, 48), (2, 150, 5, 20), (1, 1, 5, 4)]
)
def test_lstm(shape):
    inputs, _, _ = lstm_case(torch.float32, *shape)
    assert_within_high(with_gradients(lstm("high"), inputs), inputs, lstm())


@pytest.mark.parametrize("rows, features, words", [(9, 21, 50), (130, 40, 333), (600, 33, 100)])
def test_linear_cross_entropy(rows, features, words):
    inputs, _, _ = linear_cross_entropy_case(torch.float32, (rows,), features, words)
    target = torch.arange(rows, device=DEVICE) % words
    assert_within_high(with_gradients(loss(target, "high"), inputs), inputs, loss(target))


def test_follows_torch(high):
    inputs, _, _ = lstm_case(torch.float32, batch=20)
    for a, b in zip(with_gradients(lstm(), inputs), with_gradients(lstm("high"), inputs), strict=True):
        assert torch.equal(a, b)


def test_on_cuda_torchs_switch_decides(high):
    """Alone: what the persistent recurrence may do in TF32 is what torch's products do."""
    value = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    for setting, allowed in (("high", True), ("highest", False)):
        torch.set_float32_matmul_precision(setting)
        assert allows_high("lstm", None, value) == allows_high("lstm", "high", value) == allowed


@pytest.mark.parametrize("backend, setting", [("cuda", "tf32"), ("mkldnn", "bf16"), ("mkldnn", "tf32")])
def test_torchs_newer_setting_is_understood(backend, setting):
    """In a process of its own: once it is used, torch.get_float32_matmul_precision raises for good."""
    code = f"""
import torch, ulmfit_fast as uf
from types import SimpleNamespace
from ulmfit_fast.ops._common import allows_high
torch.backends.{backend}.matmul.fp32_precision = "{setting}"
for device in ("cuda", "cpu"):
    value = SimpleNamespace(dtype=torch.float32, device=torch.device(device))
    assert allows_high("lstm", None, value) == ((device == "cuda") == ("{backend}" == "cuda")), device
rnn, x = uf.WeightDropLSTM(4, 8), torch.randn(3, 2, 4)
rnn(x)[0].sum().backward()
torch.compile(rnn, fullgraph=True, backend="aot_eager")(x)[0].sum().backward()
rnn.bfloat16()(x.bfloat16())[0].sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.cpu_only("CUDA follows torch's TF32 switch: test_cuda.py")
def test_strict_unless_asked(high):
    inputs, _, _ = lstm_case(torch.float32, batch=20)
    strict = with_gradients(lstm("highest"), inputs)
    torch.set_float32_matmul_precision("highest")
    for a, b in zip(with_gradients(lstm(), inputs), strict, strict=True):
        assert torch.equal(a, b)


def test_compiled_function_follows_a_changed_setting(high):
    inputs, _, _ = lstm_case(torch.float32, batch=20)
    compiled = torch.compile(lstm(), fullgraph=True, backend="aot_eager")
    for setting in ("high", "highest"):
        torch.set_float32_matmul_precision(setting)
        for a, b in zip(with_gradients(compiled, inputs), with_gradients(lstm(), inputs), strict=True):
            assert torch.equal(a, b)


def test_other_dtypes_are_untouched(high):
    for dtype in (torch.float64, torch.bfloat16):
        inputs, _, _ = lstm_case(dtype, batch=20)
        for a, b in zip(with_gradients(lstm(), inputs), with_gradients(lstm("highest"), inputs), strict=True):
            assert torch.equal(a, b)
