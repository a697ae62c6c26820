"""What a step of the persistent recurrence takes, and its parts alone: python -m benchmarks.lstm_parts

Builds the kernels several times with nvcc, each time with other parts left out, and times them by themselves
in bf16. `rest` is what no part is in: the cells, what they load and store, the barriers within a block. Where
the plan takes clusters on the way back, all but `all, sums in L2` run in them, and `rest` has their barriers
and the sums as well.
"""

import argparse
import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from . import gpu
from .arguments import positive
from .machine import gpu_name
from .record import RESULTS, provenance, save

ROOT = Path(__file__).parent.parent
SOURCES = ["benchmarks/lstm_parts.cu"]
SOURCES += [f"csrc/kernels/cuda/lstm_persistent{end}.cu" for end in ("", "_backward")]
# ULMFIT_PERSISTENT_PARTS: 1 blocks wait for one another's flags, 2 they load h and dgates, 4 they multiply,
# 8 they are in clusters where the card has them
VARIANTS = {"all": 15, "all, sums in L2": 7, "barrier": 9, "exchange": 10, "barrier + exchange": 11}
VARIANTS |= {"products": 12, "rest": 8}
SHAPES = [(1152, 64, 72), (400, 64, 72), (1024, 64, 72), (768, 16, 72), (1152, 16, 72)]  # H, B, T


def compiler():
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", "")]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def build_command(nvcc, architecture, parts, program):
    options = ["-O3", "-std=c++20", f"-arch={architecture}", f"-DULMFIT_PERSISTENT_PARTS={parts}", "-Icsrc"]
    return [nvcc, *options, *SOURCES, "-o", str(program)]


def build(folder, architecture):
    """{variant: program}, built side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    programs = {name: folder / f"lstm_parts_{parts}" for name, parts in VARIANTS.items()}
    commands = [build_command(compiler(), architecture, VARIANTS[n], p) for n, p in programs.items()]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda words: subprocess.run(words, cwd=ROOT, check=True), commands))
    return programs


def measure(programs, shape):
    """{variant: microseconds of a step}, or why a program failed."""
    found = {}
    for name, program in programs.items():
        done = subprocess.run([program, *map(str, shape)], capture_output=True, text=True, timeout=60)
        found[name] = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr.strip()}
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", choices=["cuda"], default="cuda")
    p.add_argument("--shape", nargs=3, type=positive, metavar=("H", "B", "T"), help="default: several")
    p.add_argument("--quick", action="store_true", help="the first shape alone")
    p.add_argument("--results", type=Path, default=RESULTS, help="where the record goes")
    args = p.parse_args()
    if gpu.missing():
        p.error(f"argument --device: {gpu.missing()}")
    if compiler() is None:
        p.error("nvcc is neither in CUDA_HOME nor on PATH, and the parts have to be compiled")
    card = torch.cuda.get_device_properties("cuda")
    programs = build(ROOT / "build" / "lstm_parts", f"sm_{card.major}{card.minor}")
    shapes = [tuple(args.shape)] if args.shape else SHAPES[: 1 if args.quick else None]
    cases = {"H {}, batch {}, {} steps".format(*shape): measure(programs, shape) for shape in shapes}
    for case, parts in cases.items():
        print(f"{case}: microseconds of a step, forward and backward")
        for name, figures in parts.items():
            if "failed" in figures:
                print(f"    {name:20} failed: {figures['failed']}")
            else:
                print(f"    {name:20} {figures['forward_us']:8.2f} {figures['backward_us']:8.2f}")
    place = provenance(torch.get_num_threads(), args.device)
    record = {"benchmark": "lstm_parts", "dtype": ["bfloat16"], **place, "cases": cases}
    save(args.results / f"lstm-parts-{gpu_name(card.name)}.json", record)
    return int(any("failed" in figures for parts in cases.values() for figures in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
