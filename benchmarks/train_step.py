"""A whole training step beside torch's and fastai's: python -m benchmarks.train_step

The language model's: forward, cross-entropy with AR and TAR, backward, clipping, fused AdamW. The
classifier's on a batch of documents of mixed lengths, all layers training. See benchmarks/README.md for what
each side is.
"""

import dataclasses
from functools import partial

import torch

from . import harness, steps
from .harness import PEER, Side
from .lstm import layer_flops, layer_sizes

SMALL = {"preset": "tiny", "batch": 2, "bptt": 4, "vocab": 100}  # the step before memory is measured


def step_flops(case):
    """Multiplications and additions of the matrix products over real tokens; the head's few are left out."""
    flops = sum(layer_flops(n_in, n_out, case.tokens) for n_in, n_out in layer_sizes(case.preset))
    if case.task == "lm":
        flops += 3 * 2 * case.tokens * case.vocab * case.sizes.emb_sz
    return flops


def contestants(args, task):
    """Every library in every precision it has, run unset. Ours alone has "high"."""
    sides = [Side("ours", p, None) for p in args.precision]
    peers = ["torch", "fastai"] if steps.have_fastai() else ["torch"]
    precisions = sorted({PEER[p] for p in args.precision}, reverse=True)
    sides += [Side(library, p, None) for library in peers for p in precisions]
    if args.slow_peers and "bf16" in precisions and task == "lm":
        sides.append(Side("torch", "bf16", None, onednn=False))
    return sides


def measure(case, args, threads, roof):
    sides = contestants(args, case.task)
    small = dataclasses.replace(case, **SMALL)
    memory = {
        side.name: harness.peak_memory(steps.memory_call, (small, side), (case, side), threads)
        for side in sides
        if side.onednn  # the slow peers would run twice more
    }
    errors = steps.gradient_errors(case, sides) if case.task == "lm" else {}
    built = {library: steps.build(case, library) for library in dict.fromkeys(s.package for s in sides)}
    running = [dataclasses.replace(s, run=partial(built[s.package].run, s.precision)) for s in sides]
    seconds = harness.interleave(running, args.repeats, args.slow_repeats)
    flops = step_flops(case)
    shapes = {"tokens": case.tokens, **dataclasses.asdict(case.sizes), "vocab": case.vocab}
    shapes |= {"ids (B, T)": [case.batch, case.bptt]} if case.task == "lm" else {"lengths (B)": case.lengths}
    record = {"shapes": shapes, "flops": flops, "sides": {}}
    for side in running:
        figures = harness.figures(side, seconds[side.name])
        figures["tokens_per_s"] = round(1e3 * case.tokens / figures["total_ms"]["median"], 1)
        figures["peak_mb"] = memory.get(side.name)
        if errors:
            figures["gradient_error"] = errors[side.name]
        record["sides"][side.name] = harness.add_rates(figures, roof, flops)
    return record


def main():
    parser = harness.options(__doc__, repeats=4)
    harness.add_slow_peers(parser)
    parser.add_argument("--task", nargs="+", choices=["lm", "classifier"], default=["lm", "classifier"])
    parser.add_argument("--vocab", nargs="+", type=harness.positive, default=[30000], help="words")
    args = harness.parse(parser)
    if not steps.have_fastai():
        print("fastai is not installed: measuring without it")
    for threads in args.threads:
        torch.set_num_threads(threads)  # after the import of fastai, which sets them
        roof = harness.measure_roof(args.quick)
        for batch in args.batch:
            for vocab in args.vocab:
                for task in args.task:
                    case = steps.Case(task, args.preset, batch, args.bptt, vocab)
                    cases = {f"{task} step": measure(case, args, threads, roof)}
                    sizes = {"preset": args.preset, "batch": batch, "bptt": args.bptt, "vocab": vocab}
                    harness.publish(args, f"train_step-{task}", threads, sizes, roof, cases)


if __name__ == "__main__":
    main()
