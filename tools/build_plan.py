"""What setup.py builds: which sources, with or without CUDA, how many jobs, and the one line that says so.

If the build cannot go on, it stops with a sentence that says what to type, without a traceback.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys

NUMPY_MODULE = "csrc/kernels_module.cpp"  # the one source that is not part of the op library
TORCH_FLOOR = (2, 10)
GCC_FLOOR = 11  # Ubuntu 22.04's
GIGABYTES_PER_JOB = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    sources: list[str]  # relative to the root, as setuptools wants them
    kernel_sources: list[str]  # the torch-free part of them
    cuda: bool
    line: str  # printed once at build
    info: dict  # becomes ulmfit_fast/_build_info.py

    def write_build_info(self, path: str) -> None:
        lines = ['"""Written by setup.py: what this copy was built with. Read by ulmfit_fast.info()."""', ""]
        lines += [f"{key} = {value!r}" for key, value in self.info.items()]
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def stop(sentence: str) -> None:
    sys.exit(f"ulmfit_fast: {sentence}")


def output(*command: str, cwd: str | None = None) -> str:
    """The command's standard output, or "" where it is missing or fails."""
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def check_setuptools() -> None:
    """A new virtual environment of Python 3.10 or 3.11 has a setuptools that cannot make wheels by itself."""
    if not any(map(importlib.util.find_spec, ("wheel", "setuptools.command.bdist_wheel"))):
        stop("this environment's setuptools cannot make wheels: type `pip install -U setuptools ninja` first")


def find_torch():
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        if error.name != "torch":  # a torch that is there but broken: its own message says more
            stop(f"torch is installed but does not import: {error}")
        stop("the build needs torch: type `pip install torch`, then `pip install --no-build-isolation .`")
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < TORCH_FLOOR:
        stop(f"torch is {torch.__version__}, and >= 2.10 is needed: type `pip install -U torch`")
    return torch


def find_compiler() -> str:
    """The C++ compiler's own line about its version."""
    command = os.environ.get("CXX", "c++")
    version = output(*command.split(), "--version").split("\n")[0]
    if not version:
        stop(f"the C++ compiler `{command}` does not run: type `apt install g++`, or set CC and CXX to yours")
    macros = output(*command.split(), "-dM", "-E", "-x", "c++", os.devnull)
    gcc = re.search(r"#define __GNUC__ (\d+)", macros)
    if gcc and "__clang__" not in macros and int(gcc[1]) < GCC_FLOOR:  # clang claims to be GCC 4
        stop(
            f"`{command}` is GCC {gcc[1]}, and >= {GCC_FLOOR} is needed: install one, and set CC and CXX "
            "to it (CC=gcc-12 CXX=g++-12 pip install ...)"
        )
    return version


def find_sources(root: str, cuda: bool) -> list[str]:
    """Every .cpp and .cu below csrc/, except the numpy module; a path that has `cuda` in it only for CUDA."""
    found = [p for ext in ("cpp", "cu") for p in glob.glob(f"csrc/**/*.{ext}", root_dir=root, recursive=True)]
    return sorted(p for p in found if p != NUMPY_MODULE and (cuda or "cuda" not in p))


def find_nvcc() -> str | None:
    """Path of nvcc. Sets CUDA_HOME: an nvcc on PATH may be a wrapper from which no home can be derived."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home and os.path.exists("/usr/local/cuda/bin/nvcc"):
        home = os.environ["CUDA_HOME"] = "/usr/local/cuda"
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def architectures(torch) -> str:
    """TORCH_CUDA_ARCH_LIST, else the visible GPUs', else one that later cards can also run (PTX)."""
    visible = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    default = ";".join(f"{major}.{minor}" for major, minor in visible) + "+PTX" if visible else "8.0;9.0+PTX"
    return os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default)


def compiled_for() -> list[str]:
    """TORCH_CUDA_ARCH_LIST as torch reads it, which also takes spaces and names: ["8.0", "9.0+PTX"]."""
    # torch's own words for nvcc: its table of names ("Ampere") changes with its version
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    try:
        flags = _get_cuda_arch_flags()
    except ValueError as error:
        stop(f"TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']}: {error}")
    kinds = {}  # "9.0": {"sm", "compute"}; the latter is PTX
    for kind, major, minor in re.findall(r"code=(sm|compute)_(\d+)(\d[a-z]?)\b", " ".join(flags)):
        kinds.setdefault(f"{major}.{minor}", set()).add(kind)
    return [number + "+PTX" * ("compute" in found) for number, found in kinds.items()]


def plan_cuda(root: str, torch) -> tuple[str, str]:
    """(toolkit version or "", what the build line says about CUDA)."""
    wish = os.environ.get("ULMFIT_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        stop(f"ULMFIT_FAST_CUDA={wish} is neither 0 (never), 1 (or stop) nor unset (where possible)")
    nvcc, why = find_nvcc(), ""
    found = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version")) if nvcc else None
    if not any(path.endswith(".cu") for path in find_sources(root, cuda=True)):
        why = "this version has no CUDA kernels"
    elif wish == "0":
        why = "ULMFIT_FAST_CUDA=0"
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} is a CPU build"
    elif found is None:
        why = "no nvcc: set CUDA_HOME to the CUDA toolkit"
    if why:
        if wish == "1":
            stop(f"ULMFIT_FAST_CUDA=1, but CUDA code cannot be built: {why}")
        return "", f"no ({why})"
    toolkit = ".".join(found.groups())
    if found[1] != torch.version.cuda.split(".")[0]:
        stop(
            f"nvcc is CUDA {toolkit} but torch {torch.__version__} was built with CUDA {torch.version.cuda}: "
            "set CUDA_HOME to a matching toolkit, or ULMFIT_FAST_CUDA=0 to build the CPU part alone"
        )
    note = "" if toolkit == torch.version.cuda else f", warning: torch has CUDA {torch.version.cuda}"
    return toolkit, f"{toolkit} for {architectures(torch)}{note}"


def plan_jobs() -> str:
    """Parallel compilations: one a core, and memory for each. MAX_JOBS decides otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return os.environ.setdefault("MAX_JOBS", str(max(1, min(cores, gigabytes // GIGABYTES_PER_JOB))))


def make(root: str) -> Plan:
    check_setuptools()
    torch = find_torch()
    toolkit, cuda_says = plan_cuda(root, torch)
    sources = find_sources(root, bool(toolkit))
    compiler = find_compiler()
    commit = output("git", "rev-parse", "--short=12", "HEAD", cwd=root)
    if commit and output("git", "status", "--porcelain", cwd=root):
        commit += "+changes"
    jobs = f"{plan_jobs()} jobs" if shutil.which("ninja") else "1 job (`pip install ninja` for more)"
    return Plan(
        sources=sources,
        kernel_sources=[path for path in sources if re.fullmatch(r"csrc/kernels/.*\.cpp", path)],
        cuda=bool(toolkit),
        line=f"ulmfit_fast: building for torch {torch.__version__}, {len(sources)} files, {jobs}; "
        f"CPU: yes (instruction set chosen at run time); CUDA: {cuda_says}",
        info={
            "commit": commit or None,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "cuda": toolkit or None,
            "cuda_why": cuda_says,
            "architectures": compiled_for() if toolkit else [],
            "compiler": compiler,
        },
    )
