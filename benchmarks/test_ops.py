"""Every op beside its wiring in stock torch, forward and forward + backward: `pytest benchmarks`.

Small sizes, about a minute: pytest-benchmark measures one side after the other, so that a machine whose
speed drifts favours one of them. Quoted figures come from the programs, whose sides take turns.
"""

import pytest
import torch
import torch.nn.functional as F

import ulmfit_fast as uf
from ulmfit_fast.stock import dropout_mask

from .lstm import stock_lstm

pytest.importorskip("pytest_benchmark")

B, T, INPUTS, H, V, E = 16, 32, 200, 576, 10000, 200
P = 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def lstm(dtype):
    """A layer with DropConnect; -> ({side: forward}, the tensors that get gradients)."""
    weights = [w.detach().to(dtype).requires_grad_() for w in torch.nn.LSTM(INPUTS, H).parameters()]
    x = torch.randn(T, B, INPUTS).to(dtype).requires_grad_()
    h0 = torch.zeros(B, H, dtype=dtype)
    w_ih, w_hh, *biases = weights
    return {
        "ours": lambda: uf.lstm(x, h0, h0, *weights, weight_p=P, seed=1)[0],
        "torch": lambda: stock_lstm(x, h0, w_ih, F.dropout(w_hh, P), *biases),
    }, [x, *weights]


def linear_cross_entropy(dtype):
    h = torch.randn(B * T, E).to(dtype).requires_grad_()
    weight = (torch.randn(V, E) / 20).to(dtype).requires_grad_()
    bias = torch.zeros(V, dtype=dtype).requires_grad_()
    target = torch.randint(V, (B * T,))
    return {
        "ours": lambda: uf.linear_cross_entropy(h, weight, bias, target),
        "torch": lambda: F.cross_entropy(F.linear(h, weight, bias), target),
    }, [h, weight, bias]


def embedding_dropout(dtype):
    weight, ids = torch.randn(V, E).to(dtype).requires_grad_(), torch.randint(V, (B, T))
    return {
        "ours": lambda: uf.embedding_dropout(weight, ids, P, seed=1),
        "torch": lambda: F.embedding(ids, weight * dropout_mask(weight, (V, 1), P)),
    }, [weight]


def variational_dropout(dtype):
    x = torch.randn(B, T, H).to(dtype).requires_grad_()
    return {
        "ours": lambda: uf.variational_dropout(x, P, seed=1),
        "torch": lambda: x * dropout_mask(x, (B, 1, H), P),
    }, [x]


def concat_pool(dtype):
    out, lengths = torch.randn(B, T, E).to(dtype).requires_grad_(), torch.arange(1, B + 1) * T // B
    padded = (torch.arange(T) >= lengths[:, None])[:, :, None]

    def stock():
        mean = out.masked_fill(padded, 0).sum(1) / lengths[:, None].to(dtype)
        largest = out.masked_fill(padded, -float("inf")).amax(1)
        return torch.cat([out[torch.arange(B), lengths - 1], largest, mean], 1)

    return {"ours": lambda: uf.concat_pool(out, lengths), "torch": stock}, [out]


def mask(dtype):
    like = torch.empty(0, dtype=dtype)
    return {
        "ours": lambda: uf.dropout_mask(1, (4 * H, H), P, dtype=dtype),
        "torch": lambda: dropout_mask(like, (4 * H, H), P),
    }, []


OPS = {
    "lstm": lstm,
    "linear_cross_entropy": linear_cross_entropy,
    "embedding_dropout": embedding_dropout,
    "variational_dropout": variational_dropout,
    "concat_pool": concat_pool,
    "dropout_mask": mask,
}
CASES = [
    (op, d)
    for op in OPS
    for d in ("forward", "forward+backward")
    if (op, d) != ("dropout_mask", "forward+backward")
]


@pytest.mark.parametrize("side", ["torch", "ours"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, direction", CASES)
def test_op(benchmark, op, direction, dtype, side):
    benchmark.group = f"{op} {dtype} {direction}"
    torch.manual_seed(0)
    sides, tensors = OPS[op](DTYPES[dtype])
    forward = sides[side]
    gradient = torch.ones_like(forward().detach())

    def both():
        torch.autograd.grad(forward(), tensors, gradient)

    call = both if direction == "forward+backward" else forward
    benchmark.pedantic(call, rounds=5, warmup_rounds=1, iterations=1)
