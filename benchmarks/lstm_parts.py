"""What a step of the persistent recurrence takes, and its parts alone: python -m benchmarks.lstm_parts

Builds the kernels several times with nvcc, each time with other parts left out, and times them by themselves
in bf16. `rest` is in no part: the cells, what they load and store, the barriers within a block. Where
the plan takes clusters on the way back, all but `all, sums in L2` run in them, and `rest` has their barriers
and the sums as well. `relaxed polls` and `flags apart` are other ways to wait, to compare with `all`.
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
# the longest to compile first
SOURCES = [f"csrc/kernels/cuda/lstm_persistent{end}.cu" for end in ("_backward", "")]
SOURCES += ["benchmarks/lstm_parts.cu"]
# ULMFIT_PERSISTENT_PARTS: 1 blocks wait for one another's flags, 2 they load h and dgates, 4 they multiply,
# 8 they are in clusters where the card has them, 16 they poll flags with relaxed loads
PARTS = {"all": 15, "all, sums in L2": 7, "barrier": 9, "exchange": 10, "barrier + exchange": 11}
PARTS |= {"products": 12, "rest": 8, "all, relaxed polls": 31}
VARIANTS = {name: [f"-DULMFIT_PERSISTENT_PARTS={parts}"] for name, parts in PARTS.items()}
VARIANTS["all, flags apart"] = ["-DULMFIT_FLAG_BYTES=16"]  # 8 of them in a line of 128 bytes
SECONDS = 60  # for a program
SHAPES = [(1152, 64, 72), (400, 64, 72), (1024, 64, 72), (768, 16, 72), (1152, 16, 72)]  # H, B, T


def compiler():
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", "")]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def compile_command(nvcc, architecture, macros, source, target):
    options = ["-O3", "-std=c++20", f"-arch={architecture}", "-DULMFIT_ONLY_BF16", *macros, "-Icsrc"]
    return [nvcc, *options, "-c", source, "-o", str(target)]


def build(folder, architecture):
    """{variant: program}, all sources compiled side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = compiler()
    objects = {name: [folder / f"{i}_{Path(s).stem}.o" for s in SOURCES] for i, name in enumerate(VARIANTS)}
    programs = {name: folder / f"lstm_parts_{i}" for i, name in enumerate(VARIANTS)}
    compile_ = [
        compile_command(nvcc, architecture, VARIANTS[name], source, files[i])
        for i, source in enumerate(SOURCES)
        for name, files in objects.items()
    ]
    link = [[nvcc, *objects[name], "-o", program] for name, program in programs.items()]
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for commands in (compile_, link):
            list(pool.map(lambda words: subprocess.run(words, cwd=ROOT, check=True), commands))
    return programs


def measure(programs, shape):
    """{variant: microseconds of a step}, or why its program failed."""
    found = {}
    for name, program in programs.items():
        words = [program, *map(str, shape)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            found[name] = {"failed": f"not done after {SECONDS} seconds"}
            continue
        found[name] = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr.strip()}
    return found


def show(case, parts):
    print(f"{case}: microseconds of a step, forward and backward")
    for name, figures in parts.items():
        if "failed" in figures:
            print(f"    {name:20} failed: {figures['failed']}")
        else:
            print(f"    {name:20} {figures['forward_us']:8.2f} {figures['backward_us']:8.2f}", flush=True)


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
    place, cases = provenance(torch.get_num_threads(), args.device), {}
    for shape in shapes:
        case = "H {}, batch {}, {} steps".format(*shape)
        cases[case] = measure(programs, shape)
        show(case, cases[case])
        # keeps what was measured if time runs out
        record = {"benchmark": "lstm_parts", "dtype": ["bfloat16"], **place, "cases": cases}
        save(args.results / f"lstm-parts-{gpu_name(card.name)}.json", record)
    return int(any("failed" in figures for parts in cases.values() for figures in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
