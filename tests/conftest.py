"""Settings and fixtures of the whole test suite."""

import os
import pathlib
import random
import subprocess
import sys

import checks
import numpy as np
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


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tests' tensors lie: cpu, cuda or cuda:1")
    parser.addoption("--cuda-on-cpu", action="store_true", help="the build is that of `make cuda-on-cpu`")


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu_only(reason): skipped where the CUDA kernels run")
    name = config.getoption("--device", "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise pytest.UsageError(f"--device must be cpu, cuda or cuda:1, got {name!r}") from None
    if device.type == "cuda":
        if why := why_no_cuda(device):
            raise pytest.UsageError(f"--device {name}: {why}")
        device = torch.device("cuda", device.index or 0)
        # nn.LSTM is what some tests compare with, and cuDNN makes its float32 products in TF32 by default
        torch.backends.cudnn.allow_tf32 = False
    elif device.type != "cpu":
        raise pytest.UsageError(f"--device must be cpu, cuda or cuda:1, got {name!r}")
    checks.DEVICE = device
    checks.CUDA_KERNELS = device.type == "cuda" or config.getoption("--cuda-on-cpu", False)


def pytest_collection_modifyitems(items):
    for item in items:
        mark = item.get_closest_marker("cpu_only")
        if mark and checks.CUDA_KERNELS:
            item.add_marker(pytest.mark.skip(reason=f"CPU only: {mark.args[0]}"))


def why_no_cuda(device):
    """Why the tests cannot run on a CUDA device, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"torch sees {torch.cuda.device_count()} CUDA devices here"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("ulmfit_fast::lstm", "CUDA"):
        return "this build of ulmfit_fast has no CUDA kernels"
    return None


@pytest.fixture
def cuda():
    """A CUDA device, whatever --device says: the current one, and where checks.py puts its tensors."""
    device = checks.DEVICE if checks.DEVICE.type == "cuda" else torch.device("cuda", 0)
    if why := why_no_cuda(device):
        pytest.skip(why)
    with torch.cuda.device(device), checks.on(device):
        yield device


@pytest.fixture
def persistent(request, monkeypatch):
    """The persistent recurrence or an error, on a GPU or in the build that runs CUDA kernels on the CPU."""
    if checks.CUDA_KERNELS and checks.DEVICE.type == "cpu":
        monkeypatch.delenv("ULMFIT_ON_CPU_CARD", raising=False)
    else:
        request.getfixturevalue("cuda")
    monkeypatch.setenv("ULMFIT_FAST_RECURRENCE", "persistent")


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same generator states and leaves the number of threads as it found it."""
    torch.manual_seed(0)
    random.seed(0)  # fastai's order of documents
    np.random.seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _gpu_is_well(request):
    """Ends the process with a test that breaks its GPU's context.

    A fault shows at some later call, and then at every call: without this another test would be blamed, and
    all that follow would fail.
    """
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize(checks.DEVICE if checks.DEVICE.type == "cuda" else None)
    except RuntimeError as error:
        sentence = f"{request.node.nodeid} leaves the GPU broken: {str(error).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" in os.environ:  # whose tests go to a new one if it dies, and only then
            with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(sentence, file=sys.stderr, flush=True)
            os._exit(1)
        pytest.exit(sentence, returncode=pytest.ExitCode.TESTS_FAILED)


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
