"""A decoder's logits by the library's own products: against torch's, and when they are left to torch."""

import copy
import io

import pytest
import torch
from checks import (
    DTYPES,
    ISA_CASES,
    assert_near,
    assert_same_for_all_thread_counts,
    check_case,
    logits_case,
)
from torch import nn

import ulmfit_fast as uf
from ulmfit_fast.ops._logits import logits

pytestmark = pytest.mark.cpu_only("on CUDA logits are torch's own")


def factor(dtype):
    return 32 if dtype in (torch.float64, torch.float32) else 2  # long sums; two roundings


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, features, words",
    [(1, 1, 1), (1, 400, 130), (7, 33, 65), (64, 20, 40), (65, 20, 40), (400, 33, 700)],
)
def test_against_reference(dtype, rows, features, words):
    check_case(logits_case(dtype, rows, features, words), dtype, factor(dtype))


@pytest.mark.parametrize("rows", [5, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights(dtype, rows):
    check_case(logits_case(dtype, rows, weight_dtype=torch.float32), dtype, factor(dtype))


@pytest.mark.parametrize("name", ["logits", "logits_packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa(isa_results, name, dtype):
    check_case(ISA_CASES[name](dtype), dtype, factor(dtype), isa_results[f"{name}-{dtype}"])


@pytest.mark.parametrize("rows", [30, 300])
def test_every_thread_count(rows):
    inputs, op, _ = logits_case(torch.float32, rows)
    assert_same_for_all_thread_counts(lambda: op(*inputs))


@pytest.fixture
def decoder():
    torch.manual_seed(1)
    return nn.Linear(20, 50)


@pytest.fixture
def calls(monkeypatch):
    """How often the library's op was called."""
    from ulmfit_fast.ops import _logits

    count, op = [], torch.ops.ulmfit_fast.logits
    fake = lambda *arguments: count.append(1) or op(*arguments)  # noqa: E731
    monkeypatch.setattr(_logits.torch.ops.ulmfit_fast, "logits", fake, raising=False)
    return count


@torch.no_grad()
def test_every_shape_and_stride(decoder, calls):
    for h in (
        torch.randn(20),
        torch.randn(3, 0, 20),
        torch.randn(2, 3, 20),
        torch.randn(2, 20, 4).mT,
        torch.randn(1, 20).expand(5, 20),
    ):
        assert_near(logits(decoder, h), decoder.double()(h.double()), torch.float32, 32, str(h.shape))
        decoder.float()
    assert len(calls) == 5


def test_left_to_torch_where_something_else_is_wanted(decoder, calls):
    h = torch.randn(3, 20)
    seen = []
    with torch.no_grad():
        hooked = copy.deepcopy(decoder)
        hooked.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(logits(hooked, h), decoder(h)) and seen
        patched = copy.deepcopy(decoder)
        patched.forward = lambda x: seen.append(2) or decoder(x)
        assert torch.equal(logits(patched, h), decoder(h)) and seen[-1] == 2
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            logits(decoder, torch.randn(3, 21))
        with pytest.raises(RuntimeError, match="dtype"):
            logits(decoder, h.bfloat16())  # fp32 weights, and no autocast
    _, tangent = torch.func.jvp(lambda x: logits(decoder, x), (h,), (torch.ones_like(h),))
    torch.testing.assert_close(tangent[0], decoder.weight.sum(1))
    logits(decoder, h).sum().backward()
    assert decoder.weight.grad is not None
    assert not calls


@torch.no_grad()
def test_traced_by_fx(decoder, calls):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, h):
            return logits(self.decoder, h)

    h = torch.randn(3, 20)
    assert torch.equal(torch.fx.symbolic_trace(Head())(h), decoder(h)) and not calls


@torch.no_grad()
def test_autocast(decoder, calls):
    h = torch.randn(3, 20)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = logits(decoder, h), decoder(h)
    assert out.dtype == expected.dtype == torch.bfloat16 and calls
    assert_near(out, decoder.double()(h.double()), torch.bfloat16, 2, "bf16")


@torch.no_grad()
def test_a_language_model_uses_them(calls):
    lm = uf.LanguageModel(uf.AWDLSTM(30, 8, 10, 2)).eval()
    ids = torch.randint(30, (2, 5))
    out = lm(ids)
    assert len(calls) == 1
    lm.reset()
    torch.testing.assert_close(lm[1].decoder(lm[0](ids)), out)
    lm.reset()
    exported = torch.export.export(lm, (ids,))
    assert "ulmfit_fast.logits" not in str(exported.graph)
    torch.jit.save(torch.jit.trace(lm, ids, check_trace=False), io.BytesIO())
