"""One LSTM layer with DropConnect, forward and backward, against torch's own: python -m benchmarks.lstm

Both sides drop the recurrent weight inside the timed region. They take turns in one process, so that a
machine whose speed drifts is as unkind to one as to the other: quote the ratios.

torch's bf16 LSTM has two paths. The default (oneDNN) returns wrong gradients on CPUs with AMX where H is
1024 to 1152, so each side's gradient error against float64 is printed beside its time.
"""

import argparse
import statistics
import time
import warnings

import torch
import torch.nn.functional as F

import ulmfit_fast as uf

from .record import RESULTS, provenance, save

# ULMFiT's three layers (400 / 1152) and those of preset `small` (200 / 576)
LAYERS = {
    "ulmfit": [(400, 1152), (1152, 1152), (1152, 400)],
    "small": [(200, 576), (576, 576), (576, 200)],
}
WEIGHT_P = 0.5


class Layer:
    """The inputs of one layer, and each side's step over them."""

    def __init__(self, inputs, hidden, batch, bptt, dtype):
        torch.manual_seed(0)
        stock = torch.nn.LSTM(inputs, hidden)
        self.weights = [w.detach().to(dtype).requires_grad_() for w in stock.parameters()]
        self.x = torch.randn(bptt, batch, inputs).to(dtype).requires_grad_()
        self.h0 = torch.zeros(batch, hidden, dtype=dtype)
        self.dy = torch.randn(bptt, batch, hidden).to(dtype)

    def ours(self):
        return uf.lstm(self.x, self.h0, self.h0, *self.weights, weight_p=WEIGHT_P, seed=1)[0]

    def torch_default(self):
        w_ih, w_hh, b_ih, b_hh = self.weights
        return stock_lstm(self.x, self.h0, w_ih, F.dropout(w_hh, WEIGHT_P), b_ih, b_hh)

    def torch_without_onednn(self):
        with torch.backends.mkldnn.flags(enabled=False):
            return self.torch_default()

    def timed(self, side):
        """Seconds of (forward, forward + backward)."""
        begin = time.perf_counter()
        y = side()
        middle = time.perf_counter()
        with torch.backends.mkldnn.flags(enabled=side != self.torch_without_onednn):
            gradients = torch.autograd.grad(y, [self.x, *self.weights], self.dy)
        end = time.perf_counter()
        del gradients
        return middle - begin, end - begin

    def gradient_error(self, side):
        """Largest relative error of a gradient against float64, both without dropping (the masks differ)."""
        tensors = [self.x, *self.weights]
        exact = [t.detach().double().requires_grad_() for t in tensors]
        h0 = self.h0.double()
        with torch.backends.mkldnn.flags(enabled=side != self.torch_without_onednn):
            if side == self.ours:
                y = uf.lstm(self.x, self.h0, self.h0, *self.weights)[0]
            else:
                y = stock_lstm(self.x, self.h0, *self.weights)
            ours = torch.autograd.grad(y, tensors, self.dy)
        wanted = torch.autograd.grad(stock_lstm(exact[0], h0, *exact[1:]), exact, self.dy.double())
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, wanted, strict=True))


def stock_lstm(x, h0, *weights):
    """What torch.nn.LSTM calls, so that a dropped weight can be handed in."""
    return torch._VF.lstm(x, (h0[None], h0[None]), list(weights), True, 1, 0.0, True, False, False)[0]


def measure(layer, repeats):
    """{side: {"forward_ms": {...}, "total_ms": {...}, "gradient_error": ...}}, the sides taking turns."""
    sides = {"ours": layer.ours, "torch": layer.torch_default}
    if layer.x.dtype == torch.bfloat16:
        sides["torch without oneDNN"] = layer.torch_without_onednn
    times = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            seconds = layer.timed(side)
            if repeat > 0:  # the first is the warm-up
                times[name].append(seconds)
    result = {}
    for name, side in sides.items():
        forward, total = zip(*times[name], strict=True)
        result[name] = {
            "forward_ms": spread(forward),
            "total_ms": spread(total),
            "gradient_error": layer.gradient_error(side),
        }
    return result


def spread(seconds):
    p20, p80 = (statistics.quantiles(seconds, n=5)[i] for i in (0, 3))
    values = {"p20": p20, "median": statistics.median(seconds), "p80": p80}
    return {name: round(1e3 * value, 2) for name, value in values.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", choices=LAYERS, default="ulmfit", help="layer sizes (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], help="default: float32 bfloat16"
    )
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--bptt", type=int, default=72, help="time steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="counted repetitions (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*TF32 acceleration.*")  # torch's, when oneDNN is switched

    for dtype in args.dtype:
        record = {"benchmark": "lstm", **vars(args), "dtype": dtype, **provenance(args.threads), "layers": {}}
        print(f"{dtype}, batch {args.batch}, bptt {args.bptt}, {args.threads} threads: ms, median (p20-p80)")
        for inputs, hidden in LAYERS[args.preset]:
            layer = Layer(inputs, hidden, args.batch, args.bptt, getattr(torch, dtype))
            sides = record["layers"][f"{inputs}->{hidden}"] = measure(layer, args.repeats)
            for name, side in sides.items():
                total, forward = side["total_ms"], side["forward_ms"]
                ratio = total["median"] / sides["ours"]["total_ms"]["median"]
                print(
                    f"  {inputs:4} -> {hidden:4}  {name:21} forward {forward['median']:7.1f}"
                    f"  + backward {total['median']:7.1f} ({total['p20']:.1f}-{total['p80']:.1f})"
                    f"  x{ratio:.2f}  gradient error {side['gradient_error']:.1e}"
                )
        save(RESULTS / f"lstm-{args.preset}-{dtype}-batch{args.batch}.json", record)


if __name__ == "__main__":
    main()
