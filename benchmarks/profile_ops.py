"""What a training step on a CPU spends its time on, op by op: python -m benchmarks.profile_ops

Each record, RESULTS/profile_ops-SIZES-MACHINE-threadsN.json, has the ops of a step of ours and of stock
torch's that take longest. Beside those of ours that multiply matrices stands the least time for it: their
products at the measured roof.
"""

import re
import time
from collections import defaultdict
from functools import partial

import torch

from . import arguments, harness, roof, steps
from .floors import layer_flops, layer_sizes, softmax_flops
from .harness import Side
from .record import provenance, save

STEPS, WARM_UPS = 3, 2
TOP = 12


def ops_of(run):
    """[(op, calls, ms)] of one run, the longest first; an op's time is without that of the ops it calls."""
    for _ in range(WARM_UPS):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            run()
    found = defaultdict(lambda: [0, 0.0])
    for event in profiler.key_averages():
        # torch books our forwards under the functions that it generates for their gradients
        name = re.sub(r"^GeneratedBackwardFor_ulmfit_fast_(\w+)_default$", r"ulmfit_fast::\1", event.key)
        found[name][0] = max(found[name][0], event.count / STEPS)
        found[name][1] += event.self_cpu_time_total / STEPS / 1e3
    return sorted(((name, *row) for name, row in found.items()), key=lambda row: -row[2])


def products_of(case):
    """{op: operations of its matrix products} in a language model's step of ours."""
    layers = sum(layer_flops(n_in, n_out, case.tokens) for n_in, n_out in layer_sizes(case.preset))
    return {
        "ulmfit_fast::lstm": layers / 3,
        "ulmfit_fast::lstm_backward": 2 * layers / 3,
        "ulmfit_fast::linear_cross_entropy": softmax_flops(case.vocab, case.sizes.emb_sz, case.tokens),
    }


def summarise(rows, gflops, products):
    """The record of a side, rows as `ops_of` gives them; gflops: the roof; products: {} if not counted."""
    total = sum(ms for _, _, ms in rows)
    top = []
    for name, calls, ms in [*rows[:TOP], *(row for row in rows[TOP:] if row[0] in products)]:
        row = {"op": name, "calls": round(calls, 1), "ms": round(ms, 2), "share": round(ms / total, 4)}
        if name in products:
            row |= {"flops": products[name], "least_ms": round(products[name] / gflops / 1e6, 2)}
        top.append(row)
    return {"ms": round(total, 1), "top": top}


def main(argv=None):
    parser = arguments.options(__doc__, on_gpu=())
    parser.add_argument("--vocab", nargs="+", type=arguments.positive, default=[30000], help="words")
    args = arguments.parse(parser, argv)
    if args.device != "cpu":
        parser.error("argument --device: a GPU's kernels are for benchmarks.profile_step")
    for threads in args.threads:
        torch.set_num_threads(threads)
        rates = roof.of_cpu(args.quick)
        for batch in args.batch:
            for vocab in args.vocab:
                _measure(steps.Case("lm", args.preset, batch, args.bptt, vocab), args, threads, rates)


def _measure(case, args, threads, rates):
    sides = [Side("ours", p, None) for p in args.precision]
    sides += [Side("torch", p, None) for p in harness.peer_precisions(args)]
    found = {}
    for side in sides:
        step = steps.build(case, side.package)
        with side.settings():
            rows = ops_of(partial(step.run, side.precision, time.perf_counter))
        products = products_of(case) if side.package == "ours" else {}
        found[side.name] = summarise(rows, rates[f"{side.precision}_gflops"], products)
    sizes = {"preset": case.preset, "batch": case.batch, "bptt": case.bptt, "vocab": case.vocab}
    _show(harness.describe(sizes), found)
    place = provenance(threads)
    name = harness.file_name("profile_ops", sizes, place)
    record = {"benchmark": "profile_ops", **sizes, "steps": STEPS, **place, "roof": rates, "sides": found}
    save(args.results / name, record, show=False)


def _show(sizes, found):
    for name, side in found.items():
        print(f"{name}, {sizes}, a step: {side['ms']:,.0f} ms")
        for row in side["top"]:
            least = f"  {row['least_ms']:8,.1f} ms at least" if "least_ms" in row else ""
            op = f"{row['calls']:6g} x {row['op'][:50]:50}"
            print(f"  {row['ms']:9,.1f} ms {row['share']:6.1%} {op}{least}")


if __name__ == "__main__":
    main()
