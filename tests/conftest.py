"""Settings and fixtures of the whole test suite."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

try:
    import hypothesis
except ImportError:  # only the property tests need it; they skip themselves
    hypothesis = None
else:
    # Derandomised: a red run is red again. No deadline: a shared machine is slow at times.
    hypothesis.settings.register_profile("ulmfit", deadline=None, derandomize=True, max_examples=25)
    hypothesis.settings.load_profile("ulmfit")

ISAS = ("amx", "avx512bf16", "avx512", "avx2", "baseline")


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same generator state and leaves the number of threads as it found it."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=ISAS)
def isa_results(request, tmp_path_factory):
    """What `isa_probe.py` computes in a process forced to one instruction set: {case name: tensors}."""
    out = tmp_path_factory.mktemp("isa") / f"{request.param}.pt"
    probe = pathlib.Path(__file__).parent / "isa_probe.py"
    environment = {**os.environ, "ULMFIT_FAST_ISA": request.param, "OMP_NUM_THREADS": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, probe, out], env=environment, capture_output=True, text=True)
    if "but this machine can run" in done.stderr:
        pytest.skip(f"this machine cannot run {request.param}")
    assert done.returncode == 0, done.stderr
    return torch.load(out)
