"""What a training step on a CPU spends its time on, op by op: python -m benchmarks.profile_ops

Each record, RESULTS/profile_ops-SIZES-ISA-threadsN.json, has the ops of a step of ours and of stock torch's that
take longest. Beside those of ours whose work can be counted stands the least time for it: their matrix products
at the measured roof, or the bytes they cannot but move at the rate of a copy, whichever is longer.
"""

import time
from functools import partial

import torch

from . import arguments, floors, harness, roof, steps
from .floors import layer_flops, layer_sizes, softmax_flops
from .harness import Side
from .record import provenance, save

STEPS, WARM_UPS = 3, 2
TOP = 12


def ops_of(run):
    """[(name, calls, ms)] of one run, the longest first; an op's time is without that of the ops it calls."""
    for _ in range(WARM_UPS):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            run()
    rows = [(e.key, e.count / STEPS, e.self_cpu_time_total / STEPS / 1e3) for e in profiler.key_averages()]
    return sorted(rows, key=lambda row: -row[2])


def least_work(case, parameters):
    """{op: (operations, bytes)} of a language model's step, forward and backward each on their own."""
    layers = sum(layer_flops(n_in, n_out, case.tokens) for n_in, n_out in layer_sizes(case.preset))
    weights = floors.nbytes(*parameters)
    words = case.vocab * case.sizes.emb_sz * 4
    return {
        "ulmfit_fast::lstm": (layers / 3, 0),
        "ulmfit_fast::lstm_backward": (2 * layers / 3, 0),
        "ulmfit_fast::linear_cross_entropy": (softmax_flops(case.vocab, case.sizes.emb_sz, case.tokens), 0),
        "ulmfit_fast::embedding_dropout_backward": (0, words),  # the dense gradient, written
        "aten::_fused_adamw_": (0, 7 * weights),  # all four read; weight and both moments written
        "aten::linalg_vector_norm": (0, weights),  # for clipping
    }


def summarise(rows, precision, rates, least):
    """The record of a side, rows as `ops_of` gives them; least: {} where nothing is counted."""
    total = sum(ms for _, _, ms in rows)
    top = []
    for name, calls, ms in [*rows[:TOP], *(row for row in rows[TOP:] if row[0] in least)]:
        row = {"op": name, "calls": round(calls, 1), "ms": round(ms, 2), "share": round(ms / total, 4)}
        if name in least:
            flops, traffic = least[name]
            floor = max(flops / rates[f"{precision}_gflops"], traffic / rates["copy_gb_s"]) / 1e6
            row |= {"flops": flops, "bytes": traffic, "least_ms": round(floor, 2)}
        top.append(row)
    return {"precision": precision, "ms": round(total, 1), "top": top}


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
        least = least_work(case, step.parameters) if side.package == "ours" else {}
        found[side.name] = summarise(rows, side.precision, rates, least)
    sizes = {"preset": case.preset, "batch": case.batch, "bptt": case.bptt, "vocab": case.vocab}
    _show(harness.describe(sizes), found)
    place = provenance(threads)
    name = harness.file_name("profile_ops", sizes, f"{place['isa']}-threads{threads}")
    record = {"benchmark": "profile_ops", **sizes, "steps": STEPS, **place, "roof": rates, "sides": found}
    save(args.results / name, record, show=False)


def _show(sizes, found):
    for name, side in found.items():
        print(f"{name}, {sizes}, a step: {side['ms']:,.0f} ms")
        for row in side["top"]:
            least = f"  {row['least_ms']:8,.1f} ms at least" if "least_ms" in row else ""
            print(f"  {row['ms']:9,.1f} ms {row['share']:6.1%} {row['calls']:6g} x {row['op'][:50]:50}{least}")


if __name__ == "__main__":
    main()
