"""What the speed programs share: sides that take turns, spread, memory, the machine's own rates, records."""

import argparse
import contextlib
import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from .record import RESULTS, provenance, save

# high: float32 tensors, products rounded as torch.set_float32_matmul_precision("high") allows
DTYPES = {"fp32": torch.float32, "high": torch.float32, "bf16": torch.bfloat16}
# The peer's precision for each of ours. torch's CPU operators compute "high" as they do strict float32.
PEER = {"fp32": "fp32", "high": "fp32", "bf16": "bf16"}
QUICK = {"preset": "small", "batch": [16], "repeats": 2}


@dataclass
class Side:
    """One contestant: run() works once and returns its seconds, or (forward, forward + backward)."""

    package: str
    precision: str
    run: Callable
    onednn: bool = True

    @property
    def name(self):
        return f"{self.package} {self.precision}" + ("" if self.onednn else " without oneDNN")

    @contextlib.contextmanager
    def settings(self):
        """The global settings this side is measured with."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.precision == "high" else "highest")
        try:
            if self.onednn:
                yield
            else:
                with warnings.catch_warnings():  # of TF32 on Intel's GPUs, whenever oneDNN is switched
                    warnings.filterwarnings("ignore", message=".*TF32 acceleration on top of oneDNN.*")
                    with torch.backends.mkldnn.flags(enabled=False):
                        yield
        finally:
            torch.set_float32_matmul_precision(before)


def timed(forward, tensors, gradient=None):
    """Seconds of (forward, forward + backward): y = forward(), then the gradients of `tensors`."""
    begin = time.perf_counter()
    y = forward()
    middle = time.perf_counter()
    gradients = torch.autograd.grad(y, tensors, gradient)
    end = time.perf_counter()
    del gradients
    return middle - begin, end - begin


def interleave(sides, repeats, slow_repeats=1):
    """{side.name: what its run returned in each counted round}, the sides taking turns.

    A machine whose speed drifts is then as unkind to one side as to the others. Each round goes the other way
    round than the one before it, so that no side always finds the caches that the same other one has left.
    The first round is the warm-up. Sides without oneDNN stop after slow_repeats counted rounds.
    """
    samples = {side.name: [] for side in sides}
    for turn in range(repeats + 1):
        for side in sides if turn % 2 else reversed(sides):
            if not side.onednn and turn > slow_repeats:
                continue
            with side.settings():
                seconds = side.run()
            if turn:
                samples[side.name].append(seconds)
    return samples


def spread(seconds):
    """Median, 20th and 80th percentile, and the samples themselves, in ms."""
    p20, median, p80 = quantiles(seconds)
    in_ms = {"p20": p20, "median": median, "p80": p80}
    return {name: _ms(value) for name, value in in_ms.items()} | {"samples": [_ms(s) for s in seconds]}


def quantiles(values):
    """(p20, median, p80); of a single value, that value three times."""
    if len(values) == 1:
        return (values[0],) * 3
    # inclusive: never beyond the smallest and the largest of a few samples
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def _ms(seconds):
    return round(1e3 * seconds, 4)


def figures(side, seconds, **more):
    """The record of one side: its samples (see `interleave`) and whatever else was found out about it."""
    record = {"library": side.package, "precision": side.precision}
    record["dtype"] = str(DTYPES[side.precision]).removeprefix("torch.")
    if isinstance(seconds[0], tuple):
        forward, seconds = zip(*seconds, strict=True)
        record["forward_ms"] = spread(forward)
    return record | {"total_ms": spread(seconds)} | more


def add_rates(record, roof, flops=None, traffic=None):
    """Adds GFLOP/s from the counted flops of a call, or GB/s from its bytes, and their share of the roof."""
    seconds = record["total_ms"]["median"] / 1e3
    if flops:
        record["gflops"] = round(flops / seconds / 1e9, 1)
        record["roof_share"] = round(record["gflops"] / roof[f"{record['precision']}_gflops"], 3)
    if traffic:
        record["gb_s"] = round(traffic / seconds / 1e9, 2)
        record["roof_share"] = round(record["gb_s"] / roof["copy_gb_s"], 3)
    return record


def measure_roof(quick):
    """The machine's own rates, best of several: torch.mm of large matrices in each precision, and a copy.

    "high" is three bf16 products for one; where those are slower than a float32 product, that is the roof.
    """
    rates, size, repeats = {}, 1024 if quick else 2048, 3 if quick else 10
    for name in ("fp32", "bf16"):
        a, b, out = (torch.rand(size, size).to(DTYPES[name]) for _ in range(3))
        rates[f"{name}_gflops"] = (
            2 * size**3 / _best(lambda a=a, b=b, o=out: torch.mm(a, b, out=o), repeats) / 1e9
        )
    rates["high_gflops"] = max(rates["fp32_gflops"], rates["bf16_gflops"] / 3)
    source = torch.ones(1 << 26)  # 256 MB: more than the caches hold
    target = torch.zeros_like(source)
    rates["copy_gb_s"] = 2 * source.nbytes / _best(lambda: target.copy_(source), repeats) / 1e9
    return {name: round(rate, 1) for name, rate in rates.items()}


def _best(call, repeats):
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def peak_memory(build, small, full, threads):
    """MB that one call adds at its peak to the resident memory of a fresh process; None where Linux hides it.

    build(sizes) returns the call; build and sizes can be pickled. A call with the sizes `small` comes first,
    so that code and thread stacks are there already. What a library keeps between calls counts as its own:
    nothing of the full size ran in that process before.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    # forked from a server that has imported torch and run nothing of it: as good as a new one, and sooner
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.steps"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_memory, build, small, full, threads).result()


