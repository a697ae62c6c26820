"""Everything that wants a GPU, in one go: python -m benchmarks.on_gpu

    build     the package in place, unless it is there with CUDA kernels that this GPU can run
    test      the tests on the GPU, those of the CUDA kernels first
    bench     the speed programs; their records are copied to DIR
    sanitize  compute-sanitizer's memcheck and racecheck over every op at small sizes
    profile   the kernels of a training step

Every command is a process of its own with a time limit and writes to DIR/STAGE.log; the next one follows
whatever its outcome. A stage leaves time for the next ones. DIR/summary.json, and with --archive one file of
all that is in DIR, are rewritten after each command, so that a run cut short leaves what it had.
Exit code 1 if build, test or sanitize failed.
"""

import argparse
import datetime
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from . import gpu
from .arguments import positive
from .on_gpu_stages import MUST_PASS, PARTS, ROOT, STAGES, Context, has_workers, keep
from .record import write
from .run_limited import run_limited

OUT = Path("build/on_gpu")
LEAST = 5  # seconds: with less than this left nothing is started
TAIL = 15  # lines of a command's output in the summary


class Report:
    """What is known so far, and its file."""

    def __init__(self, out, facts):
        self.path, self.content = out / "summary.json", {**facts, "stages": {}}
        self.begun = time.time()
        self.write()

    def stage(self, name):
        self.content["stages"][name] = stage = {"outcome": "running", "seconds": 0.0, "commands": []}
        self.write()
        return stage

    def write(self):
        write(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


def run_stage(name, plan, context, report, deadline):
    """Runs one stage's commands one after the other; outcome: passed, failed, timed out, skipped, not run.

    plan(context) gives the commands, or a sentence that says why there is nothing to do. deadline: of
    time.monotonic().
    """
    stage, begin = report.stage(name), time.monotonic()
    try:
        commands = plan(context)
    except Exception as error:  # an error in one stage must not stop the next
        commands, stage["outcome"], stage["why"] = [], "failed", f"{type(error).__name__}: {error}"
    if isinstance(commands, str):
        commands, stage["outcome"], stage["why"] = [], "skipped", commands
    log = context.out / f"{name}.log"
    log.write_bytes(b"")
    for command in commands:
        left = deadline - time.monotonic()
        print(f"{name}: {command.name} ...", flush=True)
        entry = {"name": command.name, "command": " ".join(command.words), "outcome": "not run"}
        stage["commands"].append(entry)
        if left > LEAST:
            entry |= run_limited(command.words, min(command.limit, left), log, ROOT, command.environment)
            entry["tail"] = entry["tail"][-TAIL:]
            if command.after:
                command.after(entry["outcome"])
        print(f"  {entry['outcome']}, {entry.get('seconds', 0):.0f} s", flush=True)
        if command.show:
            print("\n".join("  " + line for line in entry.get("tail", [])), flush=True)
        report.write()
        keep(context, report.begun)
    if commands:
        outcomes = {c["outcome"] for c in stage["commands"]}
        order = ("failed", "timed out", "not run", "passed")
        stage["outcome"] = next(outcome for outcome in order if outcome in outcomes)
    stage["seconds"] = round(time.monotonic() - begin, 1)
    report.write()


def run(stages, context, facts, limit):
    """Runs {name: plan} within `limit` seconds and prints the table; -> the exit code."""
    context.out.mkdir(parents=True, exist_ok=True)
    report, deadline = Report(context.out, facts), time.monotonic() + limit
    try:
        for name, plan in stages.items():
            now = time.monotonic()
            part = 1.0 if name == list(stages)[-1] else PARTS[name]
            run_stage(name, plan, context, report, now + part * (deadline - now))
    finally:  # also if this program is terminated
        keep(context, report.begun)
    _show(report.content["stages"])
    print(f"logs and records: {context.archive or context.out}")
    bad = [n for n, s in report.content["stages"].items() if s["outcome"] not in ("passed", "skipped")]
    return int(any(name in MUST_PASS for name in bad))


def _show(stages):
    for name, stage in stages.items():
        for c in stage["commands"]:
            if c["outcome"] not in ("passed", "not run"):
                print(f"\n{name}: {c['name']} {c['outcome']}; the end of {name}.log there:")
                print("\n".join("  " + line[:200] for line in c["tail"]))
    print(f"\n{'stage':10}{'command':34}{'outcome':12}{'s':>6}")
    for name, stage in stages.items():
        if not stage["commands"]:
            print(f"{name:10}{'':34}{stage['outcome']:12}{'':>6}  {stage.get('why', '')}")
        for c in stage["commands"]:
            last = next((line.strip() for line in reversed(c.get("tail", [])) if line.strip()), "")
            print(f"{name:10}{c['name']:34}{c['outcome']:12}{c.get('seconds', 0):6.0f}  {last[:60]}")


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--stages", default=",".join(STAGES), help="comma-separated, in this order")
    p.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="logs, summary.json, records")
    p.add_argument("--archive", type=Path, metavar="FILE.tgz", help="DIR in one file, rewritten as DIR grows")
    p.add_argument("--limit", type=float, default=3600, help="seconds for everything")
    p.add_argument("--quick", action="store_true", help="the speed programs' --quick: small sizes")
    p.add_argument("--workers", type=positive, default=1, help="processes of pytest, with pytest-xdist")
    p.add_argument("--commit", help="what the records call the commit where there is no .git")
    args = p.parse_args(argv)
    wrong = [name for name in args.stages.split(",") if name not in STAGES]
    if wrong:
        p.error(f"argument --stages: {wrong[0]!r} is none of {', '.join(STAGES)}")
    if args.workers > 1 and not has_workers():
        p.error("argument --workers: more than one needs pytest-xdist: pip install pytest-xdist")
    if not args.limit > LEAST:
        p.error(f"argument --limit: must be more than {LEAST} seconds, got {args.limit:g}")
    return args


def main(argv=None):
    args = parse(argv)
    if gpu.missing():
        print(f"on_gpu: {gpu.missing()}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a child is ended too
    if args.commit:
        os.environ["ULMFIT_FAST_COMMIT"] = args.commit
    card = torch.cuda.get_device_properties("cuda")
    capability, archive = (card.major, card.minor), args.archive and args.archive.resolve()
    context = Context(args.out.resolve(), card.name, capability, args.quick, args.workers, archive)
    facts = {
        "device": card.name,
        "torch": torch.__version__,
        "command": " ".join(["python -m benchmarks.on_gpu", *(sys.argv[1:] if argv is None else argv)]),
        "begun": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    chosen = args.stages.split(",")
    return run({name: plan for name, plan in STAGES.items() if name in chosen}, context, facts, args.limit)


if __name__ == "__main__":
    sys.exit(main())
