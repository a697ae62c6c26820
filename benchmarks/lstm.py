"""Each LSTM layer with DropConnect, forward and backward, against torch's own: python -m benchmarks.lstm

Both sides drop the recurrent weight inside the timed region. On a GPU torch's is also measured with nothing
to drop and its weights in one piece: what its kernels take without the copies that a dropped weight costs
there; and ours with the persistent recurrence as well. `kernels` in such a record names the kernels of a call
that took longest, which tell cuDNN's algorithms apart.

torch's bf16 LSTM has two paths. The default (oneDNN) returns wrong gradients on CPUs with AMX where H is
1024 to 1152, so each side's gradient error against float64 is printed beside its time. The other one, without
oneDNN, can be about 60 times as slow there: --slow-peers asks for it.
"""

import argparse
import re
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import ulmfit_fast as uf

from . import arguments, clocks, floors, gpu, harness
from .floors import layer_flops, layer_sizes
from .harness import DTYPES, Side

WEIGHT_P = 0.5
ERROR_STEPS = 16  # on a CPU a float64 LSTM over all of bptt would take longer than the measurement
PERSISTENT = dict(variant="persistent", environment={"ULMFIT_FAST_RECURRENCE": "persistent"})
ON_GPU = ("fp32", "high", "bf16", "fp16", "bf16-autocast", "fp16-autocast")


class Layer:
    """The inputs of one layer, and each library's forward over them. x is (T, B, I)."""

    def __init__(self, inputs, hidden, batch, bptt, dtype, device="cpu"):
        torch.manual_seed(0)
        stock = torch.nn.LSTM(inputs, hidden).to(device, dtype)  # on a GPU in one piece, as cuDNN wants them
        self.weights, self.device = list(stock.parameters()), device
        self.x = torch.randn(bptt, batch, inputs).to(device, dtype).requires_grad_()
        self.h0 = torch.zeros(batch, hidden, dtype=dtype, device=device)
        self.dys = {dtype: torch.randn(bptt, batch, hidden).to(device, dtype)}

    def dy(self, y):
        """The gradient of y in its dtype, which under autocast is the library's choice."""
        if y.dtype not in self.dys:
            self.dys[y.dtype] = next(iter(self.dys.values())).to(y.dtype)
        return self.dys[y.dtype]

    def ours(self, x, weight_p):
        return uf.lstm(x, self.h0, self.h0, *self.weights, weight_p=weight_p, seed=1)[0]

    def torch(self, x, weight_p):
        w_ih, w_hh, b_ih, b_hh = self.weights
        return stock_lstm(x, self.h0, w_ih, F.dropout(w_hh, weight_p), b_ih, b_hh)

    def torch_undropped(self, x, weight_p):
        return stock_lstm(x, self.h0, *self.weights)

    def forward(self, library, precision):
        method = getattr(self, library.replace(" ", "_"))
        return harness.under_autocast(method, precision, self.device)

    def side(self, library, precision, onednn=True, **more):
        forward, tensors = self.forward(library, precision), [self.x, *self.weights]
        run = lambda mark: harness.timed(mark, lambda: forward(self.x, WEIGHT_P), tensors, self.dy)  # noqa: E731
        return Side(library, precision, run, onednn, self.device, **more)

    def traffic(self):
        """Bytes of a call: x, dy, the weights read; y, dx and the weights' gradients written."""
        (dy,) = list(self.dys.values())[:1]
        return 2 * floors.nbytes(self.x, dy, *self.weights)

    def gradient_error(self, side):
        """Largest relative error of a gradient against float64, on the CPU over ERROR_STEPS.

        Nothing is dropped, as the libraries' masks differ.
        """
        steps = ERROR_STEPS if self.device == "cpu" else len(self.x)
        x = self.x[:steps].detach().requires_grad_()
        with side.settings():
            y = self.forward(side.package, side.precision)(x, 0.0)
            dy = self.dy(y)[:steps]
            ours = torch.autograd.grad(y, [x, *self.weights], dy)
        exact = [t.detach().double().requires_grad_() for t in (x, *self.weights)]
        y = stock_lstm(exact[0], self.h0.double(), *exact[1:])
        wanted = torch.autograd.grad(y, exact, dy.double())
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, wanted, strict=True))


def stock_lstm(x, h0, *weights):
    """What torch.nn.LSTM calls, so that a dropped weight can be handed in."""
    return torch._VF.lstm(x, (h0[None], h0[None]), list(weights), True, 1, 0.0, True, False, False)[0]


