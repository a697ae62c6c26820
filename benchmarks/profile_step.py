"""Which kernels a training step of the language model runs: python -m benchmarks.profile_step

Each record, RESULTS/profile-SIZES-GPU.json, has for ours and for stock torch's the number of kernels, copies
and fills of a step, the kernels that take longest, and how much of the time from the first to the last of
them the GPU was busy.
"""

from collections import defaultdict
from functools import partial

from . import arguments, gpu, harness, steps
from .harness import Side
from .record import provenance, save

STEPS, WARM_UPS = 3, 3
TOP = 30
KINDS = {"kernel": "kernels", "gpu_memcpy": "copies", "gpu_memset": "fills"}  # a trace's categories


def profile(step, precision):
    """The trace events, as torch.profiler writes them, of STEPS steps."""
    for _ in range(WARM_UPS):
        step.run(precision, lambda: None)
    return gpu.trace(lambda: [step.run(precision, lambda: None) for _ in range(STEPS)])


def summarise(events, steps):
    """What happened on the GPU in one of `steps` steps; times in microseconds."""
    mine = [e for e in events if e.get("cat") in KINDS and e.get("ph") == "X"]
    if not mine:
        raise RuntimeError("the profiler saw nothing on the GPU")
    summary = {name: round(sum(e["cat"] == cat for e in mine) / steps, 1) for cat, name in KINDS.items()}
    begin, end = min(e["ts"] for e in mine), max(e["ts"] + e["dur"] for e in mine)
    summary["us"] = round((end - begin) / steps, 1)
    summary["busy_share"] = round(_covered(mine) / (end - begin), 3)
    durations = defaultdict(list)
    for event in mine:
        durations[event["name"]].append(event["dur"])
    total = sum(map(sum, durations.values()))
    ranked = sorted(durations.items(), key=lambda item: -sum(item[1]))[:TOP]
    summary["top"] = [
        {
            "name": name[:200],
            "calls": round(len(found) / steps, 1),
            "us": round(sum(found) / steps, 1),
            "us_each": round(sum(found) / len(found), 2),
            "share": round(sum(found) / total, 4),
        }
        for name, found in ranked
    ]
    return summary


def _covered(events):
    """Microseconds in which at least one of the events was under way."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def main():
    parser = arguments.options(__doc__, on_gpu=("bf16",), device="cuda")
    parser.add_argument("--vocab", nargs="+", type=arguments.positive, default=[30000], help="words")
    args = arguments.parse(parser)
    if args.device != "cuda":
        parser.error("argument --device: kernels are of cuda")
    place = provenance(args.threads[0], args.device)
    for batch in args.batch:
        for vocab in args.vocab:
            case = steps.Case("lm", args.preset, batch, args.bptt, vocab, args.device)
            sides = [Side(n, p, None, device=args.device) for n in ("ours", "torch") for p in args.precision]
            found = {side.name: side.attempt(partial(_one, case, side)) for side in sides}
            found = {name: summary for name, summary in found.items() if summary}
            sizes = {"preset": args.preset, "batch": batch, "bptt": args.bptt, "vocab": vocab}
            _show(harness.describe(sizes), found, harness.failures(sides))
            name = harness.file_name("profile", sizes, place)
            record = {"benchmark": "profile_step", **sizes, "steps": STEPS, **place, "sides": found}
            save(args.results / name, record | harness.failures(sides), show=False)


def _one(case, side):
    return summarise(profile(steps.build(case, side.package), side.precision), STEPS)


def _show(sizes, found, failed):
    for name, s in found.items():
        counts = ", ".join(f"{s[kind]:g} {kind}" for kind in KINDS.values())
        print(f"{name}, {sizes}, a step: {counts}; {s['us']:,.0f} us, of which busy {s['busy_share']:.0%}")
        for k in s["top"]:
            print(f"  {k['us']:10,.1f} us {k['share']:6.1%} {k['calls']:7g} x {k['name'][:70]}")
    for name, error in failed.get("failed", {}).items():
        print(f"{name} failed: {error.splitlines()[0]}")


if __name__ == "__main__":
    main()
