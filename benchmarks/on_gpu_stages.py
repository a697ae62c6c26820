"""The commands of each stage of `on_gpu`, with their time limits in seconds."""

import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from .machine import gpu_name
from .record import RESULTS, write

ROOT = Path(__file__).parent.parent
MUST_PASS = ("build", "test", "sanitize")
BUILT = ROOT / "build" / "on_gpu_sources.json"  # {source: digest} of the last build that was made here
SANITIZED = 9  # compute-sanitizer's exit code where it found something
PERSISTENT = {"ULMFIT_FAST_RECURRENCE": "auto"}  # the persistent recurrence wherever it can be
CUDA_TESTS = ("test_cuda.py", "test_lstm_persistent.py", "test_lstm_persistent_gpu.py")  # on any --device
OURS = "kns=ulmfit_fast"  # the kernels of our namespace: racecheck has nothing to say about libraries'


@dataclass(frozen=True)
class Context:
    out: Path
    device: str  # the GPU's name
    capability: tuple[int, int]
    quick: bool = False
    workers: int = 1  # processes of pytest
    archive: Path | None = None  # a .tgz of `out`, rewritten after every command


@dataclass(frozen=True)
class Command:
    name: str
    words: list[str]
    limit: float
    environment: dict = field(default_factory=dict)
    after: Callable | None = None  # called with the outcome
    show: bool = False  # the end of its output on the terminal, too


def python(*words):
    return [sys.executable, *words]


def build(context):
    """In place for this GPU, where that has not been done; what it is."""
    sources = {str(p.relative_to(ROOT)): _digest(p) for p in _sources()}
    before = json.loads(BUILT.read_text(encoding="utf-8")) if BUILT.exists() else {}
    changed = [name for name in sources if before and sources[name] != before.get(name)]
    check = Command("import, CUDA kernels", python("-m", "benchmarks.on_gpu_check"), 90, show=True)
    if not changed and not set(before) - set(sources) and _succeeds(check.words):
        return [replace(check, name="there already: CUDA kernels")]
    for name in changed:  # modification times may mislead where files were copied
        os.utime(ROOT / name)
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or "{}.{}".format(*context.capability)
    environment = {"TORCH_CUDA_ARCH_LIST": wanted, "ULMFIT_FAST_CUDA": "1"}
    words = python("setup.py", "build_ext", "--inplace")
    return [
        Command("setup.py build_ext", words, 400, environment, partial(_remember, sources)),
        check,
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
    options = ["--maxfail=30", "--tb=short", "-rfE", "--durations=8", "-o", "faulthandler_timeout=90"]
    workers = ["-n", str(context.workers)] if context.workers > 1 else []

    def pytest(name, limit, *words, environment=None):
        shared = {"OMP_WAIT_POLICY": "passive"} if workers else {}  # as in make test: workers share the cores
        command = python("-m", "pytest", *words, *options, *workers)
        return Command(name, command, limit, shared | (environment or {}))

    left_out = [f"--ignore=tests/{name}" for name in CUDA_TESTS] + ["--ignore-glob=tests/test_benchmarks*"]
    files = [f"tests/test_{name}.py" for name in ("lstm", "cuda", "cuda_runtime", "nn", "graphed")]
    return [
        *(pytest(f"tests/{name}", 240, f"tests/{name}") for name in CUDA_TESTS),
        pytest("tests on the GPU", 420, "tests", "--device", "cuda", *left_out),
        pytest("tests, persistent recurrence", 300, *files, "--device", "cuda", environment=PERSISTENT),
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
        ("lstm_parts", [], 200),
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
    return Command(shown, python("-m", f"benchmarks.{name}", *options), limit)


def keep(context, since):
    """Copies the records of this GPU that were written since then into DIR, and DIR into the archive."""
    for path in RESULTS.glob(f"*-{gpu_name(context.device)}.json"):
        if path.stat().st_mtime >= since - 1:
            shutil.copy2(path, context.out)
    if context.archive is None:
        return
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for path in sorted(context.out.iterdir()):
            if path.is_file() and path != context.archive:
                archive.add(path, arcname=f"on_gpu/{path.name}")
    write(context.archive, content.getvalue())


def has_workers():
    """Whether pytest can run tests in several processes here."""
    return importlib.util.find_spec("xdist") is not None


STAGES = {"build": build, "test": test, "bench": bench, "sanitize": sanitize, "profile": profile}
# of the time that is left when a stage begins, what it may take; the last one may take all
PARTS = {"build": 0.6, "test": 0.5, "bench": 0.8, "sanitize": 0.7, "profile": 1.0}