def contestants(layers, args):
    """The sides; layers: {dtype: Layer}."""
    sides = [layers[DTYPES[p]].side("ours", p) for p in args.precision]
    if args.device != "cpu":
        fitting = [p for p in args.precision if p != "fp32"]  # float32 runs there only in TF32
        sides += [layers[DTYPES[p]].side("ours", p, **PERSISTENT) for p in fitting]
    peers = ["torch"] if args.device == "cpu" else ["torch", "torch undropped"]
    sides += [layers[DTYPES[p]].side(peer, p) for peer in peers for p in harness.peer_precisions(args)]
    if args.slow_peers and torch.bfloat16 in layers:
        sides.append(layers[torch.bfloat16].side("torch", "bf16", onednn=False))
    return sides


def measure(inputs, hidden, batch, args, roof, clock):
    """The case of one layer, and {side name: its seconds}."""
    dtypes = {DTYPES[p] for p in [*args.precision, *harness.peer_precisions(args)]}
    layers = {d: Layer(inputs, hidden, batch, args.bptt, d, args.device) for d in dtypes}
    sides = contestants(layers, args)
    seconds = harness.interleave(sides, args.repeats, args.slow_repeats, clock)
    flops = layer_flops(inputs, hidden, batch * args.bptt)
    shapes = {"x (T, B, I)": [args.bptt, batch, inputs], "H": hidden}
    case = {"shapes": shapes, "flops": flops, "sides": {}}
    for side in sides:
        layer = layers[DTYPES[side.precision]]
        error = side.attempt(partial(layer.gradient_error, side))
        if side.name in seconds:
            figures = harness.figures(side, seconds[side.name], gradient_error=error)
            if args.device != "cpu":
                call = partial(side.run, lambda: None)
                figures["kernels"] = side.attempt(lambda c=call: gpu.longest_kernels(gpu.trace(c)))
            figures = add_counted(figures, roof, flops, layer.traffic(), args)
            case["sides"][side.name] = figures
    return case | harness.failures(sides), seconds, sides


def add_counted(figures, roof, flops, traffic, args):
    """Adds the rates; on a GPU also the time a step and the least time."""
    harness.add_rates(figures, roof, flops)
    if args.device == "cpu":
        return figures
    figures["us_per_step"] = round(1e3 * figures["total_ms"]["median"] / args.bptt, 3)
    figures["forward_us_per_step"] = round(1e3 * figures["forward_ms"]["median"] / args.bptt, 3)
    return floors.add_floor(figures, roof, flops, traffic)


def together(cases, seconds, sides, roof, args):
    """The layers as one: times added round by round, the largest of their errors."""
    flops = sum(case["flops"] for case in cases.values())
    summed = {"shapes": {name: case["shapes"] for name, case in cases.items()}, "flops": flops, "sides": {}}
    for side in sides:
        found = [case["sides"].get(side.name) for case in cases.values()]
        if None in found:  # failed at a layer
            continue
        rounds = zip(*(s[side.name] for s in seconds), strict=True)
        totals = [tuple(map(sum, zip(*layers, strict=True))) for layers in rounds]
        errors = [layer["gradient_error"] for layer in found]
        error = None if None in errors else max(errors)
        figures = harness.figures(replace(side, plan=None), totals, gradient_error=error)
        traffic = sum(layer.get("bytes", 0) for layer in found)
        summed["sides"][side.name] = add_counted(figures, roof, flops, traffic, args)
    return summed


def layer_of(text):
    """(inputs, hidden) of "1024x1024"."""
    if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"must be INPUTSxHIDDEN, such as 400x1152, got {text!r}")
    return int(match[1]), int(match[2])


def main():
    parser = arguments.options(__doc__, on_gpu=ON_GPU, also_on_cpu=arguments.OPS_ON_CPU)
    parser.add_argument("--layers", nargs="+", type=layer_of, help="INPUTSxHIDDEN, instead of the preset's")
    arguments.add_slow_peers(parser)
    args = arguments.parse(parser)
    name = args.preset if args.layers is None else "-".join(f"{i}x{h}" for i, h in args.layers)
    clock = clocks.make(args.device, keep_l2=args.keep_l2)
    for threads, roof in harness.places(args):
        for batch in args.batch:
            cases, seconds = {}, []
            for inputs, hidden in args.layers or layer_sizes(args.preset):
                case, times, sides = measure(inputs, hidden, batch, args, roof, clock)
                cases[f"{inputs} -> {hidden}"] = case
                seconds.append(times)
            cases["all layers"] = together(cases, seconds, sides, roof, args)
            sizes = {"preset": name, "batch": batch, "bptt": args.bptt}
            harness.publish(args, "lstm", threads, sizes, roof, cases, clock)


if __name__ == "__main__":
    main()