def _peak_memory(build, small, full, threads):
    torch.set_num_threads(threads)
    build(small)()
    call = build(full)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that malloc keeps would hide as much of the growth
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, to the present VmRSS
    before = _status("VmRSS")
    call()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(field):
    """A field of /proc/self/status in kB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def comparisons(sides, cross=False):
    """Names (ours, peer) of a case's sides that compare: of like precision; with `cross` any against fp32."""
    for name, ours in sides.items():
        if ours["library"] != "ours":
            continue
        wanted = {PEER[ours["precision"]], *(["fp32"] if cross else [])}
        yield from (
            (name, other) for other, s in sides.items() if s["library"] != "ours" and s["precision"] in wanted
        )


def ratio(ours, peer, key="total_ms"):
    """(p20, median, p80) of peer / ours over the rounds: how many times faster ours was."""
    pairs = zip(ours[key]["samples"], peer[key]["samples"], strict=False)  # a slow peer has fewer rounds
    return quantiles([theirs / mine for mine, theirs in pairs])


def options(doc, **defaults):
    """The options that every speed program has. `defaults` replaces some of their values."""
    p = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--preset", choices=["ulmfit", "small", "tiny"], default="ulmfit", help="model sizes")
    p.add_argument(
        "--precision", nargs="+", choices=DTYPES, default=list(DTYPES), help="of ours and the peers"
    )
    p.add_argument("--batch", nargs="+", type=positive, default=[64], help="sequences")
    p.add_argument("--bptt", type=positive, default=72, help="time steps")
    p.add_argument("--threads", nargs="+", type=positive, default=[torch.get_num_threads()])
    p.add_argument("--repeats", type=positive, default=5, help="counted rounds")
    p.add_argument("--quick", action="store_true", help="preset small, batch 16, two rounds, unless given")
    p.add_argument("--results", type=Path, default=RESULTS, help="where the records go")
    p.set_defaults(**defaults)
    return p


def add_slow_peers(parser):
    parser.add_argument(
        "--slow-peers", action="store_true", help="torch's bf16 LSTM without oneDNN too: minutes a call"
    )
    parser.add_argument("--slow-repeats", type=positive, default=1, help="counted rounds of the slow peers")


def parse(parser, argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--quick" in argv:
        parser.set_defaults(**{k: v for k, v in QUICK.items() if parser.get_default(k) is not None})
    return parser.parse_args(argv)


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def publish(args, benchmark, threads, sizes, roof, cases):
    """Prints the cases and writes them with where they were measured to RESULTS/speed-BENCHMARK-SIZES.json.

    sizes: {"preset": ..., "batch": ...}. cases: {name: {"shapes": ..., "sides": {side name: figures}}}.
    """
    print(f"{benchmark}, {describe(sizes)}, {threads} threads: ms, median (p20-p80)")
    for case, record in cases.items():
        _print_case(case, record["sides"], cross=benchmark.startswith("train_step"))
    record = {
        "benchmark": benchmark,
        "dtype": sorted({s["dtype"] for c in cases.values() for s in c["sides"].values()}),
    }
    record |= {**sizes, "repeats": args.repeats, "quick": args.quick, **provenance(threads)}
    parts = [str(v) if k == "preset" else f"{k}{v}" for k, v in sizes.items()]
    name = "-".join(["speed", benchmark, *parts, f"threads{threads}"])
    save(args.results / f"{name}.json", record | {"roof": roof, "cases": cases}, show=False)


def describe(sizes):
    return ", ".join(str(v) if k == "preset" else f"{k} {v}" for k, v in sizes.items())


def _print_case(case, sides, cross):
    print(f"  {case}")
    for name, side in sides.items():
        total = side["total_ms"]
        line = f"    {name:27}{total['median']:9.1f} ({total['p20']:.1f}-{total['p80']:.1f})"
        if "forward_ms" in side:
            line += f"  forward {side['forward_ms']['median']:.1f}"
        for key, unit in UNITS.items():
            if side.get(key) is not None:
                line += f"  {side[key]:{unit[1]}}{unit[0]}"
        print(line)
    for ours, peer in comparisons(sides, cross):
        low, middle, high = ratio(sides[ours], sides[peer])
        print(f"    {ours} against {peer}: x{middle:.2f} ({low:.2f}-{high:.2f})")


# what a side's record may hold beside its times: its heading or unit, and its format
UNITS = {
    "tokens_per_s": (" tokens/s", ",.0f"),
    "gflops": (" GFLOP/s", ",.0f"),
    "gb_s": (" GB/s", ".1f"),
    "roof_share": (" of the roof", ".0%"),
    "peak_mb": (" MB at the peak", ",.0f"),
    "loss_error": (" error of the loss", ".1e"),
    "gradient_error": (" error of the gradient", ".1e"),
}
