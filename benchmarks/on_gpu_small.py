"""Every op forward and backward on the GPU at small sizes, for tools that watch memory and are slow.

    compute-sanitizer --tool memcheck python -m benchmarks.on_gpu_small --layers

Ends with an error where a result is not finite. The tests check the values.
"""

import argparse

import torch

import ulmfit_fast as uf

from . import gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(3, 2, 5, 7), (4, 9, 33, 40), (2, 17, 64, 130)]  # T, B, I, H: odd, aligned and neither
LAYERS = [(3, 64, 400, 1152), (2, 64, 1152, 1152), (2, 20, 1152, 400)]  # the preset's, few steps
P = 0.4


def draw(*shape, dtype, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_()


def lstm(sizes, dtype):
    """Both layouts, both directions, with and without lengths, biases, dropouts and a gradient of h_n."""
    steps, batch, inputs, hidden = sizes
    weights = [draw(4 * hidden, n, dtype=dtype, scale=0.1) for n in (inputs, hidden)]
    biases = [draw(4 * hidden, dtype=dtype) for _ in range(2)]
    state = [draw(batch, hidden, dtype=dtype) for _ in range(2)]
    lengths = torch.arange(batch, device=DEVICE) % (steps + 1)
    for batch_first, reverse, some, bias, p in [
        (False, False, None, biases, P),
        (True, False, None, biases, P),
        (True, True, lengths, [], 0.0),
        (False, True, lengths, biases, P),
    ]:
        x = draw(*((batch, steps) if batch_first else (steps, batch)), inputs, dtype=dtype)
        options = dict(weight_p=p, seed=3, batch_first=batch_first, reverse=reverse, lengths=some)
        for results in (slice(3), slice(1)):  # a gradient of the last state too, or of y alone
            yield uf.lstm(x, *state, *weights, *bias, **options)[results], [x, *state, *weights, *bias]
        yield uf.lstm(x, *state, *weights, *bias, **options, dropout_p=P), [x, *state, *weights, *bias]


def linear_cross_entropy(sizes, dtype):
    steps, batch, inputs, words = sizes
    h = draw(steps, batch, inputs, dtype=dtype)
    weight, bias = draw(words, inputs, dtype=dtype, scale=0.1), draw(words, dtype=dtype)
    target = torch.randint(words, (steps, batch), device=DEVICE)
    target[0, 0] = -100
    for reduction in ("mean", "sum", "none"):
        loss = uf.linear_cross_entropy(h, weight, bias, target, label_smoothing=0.1, reduction=reduction)
        yield [loss], [h, weight, bias]
    yield [uf.linear_cross_entropy(h, weight, None, target)], [h, weight]


def embedding_dropout(sizes, dtype):
    steps, batch, inputs, words = sizes
    weight, ids = draw(words, inputs, dtype=dtype), torch.randint(words, (batch, steps), device=DEVICE)
    yield [uf.embedding_dropout(weight, ids, P, seed=3, padding_idx=1)], [weight]
    yield [uf.embedding_dropout(weight, torch.ones_like(ids), P, seed=3)], [weight]  # one row for all


def variational_dropout(sizes, dtype):
    steps, batch, inputs, _ = sizes
    x = draw(batch, steps, inputs, dtype=dtype)
    yield [uf.variational_dropout(x, P, seed=3)], [x]
    yield [uf.variational_dropout(x.transpose(0, 1), P, seed=3, batch_first=False)], [x]


def concat_pool(sizes, dtype):
    steps, batch, inputs, _ = sizes
    out, lengths = draw(batch, steps, inputs, dtype=dtype), torch.arange(batch, device=DEVICE) % (steps + 1)
    yield [uf.concat_pool(out, lengths)], [out]


def dropout_mask(sizes, dtype):
    for shape in ((sizes[3],), (sizes[3], sizes[2]), (0,)):
        yield [uf.dropout_mask(3, shape, P, dtype=dtype, device=DEVICE)], []


OPS = {
    op.__name__: op
    for op in (
        lstm,
        linear_cross_entropy,
        embedding_dropout,
        variational_dropout,
        concat_pool,
        dropout_mask,
    )
}


def check(results, tensors):
    """RuntimeError unless the results and their gradients are finite."""
    found = list(results)
    if tensors:
        found += torch.autograd.grad(results, tensors, [torch.randn_like(y) for y in results])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    for tensor in found:
        if not torch.isfinite(tensor.detach()).all():
            raise RuntimeError(f"a result of shape {tuple(tensor.shape)}, {tensor.dtype}, is not finite")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--layers", action="store_true", help="the LSTM at the layers' sizes, nothing else")
    args = parser.parse_args()
    if gpu.missing():
        parser.error(gpu.missing())
    torch.manual_seed(0)
    plan = [("lstm", LAYERS)] if args.layers else [(name, SIZES) for name in args.op]
    calls = 0
    for name, sizes in plan:
        for dtype in DTYPES:
            for some in sizes:
                for results, tensors in OPS[name](some, dtype):
                    check(results, tensors)
                    calls += 1
        print(f"{name}: done", flush=True)
    print(f"{calls} calls, forward and backward")


if __name__ == "__main__":
    main()
