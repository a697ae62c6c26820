"""ulmfit_fast.info(): what this copy was built for, what it runs with, what is missing and how to get it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from typing import Any

import torch

from ulmfit_fast.extras import TRAIN

__version__ = "0.1.0"


@dataclasses.dataclass(frozen=True)
class Info:
    """Facts about this installation; `print(info())` lays them out, `dataclasses.asdict` gives a record."""

    version: str
    commit: str | None  # short hash when built from a git checkout; "+changes": the tree had uncommitted ones
    compiler: str
    torch_built: str  # the op library keeps to the stable ABI of torch 2.10: the two may differ
    torch_running: str
    cuda_built: str | None  # toolkit that compiled our CUDA kernels; None: there are none in this build
    cuda_running: str | None  # CUDA of the running torch; None: torch is a CPU build
    architectures: tuple[str, ...]  # of our CUDA kernels: "8.0", "9.0a", "9.0+PTX"
    gpus: tuple[str, ...]
    isa: str  # CPU instruction set in use; ULMFIT_FAST_ISA names another
    isas: tuple[str, ...]  # those this machine can run, newest first
    threads: int  # torch.get_num_threads()
    missing: tuple[str, ...]  # one sentence for each missing thing: what it is and how to get it

    def __str__(self) -> str:
        cuda = self.cuda_built or "none"
        rows = {
            "ulmfit_fast": f"{self.version}, commit {self.commit or 'unknown'}, {self.compiler}",
            "torch": f"{self.torch_running} (built with {self.torch_built})",
            "CUDA kernels": f"{cuda} for {', '.join(self.architectures)}" if self.architectures else cuda,
            "CUDA of torch": self.cuda_running or "none (CPU build)",
            "GPUs": ", ".join(self.gpus) or "none visible",
            "CPU": f"{self.isa} in use; available: {', '.join(self.isas)}; {self.threads} threads",
            "missing": "\n               ".join(self.missing) or "nothing",
        }
        return "\n".join(f"{name + ':':15}{value}" for name, value in rows.items())


def info() -> Info:
    """What was built, for which torch, CUDA and architectures; what is in use; what is missing."""
    try:
        build = vars(importlib.import_module("ulmfit_fast._build_info"))
    except ImportError:  # the file is written by setup.py alone; a CMake build of the op library has none
        build = {}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    isa, isas = _isa()
    return Info(
        version=__version__,
        commit=build.get("commit"),
        compiler=build.get("compiler", "unknown compiler"),
        torch_built=build.get("torch", "unknown"),
        torch_running=torch.__version__,
        cuda_built=build.get("cuda"),
        cuda_running=torch.version.cuda,
        architectures=tuple(build.get("architectures", ())),
        gpus=tuple(f"{gpu.name} ({gpu.major}.{gpu.minor})" for gpu in gpus),
        isa=isa,
        isas=isas,
        threads=torch.get_num_threads(),
        missing=tuple(_missing(build, [(gpu.major, gpu.minor) for gpu in gpus])),
    )


def _isa() -> tuple[str, tuple[str, ...]]:
    """(in use, available). An ULMFIT_FAST_ISA that this CPU lacks is shown as its error message."""
    ops = torch.ops.ulmfit_fast
    try:
        available = tuple(name.strip() for name in ops.cpu_isas().split(","))
    except (AttributeError, RuntimeError):
        return "unknown", ()
    try:
        return ops.cpu_isa(), available
    except RuntimeError as error:
        return f"error: {str(error).splitlines()[0]}", available


def _missing(build: dict[str, Any], capabilities: list[tuple[int, int]]) -> list[str]:
    sentences = []
    absent = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if absent:
        sentences.append(f"for training, the extra [train]: pip install {' '.join(absent)}")
    if not build.get("cuda"):
        why = build.get("cuda_why", "unknown build")
        sentences.append(f"CUDA kernels: {why.removeprefix('no (').removesuffix(')')}")
    else:
        for capability in capabilities:
            if not runs_on(build["architectures"], capability):
                name = "{}.{}".format(*capability)
                sentences.append(
                    f"kernels for compute capability {name}: rebuild with TORCH_CUDA_ARCH_LIST={name}"
                )
    return sentences


def runs_on(architectures: tuple[str, ...] | list[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `architectures` ("8.0", "9.0+PTX", ...) runs on a card of this capability.

    Machine code runs on its own major version from its minor on; PTX is compiled for any later card;
    "9.0a" is for exactly that card (CUDA C++ Programming Guide, section 'Binary compatibility').
    """
    for name in architectures:
        parts = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)(\+PTX)?", name)
        if parts is None:  # a build of an earlier version has TORCH_CUDA_ARCH_LIST's own words here
            continue
        major, minor, exact, ptx = int(parts[1]), int(parts[2]), parts[3], parts[4]
        if exact:
            runs = (major, minor) == capability
        else:
            same_major = major == capability[0] and minor <= capability[1]
            runs = same_major or (ptx is not None and (major, minor) <= capability)
        if runs:
            return True
    return False
