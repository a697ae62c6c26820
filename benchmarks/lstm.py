"""Each LSTM layer with DropConnect, forward and backward, against torch's own: python -m benchmarks.lstm

Both sides drop the recurrent weight inside the timed region.

torch's bf16 LSTM has two paths. The default (oneDNN) returns wrong gradients on CPUs with AMX where H is
1024 to 1152, so each side's gradient error against float64 is printed beside its time. The other one, without
oneDNN, can be about 60 times as slow there: --slow-peers asks for it.
"""

import torch
import torch.nn.functional as F

import ulmfit_fast as uf
from ulmfit_fast.config import make_config

from . import harness
from .harness import DTYPES, PEER, Side

WEIGHT_P = 0.5
ERROR_STEPS = 16  # a float64 LSTM over all of bptt would take longer than the measurement


def layer_sizes(preset):
    """[(I, H)] of the preset's layers; ulmfit: 400 -> 1152, 1152 -> 1152, 1152 -> 400."""
    c = make_config("pretrain", preset)
    sizes = [c.emb_sz, *[c.n_hid] * (c.n_layers - 1), c.emb_sz]
    return list(zip(sizes[:-1], sizes[1:], strict=True))


def layer_flops(inputs, hidden, tokens):
    """Multiplications and additions of the matrix products, forward and backward (twice as many)."""
    return 3 * 2 * tokens * 4 * hidden * (inputs + hidden)


class Layer:
    """The inputs of one layer, and each library's forward over them. x is (T, B, I)."""

    def __init__(self, inputs, hidden, batch, bptt, dtype):
        torch.manual_seed(0)
        stock = torch.nn.LSTM(inputs, hidden)
        self.weights = [w.detach().to(dtype).requires_grad_() for w in stock.parameters()]
        self.x = torch.randn(bptt, batch, inputs).to(dtype).requires_grad_()
        self.h0 = torch.zeros(batch, hidden, dtype=dtype)
        self.dy = torch.randn(bptt, batch, hidden).to(dtype)

    def ours(self, x, weight_p):
        return uf.lstm(x, self.h0, self.h0, *self.weights, weight_p=weight_p, seed=1)[0]

    def torch(self, x, weight_p):
        w_ih, w_hh, b_ih, b_hh = self.weights
        return stock_lstm(x, self.h0, w_ih, F.dropout(w_hh, weight_p), b_ih, b_hh)

    def side(self, library, precision, onednn=True):
        forward, tensors = getattr(self, library), [self.x, *self.weights]
        run = lambda: harness.timed(lambda: forward(self.x, WEIGHT_P), tensors, self.dy)  # noqa: E731
        return Side(library, precision, run, onednn)

    def gradient_error(self, side):
        """Largest relative error of a gradient against float64 over ERROR_STEPS.

        Nothing is dropped, as the libraries' masks differ.
        """
        x, dy = (t[:ERROR_STEPS].detach() for t in (self.x, self.dy))
        x.requires_grad_()
        with side.settings():
            ours = torch.autograd.grad(getattr(self, side.package)(x, 0.0), [x, *self.weights], dy)
        exact = [t.detach().double().requires_grad_() for t in (x, *self.weights)]
        y = stock_lstm(exact[0], self.h0.double(), *exact[1:])
        wanted = torch.autograd.grad(y, exact, dy.double())
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, wanted, strict=True))


def stock_lstm(x, h0, *weights):
    """What torch.nn.LSTM calls, so that a dropped weight can be handed in."""
    return torch._VF.lstm(x, (h0[None], h0[None]), list(weights), True, 1, 0.0, True, False, False)[0]


def measure(inputs, hidden, batch, args, roof):
    """The case of one layer, and {side name: its seconds}."""
    sizes = inputs, hidden, batch, args.bptt
    layers = {p: Layer(*sizes, DTYPES[p]) for p in {PEER[p] for p in args.precision}}
    sides = [layers[PEER[p]].side("ours", p) for p in args.precision]
    sides += [layer.side("torch", p) for p, layer in sorted(layers.items(), reverse=True)]
    if args.slow_peers and "bf16" in layers:
        sides.append(layers["bf16"].side("torch", "bf16", onednn=False))
    seconds = harness.interleave(sides, args.repeats, args.slow_repeats)
    flops = layer_flops(inputs, hidden, batch * args.bptt)
    shapes = {"x (T, B, I)": [args.bptt, batch, inputs], "H": hidden}
    case = {"shapes": shapes, "flops": flops, "sides": {}}
    for side in sides:
        error = layers[PEER[side.precision]].gradient_error(side)
        figures = harness.figures(side, seconds[side.name], gradient_error=error)
        case["sides"][side.name] = harness.add_rates(figures, roof, flops)
    return case, seconds, sides


def together(cases, seconds, sides, roof):
    """The layers as one: times added round by round, the largest of their errors."""
    flops = sum(case["flops"] for case in cases.values())
    summed = {"shapes": {name: case["shapes"] for name, case in cases.items()}, "flops": flops, "sides": {}}
    for side in sides:
        rounds = zip(*(s[side.name] for s in seconds), strict=True)
        totals = [tuple(map(sum, zip(*layers, strict=True))) for layers in rounds]
        error = max(case["sides"][side.name]["gradient_error"] for case in cases.values())
        figures = harness.figures(side, totals, gradient_error=error)
        summed["sides"][side.name] = harness.add_rates(figures, roof, flops)
    return summed


def main():
    parser = harness.options(__doc__)
    harness.add_slow_peers(parser)
    args = harness.parse(parser)
    for threads in args.threads:
        torch.set_num_threads(threads)
        roof = harness.measure_roof(args.quick)
        for batch in args.batch:
            cases, seconds = {}, []
            for inputs, hidden in layer_sizes(args.preset):
                case, times, sides = measure(inputs, hidden, batch, args, roof)
                cases[f"{inputs} -> {hidden}"] = case
                seconds.append(times)
            cases["all layers"] = together(cases, seconds, sides, roof)
            sizes = {"preset": args.preset, "batch": batch, "bptt": args.bptt}
            harness.publish(args, "lstm", threads, sizes, roof, cases)


if __name__ == "__main__":
    main()
