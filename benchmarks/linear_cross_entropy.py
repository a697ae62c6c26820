"""Tied softmax and loss against F.linear and F.cross_entropy: python -m benchmarks.linear_cross_entropy

Forward and backward: the gradients of the features, the weight and the bias. Errors are relative, against
float64, over fewer positions.
"""

import time
from functools import partial

import torch
import torch.nn.functional as F

import ulmfit_fast as uf
from ulmfit_fast.config import make_config

from . import arguments, clocks, floors, harness, memory
from .harness import DTYPES, Side

ERROR_POSITIONS = 256
SMALL = (8, 16, 8)  # positions, words, features of the call that comes before memory is measured
ON_GPU = ("fp32", "high", "bf16", "bf16-autocast")  # float16 without a gradient scaler would underflow


class Softmax:
    """h (N, E), weight (V, E), bias (V,), target (N,); the weight small, as after training's first steps."""

    def __init__(self, positions, words, features, dtype, device="cpu"):
        torch.manual_seed(0)
        self.device = device
        self.h = torch.randn(positions, features).to(device, dtype).requires_grad_()
        self.weight = (torch.randn(words, features) / 20).to(device, dtype).requires_grad_()
        self.bias = torch.zeros(words, dtype=dtype, device=device).requires_grad_()
        self.target = torch.randint(words, (positions,)).to(device)

    @property
    def tensors(self):
        return [self.h, self.weight, self.bias]

    def ours(self):
        return uf.linear_cross_entropy(*self.tensors, self.target)

    def torch(self):
        return F.cross_entropy(F.linear(*self.tensors), self.target)

    def side(self, library, precision):
        forward = self.forward(library, precision)
        # the sum alone: with ours, most of the backward is done in the forward
        run = lambda mark: harness.timed(mark, forward, self.tensors)[::2]  # noqa: E731
        return Side(library, precision, run, device=self.device)

    def forward(self, library, precision):
        return harness.under_autocast(getattr(self, library), precision, self.device)

    def doubled(self):
        """The same numbers in float64."""
        twin = Softmax(1, 1, 1, torch.float64)
        twin.target = self.target
        twin.h, twin.weight, twin.bias = (t.detach().double().requires_grad_() for t in self.tensors)
        return twin

    def errors(self, side):
        """(error of the loss, largest error of a gradient), relative, against float64."""
        with side.settings():
            loss = self.forward(side.package, side.precision)()
            found = torch.autograd.grad(loss, self.tensors)
        exact = self.doubled()
        truth = exact.torch()
        wanted = torch.autograd.grad(truth, exact.tensors)
        gradient = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
        return float((loss.detach() - truth.detach()).abs() / truth.detach()), gradient


def memory_call(spec):
    """One forward and backward, for memory.peak. spec: (library, precision, (N, V, E), device)."""
    library, precision, sizes, device = spec
    side = Softmax(*sizes, DTYPES[precision], device).side(library, precision)

    def call():
        with side.settings():
            side.run(time.perf_counter)

    return call


def measure(batch, words, args, threads, roof, clock):
    features = make_config("pretrain", args.preset).emb_sz
    sizes = batch * args.bptt, words, features
    peers = harness.peer_precisions(args)
    cases = {d: Softmax(*sizes, d, args.device) for d in {DTYPES[p] for p in [*args.precision, *peers]}}
    sides = [cases[DTYPES[p]].side("ours", p) for p in args.precision]
    sides += [cases[DTYPES[p]].side("torch", p) for p in peers]
    seconds = harness.interleave(sides, args.repeats, clock=clock)
    flops = floors.softmax_flops(words, features, sizes[0])
    shapes = {"h (N, E)": [sizes[0], features], "weight (V, E)": [words, features]}
    # everything read, and the gradients of all but the targets written
    traffic = {d: 2 * floors.nbytes(*c.tensors) + c.target.nbytes for d, c in cases.items()}
    del cases  # float64 comes next
    case = {"shapes": shapes, "flops": flops, "sides": {}}
    for side in sides:
        if side.name not in seconds:
            continue
        few = min(sizes[0], ERROR_POSITIONS), words, features
        dtype = DTYPES[side.precision]
        errors = side.attempt(lambda s=side, d=dtype, few=few: Softmax(*few, d, args.device).errors(s))
        specs = [(side.package, side.precision, s, args.device) for s in (SMALL, sizes)]
        peak = side.attempt(partial(memory.peak, memory_call, *specs, threads, args.device))
        loss_error, gradient_error = errors or (None, None)
        figures = harness.figures(
            side,
            seconds[side.name],
            peak_mb=peak,
            loss_error=loss_error,
            gradient_error=gradient_error,
        )
        harness.add_rates(figures, roof, flops)
        if args.device != "cpu":
            figures = floors.add_floor(figures, roof, flops, traffic[dtype])
        case["sides"][side.name] = figures
    return {"softmax and loss": case | harness.failures(sides)}


def main():
    parser = arguments.options(__doc__, on_gpu=ON_GPU, also_on_cpu=arguments.OPS_ON_CPU)
    parser.add_argument("--vocab", nargs="+", type=arguments.positive, default=[30000], help="words")
    args = arguments.parse(parser)
    clock = clocks.make(args.device, keep_l2=args.keep_l2)
    for threads, roof in harness.places(args):
        for batch in args.batch:
            for words in args.vocab:
                cases = measure(batch, words, args, threads, roof, clock)
                sizes = {"preset": args.preset, "batch": batch, "bptt": args.bptt, "vocab": words}
                harness.publish(args, "linear_cross_entropy", threads, sizes, roof, cases, clock)


if __name__ == "__main__":
    main()
