"""The commands of each stage of `on_gpu`, with their time limits in seconds."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from .machine import gpu_name
from .record import RESULTS, write

ROOT = Path(__file__).parent.parent
MUST_PASS = ("build", "test", "sanitize")
BUILT = ROOT / "build" / "on_gpu_sources.json"  # {source: digest} of the last build that was made here
SANITIZED = 9  # compute-sanitizer's exit code where it found something
PERSISTENT = {"ULMFIT_FAST_RECURRENCE": "auto"}  # the persistent recurrence wherever it can be
PERSISTENT_TESTS = "tests/test_lstm_persistent.py"
OURS = "kns=ulmfit_fast"  # the kernels of our namespace: racecheck has nothing to say about libraries'


@dataclass(frozen=True)
class Context:
    out: Path
    device: str  # the GPU's name
    capability: tuple[int, int]
    quick: bool = False
    workers: int = 1  # processes of pytest


@dataclass(frozen=True)
class Command:
    name: str
    words: list[str]
    limit: float
    environment: dict = field(default_factory=dict)
    after: Callable | None = None  # called with the outcome


def python(*words):
    return [sys.executable, *words]


# exits with 1 unless the package imports and has kernels for the compute capability in its arguments
CHECK = (
    "import sys, ulmfit_fast; from ulmfit_fast._info import runs_on; i = ulmfit_fast.info(); print(i); "
    "c = tuple(map(int, sys.argv[1:3])); sys.exit(not (i.cuda_built and runs_on(i.architectures, c)))"
)


def build(context):
    """In place for this GPU; a sentence where that has been done."""
    sources = {str(p.relative_to(ROOT)): _digest(p) for p in _sources()}
    before = json.loads(BUILT.read_text(encoding="utf-8")) if BUILT.exists() else {}
    changed = [name for name in sources if before and sources[name] != before.get(name)]
    check = python("-c", CHECK, *map(str, context.capability))
    if not changed and not set(before) - set(sources) and _succeeds(check):
        return "there already, with CUDA kernels for this GPU"
    for name in changed:  # times may lie where files were copied here: what differs is to be compiled
        os.utime(ROOT / name)
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or "{}.{}".format(*context.capability)
    environment = {"TORCH_CUDA_ARCH_LIST": wanted, "ULMFIT_FAST_CUDA": "1"}
    words = python("setup.py", "build_ext", "--inplace")
    return [
        Command("setup.py build_ext", words, 400, environment, partial(_remember, sources)),
        Command("import, CUDA kernels", check, 90),
    ]


def _sources():
    found = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    return sorted([*found, ROOT / "setup.py", ROOT / "tools" / "build_plan.py"])


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _remember(sources, outcome):
    if outcome == "passed":
        write(BUILT, json.dumps(sources, indent=1).encode())


def _succeeds(command):
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=90).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def test(context):
    """The CUDA tests, then all others on the GPU. The programs of `bench` are left to `bench`."""
    tests = ROOT / "tests"
    options = ["--maxfail=30", "--tb=short", "-rfE", "--durations=8", "-o", "faulthandler_timeout=90"]
    workers = ["-n", str(context.workers)] if context.workers > 1 else []
    own = Command("tests/test_cuda.py", python("-m", "pytest", "tests/test_cuda.py", *options), 240)
    names = "test_cuda", "test_lstm_persistent", "test_benchmarks", "test_benchmarks_gpu"
    left_out = [f"--ignore=tests/{name}.py" for name in names]
    words = python("-m", "pytest", "tests", "--device", "cuda", *left_out, *options, *workers)
    files = [f"tests/test_{name}.py" for name in ("lstm", "cuda", "cuda_runtime", "nn", "graphed")]
    auto = python("-m", "pytest", *files, "--device", "cuda", *options, *workers)
    return [
        *([own] if (tests / "test_cuda.py").exists() else []),
        Command("tests/test_lstm_persistent.py", python("-m", "pytest", PERSISTENT_TESTS, *options), 240),
        Command("tests on the GPU", words, 420),
        Command("tests, persistent recurrence", auto, 300, PERSISTENT),
    ]


def sanitize(context):
    """Out-of-bounds accesses and races in shared memory; a sentence where the tool is missing."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    tool = shutil.which("compute-sanitizer", path=path)
    if tool is None:
        return "compute-sanitizer is not on PATH nor in CUDA_HOME: install it with the CUDA toolkit"

    def command(name, kind, limit, *options, layers=False, environment=None):
        watch = [tool, "--tool", kind, "--error-exitcode", str(SANITIZED), "--report-api-errors", "no"]
        watch += ["--launch-timeout", "120", "--target-processes", "all", *options]
        small = python("-m", "benchmarks.on_gpu_small", *(["--layers"] if layers else []))
        # each tensor an allocation of its own: inside torch's large ones every access is in bounds
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | (environment or {})
        return Command(name, [*watch, *small], limit, variables)

    def persistent(kind):
        options = ["--kernel-name", OURS]
        return command(f"{kind}, persistent", kind, 200, *options, layers=True, environment=PERSISTENT)

    return [
        command("memcheck, small sizes", "memcheck", 200),
        command("memcheck, layers", "memcheck", 120, "--kernel-name", OURS, layers=True),
        command("racecheck, small sizes", "racecheck", 200, "--kernel-name", OURS),
        command("racecheck, layers", "racecheck", 120, "--kernel-name", OURS, layers=True),
        *(persistent(kind) for kind in ("memcheck", "racecheck", "synccheck")),
    ]


def bench(context):
    """The speed programs, the figures that matter most first."""
    large, both = ["--vocab", "60000"], ["--vocab", "60000", "30000"]
    plan = [
        ("train_step", ["--task", "lm", *both], 200),
        ("lstm", [], 240),
        ("lstm_parts", [], 150),
        ("linear_cross_entropy", both, 120),
        ("graph_step", large, 120),
        ("dropout_mask", large, 90),
        ("train_step", ["--task", "classifier", *large], 150),
        # where cuDNN has a persistent kernel, and FlashRNN's published size
        ("lstm", ["--layers", "1024x1024", "--precision", "fp16"], 60),
        ("lstm", ["--layers", "768x768", "--batch", "16", "--precision", "bf16", "fp16"], 60),
    ]
    return [_program(context, *item) for item in plan]


def profile(context):
    return [_program(context, "profile_step", ["--vocab", "60000"], 120)]


def _program(context, name, options, limit):
    options = ["--device", "cuda", *options, *(["--quick"] if context.quick else [])]
    shown = " ".join([name, *(o for o in options if o in ("lm", "classifier") or re.match(r"\d+x", o))])
    words = python("-m", f"benchmarks.{name}", *options)
    return Command(shown, words, limit, after=partial(_copy_records, context, time.time()))


def _copy_records(context, since, outcome):
    """Into DIR the records of this GPU that were written since then."""
    for path in RESULTS.glob(f"*-{gpu_name(context.device)}.json"):
        if path.stat().st_mtime >= since - 1:
            shutil.copy2(path, context.out)


def has_workers():
    """Whether pytest can run tests in several processes here."""
    return importlib.util.find_spec("xdist") is not None


STAGES = {"build": build, "test": test, "sanitize": sanitize, "bench": bench, "profile": profile}
