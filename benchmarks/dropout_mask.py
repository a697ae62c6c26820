"""Dropout masks and the two dropouts made of them against torch's: python -m benchmarks.dropout_mask

The mask is that of the largest layer's recurrent weight, 4608 x 1152 with preset ulmfit (5.3 M elements).
torch has two ways to it: `bernoulli_` and a division, as fastai draws its masks, and `F.dropout`, which also
multiplies. Embedding and variational dropout are forward and backward, the peer wired as in fastai; their
errors, of the gradient against float64 under one mask for both sides, are measured on a GPU.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ulmfit_fast as uf
from ulmfit_fast.config import make_config
from ulmfit_fast.stock import dropout_mask

from . import arguments, clocks, floors, harness
from .harness import DTYPES, Side

P = 0.5
EMBED_P = 0.05
ON_GPU = ("fp32", "bf16", "fp16")


def call_marks(call, mark):
    begin = mark()
    call()
    return begin, mark()


@dataclass
class Case:
    """One op in one precision. runs: {library: run}; traffic: the fewest bytes of a call.

    written: bytes, where their rate is to be shown. error(library): the error of its gradient.
    """

    shapes: dict
    runs: dict
    traffic: int
    written: int | None = None
    error: Callable | None = None


def mask_case(precision, device, shape):
    """The mask alone."""
    weight = torch.randn(shape).to(device, DTYPES[precision])
    calls = {
        "ours": lambda: uf.dropout_mask(1, shape, P, dtype=weight.dtype, device=device),
        "torch bernoulli_": lambda: dropout_mask(weight, shape, P),
        "torch F.dropout": lambda: F.dropout(weight, P),
    }
    runs = {name: functools.partial(call_marks, call) for name, call in calls.items()}
    return Case({"mask": list(shape)}, runs, weight.nbytes, written=weight.nbytes)


def with_backward(calls, tensor, dy, mask, exact):
    """(runs, error) of ops that are called with a mask or, for one of their own, without.

    error(library): the relative error of the gradient against that of exact(tensor in float64).
    """

    def gradient(y, of, dy=dy):
        return torch.autograd.grad(y, of, dy)[0]

    def error(library):
        found = gradient(calls[library](mask), tensor)
        twin = tensor.detach().double().requires_grad_()
        wanted = gradient(exact(twin), twin, dy.double())
        return float((found.double() - wanted).norm() / wanted.norm())

    return {n: (lambda mark, c=c: harness.timed(mark, c, [tensor], dy)) for n, c in calls.items()}, error


def embedding_case(precision, device, words, features, batch, bptt):
    weight = torch.randn(words, features).to(device, DTYPES[precision]).requires_grad_()
    ids = torch.randint(words, (batch, bptt)).to(device)
    dy = torch.randn(batch, bptt, features).to(device, weight.dtype)
    seen = uf.dropout_mask(1, (words,), EMBED_P, device="cpu").to(device)[:, None]

    def stock(mask=None):
        mask = dropout_mask(weight, (words, 1), EMBED_P) if mask is None else mask
        return F.embedding(ids, weight * mask)

    calls = {"ours": lambda mask=None: uf.embedding_dropout(weight, ids, EMBED_P, seed=1), "torch": stock}
    exact = lambda weight: F.embedding(ids, weight * seen.double())  # noqa: E731
    runs, error = with_backward(calls, weight, dy, seen.to(weight.dtype), exact)
    shapes = {"weight (V, E)": [words, features], "ids (B, T)": [batch, bptt]}
    # rows that occur read, y written; dy read, the gradient of all rows written
    traffic = floors.rows_read(ids, weight) + ids.nbytes + floors.nbytes(dy, dy, weight)
    return Case(shapes, runs, traffic, error=error)


def variational_case(precision, device, batch, bptt, features):
    x = torch.randn(batch, bptt, features).to(device, DTYPES[precision]).requires_grad_()
    dy = torch.randn_like(x, requires_grad=False)
    seen = uf.dropout_mask(1, (batch, features), P, device="cpu").to(device)[:, None]

    def stock(mask=None):
        return x * (dropout_mask(x, (batch, 1, features), P) if mask is None else mask)

    calls = {"ours": lambda mask=None: uf.variational_dropout(x, P, seed=1), "torch": stock}
    runs, error = with_backward(calls, x, dy, seen.to(x.dtype), lambda x: x * seen.double())
    return Case({"x (B, T, H)": list(x.shape)}, runs, floors.nbytes(x, x, dy, dy), error=error)


def measure(make_case, precisions, sizes, args, roof, clock):
    """One case: all precisions and libraries taking turns."""
    made = {p: make_case(p, args.device, *sizes) for p in precisions}
    sides = [Side(n, p, run, device=args.device) for p, case in made.items() for n, run in case.runs.items()]
    seconds = harness.interleave(sides, args.repeats, clock=clock)
    record = {"shapes": made[precisions[0]].shapes, "sides": {}}
    for side in sides:
        if side.name not in seconds:
            continue
        case, figures = made[side.precision], harness.figures(side, seconds[side.name])
        harness.add_rates(figures, roof, traffic=case.written)
        if args.device != "cpu":
            if case.error:
                figures["gradient_error"] = side.attempt(functools.partial(case.error, side.package))
            figures = floors.add_floor(figures, roof, traffic=case.traffic)
        record["sides"][side.name] = figures
    return record | harness.failures(sides)


def main():
    parser = arguments.options(__doc__, on_gpu=ON_GPU, also_on_cpu=arguments.OPS_ON_CPU, repeats=15)
    parser.add_argument("--vocab", nargs="+", type=arguments.positive, default=[30000], help="words")
    args = arguments.parse(parser)
    clock = clocks.make(args.device, keep_l2=args.keep_l2)
    config = make_config("pretrain", args.preset)
    precisions = [p for p in args.precision if p != "high"]  # there is no product to round
    for threads, roof in harness.places(args):
        for batch in args.batch:
            for words in args.vocab:
                hidden = config.n_hid
                plan = {
                    "dropout_mask": (mask_case, [(4 * hidden, hidden)]),
                    "embedding_dropout": (embedding_case, (words, config.emb_sz, batch, args.bptt)),
                    "variational_dropout": (variational_case, (batch, args.bptt, hidden)),
                }
                cases = {n: measure(make, precisions, s, args, roof, clock) for n, (make, s) in plan.items()}
                sizes = {"preset": args.preset, "batch": batch, "bptt": args.bptt, "vocab": words}
                harness.publish(args, "dropout_mask", threads, sizes, roof, cases, clock)


if __name__ == "__main__":
    main()
