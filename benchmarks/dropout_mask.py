"""Dropout masks and the two dropouts made of them against torch's: python -m benchmarks.dropout_mask

The mask is that of the largest layer's recurrent weight, 4608 x 1152 with preset ulmfit (5.3 M elements).
torch has two ways to it: `bernoulli_` and a division, as fastai draws its masks, and `F.dropout`, which also
multiplies. Embedding and variational dropout are forward and backward, the peer wired as in fastai.
"""

import functools
import time

import torch
import torch.nn.functional as F

import ulmfit_fast as uf
from ulmfit_fast.config import make_config
from ulmfit_fast.stock import dropout_mask

from . import harness
from .harness import DTYPES, Side

P = 0.5
EMBED_P = 0.05


def call_seconds(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def mask_case(precision, shape):
    """(shapes, bytes written, {library: call}) of the mask alone."""
    weight = torch.randn(shape).to(DTYPES[precision])
    calls = {
        "ours": lambda: uf.dropout_mask(1, shape, P, dtype=weight.dtype),
        "torch bernoulli_": lambda: dropout_mask(weight, shape, P),
        "torch F.dropout": lambda: F.dropout(weight, P),
    }
    runs = {name: functools.partial(call_seconds, call) for name, call in calls.items()}
    return {"mask": list(shape)}, weight.nbytes, runs


def embedding_case(precision, words, features, batch, bptt):
    weight = torch.randn(words, features).to(DTYPES[precision]).requires_grad_()
    ids = torch.randint(words, (batch, bptt))
    dy = torch.randn(batch, bptt, features).to(weight.dtype)

    def stock():
        return F.embedding(ids, weight * dropout_mask(weight, (words, 1), EMBED_P))

    calls = {"ours": lambda: uf.embedding_dropout(weight, ids, EMBED_P, seed=1), "torch": stock}
    runs = {name: functools.partial(harness.timed, call, [weight], dy) for name, call in calls.items()}
    return {"weight (V, E)": [words, features], "ids (B, T)": [batch, bptt]}, None, runs


def variational_case(precision, batch, bptt, features):
    x = torch.randn(batch, bptt, features).to(DTYPES[precision]).requires_grad_()
    dy = torch.randn_like(x, requires_grad=False)
    calls = {
        "ours": lambda: uf.variational_dropout(x, P, seed=1),
        "torch": lambda: x * dropout_mask(x, (batch, 1, features), P),
    }
    runs = {name: functools.partial(harness.timed, call, [x], dy) for name, call in calls.items()}
    return {"x (B, T, H)": list(x.shape)}, None, runs


def measure(make_case, precisions, sizes, args, roof):
    """One case: all precisions and libraries taking turns."""
    sides, traffic = [], {}
    for precision in precisions:
        shapes, traffic[precision], runs = make_case(precision, *sizes)
        sides += [Side(library, precision, run) for library, run in runs.items()]
    seconds = harness.interleave(sides, args.repeats)
    case = {"shapes": shapes, "sides": {}}
    for side in sides:
        figures = harness.figures(side, seconds[side.name])
        case["sides"][side.name] = harness.add_rates(figures, roof, traffic=traffic[side.precision])
    return case


def main():
    parser = harness.options(__doc__, repeats=15)
    parser.add_argument("--vocab", nargs="+", type=harness.positive, default=[30000], help="words")
    args = harness.parse(parser)
    config = make_config("pretrain", args.preset)
    precisions = [p for p in args.precision if p != "high"]  # there is no product to round
    for threads in args.threads:
        torch.set_num_threads(threads)
        roof = harness.measure_roof(args.quick)
        for batch in args.batch:
            for words in args.vocab:
                hidden = config.n_hid
                plan = {
                    "dropout_mask": (mask_case, [(4 * hidden, hidden)]),
                    "embedding_dropout": (embedding_case, (words, config.emb_sz, batch, args.bptt)),
                    "variational_dropout": (variational_case, (batch, args.bptt, hidden)),
                }
                cases = {n: measure(make, precisions, s, args, roof) for n, (make, s) in plan.items()}
                sizes = {"preset": args.preset, "batch": batch, "bptt": args.bptt, "vocab": words}
                harness.publish(args, "dropout_mask", threads, sizes, roof, cases)


if __name__ == "__main__":
    main()
