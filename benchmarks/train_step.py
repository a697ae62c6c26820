"""A whole training step beside torch's and fastai's: python -m benchmarks.train_step

The language model's: forward, cross-entropy with AR and TAR, backward, clipping, fused AdamW. The
classifier's on a batch of documents of mixed lengths, all layers training. See benchmarks/README.md for what
each side is.
"""

import dataclasses
from functools import partial

from . import arguments, clocks, floors, harness, memory, steps
from .floors import layer_flops, layer_sizes
from .harness import Side

ON_GPU = ("fp32", "high", "bf16", "fp16")
SMALL = {"preset": "tiny", "batch": 2, "bptt": 4, "vocab": 100}  # the step before memory is measured


def step_flops(case):
    """Multiplications and additions of the matrix products over real tokens; the head's few are left out."""
    flops = sum(layer_flops(n_in, n_out, case.tokens) for n_in, n_out in layer_sizes(case.preset))
    if case.task == "lm":
        flops += floors.softmax_flops(case.vocab, case.sizes.emb_sz, case.tokens)
    return flops


def contestants(args, task):
    """Every library in every precision it has, run unset."""
    sides = [Side("ours", p, None, device=args.device) for p in args.precision]
    peers = ["torch", "fastai"] if steps.have_fastai() else ["torch"]
    precisions = harness.peer_precisions(args)
    sides += [Side(library, p, None, device=args.device) for library in peers for p in precisions]
    if args.slow_peers and "bf16" in precisions and task == "lm":
        sides.append(Side("torch", "bf16", None, onednn=False))
    return sides


def measure(case, args, threads, roof, clock):
    sides = contestants(args, case.task)
    small = dataclasses.replace(case, **SMALL)
    peaks = {
        side.name: side.attempt(
            partial(memory.peak, steps.memory_call, (small, side), (case, side), threads, args.device)
        )
        for side in sides
        if side.onednn  # the slow peers would run twice more
    }
    errors = steps.gradient_errors(case, sides) if case.task == "lm" else {}
    built = {library: steps.build(case, library) for library in dict.fromkeys(s.package for s in sides)}
    running = [
        dataclasses.replace(s, run=partial(built[s.package].run, s.precision), error=None) for s in sides
    ]
    seconds = harness.interleave(running, args.repeats, args.slow_repeats, clock)
    flops = step_flops(case)
    shapes = {"tokens": case.tokens, **dataclasses.asdict(case.sizes), "vocab": case.vocab}
    shapes |= {"ids (B, T)": [case.batch, case.bptt]} if case.task == "lm" else {"lengths (B)": case.lengths}
    record = {"shapes": shapes, "flops": flops, "sides": {}}
    for side in running:
        if side.name not in seconds:
            continue
        figures = harness.figures(side, seconds[side.name])
        figures["tokens_per_s"] = round(1e3 * case.tokens / figures["total_ms"]["median"], 1)
        figures["peak_mb"] = peaks.get(side.name)
        if errors:
            figures["gradient_error"] = errors[side.name]
        harness.add_rates(figures, roof, flops)
        if case.device != "cpu":
            figures = floors.add_floor(figures, roof, flops, floors.step_bytes(built["ours"].parameters))
        record["sides"][side.name] = figures
    return record | harness.failures([*sides, *running])


def main():
    parser = arguments.options(__doc__, on_gpu=ON_GPU, repeats=3)
    arguments.add_slow_peers(parser)
    parser.add_argument("--task", nargs="+", choices=["lm", "classifier"], default=["lm", "classifier"])
    parser.add_argument("--vocab", nargs="+", type=arguments.positive, default=[30000], help="words")
    args = arguments.parse(parser)
    if not steps.have_fastai():
        print("fastai is not installed: measuring without it")
    clock = clocks.make(args.device, whole_steps=True)
    for threads, roof in harness.places(args):  # after the import of fastai, which sets the threads
        for batch in args.batch:
            for vocab in args.vocab:
                for task in args.task:
                    case = steps.Case(task, args.preset, batch, args.bptt, vocab, args.device)
                    cases = {f"{task} step": measure(case, args, threads, roof, clock)}
                    sizes = {"preset": args.preset, "batch": batch, "bptt": args.bptt, "vocab": vocab}
                    harness.publish(args, f"train_step-{task}", threads, sizes, roof, cases, clock)


if __name__ == "__main__":
    main()
