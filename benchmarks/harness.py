"""What the speed programs share: sides that take turns, spread, the machine's own rates, records."""

import contextlib
import functools
import os
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from . import clocks, floors, gpu, roof
from .machine import short_name
from .record import provenance, save

AUTOCAST = {"bf16-autocast": torch.bfloat16, "fp16-autocast": torch.float16}
# high: float32 tensors, products rounded as torch.set_float32_matmul_precision("high") allows
DTYPES = {"high": torch.float32, **roof.DTYPES}
DTYPES |= dict.fromkeys(AUTOCAST, torch.float32)


@dataclass
class Side:
    """One side: run(mark) does its work once and returns the clock's marks, see `clocks`.

    variant: what else tells it from another side. environment: variables that it runs with.
    plan: the clock's. error: why it failed on a GPU.
    """

    package: str
    precision: str
    run: Callable
    onednn: bool = True
    device: str = "cpu"
    variant: str = ""
    environment: dict = field(default_factory=dict)
    plan: clocks.Plan | None = None
    error: str | None = None
    SLOW: ClassVar[str] = " without oneDNN"  # the end of the name of a side that runs so

    @property
    def name(self):
        variant = "" if self.onednn else self.SLOW
        return f"{self.package} {self.precision}{variant}" + (f", {self.variant}" if self.variant else "")

    @contextlib.contextmanager
    def settings(self):
        """The global settings this side is measured with."""
        before = torch.get_float32_matmul_precision()
        variables = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        torch.set_float32_matmul_precision("high" if self.precision == "high" else "highest")
        if self.device != "cpu":  # or cuDNN's float32 would be TF32, its default
            tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, self.precision == "high"
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
            for name, value in variables.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
            if self.device != "cpu":
                torch.backends.cudnn.allow_tf32 = tf32

    def attempt(self, call):
        """call() under the side's settings. On a GPU a failure becomes the side's error, and the result None:
        a measurement there is expensive, and the other sides go on without this one.
        """
        if self.error:
            return None
        try:
            with self.settings():
                return call()
        except Exception as error:
            if self.device == "cpu":
                raise
            self.error = f"{type(error).__name__}: {error}"[:1000]
            return None


def under_autocast(forward, precision, device):
    """`forward`, under autocast where that is what the precision means."""
    if precision not in AUTOCAST:
        return forward

    @functools.wraps(forward)
    def cast(*arguments):
        with torch.autocast(device, AUTOCAST[precision]):
            return forward(*arguments)

    return cast


def timed(mark, forward, tensors, gradient=None):
    """Marks at the beginning, after y = forward(), and after the gradients of `tensors`.

    gradient: y's; or a function of y that has it ready, where its dtype is not known before.
    """
    begin = mark()
    y = forward()
    middle = mark()
    gradients = torch.autograd.grad(y, tensors, gradient(y) if callable(gradient) else gradient)
    end = mark()
    del gradients
    return begin, middle, end


def interleave(sides, repeats, slow_repeats=1, clock=None):
    """{side.name: its seconds, or (forward, forward + backward), of each counted round}, taking turns.

    Drift of the machine's speed then affects all sides alike. The order is reversed in every other round, so
    that no side always finds the caches that the same other one has left.
    The first round is for the clock to warm up. Sides without oneDNN stop after slow_repeats counted rounds;
    sides that fail on a GPU are left out.
    """
    clock = clock or clocks.WallClock()
    samples = {side.name: [] for side in sides}
    for turn in range(repeats + 1):
        for side in sides if turn % 2 else reversed(sides):
            if not side.onednn and turn > slow_repeats:
                continue
            if turn:
                samples[side.name].append(side.attempt(functools.partial(clock.sample, side.run, side.plan)))
            else:
                side.plan = side.attempt(functools.partial(clock.warm_up, side.run))
    for side in sides:
        if side.error:
            del samples[side.name]
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
    record["total_ms"] = spread(seconds)
    if side.plan:
        record |= {"calls_per_round": side.plan.calls, "host_ms": _ms(side.plan.host)}
        if side.plan.back_to_back is not None:
            record["back_to_back_ms"] = _ms(side.plan.back_to_back)
    return record | more


def failures(sides):
    """What a record says about the sides that failed: {} or {"failed": {side name: error}}."""
    failed = {side.name: side.error for side in sides if side.error}
    return {"failed": failed} if failed else {}


def add_rates(record, roof, flops=None, traffic=None):
    """Adds GFLOP/s from the counted flops of a call, or GB/s from its bytes, and their share of the roof."""
    seconds = record["total_ms"]["median"] / 1e3
    if flops:
        record["gflops"] = round(flops / seconds / 1e9, 1)
        record["roof_share"] = round(record["gflops"] / roof[f"{floors.base(record['precision'])}_gflops"], 3)
    if traffic:
        record["gb_s"] = round(traffic / seconds / 1e9, 2)
        record["roof_share"] = round(record["gb_s"] / roof["copy_gb_s"], 3)
    return record


def measure_roof(args, shapes):
    """The machine's own rates: of a CPU see `roof`; a GPU's also at the product shapes given."""
    if args.device != "cpu":
        names = dict.fromkeys(["fp32", "bf16", *map(floors.base, args.precision)])
        settings = {p: (DTYPES[p], Side("torch", p, None, device=args.device).settings()) for p in names}
        return gpu.measure_roof(args.quick, settings, shapes)
    return roof.of_cpu(args.quick, [p for p in args.precision if p in ("fp16", "fp64")])


