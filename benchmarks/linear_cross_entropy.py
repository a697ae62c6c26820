"""Tied softmax and loss against F.linear and F.cross_entropy: python -m benchmarks.linear_cross_entropy

Forward and backward: the gradients of the features, the weight and the bias. Errors are relative, against
float64, over fewer positions.
"""

import torch
import torch.nn.functional as F

import ulmfit_fast as uf
from ulmfit_fast.config import make_config

from . import harness
from .harness import DTYPES, PEER, Side

ERROR_POSITIONS = 256
SMALL = (8, 16, 8)  # positions, words, features of the call that comes before memory is measured


class Softmax:
    """h (N, E), weight (V, E), bias (V,), target (N,); the weight small, as after training's first steps."""

    def __init__(self, positions, words, features, dtype):
        torch.manual_seed(0)
        self.h = torch.randn(positions, features).to(dtype).requires_grad_()
        self.weight = (torch.randn(words, features) / 20).to(dtype).requires_grad_()
        self.bias = torch.zeros(words, dtype=dtype).requires_grad_()
        self.target = torch.randint(words, (positions,))

    @property
    def tensors(self):
        return [self.h, self.weight, self.bias]

    def ours(self):
        return uf.linear_cross_entropy(*self.tensors, self.target)

    def torch(self):
        return F.cross_entropy(F.linear(*self.tensors), self.target)

    def side(self, library, precision):
        # the sum alone: with ours, most of the backward is done in the forward
        return Side(library, precision, lambda: harness.timed(getattr(self, library), self.tensors)[1])

    def doubled(self):
        """The same numbers in float64."""
        twin = Softmax(1, 1, 1, torch.float64)
        twin.target = self.target
        twin.h, twin.weight, twin.bias = (t.detach().double().requires_grad_() for t in self.tensors)
        return twin

    def errors(self, side):
        """(error of the loss, largest error of a gradient), relative, against float64."""
        with side.settings():
            loss = getattr(self, side.package)()
            found = torch.autograd.grad(loss, self.tensors)
        exact = self.doubled()
        truth = exact.torch()
        wanted = torch.autograd.grad(truth, exact.tensors)
        gradient = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
        return float((loss.detach() - truth.detach()).abs() / truth.detach()), gradient


def memory_call(spec):
    """One forward and backward, for harness.peak_memory. spec: (library, precision, (N, V, E))."""
    library, precision, sizes = spec
    side = Softmax(*sizes, DTYPES[precision]).side(library, precision)

    def call():
        with side.settings():
            side.run()

    return call


def measure(batch, words, args, threads, roof):
    features = make_config("pretrain", args.preset).emb_sz
    sizes = batch * args.bptt, words, features
    cases = {p: Softmax(*sizes, DTYPES[p]) for p in {PEER[p] for p in args.precision}}
    sides = [cases[PEER[p]].side("ours", p) for p in args.precision]
    sides += [case.side("torch", p) for p, case in sorted(cases.items(), reverse=True)]
    seconds = harness.interleave(sides, args.repeats)
    flops = 3 * 2 * sizes[0] * words * features
    shapes = {"h (N, E)": [sizes[0], features], "weight (V, E)": [words, features]}
    del cases  # float64 comes next
    case = {"shapes": shapes, "flops": flops, "sides": {}}
    for side in sides:
        few = min(sizes[0], ERROR_POSITIONS), words, features
        loss_error, gradient_error = Softmax(*few, DTYPES[side.precision]).errors(side)
        specs = [(side.package, side.precision, s) for s in (SMALL, sizes)]
        figures = harness.figures(
            side,
            seconds[side.name],
            peak_mb=harness.peak_memory(memory_call, *specs, threads),
            loss_error=loss_error,
            gradient_error=gradient_error,
        )
        case["sides"][side.name] = harness.add_rates(figures, roof, flops)
    return {"softmax and loss": case}


def main():
    parser = harness.options(__doc__)
    parser.add_argument("--vocab", nargs="+", type=harness.positive, default=[30000], help="words")
    args = harness.parse(parser)
    for threads in args.threads:
        torch.set_num_threads(threads)
        roof = harness.measure_roof(args.quick)
        for batch in args.batch:
            for words in args.vocab:
                cases = measure(batch, words, args, threads, roof)
                sizes = {"preset": args.preset, "batch": batch, "bptt": args.bptt, "vocab": words}
                harness.publish(args, "linear_cross_entropy", threads, sizes, roof, cases)


if __name__ == "__main__":
    main()