def places(args):
    """(threads, roof) of each place to measure in: numbers of threads of the CPU, or the one GPU."""
    shapes = floors.products(args.preset, args.batch[0] * args.bptt, max(getattr(args, "vocab", [0])))
    for threads in args.threads:
        torch.set_num_threads(threads)
        yield threads, measure_roof(args, shapes)


def peer_precisions(args):
    """The precisions of the peers.

    On a CPU torch computes "high" as it does strict float32, and 16 bits may take it minutes a call, or fail:
    float32 is the peer of these then.
    """
    missing = set()
    if args.device == "cpu":
        missing = {"high", *(p for p in ("bf16", "fp16") if not roof.torch_has(DTYPES[p]))}
    return sorted({"fp32" if p in missing else p for p in args.precision}, reverse=True)


def comparisons(sides, cross=False):
    """Names (ours, peer) of a case's sides that compare: of like precision; with `cross` any against fp32.

    What no peer has, because torch lacks it there, is compared with strict float32.
    """
    peers = {name: side["precision"] for name, side in sides.items() if side["library"] != "ours"}
    for name, ours in sides.items():
        if ours["library"] != "ours":
            continue
        alone = ours["precision"] not in peers.values()
        wanted = {"fp32" if alone else ours["precision"], *(["fp32"] if cross else [])}
        yield from ((name, other) for other, precision in peers.items() if precision in wanted)


def ratio(ours, peer, key="total_ms"):
    """(p20, median, p80) of peer / ours over the rounds: how many times faster ours was."""
    pairs = zip(ours[key]["samples"], peer[key]["samples"], strict=False)  # a slow peer has fewer rounds
    return quantiles([theirs / mine for mine, theirs in pairs])


def publish(args, benchmark, threads, sizes, roof, cases, clock=None):
    """Prints the cases and writes them with where they were measured to RESULTS/speed-BENCHMARK-SIZES.json.

    The file's name ends with the machine's, see `file_name`.
    sizes: {"preset": ..., "batch": ...}. cases: {name: {"shapes": ..., "sides": {side name: figures}}}.
    """
    place = provenance(threads, args.device)
    where = f"{threads} threads" if args.device == "cpu" else place["device"]
    print(f"{benchmark}, {describe(sizes)}, {where}: ms, median (p20-p80)")
    for case, record in cases.items():
        _print_case(case, record, cross=crosses(benchmark), digits=1 if args.device == "cpu" else 3)
    record = {
        "benchmark": benchmark,
        "dtype": sorted({s["dtype"] for c in cases.values() for s in c["sides"].values()}),
    }
    record |= {**sizes, "repeats": args.repeats, "quick": args.quick, **place}
    record |= clock.describe() if clock else {}
    path = args.results / file_name(f"speed-{benchmark}", sizes, place)
    save(path, record | {"roof": roof, "cases": cases}, show=False)


def file_name(kind, sizes, place):
    """KIND-SIZES-MACHINE.json, and of a CPU the number of threads at the end; place: see `provenance`."""
    parts = [str(v) if k == "preset" else f"{k}{v}" for k, v in sizes.items()]
    threads = [] if "gpu" in place else [f"threads{place['threads']}"]
    return "-".join([kind, *parts, short_name(place), *threads]) + ".json"


def crosses(benchmark):
    """Whether all of ours are compared with strict float32 too."""
    return benchmark.startswith(("train_step", "way_back"))


def describe(sizes):
    return ", ".join(str(v) if k == "preset" else f"{k} {v}" for k, v in sizes.items())


def _print_case(case, record, cross, digits):
    print(f"  {case}")
    sides = record["sides"]
    for name, side in sides.items():
        total = side["total_ms"]
        shown = (f"{total[key]:.{digits}f}" for key in ("median", "p20", "p80"))
        line = "    {:32}{:>9} ({}-{})".format(name, *shown)
        if "forward_ms" in side:
            line += f"  forward {side['forward_ms']['median']:.{digits}f}"
        for key, unit in UNITS.items():
            if side.get(key) is not None:
                line += f"  {side[key]:{unit[1]}}{unit[0]}"
        print(line)
    for name, error in record.get("failed", {}).items():
        print(f"    {name:32} failed: {error.splitlines()[0]}")
    for ours, peer in comparisons(sides, cross):
        low, middle, high = ratio(sides[ours], sides[peer])
        print(f"    {ours} against {peer}: x{middle:.2f} ({low:.2f}-{high:.2f})")


# what a side's record may hold beside its times: its heading or unit, and its format
UNITS = {
    "tokens_per_s": (" tokens/s", ",.0f"),
    "gflops": (" GFLOP/s", ",.0f"),
    "gb_s": (" GB/s", ".1f"),
    "roof_share": (" of the roof", ".0%"),
    "us_per_step": (" us a time step", ".2f"),
    "forward_us_per_step": (" forward", ".2f"),
    "floor_ms": (" ms at least", ".3g"),
    "floor_share": (" of that", ".0%"),
    "host_ms": (" ms of the host", ".3f"),
    "back_to_back_ms": (" ms back to back", ".3f"),
    "peak_mb": (" MB at the peak", ",.0f"),
    "loss_error": (" error of the loss", ".1e"),
    "gradient_error": (" error of the gradient", ".1e"),
    "file_mb": (" MB in a file", ",.1f"),
    "output_error": (" from ours in fp32", ".1e"),
    "perplexity": (" perplexity", ",.2f"),
    "accuracy": (" accuracy", ".2%"),
}
